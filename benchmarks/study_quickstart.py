"""What a model of a few minutes should look like: one change at a time, held-out bits per byte (LOG.md).

Names begin with ``flops/`` (every run gets 5.5 TFLOP) or ``time/`` (every run gets the tokens that two laptop
cores can train in about 120 s, measured beforehand). An hour or two on one GPU.

    python benchmarks/study_quickstart.py [--device cuda] [--only time/]
    python benchmarks/study_quickstart.py --device cpu --only flops/base --steps 2 --held-out-tokens 512
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lm_study import Setting, main

FLOPS = Setting(
    vocab=2048, hidden=128, batch_tokens=2048, lr=6e-3, schedule="wsd", tied=False, tflop=5.5
)  # fmt: skip
FLOPS_CHANGES: dict[str, dict[str, Any]] = {
    "base": {},
    "seed 1": {"seed": 1},
    "11 TFLOP": {"tflop": 11.0},
    "hidden 96": {"hidden": 96},
    "hidden 192": {"hidden": 192},
    "hidden 96, 6 layers": {"hidden": 96, "layers": 6},
    "3 layers": {"layers": 3},
    "5 layers": {"layers": 5},
    "length 256": {"length": 256},
    "length 1024": {"length": 1024},
    "window 64": {"window": 64},
    "window 256": {"window": 256},
    "pattern F": {"pattern": "F"},
    "pattern H": {"pattern": "H"},
    "pattern LHLH": {"pattern": "LHLH"},
    "pattern LLLF": {"pattern": "LLLF"},
    "dense": {"experts": 0},
    "every other layer dense": {"ffn_pattern": "DE", "ffn": 256},
    "experts of 64": {"expert_ffn": 64},
    "experts of 192": {"expert_ffn": 192},
    "32 experts": {"experts": 32},
    "32 experts of 64": {"experts": 32, "expert_ffn": 64},
    "64 experts of 64": {"experts": 64, "expert_ffn": 64},
    "top-1 of experts of 256": {"expert_ffn": 256, "top_k": 1},
    "experts of 64, 1 shared": {"expert_ffn": 64, "shared_experts": 1},
    "no balancing": {"entropy_weight": 0.0, "bias_rate": 0.0},
    "entropy weight 1e-3": {"entropy_weight": 1e-3},
    "bias rate 1e-2": {"bias_rate": 1e-2},
    "momentum 0.9": {"momentum": 0.9},
    "momentum 0.97": {"momentum": 0.97},
    "embedding lr x 4": {"embedding_lr": 4.0},
    "embedding lr x 2": {"embedding_lr": 2.0},
    "embedding lr x 0.5": {"embedding_lr": 0.5},
    "cosine": {"schedule": "cosine"},
    "cosine to 0": {"schedule": "cosine", "floor": 0.0},
    "WSD to 0": {"floor": 0.0},
    "warm-up 10%": {"warmup": 0.1},
    "lr 4e-3": {"lr": 4e-3},
    "lr 1e-2": {"lr": 1e-2},
    "lr 1.5e-2": {"lr": 1.5e-2},
    "4096 a step": {"batch_tokens": 4096},
    "4096 a step, lr 1e-2": {"batch_tokens": 4096, "lr": 1e-2},
    "1024 a step": {"batch_tokens": 1024},
    "1024 a step, lr 4e-3": {"batch_tokens": 1024, "lr": 4e-3},
    "vocabulary 4096": {"vocab": 4096},
    "vocabulary 1024": {"vocab": 1024},
    "tied head": {"tied": True},
    "beta2 0.98": {"beta2": 0.98},
    "weight decay 0.02": {"weight_decay": 0.02},
    "weight decay 0.3": {"weight_decay": 0.3},
    "clip 0.3": {"clip": 0.3},
    "no clipping": {"clip": 0.0},
    "initial std 0.06": {"init_std": 0.06},
    "heads of 64": {"head_dim": 64},
    "heads of 16": {"head_dim": 16},
    "as many KV heads": {"queries_per_kv": 1},
    "a quarter of KV heads": {"queries_per_kv": 4},
}

TIME = replace(
    FLOPS, expert_ffn=64, length=256, window=64, lr=4e-3, embedding_lr=4.0, momentum=0.9, newton_schulz_steps=3,
    schedule="cosine", tokens=960_000,
)  # fmt: skip
THREE = {"layers": 3, "tokens": 1_290_000}
TIME_CHANGES: dict[str, dict[str, Any]] = {
    "base": {},
    "3 layers, LLH, window 32": {**THREE, "pattern": "LLH", "window": 32},
    "3 layers, LLH, window 32, lr 6e-3": {**THREE, "pattern": "LLH", "window": 32, "lr": 6e-3},
    "3 layers, local": THREE,
    "3 layers, local, lr 6e-3": {**THREE, "lr": 6e-3},
    "3 layers, LHL": {**THREE, "pattern": "LHL"},
    "lr 6e-3": {"lr": 6e-3},
    "lr 3e-3": {"lr": 3e-3},
    "vocabulary 4096": {"vocab": 4096, "tokens": 800_000},
    "5 Newton-Schulz steps": {"newton_schulz_steps": 5},
    "WSD": {"schedule": "wsd"},
    "cosine to 0": {"floor": 0.0},
    "4096 a step": {"batch_tokens": 4096, "tokens": 1_090_000},
    "1024 a step": {"batch_tokens": 1024, "tokens": 800_000},
    "tied head": {"tied": True},
    "embedding lr x 8": {"embedding_lr": 8.0},
    "momentum 0.85": {"momentum": 0.85},
    "gate starts at sigmoid(-1)": {"gate_init": -1.0},
    "32 experts": {"experts": 32, "tokens": 900_000},
    "hidden 64": {"hidden": 64, "tokens": 1_600_000},
    "hidden 64, experts of 128": {"hidden": 64, "expert_ffn": 128, "tokens": 1_400_000},
    "hidden 96": {"hidden": 96, "expert_ffn": 96, "tokens": 1_030_000},
    "hidden 96, length 512, window 128": {
        "hidden": 96, "expert_ffn": 96, "length": 512, "window": 128, "tokens": 1_020_000,
    },
    "length 512, window 128": {"length": 512, "window": 128},
    "AdamW": {"optimizer": "adamw", "embedding_lr": 1.0, "tokens": 1_200_000},
}  # fmt: skip

GRID = {
    **{f"flops/{name}": replace(FLOPS, **change) for name, change in FLOPS_CHANGES.items()},
    **{f"time/{name}": replace(TIME, **change) for name, change in TIME_CHANGES.items()},
}

if __name__ == "__main__":
    main(__doc__, GRID)
