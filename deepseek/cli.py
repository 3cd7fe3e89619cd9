"""``deepseek …``: what a person types. Parsing is tyro's; every command is a dataclass whose ``run`` does it.

Heavy packages are imported inside the commands, so that ``deepseek --help`` answers at once.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import tyro
from tyro.conf import Positional, arg, subcommand

from deepseek.errors import ConfigError, DeepseekError, did_you_mean


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

        config = _overridden(_named_config(self.config), ["--help"] if self.options else rest)
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
        config, skip = _overridden(read_config(run.config_path), rest), None
        if self.skip:
            from deepseek.monitor.control import parse_skip

            skip = parse_skip(self.skip)
        sinks = _sinks(self.json, self.quiet)
        with _watched(run.path, self.monitor, self.tensorboard, sinks):
            result = resume_run(run.path, config, step=self.step, skip=skip, sinks=sinks)
        return _finished(result, self.json)


@dataclass(frozen=True)
class _Sampling:
    max_tokens: int = 128
    temperature: float = 0.8  # 0: always the most likely token
    top_k: int = 0  # 0: all
    top_p: float = 0.95
    seed: int | None = None
    stop: tuple[str, ...] = ()  # texts that end the answer
    device: str = "auto"

    def sampling(self) -> dict[str, Any]:
        names = ("max_tokens", "temperature", "top_k", "top_p", "seed", "stop")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Generate(_Sampling):
    """Continue a prompt with a run, a checkpoint or a Hugging Face directory; '-' reads the prompt from stdin."""

    model: Positional[str] = ""
    prompt: Positional[str] = "-"
    json: bool = False

    def go(self, rest: Sequence[str]) -> int:
        from deepseek.serve import SamplingConfig, load

        prompt = _read_stdin() if self.prompt == "-" else self.prompt
        model, sampling = load(self.model, self.device), SamplingConfig(**self.sampling())
        if self.json:
            done = model.complete(prompt, sampling)
            _print_json({"text": done.text, "tokens": done.tokens, "finish_reason": done.finish_reason,
                         "seconds": done.seconds})  # fmt: skip
            return 0
        model.prompt_ids(prompt)  # what cannot be continued is refused before it is shown
        print(prompt, end="", flush=True)
        for piece in model.stream(prompt, sampling):
            print(piece, end="", flush=True)
        print()
        return 0


@dataclass(frozen=True)
class Chat(_Sampling):
    """Talk to a model, turn by turn; an empty line or Ctrl-D ends. (A pretrained model only continues text.)"""

    model: Positional[str] = ""
    system: str = ""

    def go(self, rest: Sequence[str]) -> int:
        from deepseek.serve import Message, SamplingConfig, load

        model, sampling = load(self.model, self.device), SamplingConfig(**self.sampling())
        messages = [Message("system", self.system)] if self.system else []
        while question := _ask("you> "):
            messages.append(Message("user", question))
            answer = ""
            print("model> ", end="", flush=True)
            for piece in model.stream(model.chat_prompt(messages), sampling):
                answer += piece
                print(piece, end="", flush=True)
            print()
            messages.append(Message("assistant", answer))
        return 0


@dataclass(frozen=True)
class Export:
    """Write a run as a Hugging Face directory, read it back and compare logits."""

    run: Positional[str]
    format: str = "hf"
    to: str = ""  # the directory; RUN/export unless told
    dtype: str = "fp32"  # fp32, bf16 or fp16
    family: str = "auto"  # 'auto', 'llama', 'qwen3', 'qwen3_moe', 'mixtral', … or 'deepseek_hybrid'
    json: bool = False

    def go(self, rest: Sequence[str]) -> int:
        from dataclasses import asdict

        from deepseek.recipes.export import export

        if self.format != "hf":
            raise ConfigError(f"--format {self.format!r} is not known; this version writes 'hf'")
        done = export(self.run, self.to or None, dtype=self.dtype, family=self.family)
        if self.json:
            _print_json({**asdict(done), "path": str(done.path)})
        else:
            print(f"{done.path}: {done.model_type}, read back by {done.loaded_with}, "
                  f"largest logit difference {done.max_logit_difference:.2g}")  # fmt: skip
            if done.reason:
                print(
                    f"not a family of plain transformers: {done.reason}; use `import deepseek.transformers`"
                )
        return 0


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
            _print_json(asdict(done))
            return 0
        rows = [(f"model, step {done.step}", done.model.bits_per_byte)]
        rows += [(f"{c.name}, {c.how}", c.bits_per_byte) for c in done.compressors]
        comparison(f"bits per byte, {done.documents} held-out documents, {done.model.bytes:,} bytes", rows)
        return 0


@dataclass(frozen=True)
class Report:
    """Write the run's report: one self-contained HTML page."""

    run: Positional[str]

    def go(self, rest: Sequence[str]) -> int:
        from deepseek.assemble import Run
        from deepseek.monitor import write_report

        print(write_report(Run.open(self.run).path))
        return 0


