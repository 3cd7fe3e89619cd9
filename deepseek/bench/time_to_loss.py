"""``deepseek bench time-to-loss``: held-out bits per byte against minutes of training, ours beside a peer.

Every stack gets the same tokens in the same order, the same GPU and the same minutes; what differs is the model, the
optimizer and the speed. The clock counts training only: it starts after the first steps, which compile, and stands
still during evaluation. Learning rates follow the share of the minutes that is over, so every stack anneals exactly
at the end. Rows are contiguous windows of the shuffled corpus, cut anew each epoch, and cross document boundaries,
in training and in evaluation, for all stacks.

A learning rate may be tuned: with several in ``lrs`` each is tried for ``--tune-seconds`` (its schedule squeezed into
them) and the best goes on; with ``--tune-seconds 0`` each runs for the whole time and the best counts, the others are
kept beside it. With several GPUs each run takes one. Every run is a file in ``--out``, so that runs of several calls
come together in one table and one plot; ``--stacks ""`` only draws them.

    python benchmarks/corpus_debian.py --out .corpus
    deepseek bench time-to-loss --corpus .corpus --minutes 8 --out runs/time_to_loss
    deepseek bench time-to-loss --quick          # seconds on a CPU; says nothing about stacks
"""

from __future__ import annotations

import itertools
import json
import math
import os
import pickle
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from queue import Queue
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.batch import Batch
from deepseek.bench.peers import full_attention, hf_model
from deepseek.bench.report import BenchOptions, Report
from deepseek.bench.timing import attempt, free, peak_gib, synchronize
from deepseek.bench.tokens import Tokens, load_tokens
from deepseek.config import replace as changed
from deepseek.errors import ConfigError, did_you_mean
from deepseek.files import write_atomic
from deepseek.models import ModelConfig, Transformer, count
from deepseek.monitor.charts import LEFT, RIGHT, TOP, WIDTH, Line, Scale
from deepseek.monitor.markup import Html, tag
from deepseek.nn.attention import AttentionConfig
from deepseek.nn.moe import MoEConfig
from deepseek.ops.jit import compile_blocks
from deepseek.precision import choose, lower
from deepseek.train import OptimConfig, Schedule, ScheduleConfig, TrainStep, build_optimizer, next_token_loss
from deepseek.train.losses import cross_entropy_sum

TITLE = "time to loss"
WARMING = 3  #: first steps, which train but are not on the clock: they compile
TICKS = 10_000  #: a schedule's steps; the share of the time that is over says which one
EVAL_ROWS = 8

DENSE = ModelConfig(
    vocab_size=16_384, hidden=768, layers=12, ffn=2048, pattern="F", max_length=4096, tie_embeddings=False,
    attention=AttentionConfig(heads=12, kv_heads=4, head_dim=64, qk_norm=True, window=128),
)  # fmt: skip
WSD = ScheduleConfig(kind="wsd", warmup=0.02, decay=0.3, floor=0.02)
SPARSE = changed(DENSE, pattern="LLLF", moe=MoEConfig(experts=16, top_k=2, expert_ffn=1024))


@dataclass(frozen=True)
class Stack:
    """Who trains what, and how: everything that may differ between two lines of the plot."""

    kind: Literal["deepseek", "transformers"] = "deepseek"
    model: ModelConfig = DENSE
    optimizer: Literal["muon", "adamw"] = "muon"  # transformers: AdamW
    lr: float = 3e-3
    lrs: tuple[float, ...] = ()  # tuned over these; lr when empty
    batch_tokens: int = 131_072  # tokens per optimizer step
    micro_rows: int = 16  # rows per forward pass to try first; halved while memory runs out
    schedule: ScheduleConfig = WSD
    weight_decay: float = 0.1
    clip: float = 1.0
    precision: str = "auto"
    weights: Literal["fp32", "bf16"] = "fp32"  # transformers: fp32 under autocast, or bf16 throughout
    liger: bool = False  # transformers: with Liger's kernels, if they can be imported
    compile: Literal["auto", "yes", "no"] = "auto"  # auto: on a GPU, and not what Liger replaces
    label: str = ""  # in the plot; the stack's name when empty


