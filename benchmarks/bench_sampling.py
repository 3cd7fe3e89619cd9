"""What a step's sampling costs: milliseconds for a batch of rows by the options they have.

    device   wall time up to the host's copy of the tokens, the median of the repeats
    cpu      processor time of this process in the same repeats: what says something on a machine that others use

The logits are a real model's where one is given (its nuclei decide how many candidates are looked at), else random.

    python benchmarks/bench_sampling.py [--rows 1 32] [--vocabulary 49152] [--device cpu] [--model PATH --text FILE]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

import deepseek as ds
from deepseek.serve.sampling import SamplingState, sample, sample_drafts
from deepseek.serve.sampling_config import SamplingConfig

CASES = {
    "greedy": SamplingConfig(temperature=0),
    "temperature": SamplingConfig(temperature=0.8, top_p=1.0),
    "min-p 0.05": SamplingConfig(temperature=0.8, top_p=1.0, min_p=0.05),
    "top-k 50": SamplingConfig(temperature=0.8, top_p=1.0, top_k=50),
    "top-p 0.95": SamplingConfig(temperature=0.8, top_p=0.95),
    "top-k 50, top-p 0.95": SamplingConfig(temperature=0.8, top_p=0.95, top_k=50),
    "greedy, penalties": SamplingConfig(temperature=0, repetition_penalty=1.1, frequency_penalty=0.1),
    "greedy, 5 logprobs": SamplingConfig(temperature=0, logprobs=5),
}


def logits_of(model: str, text: Path, rows: int, device: str) -> torch.Tensor:
    loaded = ds.load(model, device=device)
    ids = loaded.tokenizer.encode(text.read_text(encoding="utf-8"))[:1024]
    with torch.no_grad():
        hidden = loaded.model(torch.tensor([ids], device=loaded.device)).hidden[0]
        logits = loaded.model.logits(hidden)[:, : loaded.tokenizer.vocab_size]
    return logits[torch.linspace(0, len(ids) - 1, rows).long()].bfloat16()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--model")
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "LICENSE")
    options = parser.parse_args()
    print(f"{'rows':>5} {'options':24} {'device ms':>10} {'cpu ms':>10}")
    for rows in options.rows:
        if options.model:
            logits = logits_of(options.model, options.text, rows, options.device)
        else:
            logits = (torch.randn(rows, options.vocabulary, device=options.device) * 4).bfloat16()
        for name, config in CASES.items():
            states = [SamplingState(config, range(1000), seed, logits.shape[1]) for seed in range(rows)]
            wall, cpu = [], []
            for repeat in range(options.repeats + 3):
                began, used = time.perf_counter(), time.process_time()
                sample(logits, states, [repeat] * rows)
                if repeat >= 3:
                    wall.append(time.perf_counter() - began)
                    cpu.append(time.process_time() - used)
            print(
                f"{rows:5} {name:24} {1e3 * statistics.median(wall):10.2f} {1e3 * statistics.median(cpu):10.2f}"
            )
        states = [SamplingState(CASES["greedy"], range(1000), 0, logits.shape[1]) for _ in range(rows)]
        four, wall = logits.repeat_interleave(4, 0), []
        for _ in range(options.repeats):
            began = time.perf_counter()
            sample_drafts(four, [(state, [1, 2, 3]) for state in states])
            wall.append(time.perf_counter() - began)
        print(f"{rows:5} {'greedy, drafts of 3':24} {1e3 * statistics.median(wall):10.2f}")


if __name__ == "__main__":
    main()
