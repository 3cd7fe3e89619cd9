"""A real training run with one bad batch, for a browser to find: ``python live_run.py RUN CORPUS``.

Everything is the project's own but batch ``BAD``, whose tokens are noise: whenever the loader delivers it, not at a
step of a certain number. After a roll back that skips it, it does not come again.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

from recipe_runs import checkpointed, smallest, write_corpus

from deepseek.data.loader import Loader
from deepseek.monitor.config import MonitorConfig
from deepseek.recipes.pretrain import pretrain

BAD, STEPS, EVERY = 620, 20_000, 50


def main(run: Path, corpus: Path) -> None:
    torch.set_num_threads(1)
    deliver = Loader.__next__

    def with_noise(loader: Loader) -> Any:
        batch = deliver(loader)
        if loader.batch != BAD:
            return batch
        draw = torch.Generator().manual_seed(1)
        noise = torch.randint(0, 256, batch.tokens.shape, generator=draw)
        return replace(
            batch, tokens=noise, targets=torch.where(batch.targets >= 0, noise.roll(-1, 1), batch.targets)
        )

    Loader.__next__ = with_noise  # type: ignore[method-assign]
    write_corpus(corpus, documents=120)
    config = checkpointed(smallest(corpus), EVERY)
    config = replace(
        config,
        train=replace(config.train, steps=STEPS),
        optim=replace(config.optim, lr=0.0008),
        monitor=MonitorConfig(every=10),
    )
    pretrain(config, run, sinks=[])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