PEER = Stack(
    kind="transformers", optimizer="adamw", lr=1.2e-3, lrs=(6e-4, 1.2e-3, 2.4e-3), weights="bf16", liger=True,
    schedule=ScheduleConfig(kind="cosine", warmup=0.02, floor=0.05), label="transformers, bf16 weights",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options(BenchOptions):
    """Held-out bits per byte against minutes."""

    corpus: str = ".corpus"  # written by benchmarks/corpus_debian.py
    minutes: float = 8.0  # of training, for each stack
    out: str = "runs/time_to_loss"  # a folder: a file a run, the table as JSON, the plot as SVG
    stacks: str = "moe,dense,peer"  # of moe, dense, peer, peer32; empty: only draw what lies in --out
    length: int = 4096
    marks: int = 12  # evaluations, evenly spaced over the minutes; the last one at the end
    held_out_tokens: int = 0  # evaluate on so many of the held-out tokens; 0: all
    tune_seconds: float = 0.0  # for each of a stack's lrs, before its run; 0: run each for the whole time
    moe: Stack = field(default_factory=lambda: Stack(model=SPARSE, label="hybrid MoE (ours)"))
    dense: Stack = field(default_factory=lambda: Stack(label="dense (ours)"))
    peer: Stack = field(default_factory=lambda: PEER)
    peer32: Stack = field(
        default_factory=lambda: replace(PEER, weights="fp32", label="transformers, fp32 weights")
    )

    @property
    def chosen(self) -> dict[str, Stack]:
        """The stacks asked for. Raises ``ConfigError`` for an unknown one."""
        names = [name for name in self.stacks.split(",") if name]
        known = ("moe", "dense", "peer", "peer32")
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"unknown stack {name!r}{did_you_mean(name, known)}; one of {', '.join(known)}"
                )
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Job:
    """One run: a stack at one learning rate for so long."""

    name: str
    stack: Stack
    lr: float
    minutes: float
    tuning: bool = False

    @property
    def file(self) -> str:
        return f"{'tune' if self.tuning else 'run'}-{self.name}-{self.lr:g}.json"


@dataclass(frozen=True)
class Mark:
    """An evaluation: minutes on the clock, tokens trained on, held-out bits per byte."""

    minutes: float
    tokens: int
    bits_per_byte: float


class Trainer(Protocol):
    """What is measured: a step at a share of the peak learning rate, and an evaluation."""

    def step(self, batch: Batch, factor: float) -> Tensor:
        """One optimizer step; the mean loss, on the device."""
        ...

    def nats(self, batch: Batch) -> Tensor:
        """Sum of −log p over the targets, in evaluation mode."""
        ...


