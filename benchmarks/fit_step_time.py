"""What a step of the real engine costs: a linear model of its time, fitted on this machine, for the scheduling study.

    seconds = fixed + decode x (rows that decode) + prefill x (rows of prompts)
            + read x (positions that decoding rows look back on) + mix x (the same for rows of prompts)

Steps of every mixture are made by requests of random lengths under random budgets. On a CPU the processor time of a
step is fitted (one thread: a busy machine stretches wall time, hardly processor time), on a GPU wall time. The error
given is that of steps that were not fitted.

    python benchmarks/fit_step_time.py MODEL [--device cpu] [--steps 1500] [--max-length 2048]
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np

from deepseek.serve.engine import Engine
from deepseek.serve.engine_config import EngineConfig
from deepseek.serve.request import Request
from deepseek.serve.sampler import SamplingConfig
from deepseek.serve.scheduler import Plan

NAMES = ("fixed", "decode", "prefill", "read", "mix")


def features(plan: Plan) -> tuple[float, ...]:
    """What the model's five terms are multiplied with."""
    decode = prefill = read = mix = 0
    for w in plan.work:
        if w.sequence.decoding:
            decode += w.rows
            read += w.rows * w.start
        else:
            prefill += w.rows
            mix += w.rows * (w.start + w.rows // 2)
    return 1.0, decode, prefill, read, mix


class Drawn:
    """A budget that is drawn anew for every step."""

    def __init__(self, rng: random.Random, most: int) -> None:
        self.rng, self.most = rng, most

    def rows(self, decoding: int, waiting_rows: int) -> int:
        return decoding + round(self.most ** self.rng.random())


def measure(engine: Engine, steps: int, longest: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features ``[S, 5]`` and seconds ``[S]`` of ``steps`` steps."""
    rng = random.Random(seed)
    engine.scheduler.budget = Drawn(rng, 1024)
    clock = time.process_time if engine.device.type == "cpu" else time.perf_counter
    plans: list[tuple[float, ...]] = []
    plan = engine.scheduler.plan

    def told() -> Plan:
        made = plan()
        plans.append(features(made))
        return made

    engine.scheduler.plan = told  # type: ignore[method-assign]
    seconds, number, wanted = list[float](), 0, 1
    while len(seconds) < steps:
        if len(seconds) % 50 == 0:
            wanted = round(32 ** rng.random())
        while len(engine.scheduler.running) + len(engine.scheduler.waiting) < wanted:
            number += 1
            length = min(longest // 2, round(rng.lognormvariate(5.5, 1.0)) + 1)
            prompt = tuple(rng.randrange(engine.vocabulary) for _ in range(length))
            answer = SamplingConfig(max_tokens=rng.randrange(2, 96), temperature=0, ignore_eos=True)
            engine.add(Request(f"{seed}-{number}", prompt, answer))
        began = clock()
        engine.step()
        seconds.append(clock() - began)
    return np.array(plans[: len(seconds)]), np.array(seconds)


def fit(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Non-negative coefficients of the least relative error; steps far off (another process's doing) are left out."""
    keep, columns = np.ones(len(y), bool), list(range(x.shape[1]))
    found = np.zeros(x.shape[1])
    for _ in range(8):
        weighted = x[keep][:, columns] / y[keep, None]
        some = np.linalg.lstsq(weighted, np.ones(keep.sum()), rcond=None)[0]
        found = np.zeros(x.shape[1])
        found[columns] = some
        if (some < 0).any():
            columns = [c for c, value in zip(columns, some) if value >= 0]
            continue
        off = np.abs(x @ found / y - 1)
        keep = off < max(4 * float(np.median(off)), 0.05)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--max-length", type=int, default=2048)
    args = parser.parse_args()
    config = EngineConfig(
        device=args.device, precision=args.precision, max_length=args.max_length, prefix_cache=False,
        ahead=False,  # a step's time is its own
    )  # fmt: skip
    engine = Engine.load(args.model, config)
    measure(engine, 20, engine.max_length)
    x, y = measure(engine, args.steps, engine.max_length, seed=1)
    even, odd = slice(0, None, 2), slice(1, None, 2)
    found = fit(x[even], y[even])
    off = np.abs(x[odd] @ found / y[odd] - 1)
    print(json.dumps({"model": args.model.name, "format": engine.format, "device": str(engine.device),
                      **{name: float(f"{v:.4g}") for name, v in zip(NAMES, found)},
                      "median_error": round(float(np.median(off)), 3),
                      "p90_error": round(float(np.quantile(off, 0.9)), 3)}))  # fmt: skip


if __name__ == "__main__":
    main()
