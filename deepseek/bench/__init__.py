"""Benchmarks: our numbers, the peers' and the machine's ceilings, side by side in one run.

    deepseek bench train --model moe_64x2 --peer all --json moe.json

Each benchmark is a module with ``run``. Either it takes one ``Options`` (a frozen dataclass that inherits
``report.BenchOptions``) or its keyword arguments are the options; either way it returns a ``Report``, which
prints its tables as they are found and keeps them as JSON. Every one also runs on a CPU with ``--quick``, in
seconds and with shapes that say nothing about speed: that is what the tests run.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from deepseek.errors import ConfigError, did_you_mean

#: Benchmark -> its module.
BENCHES = {
    "train": "deepseek.bench.train",
    "attention": "deepseek.bench.attention",
    "moe": "deepseek.bench.moe",
    "memory": "deepseek.bench.memory",
    "optim": "deepseek.bench.optim",
    "fusion": "deepseek.bench.fusion",
    "time-to-loss": "deepseek.bench.time_to_loss",
    "serve": "deepseek.bench.serve",
}


def run(name: str, arguments: Sequence[str] = ()) -> Any:
    """Run a benchmark with command-line ``arguments``; returns what its ``run`` returns, a ``Report``.

    Raises:
        ConfigError: there is no such benchmark; options of it are checked by the parser, which exits.
    """
    import tyro

    if name not in BENCHES:
        raise ConfigError(
            f"no benchmark {name!r}{did_you_mean(name, BENCHES)}; there are: {', '.join(BENCHES)}"
        )
    module, prog = import_module(BENCHES[name]), f"deepseek bench {name}"
    flags = (tyro.conf.FlagCreatePairsOff,)
    if hasattr(module, "Options"):
        options = tyro.cli(module.Options, args=list(arguments), prog=prog, config=flags)
        return module.run(options)
    return tyro.cli(module.run, args=list(arguments), prog=prog, config=flags)


__all__ = ["BENCHES", "run"]
