"""Hybrid against full attention at equal steps on real text (LOG.md, claim C05).

8 layers, rows of 4,096, 6.55M tokens of the standard library. Minutes on a large GPU, days on a CPU.

    python benchmarks/study_hybrid.py [--device cuda] [--only LLLH]
    python benchmarks/study_hybrid.py --device cpu --steps 2 --hidden 64 --length 128 --held-out-tokens 512
"""

from __future__ import annotations

from dataclasses import replace

from lm_study import Setting, main

BASE = Setting(
    vocab=4096, hidden=384, layers=8, head_dim=64, window=128, experts=0, length=4096, batch_tokens=32_768,
    steps=200, precision="bf16", lr=3e-3,
)  # fmt: skip
SPARSE = replace(BASE, experts=16, expert_ffn=256)

GRID = {
    **{f"{p}, seed {seed}": replace(BASE, pattern=p, seed=seed) for seed in (0, 1, 2) for p in ("F", "LLLH")},
    **{f"{p}, seed 0": replace(BASE, pattern=p) for p in ("H", "L", "LLLF")},
    **{f"{p}, 16 experts": replace(SPARSE, pattern=p) for p in ("F", "LLLH")},
}

if __name__ == "__main__":
    main(__doc__, GRID)