@dataclass(frozen=True)
class Inspect:
    """Look into a model: suspect heads and experts first, then the figures of all; on a live run too."""

    run: Positional[str]  # a run, one of its checkpoints, or a Hugging Face directory
    step: int | None = None  # the checkpoint to look at, instead of the newest
    text: str = ""  # a text file to look with, instead of the run's held-out documents
    ablate: bool = False  # also measure the loss without each head and each expert
    device: str = "auto"
    json: bool = False

    def go(self, rest: Sequence[str]) -> int:
        from deepseek.recipes.inspect import inspect_run, render

        done = inspect_run(
            self.run, self.step, self.text or None, ablate=self.ablate, device=self.device,
            progress=None if self.json else _progress("parts taken out"),
        )  # fmt: skip
        if self.json:
            _print_json({**done.found, "ablation": done.ablation})
        else:
            render(done)
        return 0


@dataclass(frozen=True)
class Runs:
    """List the runs below a directory and their state."""

    root: Positional[str] = "runs"
    json: bool = False

    def go(self, rest: Sequence[str]) -> int:
        from deepseek.monitor import list_runs
        from deepseek.monitor.runs import render

        found = list_runs(Path(self.root))
        if self.json:
            _print_json([run.to_dict() for run in found])
        else:
            render(found)
        return 0


@dataclass(frozen=True)
class Monitor:
    """Serve the dashboard of the runs below a directory, or of one run, in a browser on this machine."""

    root: Positional[str] = "runs"
    port: int | None = None  # 0: any free one; the first free one from 6060 unless told
    host: str = "127.0.0.1"  # anything else can be reached from other machines, and needs a token
    token: str = ""  # 'auto' makes one; or in the environment as DEEPSEEK_MONITOR_TOKEN
    open: bool = False  # open the browser
    webhook: str = ""  # told, as JSON, of runs that die or fall silent
    command: str = ""  # the same for a program, on its standard input
    ends_with_stdin: bool = False  # end when the standard input ends: for a program that starts this one

    def go(self, rest: Sequence[str]) -> int:
        import os

        from deepseek.monitor.access import new_token
        from deepseek.monitor.alerts import receivers_of
        from deepseek.monitor.dashboard import serve

        token = self.token or os.environ.get("DEEPSEEK_MONITOR_TOKEN", "")
        token = new_token() if token == "auto" else token
        serve(
            _run_or_root(self.root), host=self.host, port=self.port, token=token, open_browser=self.open,
            ends_with=sys.stdin if self.ends_with_stdin else None, receivers=receivers_of(self.webhook, self.command),
        )  # fmt: skip
        return 0


@dataclass(frozen=True)
class Metrics:
    """Write a run's series for other programs: csv, parquet, tensorboard or prometheus."""

    run: Positional[str]
    format: str = "csv"
    to: str = ""  # a file, for tensorboard a directory; in the run unless told
    name: tuple[str, ...] = ()  # series to write; * and ? stand for any text. All unless told
    json: bool = False

    def go(self, rest: Sequence[str]) -> int:
        from deepseek.monitor.export.formats import export_series

        done = export_series(_run_or_root(self.run), self.format, self.to or None, self.name)
        if self.json:
            _print_json({"path": str(done.path), "series": done.series, "rows": done.rows})
        else:
            print(f"{done.path}: {done.series} series, {done.rows:,} {done.unit}")
        return 0