class Ours:
    """The path of ``deepseek pretrain`` without its loop: compiled blocks, fp32 masters, our loss and optimizers."""

    def __init__(self, job: Job, options: Options, config: ModelConfig, micro_rows: int) -> None:
        device, s = options.torch_device, job.stack
        torch.manual_seed(options.seed)
        with torch.device(device):
            self.model = Transformer(config)
        if compiled(s, device):
            compile_blocks(self.model.blocks)
        self.policy, self.device = choose(s.precision, device, training=True), device
        optim = OptimConfig(name=s.optimizer, lr=job.lr, weight_decay=s.weight_decay)
        self.optimizer = build_optimizer(self.model, optim, lower(self.model, self.policy))
        self._step = TrainStep(
            self.model, next_token_loss, self.optimizer, self.policy, micro_rows=micro_rows, grad_clip=s.clip
        )

    def step(self, batch: Batch, factor: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        return self._step(batch).loss

    def nats(self, batch: Batch) -> Tensor:
        self.model.eval()
        # Eager: an evaluation is no reason to compile another graph.
        with self.policy.compute(self.device), torch.compiler.set_stance("force_eager"):
            hidden = self.model(batch.tokens).hidden
            found = cross_entropy_sum(hidden.flatten(0, 1), self.model.head_weight, batch.targets.flatten())
        self.model.train()
        return found


class Peer:
    """``transformers``' Llama of the same shape, its own loss, fused AdamW on matrices and vectors."""

    def __init__(self, job: Job, options: Options, config: ModelConfig, micro_rows: int) -> None:
        device, s = options.torch_device, job.stack
        torch.manual_seed(options.seed)
        self.liger = s.liger and device.type != "cpu" and apply_liger()
        with torch.device(device):
            model = hf_model(full_attention(config))
        wide = s.weights == "fp32" or device.type == "cpu"
        self.model = model if wide else model.to(torch.bfloat16)
        use: Any = compiled(s, device) and not (self.liger and s.compile == "auto")
        self.forward: Any = torch.compile(self.model) if use else self.model
        self.parameters = list(self.model.parameters())
        decayed, rest = ([p for p in self.parameters if (p.dim() >= 2) is matrix] for matrix in (True, False))
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": s.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=job.lr, betas=(0.9, 0.95), fused=True,
        )  # fmt: skip
        self.lr, self.clip, self.micro_rows, self.device = job.lr, s.clip, micro_rows, device
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=wide and device.type != "cpu")

    def step(self, batch: Batch, factor: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor
        total = torch.zeros((), device=self.device)
        for part in batch.split(self.micro_rows):
            # Already shifted, and one number for the whole batch, so that micro-batches add up.
            with self.autocast:
                loss = self.forward(
                    input_ids=part.tokens, labels=part.targets, shift_labels=part.targets, use_cache=False,
                    num_items_in_batch=batch.n_targets,
                ).loss  # fmt: skip
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def nats(self, batch: Batch) -> Tensor:
        self.model.eval()
        with self.autocast:
            logits = self.model(input_ids=batch.tokens, use_cache=False).logits
        self.model.train()
        parts = zip(logits, batch.targets)  # a row at a time: fp32 logits are large
        return torch.stack([F.cross_entropy(x.float(), t, reduction="sum") for x, t in parts]).sum()


def apply_liger() -> bool:
    """Put Liger's kernels into ``transformers``, for the whole process; whether there are any."""
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
    except ImportError:
        return False
    apply_liger_kernel_to_llama()
    return True


def compiled(stack: Stack, device: torch.device) -> bool:
    """Whether to compile: as asked, else on a GPU."""
    return stack.compile == "yes" or (stack.compile == "auto" and device.type != "cpu")


TRAINERS: dict[str, type[Ours] | type[Peer]] = {"deepseek": Ours, "transformers": Peer}


class Rows:
    """Shuffled contiguous rows of a token array on the device, cut at a new offset every epoch.

    ``next(n)`` gives ``n`` rows ``[n, length + 1]``; two of the same seed give the same rows, however many at a time.
    """

    def __init__(self, tokens: Tensor, length: int, seed: int) -> None:
        if len(tokens) <= 2 * length:
            raise ConfigError(
                f"{len(tokens):,} training tokens hold no two rows of {length:,}; use a shorter length"
            )
        self.tokens, self.length, self.epoch = tokens, length, 0
        self._random = torch.Generator().manual_seed(seed)
        self._offsets = torch.arange(length + 1, device=tokens.device)
        self._starts = self._shuffled()

    def _shuffled(self) -> Tensor:
        first = int(torch.randint(0, self.length, (), generator=self._random))
        rows = (len(self.tokens) - 1 - first) // self.length
        order = torch.randperm(rows, generator=self._random).to(self.tokens.device)
        return first + order * self.length

    def next(self, rows: int) -> Tensor:
        while len(self._starts) < rows:
            self.epoch += 1
            self._starts = torch.cat((self._starts, self._shuffled()))
        taken, self._starts = self._starts[:rows], self._starts[rows:]
        return self.tokens[taken[:, None] + self._offsets]


@dataclass(frozen=True)
class HeldOut:
    """The held-out rows ``[n, length + 1]`` and the bytes their targets stand for."""

    rows: Tensor
    n_bytes: int

    @classmethod
    def of(cls, tokens: Tokens, length: int, limit: int, device: torch.device) -> HeldOut:
        ids = tokens.held_out[: limit + 1 if limit else None].astype(np.int32)
        rows = (len(ids) - 1) // length
        if rows < 1:
            raise ConfigError(f"{len(ids):,} held-out tokens hold no row of {length:,}")
        used = torch.from_numpy(ids[: rows * length + 1]).unfold(0, length + 1, length)
        sizes = tokens.token_bytes.astype(np.int64)
        return cls(used.to(device), int(sizes[ids[1 : rows * length + 1]].sum()))

    @torch.no_grad()
    def bits_per_byte(self, trainer: Trainer) -> float:
        total = torch.zeros((), dtype=torch.float64, device=self.rows.device)
        for part in self.rows.split(EVAL_ROWS):
            total += trainer.nats(Batch.from_rows(part)).to(torch.float64)
        return float(total) / math.log(2) / self.n_bytes


class Leash:
    """Keeps the host within two steps of the device, so that a clock read on the host means something."""

    def __init__(self, device: torch.device) -> None:
        self._events: deque[torch.cuda.Event] | None = deque() if device.type == "cuda" else None

    def hold(self) -> None:
        """After every step."""
        if self._events is not None:
            self._events.append(event := torch.cuda.Event())
            event.record()
            if len(self._events) > 2:
                self._events.popleft().synchronize()


def train(trainer: Trainer, job: Job, options: Options, tokens: Tokens, started: float) -> dict[str, Any]:
    """Train for the job's minutes; what was found at every mark, and what it took."""
    device, length = options.torch_device, options.length
    rows = max(1, job.stack.batch_tokens // length)
    data = Rows(torch.from_numpy(tokens.train.astype(np.int32)).to(device), length, options.seed)
    held_out = HeldOut.of(tokens, length, options.held_out_tokens, device)
    schedule = Schedule(job.stack.schedule, TICKS)
    marks, losses, steps = [Mark(0.0, 0, held_out.bits_per_byte(trainer))], list[Tensor](), 0
    budget, leash = 60 * job.minutes, Leash(device)

    def advance(elapsed: float) -> None:
        nonlocal steps
        factor = schedule.factor(min(TICKS - 1, int(elapsed / budget * TICKS)))
        losses.append(trainer.step(Batch.from_rows(data.next(rows)), factor).detach())
        leash.hold()
        steps += 1

    for _ in range(WARMING):
        advance(0.0)
    synchronize(device)
    start_up, clock = time.perf_counter() - started, 0.0
    for mark in range(1, options.marks + 1):
        until, began = budget * mark / options.marks, time.perf_counter()
        while (elapsed := clock + time.perf_counter() - began) < until:
            advance(elapsed)
        synchronize(device)
        clock += time.perf_counter() - began
        marks.append(Mark(clock / 60, steps * rows * length, held_out.bits_per_byte(trainer)))
    seen = steps * rows * length
    tail = torch.stack(losses[-max(1, len(losses) // 50) :]).float().mean()
    return {
        "bits_per_byte": marks[-1].bits_per_byte, "marks": [asdict(m) for m in marks], "steps": steps, "tokens": seen,
        "epochs": seen / len(tokens.train), "tokens_per_second": (steps - WARMING) * rows * length / clock,
        "clock_seconds": clock, "start_up_seconds": start_up, "train_loss": float(tail),
        "held_out_bytes": held_out.n_bytes, "peak_gib": peak_gib(device),
    }  # fmt: skip


def execute(job: Job, options: Options) -> dict[str, Any]:
    """One run on this process's device: built, trained, described; ``problem`` says why there is nothing."""
    device = options.torch_device
    tokens = corpus(options)
    config = changed(job.stack.model, vocab_size=tokens.vocab_size, max_length=options.length)
    micro = min(job.stack.micro_rows, max(1, job.stack.batch_tokens // options.length))

    def one(micro_rows: int) -> dict[str, Any]:
        started = time.perf_counter()
        trainer = TRAINERS[job.stack.kind](job, options, config, micro_rows)
        extra = {"liger": trainer.liger} if isinstance(trainer, Peer) else {}
        return {**train(trainer, job, options, tokens, started), **extra, "micro_rows": micro_rows}

    while True:
        free(device)
        outcome = attempt(partial(one, micro), device)
        if not outcome.out_of_memory or micro == 1:
            break
        micro //= 2
    flops, size = count.flops(config, options.length), count.parameters(config)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return {
        "name": job.name, "label": job.stack.label or job.name, "lr": job.lr, "minutes": job.minutes,
        "tuning": job.tuning, "corpus": tokens.report.get("corpus", ""), "length": options.length,
        "problem": outcome.problem, "stack": asdict(job.stack), "parameters": size.total, "active": size.active,
        "gflop_per_token": flops.per_token / 1e9, "device": name, "torch": torch.__version__, **(outcome.value or {}),
    }  # fmt: skip


def corpus(options: Options) -> Tokens:
    """The tokens in ``options.corpus``; under ``quick``, made-up ones when there are none."""
    if options.quick and not (Path(options.corpus) / "tokens.json").is_file():
        return made_up(options.seed)
    return load_tokens(options.corpus)


def made_up(seed: int, vocab: int = 256, size: int = 20_000) -> Tokens:
    """Sentences of a small random grammar: each id is followed by one of four. Something to learn in seconds."""
    random = np.random.default_rng(seed)
    follows = random.integers(1, vocab, (vocab, 4))
    choice, ids = random.integers(0, 4, size), np.zeros(size, np.uint16)
    for i in range(1, size):
        ids[i] = follows[ids[i - 1], choice[i]]
    sizes = np.ones(vocab, np.uint16)
    return Tokens(
        ids[: size * 9 // 10], ids[size * 9 // 10 :], sizes, vocab, 0, {"corpus": f"made up, seed {seed}"}
    )


def quick(options: Options) -> Options:
    """The same with tiny models and seconds instead of minutes."""

    def smaller(stack: Stack) -> Stack:
        moe = stack.model.moe
        moe = changed(moe, experts=4, top_k=2, expert_ffn=32) if moe.experts else moe
        attention = changed(
            stack.model.attention, heads=4, kv_heads=2, head_dim=16, window=16, block=8, stride=4
        )
        model = changed(stack.model, hidden=64, layers=2, ffn=96, attention=attention, moe=moe)
        return replace(stack, model=model, batch_tokens=512, micro_rows=4, lrs=stack.lrs[:2])

    return replace(
        options, minutes=min(options.minutes, 0.03), length=64, marks=3, held_out_tokens=1024,
        tune_seconds=min(options.tune_seconds, 0.5), moe=smaller(options.moe), dense=smaller(options.dense),
        peer=smaller(options.peer), peer32=smaller(options.peer32),
    )  # fmt: skip


def run(options: Options) -> Report:
    """Run the stacks, or collect what lies in ``options.out``; write the table and the plot."""
    device = options.torch_device
    options = quick(options) if options.quick else options
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    report = Report("time-to-loss", device, options, options.json)
    stacks = options.chosen
    if stacks:
        tokens = corpus(options)
        report.say(
            f"{len(tokens.train):,} training tokens, {len(tokens.held_out):,} held out, {tokens.vocab_size:,} ids"
        )
    jobs: list[Job] = []
    tuned = tune(stacks, options, report)
    for name, stack in stacks.items():
        lrs = [tuned[name]] if name in tuned else stack.lrs or [stack.lr]
        jobs += [Job(name, stack, lr, options.minutes) for lr in lrs]
    for _ in finished(jobs, options, report):
        publish(out, report)
    rows, _ = publish(out, report)
    report.add(TITLE, rows)
    return report.close()


def tune(stacks: dict[str, Stack], options: Options, report: Report) -> dict[str, float]:
    """The best learning rate of each stack that has several, by short runs; none without ``tune_seconds``."""
    if options.tune_seconds <= 0:
        return {}
    short = replace(options, marks=1)
    jobs = [
        Job(name, stack, lr, options.tune_seconds / 60, tuning=True)
        for name, stack in stacks.items()
        for lr in (stack.lrs if len(stack.lrs) > 1 else ())
    ]
    found: dict[str, list[tuple[float, float]]] = {}
    for result in finished(jobs, short, report):
        if not result["problem"]:
            found.setdefault(result["name"], []).append((result["bits_per_byte"], result["lr"]))
    return {name: min(tried)[1] for name, tried in found.items()}


def finished(jobs: Sequence[Job], options: Options, report: Report) -> Iterator[dict[str, Any]]:
    """Run the jobs, side by side when there are several GPUs, and give each result once its file is written."""
    gpus = torch.cuda.device_count() if options.torch_device.type == "cuda" else 0
    if gpus > 1 and len(jobs) > 1:
        free_gpus: Queue[int] = Queue()
        for index in range(gpus):
            free_gpus.put(index)
        with ThreadPoolExecutor(gpus) as pool:
            results = list(pool.map(lambda job: _elsewhere(job, options, free_gpus), jobs))
    else:
        results = (_kept(execute(job, options), job, options) for job in jobs)  # type: ignore[assignment]
    for found in results:
        if found["problem"]:
            report.note(f"{found['name']} at lr {found['lr']:g}: {found['problem']}")
        report.keep("tuning" if found["tuning"] else "runs", summary(found))
        yield found


def _kept(found: dict[str, Any], job: Job, options: Options) -> dict[str, Any]:
    write_atomic(Path(options.out) / job.file, json.dumps(found, indent=1) + "\n")
    return found


def _elsewhere(job: Job, options: Options, gpus: Queue[int]) -> dict[str, Any]:
    """The job in a process of its own that sees one GPU only."""
    path, gpu = Path(options.out) / f"{job.file}.job", gpus.get()
    try:
        path.write_bytes(pickle.dumps((job, options)))
        code = "import sys; from deepseek.bench.time_to_loss import child; child(sys.argv[1])"
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], env={**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)},
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode == 0:
            found: dict[str, Any] = json.loads((Path(options.out) / job.file).read_text())
            return found
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"name": job.name, "lr": job.lr, "tuning": job.tuning, "problem": lines[-1][:300]}
    finally:
        path.unlink(missing_ok=True)
        gpus.put(gpu)


def child(path: str) -> None:
    """Run the job of a file that ``_elsewhere`` wrote; its result goes beside it."""
    job, options = pickle.loads(Path(path).read_bytes())
    _kept(execute(job, options), job, options)


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """The row of a run."""
    return {
        "stack": found.get("label", found["name"]), "lr": found["lr"], "bits/byte": found.get("bits_per_byte"),
        "minutes": found["clock_seconds"] / 60 if "clock_seconds" in found else None,
        "start-up s": found.get("start_up_seconds"), "tok/s": found.get("tokens_per_second"),
        "M tokens": found["tokens"] / 1e6 if "tokens" in found else None, "epochs": found.get("epochs"),
        "train loss": found.get("train_loss"), "M parameters": found["parameters"] / 1e6 if "parameters" in found else
        None, "M active": found["active"] / 1e6 if "active" in found else None, "peak GiB": found.get("peak_gib"),
    }  # fmt: skip


def publish(out: Path, report: Report) -> tuple[list[dict[str, Any]], Path]:
    """The table of all runs in ``out``, best learning rate of each stack first; JSON and plot written beside them."""
    runs = [json.loads(path.read_text()) for path in sorted(out.glob("run-*.json"))]
    runs = [r for r in runs if not r["problem"]]
    settings = {(r["corpus"], r["length"], round(r["minutes"], 6), r["held_out_bytes"]) for r in runs}
    if len(settings) > 1:
        raise ConfigError(
            f"{out} holds runs of {len(settings)} different corpora, lengths or minutes, which do not compare: "
            f"give another --out"
        )
    if len({r["device"] for r in runs}) > 1:
        report.note(f"the runs in {out} are of different devices")
    runs.sort(key=lambda r: r["bits_per_byte"])
    best = {r["name"]: r for r in reversed(runs)}
    peers = [r["bits_per_byte"] for r in best.values() if r["stack"]["kind"] != "deepseek"]
    rows = []
    for r in runs:
        row = summary(r)
        row["to best peer %"] = 100 * (r["bits_per_byte"] / min(peers) - 1) if peers else None
        row["minutes to peer's"] = minutes_to(r["marks"], min(peers)) if peers else None
        rows.append(row)
    write_atomic(out / "time_to_loss.json", json.dumps({"table": rows, "runs": runs}, indent=1) + "\n")
    shown = [(r["label"], [(m["minutes"], m["bits_per_byte"]) for m in r["marks"][1:]], r) for r in runs]
    curves = [Curve(label, points, best[r["name"]] is not r) for label, points, r in shown]
    if curves:
        write_atomic(out / "time_to_loss.svg", plot(curves))
    return rows, out


def minutes_to(marks: Sequence[dict[str, float]], target: float) -> float | None:
    """When a curve first reaches ``target``, linearly between marks; ``None`` if it never does."""
    for before, after in itertools.pairwise(marks):
        high, low = before["bits_per_byte"], after["bits_per_byte"]
        if low <= target:
            share = (high - target) / (high - low) if high > low else 1.0
            return before["minutes"] + max(0.0, share) * (after["minutes"] - before["minutes"])
    return None


@dataclass(frozen=True)
class Curve:
    """A line of the plot; ``faint`` for a learning rate that was not the best."""

    label: str
    points: list[tuple[float, float]]
    faint: bool = False


COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  #: Okabe and Ito's
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.grid{stroke:#ddd}.axis{stroke:#888}path{fill:none}"
    ".line{stroke-width:2}.faint{stroke-width:1;opacity:.45}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.grid{stroke:#444}svg{background:#1b1b1b}}"
)


def plot(curves: Sequence[Curve]) -> Html:
    """A drawing that stands alone: held-out bits per byte against minutes."""
    scale = Scale.around([Line(c.label, c.points) for c in curves], log=False)
    names = list(dict.fromkeys(c.label for c in curves if not c.faint))
    color = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    height = scale.height + 24 + 18 * len(names)
    lines = [_line(c, scale, color.get(c.label, "#888")) for c in curves]
    legend = [
        (
            tag("path", d=f"M{LEFT} {y}h24", stroke=color[c.label], class_="line"),
            tag("text", f"{c.label}: {c.points[-1][1]:.4f}", x=LEFT + 32, y=y + 4),
        )
        for y, c in zip(range(scale.height + 30, height, 18), (c for c in curves if not c.faint))
    ]
    return tag(
        "svg",
        tag("title", "Held-out bits per byte against minutes of training"),
        tag("style", Html(STYLE)),
        scale.axes(),
        tag("text", "held-out bits per byte", x=LEFT, y=TOP - 3),
        tag("text", "minutes of training", x=WIDTH - RIGHT, y=scale.height + 12, text_anchor="end"),
        lines,
        legend,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {height}",
        role="img",
    )


def _line(curve: Curve, scale: Scale, color: str) -> Html:
    path = "M" + "L".join(f"{scale.x(x):.1f} {scale.y(y):.1f}" for x, y in curve.points)
    return tag("path", d=path, stroke=color, class_="faint" if curve.faint else "line")
