"""The series of a run that nobody trained: every value is a known function of its step.

A 3B model with one fault of each kind: a document that is noise (step 31,217, seen by layer 7's gradient three steps
before), a slow rank, a source that drifts, a dead expert.
"""

from __future__ import annotations

import math
import time
from functools import lru_cache
from typing import Any

import numpy as np

STEPS, SPIKE, LEAD = 50_000, 31_217, 31_214
LAYERS, HEADS, EXPERTS, RANKS = 12, 8, 32, 8
SOURCES = ("web", "code", "papers", "dialogue")
CHECKPOINTS = [*range(2000, STEPS + 1, 2000)]
NOW = time.time()


def noise(name: str, size: int = STEPS + 1) -> np.ndarray:
    return np.random.default_rng(abs(hash_text(name)) % 2**32).standard_normal(size)


def hash_text(text: str) -> int:
    value = 2166136261
    for byte in text.encode():
        value = ((value ^ byte) * 16777619) & 0xFFFFFFFF
    return value


@lru_cache(maxsize=600)
def values(name: str) -> np.ndarray:
    """One value a step, 0..STEPS, of any series of the fake run."""
    step = np.arange(STEPS + 1)
    rough = noise(name)
    ramp = np.minimum(step / 1500, 1.0)
    kick = np.zeros(STEPS + 1)
    kick[SPIKE] = 1
    early = np.zeros(STEPS + 1)
    early[LEAD : SPIKE + 2] = 1
    parts = name.split("/")
    loss = 2.0 + 8.6 * np.exp(-(step**0.46) / 16) + 0.035 * rough
    if name in ("train/loss", "train/bits_per_byte"):
        return (loss + 6.0 * kick) * (0.45 if "bits" in name else 1)
    if name.startswith("eval/"):
        out = np.where(step % 1000 == 0, loss - 0.02 * rough + 0.03, np.nan)
        return out * (0.45 if "bits" in name else 1)
    if name.endswith("grad_norm"):
        base = 0.35 + 1.8 * np.exp(-step / 1800)
        hit = 30.0 if parts[0] == "train" else 40.0 if parts[1] == "7" else 6.0
        wave = early * hit * (0.4 + 0.6 * np.clip((step - LEAD) / 3, 0, 1))
        return base * np.exp(0.18 * rough) + wave * (0.2 if parts[0] == "layer" and parts[1] != "7" else 1)
    if name == "train/lr":
        return 4e-4 * ramp * (0.1 + 0.45 * (1 + np.cos(np.pi * step / 60000)))
    if name == "train/tokens_per_second":
        slow = (step > 41_000) & (step < 41_400)
        return 182_000 * (1 + 0.012 * rough) * np.where(slow, 0.66, 1)
    if name == "train/mfu":
        return values("train/tokens_per_second") / 182_000 * 0.418
    if parts[0] == "time":
        share = {
            "step": 1.0,
            "forward": 0.29,
            "backward": 0.52,
            "optimizer": 0.05,
            "communication": 0.09,
            "data": 0.02,
            "other": 0.03,
        }
        return 1.44 * share[parts[1]] * (1 + 0.03 * np.abs(rough))
    if parts[0] == "memory":
        gib = {
            "weights": 6.2,
            "gradients": 6.2,
            "optimizer": 24.8,
            "activations": 21.4,
            "allocated": 58.9,
            "reserved": 66.1,
            "rss": 11.8,
        }
        return np.round(gib[parts[1]] * 2**30 * (1 + 0.002 * rough))
    if parts[0] == "rank":
        seconds = 1.38 * (1 + 0.01 * np.abs(rough))
        if parts[1] == "5":
            seconds = seconds * np.where((step > 41_000) & (step < 41_400), 1.5, 1)
        return seconds if parts[2] == "step_seconds" else 0.02 * (1 + np.abs(rough))
    if parts[0] == "data":
        i = SOURCES.index(parts[1])
        psi = 0.01 + 0.008 * np.abs(rough) + (0.31 * (step > 46_500) if parts[1] == "dialogue" else 0)
        table = {
            "loss": loss + (0.4, -0.9, 0.1, 0.25)[i],
            "share": (0.52, 0.22, 0.16, 0.10)[i] + 0.01 * rough,
            "psi": psi,
            "length": (812, 1490, 4210, 388)[i] * (1 + 0.05 * rough),
            "entropy": (4.6, 4.9, 4.5, 4.2)[i] + 0.03 * rough,
            "duplicates": np.abs(0.004 + 0.001 * rough),
        }
        return table[parts[2]]
    if name.endswith("entropy"):
        return 3.1 + 0.3 * (1 - ramp) + 0.02 * rough
    if name.endswith("max_vio"):
        return 0.4 + 3 * np.exp(-step / 900) + 0.04 * np.abs(rough)
    if name.endswith("dead"):
        return ((step > 22_000) & (parts[1] == "9")).astype(float)
    if name == "precision/loss_scale":
        return 2.0 ** (14 + (step // 8000) % 3)
    if name.startswith("precision/"):
        return np.cumsum(kick)
    if name.endswith("gate"):
        return np.clip(0.5 + 0.2 * np.tanh(step / 9000) + 0.02 * rough, 0, 1)
    return 1 + 0.2 * np.exp(-step / 4000) + 0.05 * rough


ABOUT: dict[str, tuple[str, str, str, str]] = {
    "train/loss": ("Training", "nats", "Mean cross-entropy of the batch's tokens", "批次词元的平均交叉熵"),
    "train/grad_norm": ("Training", "", "Norm of all gradients before clipping", "裁剪前所有梯度的范数"),
    "train/tokens_per_second": (
        "Training",
        "tokens/s",
        "Tokens trained per second, all ranks",
        "每秒训练的词元数",
    ),
}


def names() -> list[str]:
    train = [
        "loss",
        "grad_norm",
        "bits_per_byte",
        "lr",
        "tokens_per_second",
        "mfu",
        "router_entropy",
        "max_vio",
    ]
    out = [f"train/{n}" for n in train] + ["eval/loss", "eval/bits_per_byte"]
    out += [
        f"time/{n}" for n in ["step", "forward", "backward", "optimizer", "communication", "data", "other"]
    ]
    out += [
        f"memory/{n}"
        for n in ["weights", "gradients", "optimizer", "activations", "allocated", "reserved", "rss"]
    ]
    out += [
        f"layer/{i}/{n}"
        for i in range(LAYERS)
        for n in ["grad_norm", "weight_norm", "update_ratio", "activation_rms"]
    ]
    heads = [(i, h) for i in range(LAYERS) for h in range(HEADS)]
    out += [f"attention/{i}/{h}/{n}" for i, h in heads for n in ("gate", "entropy")]
    out += [f"router/{i}/{n}" for i in range(1, LAYERS) for n in ["entropy", "max_vio", "dead"]]
    out += [f"rank/{r}/{n}" for r in range(RANKS) for n in ["step_seconds", "data_seconds"]]
    out += [
        f"data/{s}/{n}" for s in SOURCES for n in ["loss", "share", "length", "entropy", "duplicates", "psi"]
    ]
    return [*out, "precision/loss_scale", "precision/nonfinite", "precision/switches"]


def unit(name: str) -> str:
    if name in ABOUT:
        return ABOUT[name][1]
    first = name.split("/")[0]
    return {"memory": "bytes", "time": "s"}.get(first, "s" if name.endswith("seconds") else "")


def series() -> list[dict[str, Any]]:
    rows = []
    for name in names():
        group, _, en, zh = ABOUT.get(name, (name.split("/")[0], "", name.replace("/", ", "), name))
        last = values(name)
        last = last[np.isfinite(last)][-1]
        about = {"en": en, "zh": zh}
        rows.append(
            {
                "name": name,
                "group": group,
                "unit": unit(name),
                "description": about,
                "last": float(last),
                "step": STEPS,
            }
        )
    return rows


def window(name: str, start: int, stop: int, points: int) -> dict[str, Any]:
    """Buckets of equal length with their least, largest and mean value, or every step where they fit."""
    start, stop = max(0, start), min(stop, STEPS + 1)
    column = values(name)[start:stop]
    known = np.flatnonzero(np.isfinite(column))
    column, steps = column[known], known + start
    size = max(1, math.ceil(len(column) / points))
    edges = np.arange(0, len(column), size)
    if not len(edges):
        return {"step": [], "low": [], "high": [], "mean": [], "raw": True, "nonfinite": []}
    low, high = np.minimum.reduceat(column, edges), np.maximum.reduceat(column, edges)
    mean = np.add.reduceat(column, edges) / np.diff([*edges, len(column)])
    return {
        "step": steps[edges].tolist(),
        "low": [float(f"{x:.6g}") for x in low],
        "high": [float(f"{x:.6g}") for x in high],
        "mean": [float(f"{x:.6g}") for x in mean],
        "raw": size == 1,
        "nonfinite": [],
    }