@dataclass(frozen=True)
class Act:
    """Ask a run that trains for something: pause, continue, stop, checkpoint, rollback_skip, quarantine, capture."""

    run: Positional[str]
    action: Positional[str]
    skip: str = ""  # rollback_skip: FIRST:LAST, steps whose batches are left out
    to_step: int | None = (
        None  # rollback_skip: the checkpoint to go back to; the newest before `skip` unless told
    )
    document: tuple[str, ...] = ()  # quarantine: SOURCE:PATH:OFFSET, or SOURCE:PATH for all of a file
    reason: str = ""  # quarantine: for the record
    steps: int | None = None  # capture: how many
    wait: float = 300.0  # seconds to wait for the answer
    json: bool = False

    def go(self, rest: Sequence[str]) -> int:
        from deepseek.assemble import Run
        from deepseek.monitor import control

        arguments = {
            "skip": control.parse_skip(self.skip) if self.skip else None, "to_step": self.to_step, "steps": self.steps,
            "documents": [control.parse_document(d) for d in self.document] or None, "reason": self.reason or None,
        }  # fmt: skip
        given = {name: value for name, value in arguments.items() if value is not None}
        path = Run.open(self.run).path
        answer = control.wait(path, control.request(path, self.action, given, by="command line"), self.wait)
        if self.json:
            _print_json(answer.to_dict())
        elif answer.status == "done":
            print(answer.result.get("text", "done"))
        else:
            print(f"error: {answer.result.get('error', answer.status)}", file=sys.stderr)
        return 0 if answer.status == "done" else 1


@dataclass(frozen=True)
class Replay:
    """Compute the loss of a step's batch once more, document by document: which sample was it?"""

    run: Positional[str]
    step: int
    at: str = "before"  # the weights: of the newest checkpoint 'before' the step, 'current': the newest, or a step's
    device: str = "auto"
    top: int = 16  # documents to print
    json: bool = False
    answer: int | None = None  # the number of the request that this answers

    def go(self, rest: Sequence[str]) -> int:
        from deepseek.monitor.commands import answering
        from deepseek.recipes.replay import replay_run

        at = int(self.at) if self.at.isdigit() else self.at
        with answering(self.run, self.answer) as reply:
            done = replay_run(self.run, self.step, at, self.device)
            reply.update(done.to_dict())
        if self.json:
            _print_json(done.to_dict())
        elif self.answer is None:
            from deepseek.monitor import table

            print(f"step {done.step} with the weights of step {done.weights}: loss {done.loss:.4f}, {done.targets:,} "
                  f"targets, {len(done.documents)} pieces; the costliest first")  # fmt: skip
            table([{"loss": f"{d.loss:.3f}", "tokens": d.length, "document": f"{d.source}:{d.path}:{d.offset}",
                    "text": " ".join(d.text.split())[:60]} for d in done.documents[: self.top]])  # fmt: skip
        return 0


@dataclass(frozen=True)
class Doctor:
    """What this machine has, and which path each operation takes on it."""

    json: bool = False

    def go(self, rest: Sequence[str]) -> int:
        from deepseek.monitor import table
        from deepseek.recipes.doctor import examine

        findings = examine()
        if self.json:
            _print_json(findings)
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


