"""Commands about this machine: what it has, and how fast it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tyro.conf import Positional

from deepseek.cli.terminal import print_json


@dataclass(frozen=True)
class Doctor:
    """What this machine has, and which path each operation takes on it."""

    json: bool = False

    def go(self, rest: Sequence[str]) -> int:
        from deepseek.monitor import table
        from deepseek.recipes.doctor import examine

        findings = examine()
        if self.json:
            print_json(findings)
        else:
            for title, rows in findings.items():
                table([{title: name, "": value} for name, value in rows.items()])
        return 0


@dataclass(frozen=True)
class Bench:
    """Measure this machine: train, attention, moe, memory, optim, fusion or time-to-loss, beside peers and ceilings.

    `deepseek bench train --help` lists the options of one.
    """

    name: Positional[str]

    def go(self, rest: Sequence[str]) -> int:
        from deepseek import bench

        bench.run(self.name, rest)
        return 0
