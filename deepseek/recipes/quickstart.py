"""The first three minutes: one command that trains, is interrupted, resumes, is judged, exported and talked to.

Training happens in processes of its own, as it would for real: the first is stopped by a signal half-way, the second
goes on from its checkpoint. How many steps there are follows from the speed measured here.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from deepseek.assemble import Run, build
from deepseek.config import replace, to_toml
from deepseek.data import Corpus, prepare
from deepseek.errors import RunError
from deepseek.events import JsonlSink, attached, emit, read_jsonl
from deepseek.models import count
from deepseek.monitor import Narrator, comparison, write_report
from deepseek.precision import lower
from deepseek.recipes.evaluate import Compression, compress_held_out
from deepseek.recipes.export import export
from deepseek.recipes.plan import PretrainConfig, confirm_precision, derive, preset
from deepseek.serve import SamplingConfig, load
from deepseek.train import TrainStep, build_optimizer, next_token_loss

PROMPT = "def read_config(path):\n"
PROBE_STEPS = 6
FEWEST_STEPS = 60  #: below this even a slow machine learns nothing worth showing


def quickstart(run: Path, seconds: float, *, quiet: bool = False) -> None:
    """Do all of it in ``run``; about ``seconds`` of it are training.

    Raises:
        RunError: a training process failed; its own message is above.
        DeepseekError: whatever a step raises.
    """
    began = time.perf_counter()
    narrator = Narrator(
        "deepseek quickstart: a sparse hybrid-attention model, from text to answer", quiet=quiet
    )
    _move_aside(run, narrator)
    config = preset("tiny")
    with narrator.step("Reading the standard library") as step:
        corpus = prepare(config.data, run.parent / ".corpora")
        step.note = (
            f"{len(corpus.train):,} files to learn from, {len(corpus.held_out or ())} held out, "
            f"{corpus.train.n_bytes / 1e6:.1f} MB, {corpus.train.n_tokens / 1e6:.1f}M tokens"
        )
    with narrator.step("Measuring this machine") as step:
        config, step.note = plan_steps(config, corpus, seconds)
    parameters = count.parameters(derive(config, corpus.tokenizer.vocab_size).config.model)
    narrator.say(
        f"model 'tiny': {parameters.total:,} parameters, {parameters.active:,} active per token; layers "
        f"{config.model.kinds} (L window, H hybrid), {config.model.moe.experts} experts, top-{config.model.moe.top_k}"
    )
    with narrator.step("Training, first half", live=True) as step:
        step.note = _train_until(config, run, config.train.steps // 2, quiet)
    with narrator.step("Resuming in a new process", live=True) as step:
        _command(["resume", str(run)], quiet)
        step.note = continuity(read_jsonl(run / "events.jsonl"))
    with attached(JsonlSink(run / "events.jsonl")):
        compressors = _finish(run, corpus, narrator)
        emit("quickstart", config.train.steps, seconds=time.perf_counter() - began)
    with narrator.step("Writing the report") as step:
        step.note = str(write_report(run))
    _close(run, compressors, time.perf_counter() - began, quiet)


def plan_steps(config: PretrainConfig, corpus: Corpus, seconds: float) -> tuple[PretrainConfig, str]:
    """``config`` with as many steps as fit into ``seconds`` here, and a sentence that says why."""
    plan = derive(replace(config, train=replace(config.train, steps=1)), corpus.tokenizer.vocab_size)
    torch.manual_seed(0)
    model = build(plan.config.model, plan.device, 0)
    plan = confirm_precision(plan, model)
    optimizer = build_optimizer(model, plan.config.optim, lower(model, plan.policy))
    step = TrainStep(model, next_token_loss, optimizer, plan.policy, micro_rows=plan.config.train.micro_rows)
    took = []
    with corpus.loader(rows=plan.rows, length=config.train.length) as loader:
        for batch in itertools.islice(loader, PROBE_STEPS):
            start = time.perf_counter()
            float(step(batch).loss)  # waits for the device
            took.append(time.perf_counter() - start)
    fastest = sorted(took)[: PROBE_STEPS // 2]
    steps = max(FEWEST_STEPS, int(seconds / fmean(fastest)))
    speed = config.train.batch_tokens / fmean(fastest)
    note = f"{speed:,.0f} tokens/s in {plan.policy.name}: {steps:,} steps fit into {seconds:.0f} s"
    return replace(config, train=replace(config.train, steps=steps)), note


def continuity(events: list[dict[str, Any]]) -> str:
    """What the loss did across the interruption, from the run's own events."""
    at = next((i for i, e in enumerate(events) if e["event"] == "resume"), None)
    if at is None:
        return "nothing was interrupted"
    before = [e["loss"] for e in events[:at] if e["event"] == "train"]
    after = [e["loss"] for e in events[at:] if e["event"] == "train"]
    pids = [e["pid"] for e in events if e["event"] == "run"]
    n = min(30, len(before), len(after))
    mark = events[at]
    held_out = ""
    if mark.get("probe_before") is not None:
        held_out = (
            f"loss on a held-out batch {mark['probe_before']:.4f} before, {mark['probe_after']:.4f} after; "
        )
    return (
        f"step {mark['step']}: {held_out}training loss of {n} steps {fmean(before[-n:]):.2f} → {fmean(after[:n]):.2f}; "
        f"process {pids[0]} → {pids[-1]}"
    )