Command = (
    Annotated[Quickstart, subcommand("quickstart")]
    | Annotated[Pretrain, subcommand("pretrain")]
    | Annotated[Resume, subcommand("resume")]
    | Annotated[Generate, subcommand("generate")]
    | Annotated[Chat, subcommand("chat")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Inspect, subcommand("inspect")]
    | Annotated[Runs, subcommand("runs")]
    | Annotated[Monitor, subcommand("monitor")]
    | Annotated[Metrics, subcommand("metrics")]
    | Annotated[Act, subcommand("act")]
    | Annotated[Replay, subcommand("replay")]
    | Annotated[Doctor, subcommand("doctor")]
    | Annotated[Bench, subcommand("bench")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, and turn every ``DeepseekError`` into one line on stderr. Returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args in (["--version"], ["-V"]):
        from deepseek import __version__

        print(f"deepseek-framework {__version__}")
        return 0
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character must not end a run
    names = [get_args(command)[1].name for command in get_args(Command)]
    if args and not args[0].startswith("-") and args[0] not in names:
        print(
            f"error: no command {args[0]!r}{did_you_mean(args[0], names)}; there are: {', '.join(names)}",
            file=sys.stderr,
        )
        return 2
    try:
        if args[:1] == ["bench"] and len(args) > 1 and not args[1].startswith("-"):
            return Bench(args[1]).go(args[2:])  # each benchmark has options, and a --help, of its own
        parsed, rest = tyro.cli(
            Command, args=args or ["--help"], prog="deepseek", return_unknown_args=True,
            config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
        )  # fmt: skip
        if rest and not isinstance(parsed, (Pretrain, Resume)):
            raise ConfigError(f"unknown option {rest[0]!r}; see `deepseek {args[0]} --help`")
        return parsed.go(rest)
    except DeepseekError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone: nothing is wrong
        return 0
    except OSError as error:
        print(f"error: {error.filename or 'file'}: {error.strerror or error}", file=sys.stderr)
        return 1


def _run_or_root(name: str) -> Path:
    """A directory as given, or the run of that name in runs/."""
    below = Path("runs") / name
    return below if not Path(name).exists() and below.is_dir() else Path(name)


def _named_config(name: str) -> Any:
    """A config file, or a preset's name."""
    from deepseek.models import PRESETS
    from deepseek.recipes.plan import preset, read_config

    if name in PRESETS and not Path(name).exists():
        return preset(name)
    if not name.endswith(".toml") and not Path(name).exists():
        raise ConfigError(
            f"{name!r} is neither a config file nor a preset{did_you_mean(name, PRESETS)}; "
            f"presets: {', '.join(PRESETS)}"
        )
    return read_config(name)


def _overridden(config: Any, rest: Sequence[str]) -> Any:
    """``config`` with ``--section.name=value`` applied, checked by tyro and by the config itself."""
    from deepseek.recipes.plan import PretrainConfig

    if not rest:
        return config
    return tyro.cli(
        PretrainConfig, default=config, args=_python_booleans(config, rest), prog="deepseek pretrain CONFIG",
        config=(tyro.conf.FlagConversionOff,),
    )  # fmt: skip


def _python_booleans(config: Any, args: Sequence[str]) -> list[str]:
    """``args`` with TOML's ``true`` and ``false``, where the option is a boolean, as the parser wants them."""
    words, option, found = {"true": "True", "false": "False"}, "", []
    for argument in args:
        name, sign, value = argument.partition("=") if argument.startswith("--") else (option, "", argument)
        if value in words and isinstance(_value_at(config, name), bool):
            argument = name + sign + words[value] if sign else words[value]
        option = argument
        found.append(argument)
    return found


def _value_at(config: Any, option: str) -> Any:
    """``--section.name`` in ``config``; ``None`` if there is none."""
    for name in option.removeprefix("--").replace("-", "_").split("."):
        config = getattr(config, name, None)
    return config


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

        _print_json({"run": str(result.run), "step": result.step, "finished": result.finished,
                     "evaluation": asdict(evaluation) if evaluation else None})  # fmt: skip
    elif not result.finished:
        print(f"stopped after step {result.step}; go on with: deepseek resume {result.run}")
    return 0


def _show_derived(derived: Sequence[tuple[str, str, str]]) -> None:
    from deepseek.monitor import table

    table([{"derived": name, "value": value, "why": why} for name, value, why in derived])


def _show_dry_run(facts: dict[str, Any], derived: Sequence[tuple[str, str, str]], as_json: bool) -> None:
    if as_json:
        _print_json({**facts, "derived": [list(row) for row in derived]})
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


def _progress(what: str) -> Any:
    """``progress(done, of)`` that writes one line again and again on a terminal, and nothing elsewhere."""

    def told(done: int, of: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {of} {what}", end="\n" if done == of else "", file=sys.stderr, flush=True)

    return told


def _read_stdin() -> str:
    """Standard input as text; bytes that are no UTF-8 become replacement characters."""
    return sys.stdin.buffer.read().decode("utf-8", "replace")


def _ask(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except EOFError:
        print()
        return ""


def _print_json(value: Any) -> None:
    print(json.dumps(value, default=str))


if __name__ == "__main__":
    sys.exit(main())
