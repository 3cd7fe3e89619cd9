"""Every benchmark of this project on one GPU, in one call: ours, the peers and the machine's ceilings.

    python benchmarks/run_gpu.py --out results --seconds 570
    python benchmarks/run_gpu.py --only train,attention --set train-moe "--micro-rows 4 --steps 6"
    python benchmarks/run_gpu.py --quick --out /tmp/try            # on a CPU, to see that it runs

A part is one ``deepseek bench …`` in a process of its own, so that one that fails or runs out of memory leaves the
others alone. A part that would not fit what is left of ``--seconds`` is skipped and says so; one that runs past the
end is stopped and keeps what it had found. Two files: results.json, written again every few seconds, and run.log.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]


LAST = {
    "train": 60,
    "fusion": 30,
    "optim": 30,
}  #: seconds before the end in which a benchmark begins nothing new


@dataclass(frozen=True)
class Part:
    """A command, and about how long it takes on an H100, in seconds."""

    arguments: str
    seconds: float
    asked_only: bool = False  # runs only when named in --only


PARTS = {
    "attention": Part("attention", 75),
    "moe": Part("moe", 75),
    "train-dense": Part("train --model dense_856m --steps 4 --profile", 240),
    "train-moe": Part(
        "train --model moe_64x2 --micro-rows 16 --batch-tokens 262144 --steps 3 --warmup 8 --profile", 260
    ),
    "optim": Part("optim", 60),
    "memory": Part("memory", 150),
    "memory-moe": Part("memory --model moe_64x2 --rows 2", 120, asked_only=True),
    "fusion": Part("fusion", 120),
    "cold-dense": Part("train --model dense_856m --peer none --steps 2 --cold-start", 150),
    "cold-moe": Part("train --model moe_64x2 --peer none --steps 2 --cold-start --real-only", 180),
    "serve-dense": Part(
        "serve --model dense_856m --streams 1 64 --prompt 512 --answer 256", 400, asked_only=True
    ),
    "serve-window": Part(
        "serve --model window_856m --streams 1 64 --prompt 2048 --answer 256", 400, asked_only=True
    ),
    "serve-moe": Part(
        "serve --model moe_64x2 --streams 1 64 --prompt 512 --answer 256", 400, asked_only=True
    ),
    "checkpoint": Part("train --model dense_856m --peer none --steps 4 --checkpoint", 120),
    "optim-target": Part("optim --models dense_856m --steps-to-target", 420, asked_only=True),
    "time-to-loss": Part("time-to-loss", 1500, asked_only=True),
}


Row = dict[str, Any]
TICK = 5.0  #: seconds between two looks at what a part has found
SPEED = {"train-dense": 107_000, "train-moe": 340_000}  #: tok/s: 60% and 45% of an H100's 989 TFLOP/s
HYBRID = {"1x4096": 0.5, "1x32768": 0.1}  #: forward and backward, at most this share of full SDPA
FIRST_STEP = 60  #: seconds, compilation included


def goals(results: dict[str, Any]) -> list[tuple[str, float, str, float, bool]]:
    """What the project wants on an H100: (what, measured, relation, goal, met), for the parts that were run."""
    found = []

    def goal(what: str, value: float, relation: str, wanted: float) -> None:
        found.append(
            (what, value, relation, wanted, value >= wanted if relation == ">=" else value <= wanted)
        )

    for part, speed in SPEED.items():
        rows = {row["stack"]: row for row in table(results, part, "training")}
        own = [row for name, row in rows.items() if name in ("deepseek", "deepseek, CUDA graph")]
        if own:
            ours = max(own, key=lambda row: row["tok/s"])
            goal(f"{part}, tok/s", ours["tok/s"], ">=", speed)
            goal(f"{part}, first step s", max(row["first step s"] for row in own), "<=", FIRST_STEP)
            peers = [row["tok/s"] for name, row in rows.items() if not name.startswith("deepseek")]
            if peers:
                goal(f"{part}, tok/s of the best peer", ours["tok/s"], ">=", max(peers))
    for shape, share in HYBRID.items():
        rows_, length = shape.split("x")
        ratios = [
            row["of SDPA, forward+backward"]
            for row in table(results, "attention", f"time at {rows_} x {int(length):,}")
            if row["attention"].startswith("Hybrid")
        ]
        if ratios:
            goal(f"hybrid attention {shape}, of SDPA", min(ratios), "<=", share)
    reads = [
        row["of full"]
        for row in table(results, "attention", "bytes of keys and values that a new token reads, per row")
        if row["pattern"] == "H"
    ]
    if reads:
        goal("hybrid layer, bytes read while decoding, of full", max(reads), "<=", 0.25)
    return found


def table(results: dict[str, Any], part: str, title: str) -> list[Row]:
    """A table of a part's report; empty when there is none."""
    return ((results.get(part, {}).get("result") or {}).get("tables") or {}).get(title, [])


