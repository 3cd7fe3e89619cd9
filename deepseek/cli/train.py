"""Commands that make a run, go on with it, and say how good it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from deepseek.cli.options import named_config, overridden
from deepseek.cli.terminal import print_json


@dataclass(frozen=True)
class Quickstart:
    """Train, interrupt, resume, export and talk to a small sparse model on this machine, in about three minutes."""

    run: str = "runs/quickstart"  # a run of that name from an earlier quickstart is moved aside
    seconds: float = 105.0  # training time to aim for; the number of steps follows from this machine's speed
    quiet: bool = False

    def go(self, rest: Sequence[str]) -> int:
        from deepseek.recipes.quickstart import quickstart

        quickstart(Path(self.run), self.seconds, quiet=self.quiet)
        return 0


@dataclass(frozen=True)
class Pretrain:
    """Train from a config file or a preset: `deepseek pretrain configs/small.toml --train.steps=500`.

    Every option of the config can be given as --section.name=value; `--options` lists them all.
    """

    config: Positional[str]  # a TOML file, or the name of a preset (tiny, small, …)
    run: str = ""  # where to keep it: a path, or a NAME in runs/; the config's name unless told
    explain: bool = False  # print every derived value and why, then train
    dry_run: bool = False  # print parameters, FLOPs, memory and tokens, and stop
    options: bool = False  # list every option of the config, and stop
    monitor: bool = False  # serve the dashboard of this run while it trains
    tensorboard: str = ""  # a directory for TensorBoard files, written as the run goes
    json: bool = False  # print results as JSON lines, for machines
    quiet: bool = False

    def go(self, rest: Sequence[str]) -> int:
        from deepseek.recipes import pretrain as recipe

        config = overridden(named_config(self.config), ["--help"] if self.options else rest)
        if self.dry_run:
            _show_dry_run(
                recipe.dry_run(config), recipe.derive(config).derived if self.explain else [], self.json
            )
            return 0
        if self.explain:
            _show_derived(recipe.derive(config).derived)
        name = self.run or Path(self.config).stem
        path = Path(name) if Path(name).name != name else Path("runs") / name
        sinks = _sinks(self.json, self.quiet)
        with _watched(path, self.monitor, self.tensorboard, sinks):
            result = recipe.pretrain(config, path, sinks=sinks)
        return _finished(result, self.json)


@dataclass(frozen=True)
class Resume:
    """Go on with a run from its newest checkpoint, exactly where it was; options as for pretrain."""

    run: Positional[str]
    step: Annotated[int | None, arg(name="from")] = None  # the step to go on from, instead of the newest
    skip: str = ""  # FIRST:LAST, steps whose batches are left out; from the newest checkpoint before them
    monitor: bool = False  # serve the dashboard of this run while it trains
    tensorboard: str = ""  # a directory for TensorBoard files, written as the run goes
    json: bool = False
    quiet: bool = False

    def go(self, rest: Sequence[str]) -> int:
        from deepseek.assemble import Run
        from deepseek.recipes.plan import read_config
        from deepseek.recipes.pretrain import resume_run

        run = Run.open(self.run)
        config, skip = overridden(read_config(run.config_path), rest), None
        if self.skip:
            from deepseek.monitor.control import parse_skip

            skip = parse_skip(self.skip)
        sinks = _sinks(self.json, self.quiet)
        with _watched(run.path, self.monitor, self.tensorboard, sinks):
            result = resume_run(run.path, config, step=self.step, skip=skip, sinks=sinks)
        return _finished(result, self.json)


@dataclass(frozen=True)
class Evaluate:
    """Bits per byte on the run's held-out documents, beside gzip -9 and xz -9 on the same bytes."""

    run: Positional[str]
    device: str = "auto"
    json: bool = False

    def go(self, rest: Sequence[str]) -> int:
        from dataclasses import asdict

        from deepseek.monitor import comparison
        from deepseek.recipes.evaluate import evaluate_run

        done = evaluate_run(self.run, self.device)
        if self.json:
            print_json(asdict(done))
            return 0
        rows = [(f"model, step {done.step}", done.model.bits_per_byte)]
        rows += [(f"{c.name}, {c.how}", c.bits_per_byte) for c in done.compressors]
        comparison(f"bits per byte, {done.documents} held-out documents, {done.model.bytes:,} bytes", rows)
        return 0


def _sinks(as_json: bool, quiet: bool) -> list[Any]:
    if as_json or quiet:
        return []
    from deepseek.monitor import TerminalSink

    return [TerminalSink()]


@contextmanager
def _watched(run: Path, monitor: bool, tensorboard: str, sinks: Sequence[Any]) -> Iterator[None]:
    """While a run trains: its dashboard, if ``monitor``, and TensorBoard files, if a directory is given."""
    import os

    if os.environ.get("RANK", "0") != "0":  # of several processes, one
        yield
        return
    with ExitStack() as stack:
        if monitor:
            from deepseek.monitor.background import BackgroundDashboard

            say = print
            for sink in sinks:
                sink.see = ""  # the dashboard is there already; its address comes instead
                say = sink.say
            stack.enter_context(BackgroundDashboard(run, say))
        if tensorboard:
            from deepseek.monitor.export.board import BoardThread

            stack.enter_context(BoardThread(run / "monitor", Path(tensorboard)))
        yield


def _finished(result: Any, as_json: bool) -> int:
    evaluation = result.evaluation
    if as_json:
        from dataclasses import asdict

        print_json({"run": str(result.run), "step": result.step, "finished": result.finished,
                     "evaluation": asdict(evaluation) if evaluation else None})  # fmt: skip
    elif not result.finished:
        print(f"stopped after step {result.step}; go on with: deepseek resume {result.run}")
    return 0


def _show_derived(derived: Sequence[tuple[str, str, str]]) -> None:
    from deepseek.monitor import table

    table([{"derived": name, "value": value, "why": why} for name, value, why in derived])


def _show_dry_run(facts: dict[str, Any], derived: Sequence[tuple[str, str, str]], as_json: bool) -> None:
    if as_json:
        print_json({**facts, "derived": [list(row) for row in derived]})
        return
    from deepseek.monitor import table

    if derived:
        _show_derived(derived)
    parameters, memory = facts["parameters"], facts["memory_bytes"]
    rows = {
        "parameters": f"{parameters['total']:,} total, {parameters['active']:,} active",
        "FLOPs per token": f"{facts['flops_per_token']:,.0f} (forward and backward)",
        "tokens": f"{facts['tokens']:,} in {facts['steps']:,} steps",
        "all FLOPs": f"{facts['total_flops']:.3g}",
        "memory": ", ".join(f"{k} {v / 2**20:,.0f} MiB" for k, v in memory.items()),
        "cache at max_length": f"{facts['cache_bytes_at_max_length'] / 2**20:,.2f} MiB",
        "time": f"{facts['seconds_at_40_percent_mfu']:,.0f} s at 40% of the measured "
        f"{facts['peak_flops'] / 1e9:,.0f} GFLOP/s",
    }
    table([{"what": name, "value": value} for name, value in rows.items()])
