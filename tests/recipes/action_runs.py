"""Runs that are asked to do something at a certain step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deepseek.events import Event, MemorySink
from deepseek.monitor.control import request, wait
from deepseek.recipes.pretrain import PretrainConfig, pretrain, resume_run


class Asks(MemorySink):
    """Asks for actions once a step was told for the ``n``-th time: ``{(step, n): [(action, arguments), ...]}``."""

    def __init__(self, run: Path, asked: dict[tuple[int, int], list[tuple[str, dict[str, Any]]]]) -> None:
        super().__init__()
        self.run, self.asked, self.told = run, asked, list[int]()
        self.ids: list[int] = []

    def write(self, event: Event) -> None:
        super().write(event)
        if event.name == "train" and event.step is not None:
            self.told.append(event.step)
            torch.rand(3)  # disturbs the generators, as anything in a process may
            for action, arguments in self.asked.get((event.step, self.told.count(event.step)), []):
                self.ids.append(request(self.run, action, arguments, by="test"))

    def answers(self) -> list[Any]:
        return [wait(self.run, number, 60.0) for number in self.ids]


def with_actions(config: PretrainConfig, run: Path, asked: Mapping[Any, Any], resume: bool = False) -> Asks:
    sink = Asks(run, {k if isinstance(k, tuple) else (k, 1): v for k, v in asked.items()})
    resume_run(run, sinks=[sink]) if resume else pretrain(config, run, sinks=[sink])
    return sink
