"""Hybrid against full attention: held-out loss, attention FLOPs and cache bytes on real text (LOG.md, claim C05).

A dense model of 8 layers (31M parameters with a vocabulary of 16,384), rows of 4,096, windows of 128. The question
(F11): which pattern is within 2% of full attention's loss, or better, at no more than 58% of its attention-block
FLOPs, after at least 100M tokens and over three seeds?

    python benchmarks/corpus_debian.py --out .corpus
    python benchmarks/study_hybrid.py --corpus .corpus --seconds 480 --out study.json
    python benchmarks/study_hybrid.py --corpus .corpus --patterns F,LLLH:learned --explore "" --seeds 0,1,2
    python benchmarks/study_hybrid.py --counts           # FLOPs and cache of every pattern; trains nothing
    python benchmarks/study_hybrid.py --smoke            # seconds on a CPU; says nothing about quality

A pattern may carry options: ``LLLH:learned`` pools by learned weights, ``:nope`` leaves full layers unrotated,
``:w256`` sets the window, ``:b64`` the pooled block, ``:s32`` its stride, ``:g0`` the gate's first logit; several
joined by ``+``. ``L*7F`` is ``LLLLLLLF``.

Seed 0 of everything runs first. Then the best candidate within the FLOPs, and the best whose cache is a quarter at
most, go on with the other seeds beside full attention (``--confirm``, the default). With several GPUs each run takes
one. Results are written after every run; a run that would not end within ``--seconds`` is not started.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from lm_study import Setting, run, text

from deepseek.files import write_atomic
from deepseek.models import count

#: Vocabulary, batch and optimizer of the study; AdamW at 1e-3 with a cosine, as the first probe had.
BASE = Setting(
    vocab=16_384, hidden=512, layers=8, ffn=1408, head_dim=64, queries_per_kv=4, window=128, experts=0, length=4096,
    batch_tokens=65_536, precision="bf16", optimizer="adamw", lr=1e-3, warmup=0.05, floor=0.1, compiled=True,
)  # fmt: skip
SMOKE: dict[str, Any] = {
    "vocab": 512, "hidden": 64, "layers": 8, "ffn": 96, "head_dim": 16, "length": 128, "batch_tokens": 256,
    "window": 16, "block": 8, "stride": 4, "precision": "fp32", "compiled": False, "steps": 3, "tokens": 0,
}  # fmt: skip
YARDSTICK = "F"
EXPLORED = (
    "LLLF,LLLHLLLF:learned+nope,LLLH:learned,L*7F,LLLF:nope,LHLF:learned,LLLHLLLF,L*7F:nope,LLLFLLLH,HHHF,LLLH,LLF"
)  # fmt: skip
MOST_FLOPS, MOST_CACHE = 0.58, 0.25  #: what a candidate may cost relative to full attention (F11)


def parse(name: str, base: Setting) -> Setting:
    """``base`` with the pattern and the options of a name. Raises ``ValueError`` for an unknown option."""
    pattern, _, options = name.partition(":")
    pattern = re.sub(r"([FLH])\*(\d+)", lambda m: m[1] * int(m[2]), pattern)
    changes: dict[str, Any] = {"pattern": pattern}
    numbers: dict[str, tuple[str, Callable[[str], Any]]] = {
        "w": ("window", int), "b": ("block", int), "s": ("stride", int), "g": ("gate_init", float),
    }  # fmt: skip
    for option in filter(None, options.split("+")):
        if option == "learned":
            changes["pooling"] = "learned"
        elif option == "nope":
            changes["full_rope"] = False
        elif option[0] in numbers and re.fullmatch(r"-?\d+(\.\d+)?", option[1:]):
            key, kind = numbers[option[0]]
            changes[key] = kind(option[1:])
        else:
            raise ValueError(f"unknown option {option!r} in {name!r}: learned, nope, w…, b…, s… or g…")
    return replace(base, **changes)


def shares(setting: Setting) -> dict[str, float]:
    """Attention-block FLOPs (projections, scores, gates) and cache bytes relative to full attention."""
    plain = replace(setting, pooling="mean", full_rope=True)  # neither changes a count
    mine, full = plain.model, replace(plain, pattern="F").model
    n = setting.length
    return {
        "flops_share": round(count.flops(mine, n).attention / count.flops(full, n).attention, 4),
        "cache_share": round(count.cache_bytes(mine, n) / count.cache_bytes(full, n), 4),
        "model_flops_share": round(count.flops(mine, n).row / count.flops(full, n).row, 4),
    }


@dataclass
class Study:
    """What was found so far, kept in a file."""

    out: Path
    base: Setting
    began: float = field(default_factory=time.perf_counter)
    runs: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def add(self, found: dict[str, Any]) -> None:
        with self.lock:
            self.runs.append(found)
            print(json.dumps(found), flush=True)
            self.write()

    def note(self, text: str) -> None:
        with self.lock:
            self.notes.append(text)
            print(f"note: {text}", flush=True)
            self.write()

    def write(self) -> None:
        found = {
            "base": asdict(self.base), "torch": torch.__version__, "table": self.table(), "runs": self.runs,
            "notes": self.notes, "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        }  # fmt: skip
        write_atomic(self.out, json.dumps(found, indent=1) + "\n")

    def table(self) -> list[dict[str, Any]]:
        """One row a pattern: mean over seeds, ratio to full attention over the seeds that both have."""
        names = list(dict.fromkeys(r["name"] for r in self.runs))
        by = {n: {r["seed"]: r for r in self.runs if r["name"] == n} for n in names}
        rows = []
        for name in names:
            mine, full = by[name], by.get(YARDSTICK, {})
            both = sorted(mine.keys() & full.keys())
            ratios = [mine[s]["loss"] / full[s]["loss"] for s in both]
            one = next(iter(mine.values()))
            rows.append({
                "pattern": name, "seeds": len(mine), "loss": round(mean(r["loss"] for r in mine.values()), 4),
                "bits_per_byte": round(mean(r["bits_per_byte"] for r in mine.values()), 4),
                "to_full": round(mean(ratios), 4) if ratios else None,
                "worst_to_full": round(max(ratios), 4) if ratios else None,
                "flops_share": one["flops_share"], "cache_share": one["cache_share"],
                "tok_s": round(mean(r["tokens_per_second"] for r in mine.values())), "gates": one["gates"],
            })  # fmt: skip
        return sorted(rows, key=lambda r: r["loss"])

    def best(self) -> list[str]:
        """The candidates of lowest loss at no more than ``MOST_FLOPS``: of all, and of those with a small cache."""
        able = [r for r in self.table() if r["pattern"] != YARDSTICK and r["flops_share"] <= MOST_FLOPS]
        small = [r for r in able if r["cache_share"] <= MOST_CACHE]
        return list(dict.fromkeys(r["pattern"] for r in [*able[:1], *small[:1]]))

    def markdown(self) -> str:
        lines = [
            "| layers | seeds | loss | bits per byte | to full | worst | attention FLOPs | cache | tok/s |"
        ]
        lines.append("|---|---|---|---|---|---|---|---|---|")
        for r in self.table():
            to, worst = (f"{v - 1:+.2%}" if v else "–" for v in (r["to_full"], r["worst_to_full"]))
            lines.append(
                f"| {r['pattern']} | {r['seeds']} | {r['loss']:.4f} | {r['bits_per_byte']:.4f} | {to} | {worst} "
                f"| {r['flops_share']:.0%} | {r['cache_share']:.0%} | {r['tok_s'] / 1e6:.2f}M |"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class Job:
    name: str
    seed: int


def execute(
    study: Study, jobs: list[Job], options: argparse.Namespace, devices: list[str], reserved: float = 0.0
) -> None:
    """Run the jobs in order, each on the next free device, as long as they and ``reserved`` more fit the time."""
    waiting: queue.Queue[Job] = queue.Queue()
    for job in jobs:
        waiting.put(job)
    slowest = [max((r["seconds"] for r in study.runs), default=0.0)]

    def work(device: str) -> None:
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            if study.elapsed + slowest[0] * (1 + reserved) > options.seconds:
                study.note(f"{job.name}, seed {job.seed}: not started, the time is over")
                continue
            try:
                left = options.seconds - study.elapsed
                alone = device.startswith("cuda")
                found = _alone(job, options, device, left) if alone else one(job, options, device)
            except Exception as error:  # one failing variant must not end a study
                study.note(f"{job.name}, seed {job.seed}: {type(error).__name__}: {str(error)[-400:]}")
                continue
            slowest[0] = max(slowest[0], found["seconds"])
            study.add(found)

    threads = [threading.Thread(target=work, args=(device,)) for device in devices[1:]]
    for thread in threads:
        thread.start()
    work(devices[0])
    for thread in threads:
        thread.join()


def one(job: Job, options: argparse.Namespace, device: str) -> dict[str, Any]:
    """One run here."""
    setting = replace(parse(job.name, base(options)), seed=job.seed)
    data = text(setting.vocab, options.corpus, device)
    held_out = options.held_out_tokens or 1_000_000
    found = run(setting, data, device, held_out, options.marks)
    return {"name": job.name, "seed": job.seed, **shares(setting), **found}


def _alone(job: Job, options: argparse.Namespace, device: str, seconds: float) -> dict[str, Any]:
    """One run in a process of its own, which sees one GPU only; ended after ``seconds``, when the study is over."""
    mine = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    index = device.partition(":")[2]
    index = mine.split(",")[int(index or 0)] if mine else index or "0"
    command = [sys.executable, __file__, *options.arguments, "--job", job.name, "--job-seed", str(job.seed)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": index, "OMP_NUM_THREADS": "4"}
    limit = seconds if seconds < 1e6 else None  # a wait takes milliseconds as a small integer
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=limit)
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}, see above")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def base(options: argparse.Namespace) -> Setting:
    """The study's setting with what the command line changes."""
    setting = replace(BASE, tokens=int(options.tokens), optimizer=options.optimizer)
    if options.optimizer == "muon":
        setting = replace(setting, lr=3e-3)
    if (options.corpus / "tokens.json").is_file():
        report = json.loads((options.corpus / "tokens.json").read_text())
        setting = replace(setting, vocab=int(report["vocab_size"]))
    if options.smoke:
        vocab = setting.vocab if (options.corpus / "tokens.json").is_file() else SMOKE["vocab"]
        setting = replace(setting, **{**SMOKE, "vocab": vocab})
    names = ("lr", "hidden", "layers", "ffn", "length", "batch_tokens", "window", "precision", "steps")
    changes: dict[str, Any] = {name: value for name in names if (value := getattr(options, name))}
    if options.eager:
        changes["compiled"] = False
    return replace(setting, **changes)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus", type=Path, default=Path(".corpus"), help="of corpus_debian.py; else a cache"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/study_hybrid.json"), help="a file, or a folder for it"
    )
    parser.add_argument(
        "--patterns", default=YARDSTICK, help="these get every seed; F among them is the yardstick"
    )
    parser.add_argument("--explore", default=EXPLORED, help="these get the first seed")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--confirm", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--tokens", type=float, default=100.6e6)
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="start nothing that would end later than this"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--precision", default="")
    parser.add_argument("--lr", type=float, default=0.0)
    for name in ("hidden", "layers", "ffn", "length", "batch-tokens", "window", "steps", "held-out-tokens"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--marks", type=int, default=0, help="evaluate at so many points of a run")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--counts", action="store_true")
    parser.add_argument("--job", default="", help=argparse.SUPPRESS)
    parser.add_argument("--job-seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.arguments = sys.argv[1:]
    if options.smoke:
        options.held_out_tokens = options.held_out_tokens or 1024
    return options


def print_counts(options: argparse.Namespace) -> None:
    names = [*options.patterns.split(","), *filter(None, options.explore.split(","))]
    print("| layers | attention FLOPs | model FLOPs | cache |\n|---|---|---|---|")
    for name in dict.fromkeys(n.partition(":")[0] for n in [*names, "LF", "LLLLLF", "L*7H", "LH", "H", "L"]):
        found = shares(parse(name, base(options)))
        print(
            f"| {name} | {found['flops_share']:.1%} | {found['model_flops_share']:.1%} | {found['cache_share']:.1%} |"
        )


def main() -> None:
    options = arguments()
    if options.counts:
        print_counts(options)
    elif options.job:
        print(json.dumps(one(Job(options.job, options.job_seed), options, options.device)))
    else:
        study(options)


def study(options: argparse.Namespace) -> None:
    """The first seed of everything, then the others of the yardstick and of the best candidate."""
    out = options.out if options.out.suffix == ".json" else options.out / "study_hybrid.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    found = Study(out, base(options))
    many = options.device == "cuda" and torch.cuda.device_count() > 1
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if many else [options.device]
    seeds = [int(s) for s in options.seeds.split(",")]
    patterns, explored = ([n for n in t.split(",") if n] for t in (options.patterns, options.explore))
    for name in [*patterns, *explored]:
        parse(name, found.base)  # a misspelt option is told before the first run
    rest = [Job(n, s) for s in seeds[1:] for n in patterns]
    reserved = (len(rest) + (len(seeds) - 1) * options.confirm) / len(devices)
    execute(found, [Job(n, seeds[0]) for n in patterns], options, devices)
    execute(found, [Job(n, seeds[0]) for n in explored if n not in patterns], options, devices, reserved)
    best = [name for name in found.best() if options.confirm and name not in patterns]
    rest += [Job(name, s) for s in seeds[1:] for name in best]
    execute(found, sorted(rest, key=lambda job: job.seed), options, devices)
    print(found.markdown())


if __name__ == "__main__":
    main()