def chosen(only: str) -> list[str]:
    """Parts by name or by the word before the dash (``train``: train-dense and train-moe); all usual ones if empty."""
    if not only:
        return [name for name, part in PARTS.items() if not part.asked_only]
    found: list[str] = []
    for word in filter(None, only.split(",")):
        matches = [word] if word in PARTS else [n for n in PARTS if n.split("-")[0] == word]
        if not matches:
            sys.exit(f"no part {word!r}; there are: {', '.join(PARTS)}")
        found += [n for n in matches if n not in found]
    return found


class Runner:
    """Runs parts and keeps ``results.json`` and ``run.log`` up to date, so that nothing is lost when it is stopped."""

    def __init__(self, out: Path, quick: bool = False) -> None:
        self.out, self.quick, self.results = out, quick, dict[str, Any]()
        out.mkdir(parents=True, exist_ok=True)
        self.log = out / "run.log"
        self.log.write_text("", encoding="utf-8")

    def say(self, text: str) -> None:
        """A line for the log and for our own output."""
        line = text.rstrip("\n") + "\n"
        with self.log.open("a", encoding="utf-8") as file:
            file.write(line)
        sys.stdout.write(line)
        sys.stdout.flush()

    def save(self) -> None:
        """Write what there is."""
        (self.out / "results.json").write_text(json.dumps(self.results, indent=1), encoding="utf-8")

    def run(self, name: str, extra: str, limit: float) -> dict[str, Any]:
        """One part, for at most ``limit`` seconds; what it did and what it found, complete or not."""
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder) / "report.json"
            command, began = self.command(name, extra, limit, found), time.perf_counter()
            paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
            done = self.results[name] = {"command": shlex.join(command[1:])}
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            with subprocess.Popen(command, env=environment, errors="replace", **pipes) as process:
                reader = threading.Thread(target=self.copy, args=(process.stdout,))
                reader.start()
                while process.poll() is None and time.perf_counter() - began < limit:
                    self.note(done, found)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(min(TICK, max(0.1, limit - (time.perf_counter() - began))))
                done["stopped"] = process.poll() is None
                stop(process)
                reader.join()
            self.note(done, found)
        done["seconds"], done["status"] = round(time.perf_counter() - began, 1), process.returncode
        self.save()
        return done

    def command(self, name: str, extra: str, limit: float, found: Path) -> list[str]:
        part = shlex.split(PARTS[name].arguments)
        command = [sys.executable, "-m", "deepseek", "bench", *part, *shlex.split(extra)]
        command += ["--json", str(found), *(["--quick"] if self.quick else [])]
        if part[0] in LAST and "--seconds" not in command:
            command += ["--seconds", f"{max(1.0, limit - LAST[part[0]]):.0f}"]
        return command

    def note(self, done: dict[str, Any], found: Path) -> None:
        """What a part has found so far."""
        if found.exists():
            done["result"] = json.loads(found.read_text(encoding="utf-8"))
            self.save()

    def copy(self, source: IO[str]) -> None:
        for line in source:
            self.say(line)


def stop(process: subprocess.Popen[str]) -> None:
    """End a process that has not ended."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def summary(results: dict[str, Any]) -> list[str]:
    """A line for every trained stack and every goal."""
    lines = []
    for part in SPEED:
        for row in table(results, part, "training"):
            mfu = (
                ""
                if row["MFU %"] is None
                else f", MFU {row['MFU %']:.1f}% of {row['peak TFLOP/s']:.0f} TFLOP/s"
            )
            lines.append(
                f"{part}: {row['stack']}: {row['tok/s']:,.0f} tok/s{mfu}, {row['of matmul %']:.1f}% of matmul"
            )
    for what, value, relation, wanted, met in goals(results):
        lines.append(f"{'met   ' if met else 'missed'} {what}: {value:,.6g} {relation} {wanted:,.6g}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "bench-results")))
    parser.add_argument("--only", default="", help=f"comma-separated: {', '.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=570.0, help="for everything together")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("PART", "ARGUMENTS"),
                        help="more arguments for a part")  # fmt: skip
    options = parser.parse_args()
    names, extra = chosen(options.only), dict(options.set)
    if unknown := set(extra) - set(PARTS):
        sys.exit(f"no part {', '.join(sorted(unknown))}; there are: {', '.join(PARTS)}")
    began, runner = time.perf_counter(), Runner(options.out, options.quick)
    for name in names:
        left = options.seconds - (time.perf_counter() - began)
        needed = 5.0 if options.quick else PARTS[name].seconds
        if needed > left:
            runner.results[name] = {"skipped": f"needs about {needed:.0f} s, {left:.0f} s are left"}
            runner.say(f"\n=== {name}: skipped, {runner.results[name]['skipped']}")
            runner.save()
            continue
        runner.say(f"\n=== {name}: about {needed:.0f} s, {left:.0f} s are left")
        done = runner.run(name, extra.get(name, ""), left - 5)
        runner.say(f"=== {name}: {done['seconds']} s, status {done['status']}")
    for line in summary(runner.results):
        runner.say(line)
    failed = [n for n, r in runner.results.items() if r.get("status") or r.get("stopped")]
    if failed:
        runner.say(f"not complete: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