def _train_until(config: PretrainConfig, run: Path, step: int, quiet: bool) -> str:
    """Train in a child process and stop it by SIGTERM once ``step`` is reached."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quickstart.toml"
        path.write_text(to_toml(config), encoding="utf-8")
        _command(["pretrain", str(path), "--run", str(run)], quiet, stop_at=(run / "events.jsonl", step))
    stopped = [e for e in read_jsonl(run / "events.jsonl") if e["event"] == "interrupted"]
    return (
        f"stopped by {stopped[-1]['signal']} after step {stopped[-1]['step']}, checkpoint saved"
        if stopped
        else "done"
    )


def _command(args: list[str], quiet: bool, stop_at: tuple[Path, int] | None = None) -> None:
    """Run ``deepseek ARGS`` in a process of its own; raise ``RunError`` when it fails."""
    args = [*args, "--quiet"] if quiet else args
    child = subprocess.Popen([sys.executable, "-m", "deepseek", *args])
    with _stopping(child, stop_at), _forwarding(child):
        status = child.wait()
    if status:
        raise RunError(f"`deepseek {' '.join(args[:2])} …` ended with status {status}; its message is above")


@contextlib.contextmanager
def _stopping(child: subprocess.Popen[bytes], stop_at: tuple[Path, int] | None) -> Iterator[None]:
    """Send SIGTERM to ``child`` when the event file reaches a step."""
    ended = threading.Event()

    def watch(path: Path, step: int) -> None:
        while not ended.wait(0.3):
            if path.exists() and any(
                e["event"] == "train" and e["step"] >= step for e in read_jsonl(path)[-5:]
            ):
                child.send_signal(signal.SIGTERM)
                return

    thread = threading.Thread(target=watch, args=stop_at, daemon=True) if stop_at else None
    if thread:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if thread:
            thread.join()


@contextlib.contextmanager
def _forwarding(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """On Ctrl-C wait for the child, which saves a checkpoint, before going down with it."""
    try:
        yield
    except KeyboardInterrupt:
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            child.wait(timeout=30)
        raise


def _finish(run: Path, corpus: Corpus, narrator: Narrator) -> list[Compression]:
    """Everything after training: judge, export, talk."""
    with narrator.step("Judging by compression") as step:
        compressors = compress_held_out(corpus)
        for other in compressors:
            emit("compress", **asdict(other))
        step.note = f"{bits_per_byte(run):.3f} bits per byte on {len(corpus.held_out or ())} held-out files"
    with narrator.step("Exporting and reading back") as step:
        done = export(run)
        step.note = (
            f"{done.path}: logits differ by {done.max_logit_difference:.1g}, read by {done.loaded_with}"
        )
    with narrator.step("Asking for a completion", live=True):
        _answer(run, narrator)
    return compressors


def _answer(run: Path, narrator: Narrator) -> None:
    """Stream a completion, indented."""
    pieces = load(run).stream(PROMPT, SamplingConfig(temperature=0.5, max_tokens=100, seed=1))
    if narrator.quiet:
        deque(pieces, maxlen=0)
        return
    margin = "      │ "
    print(margin, end="")
    for piece in itertools.chain([PROMPT], pieces):
        print(piece.replace("\n", "\n" + margin), end="", flush=True)
    print()


def bits_per_byte(run: Path) -> float:
    """The last held-out evaluation of a run."""
    found = [e["bits_per_byte"] for e in read_jsonl(Run.open(run).events_path) if e["event"] == "evaluate"]
    return float(found[-1])


def _close(run: Path, compressors: list[Compression], seconds: float, quiet: bool) -> None:
    if quiet:
        return
    rows = [("this model", bits_per_byte(run))] + [
        (f"{c.name}, {c.how}", c.bits_per_byte) for c in compressors
    ]
    comparison("bits per byte on files it has never seen (less is better)", rows)
    print(f"\n{seconds:.0f} s in all. The report: {run / 'report.html'}\n\nTry next:")
    print(f'  deepseek generate {run} "import " --temperature 0.6')
    print("  deepseek pretrain configs/small.toml --explain --dry-run")
    print("  deepseek doctor")


def _move_aside(run: Path, narrator: Narrator) -> None:
    """Keep an earlier quickstart under a numbered name."""
    if not run.exists():
        return
    taken = next(p for n in itertools.count(1) if not (p := run.with_name(f"{run.name}-{n}")).exists())
    run.rename(taken)
    narrator.say(f"the earlier {run} is now {taken}")
