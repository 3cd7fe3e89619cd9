"""Commands that look at runs and models, and ask something of a run that trains."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from deepseek.cli.terminal import print_json, progress


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
            progress=None if self.json else progress("parts taken out"),
        )  # fmt: skip
        if self.json:
            print_json({**done.found, "ablation": done.ablation})
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
            print_json([run.to_dict() for run in found])
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
            print_json({"path": str(done.path), "series": done.series, "rows": done.rows})
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
            print_json(answer.to_dict())
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
            print_json(done.to_dict())
        elif self.answer is None:
            from deepseek.monitor import table

            print(f"step {done.step} with the weights of step {done.weights}: loss {done.loss:.4f}, {done.targets:,} "
                  f"targets, {len(done.documents)} pieces; the costliest first")  # fmt: skip
            table([{"loss": f"{d.loss:.3f}", "tokens": d.length, "document": f"{d.source}:{d.path}:{d.offset}",
                    "text": " ".join(d.text.split())[:60]} for d in done.documents[: self.top]])  # fmt: skip
        return 0


def _run_or_root(name: str) -> Path:
    """A directory as given, or the run of that name in runs/."""
    below = Path("runs") / name
    return below if not Path(name).exists() and below.is_dir() else Path(name)
