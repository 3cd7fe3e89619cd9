"""A server with invented answers in the API's shape: every page has content, and every number is known to the tests.

The real server is tested elsewhere (and with the page in ``test_page_live.py``). Here a test must know that the spike
is at step 31,217 and nowhere else. ``python fake_server.py [PORT]`` serves it for a look.
"""

from __future__ import annotations

import base64
import json
import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

DIST = Path(__file__).parents[3] / "deepseek" / "monitor" / "web" / "dist"
POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
)
VIEWER = (
    "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; worker-src 'self' blob:; connect-src 'self' blob: data:"
)
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".json": "application/json",
    ".png": "image/png",
    ".woff2": "font/woff2",
    ".wasm": "application/wasm",
    ".ico": "image/x-icon",
}
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
        share = dict(
            step=1.0, forward=0.29, backward=0.52, optimizer=0.05, communication=0.09, data=0.02, other=0.03
        )
        return 1.44 * share[parts[1]] * (1 + 0.03 * np.abs(rough))
    if parts[0] == "memory":
        gib = dict(
            weights=6.2,
            gradients=6.2,
            optimizer=24.8,
            activations=21.4,
            allocated=58.9,
            reserved=66.1,
            rss=11.8,
        )
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
    return out + ["precision/loss_scale", "precision/nonfinite", "precision/switches"]


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
            dict(name=name, group=group, unit=unit(name), description=about, last=float(last), step=STEPS)
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
        return dict(step=[], low=[], high=[], mean=[], raw=True, nonfinite=[])
    low, high = np.minimum.reduceat(column, edges), np.maximum.reduceat(column, edges)
    mean = np.add.reduceat(column, edges) / np.diff([*edges, len(column)])
    return dict(
        step=steps[edges].tolist(),
        low=[float(f"{x:.6g}") for x in low],
        high=[float(f"{x:.6g}") for x in high],
        mean=[float(f"{x:.6g}") for x in mean],
        raw=size == 1,
        nonfinite=[],
    )


def card(run: str, index: int = 0) -> dict[str, Any]:
    rough = noise(run, 48)
    spark = (2.1 + 0.03 * index + 5 * np.exp(-np.arange(48) / 9) + 0.06 * rough).round(4).tolist()
    status = ("running", "finished", "interrupted", "crashed")[index % 4]
    return dict(
        id=run,
        name=run.replace("~", "/"),
        status=status,
        step=STEPS if index == 0 else 60_000 - 1700 * index,
        total_steps=60_000,
        loss=round(2.113 + 0.03 * index, 4),
        tokens_per_second=round(182_000 - 3000.0 * index),
        started=NOW - 86_400 * (index + 1),
        updated=NOW - (2 if index == 0 else 3600 * index),
        incidents_open=3 if index == 0 else (2 if index == 3 else 0),
        device="8 × H100",
        parameters=3_420_000_000,
        spark=spark,
    )


RUNS = [
    "moe-3b-hybrid",
    *[f"sweep~lr-{x}" for x in ("1e-4", "2e-4", "4e-4", "8e-4")],
    "baseline-dense",
    "quickstart",
]


def run_info(run: str) -> dict[str, Any]:
    return {
        **card(run, RUNS.index(run)),
        "facts": {
            "preset": "moe-3b",
            "dtype": "bfloat16",
            "parameters": 3_420_000_000,
            "active_parameters": 612_000_000,
            "batch_tokens": 262_144,
            "total_steps": 60_000,
            "host_cpu": "2 × x86_64",
            "command": "deepseek pretrain configs/moe-3b.toml",
        },
        "config": 'preset = "moe-3b"\n\n[train]\nsteps = 60000\nbatch_tokens = 262144\n\n[model]\npattern = "LLLH"\n',
        "checkpoints": [dict(step=s, bytes=37 * 2**30, time=NOW - (STEPS - s) * 1.44) for s in CHECKPOINTS],
        "pages": ["experts", "data", "precision", "lineage", "inspect"],
    }


TEXT = "aGVsbG8gd29ybGQ=" * 9 + "\n" + "0x7f 0x45 0x4c 0x46 " * 12


def incidents() -> list[dict[str, Any]]:
    movers = [
        dict(name="layer/7/grad_norm", step=LEAD, score=41.2, before=0.36, after=16.3),
        dict(name="train/grad_norm", step=LEAD + 1, score=33.0, before=0.35, after=18.1),
        dict(name="layer/6/grad_norm", step=LEAD + 1, score=18.8, before=0.35, after=1.6),
        dict(name="layer/8/grad_norm", step=LEAD + 1, score=17.0, before=0.36, after=1.5),
        dict(name="train/loss", step=SPIKE, score=52.7, before=2.09, after=8.11),
        dict(name="train/bits_per_byte", step=SPIKE, score=52.6, before=0.94, after=3.65),
        dict(name="precision/nonfinite", step=SPIKE, score=9.0, before=0, after=1),
    ]
    steps = list(range(SPIKE - 40, SPIKE + 21))
    grid = [[float(f"{values(f'layer/{i}/grad_norm')[s]:.4g}") for s in steps] for i in range(LAYERS)]
    samples = [
        dict(row=11, column=0, length=4096, source="web", path="corpus/web/shard-00417.jsonl", offset=88_231_004,
             start=0, loss=9.72, text=TEXT),
        dict(row=3, column=0, length=1880, source="code", path="corpus/code/shard-00031.jsonl", offset=1_204_551,
             start=0, loss=3.41, text="def resolve(path):\n    return path if path.exists() else None\n"),
        dict(row=7, column=0, length=2216, source="papers", path="corpus/papers/shard-00102.jsonl", offset=77_120,
             start=512, loss=2.48, text="We consider the limit in which the number of experts grows."),
        dict(row=1, column=0, length=901, source="dialogue", path="corpus/dialogue/shard-7.jsonl", offset=5_110,
             start=0, loss=2.07, text="Could you tell me how the tide tables are made?"),
    ]  # fmt: skip
    spike = dict(
        id="3", step=SPIKE, first_step=LEAD, kind="loss_spike", severity="critical", verdict="DATA", confidence=0.91,
        title="Loss jumped from 2.09 to 8.11 in one step",
        summary="Layer 7's gradient rose three steps before the loss. One document of 4,096 tokens, base64 without "
        "spaces, carries 71% of the batch's loss; the same step in the sibling run jumped too.",
        evidence=[
            dict(text="The same data step jumped in sweep/lr-2e-4, which has other weights.", series="train/loss",
                 step=SPIKE, value=7.9, score=48.0),
            dict(text="Row 11 alone has a loss of 9.72; the other rows are at their usual 2.1.", series="train/loss",
                 step=SPIKE, value=9.72, score=52.7),
            dict(text="Layer 7's gradient norm led the loss by three steps.", series="layer/7/grad_norm", step=LEAD,
                 value=16.3, score=41.2),
            dict(text="No rank was slow and no value was lost before the step.", series="rank/5/step_seconds",
                 step=SPIKE, value=1.39, score=0.4),
        ],
        movers=movers, window=[SPIKE - 200, SPIKE + 200], samples=samples,
        gradient_map=dict(layers=list(range(LAYERS)), steps=steps, values=grid), status="open",
        actions=[], time=NOW - 27_000,
        siblings=[dict(run="sweep~lr-2e-4", step=SPIKE, loss=7.9), dict(run="sweep~lr-4e-4", step=SPIKE, loss=8.3)],
    )  # fmt: skip
    rest = dict(evidence=[], samples=[], gradient_map={}, status="open", time=NOW - 9000)
    slow = dict(
        id="4", step=41_003, first_step=41_001, kind="slow_rank", severity="warning", verdict="HARDWARE",
        confidence=0.88, title="Rank 5 is 1.5 times slower than the others",
        summary="Every rank waits for it: 34% of the throughput is gone.", window=[40_800, 41_200],
        movers=[dict(name="rank/5/step_seconds", step=41_001, score=22.1, before=1.39, after=2.08),
                dict(name="train/tokens_per_second", step=41_001, score=-19.0, before=182_000, after=120_000)],
        actions=[], **rest,
    )  # fmt: skip
    drift = dict(
        id="5", step=46_610, first_step=46_501, kind="data_drift", severity="warning", verdict="DATA",
        confidence=0.84, title="The source dialogue has shifted: PSI 0.32",
        summary="Documents are shorter and their bytes more even than in the reference window.",
        window=[46_400, 46_800], movers=[dict(name="data/dialogue/psi", step=46_501, score=38.0, before=0.01, after=0.32)],
        actions=[], **rest,
    )  # fmt: skip
    return [spike, slow, drift]


def lineage() -> dict[str, Any]:
    rows: list[dict[str, Any]] = [dict(kind="start", step=0, time=NOW - 90_000)]
    rows += [
        dict(kind="checkpoint", step=s, time=NOW - 90_000 + 1.5 * s, bytes=37 * 2**30)
        for s in CHECKPOINTS[:9]
    ]
    rows.append(dict(kind="interrupted", step=18_640, time=NOW - 60_000, reason="SIGTERM"))
    rows.append(
        dict(kind="resume", step=18_000, to=18_000, time=NOW - 59_000, by="deepseek pretrain --resume")
    )
    rows += [dict(kind="checkpoint", step=s, time=NOW - 59_000 + s - 18_000) for s in CHECKPOINTS[9:14]]
    rows.append(dict(kind="config", step=24_500, time=NOW - 52_000, what="train.lr 4e-4 → 3e-4"))
    rows.append(
        dict(kind="rollback", step=28_000, from_step=29_400, time=NOW - 44_000, steps=[29_380, 29_400])
    )
    rows += [dict(kind="checkpoint", step=s, time=NOW - 43_000 + s - 28_000) for s in CHECKPOINTS[14:]]
    return {
        "lines": [{**{k: v for k, v in r.items() if k in ("kind", "step", "time")}, "data": r} for r in rows],
        "events": [],
    }


def ranks() -> dict[str, Any]:
    edges = np.linspace(0, STEPS, 181).astype(int)
    columns = [values(f"rank/{r}/step_seconds") for r in range(RANKS)]
    table = [[float(f"{c[a:b].max():.4g}") for a, b in zip(edges[:-1], edges[1:])] for c in columns]
    return dict(ranks=list(range(RANKS)), steps=edges[1:].tolist(), seconds=table)


def experts() -> dict[str, Any]:
    layers = []
    for i in range(1, LAYERS):
        rough = noise(f"load{i}", EXPERTS)
        now = np.exp(0.22 * rough)
        steps = np.linspace(0, STEPS, 160).astype(int)
        fade = np.exp(-steps / 6000)[None, :]
        load = np.exp(
            (0.22 + 0.6 * fade) * rough[:, None] + 0.06 * noise(f"h{i}", EXPERTS * 160).reshape(EXPERTS, 160)
        )
        if i == 9:
            now[4], load[4, steps > 22_000] = 0.0, 0.0
        layers.append(
            dict(
                index=i, load=(now / now.mean()).round(4).tolist(), bias=(0.01 * rough).round(5).tolist(),
                entropy=round(3.1 - 0.02 * i, 3), max_vio=round(float(now.max() / now.mean() - 1), 3),
                dead=int(i == 9), coverage=round(1 - (i == 9) / EXPERTS, 4),
                history=dict(steps=steps.tolist(), load=load.round(4).tolist()),
            )
        )  # fmt: skip
    return dict(layers=layers)


def heads() -> dict[str, Any]:
    layers = []
    for i in range(LAYERS):
        rows = []
        for h in range(HEADS):
            r = noise(f"head{i}.{h}", 6)
            bad = (i, h) == (6, 3)
            rows.append(
                dict(output_norm=0.01 if bad else round(1 + 0.12 * r[0] + 0.03 * i, 3),
                     entropy=0.02 if bad else round(abs(2.6 + 0.5 * r[1]), 3), sink=0.98 if bad else round(abs(0.2 + 0.1 * r[2]), 3),
                     max_logit=61.0 if bad else round(abs(9 + 2 * r[3]), 2), gate=round(0.5 + 0.1 * r[4], 3),
                     score=11.4 if bad else round(abs(r[5]), 2))
            )  # fmt: skip
        layers.append(dict(index=i, heads=rows))
    suspects = [
        dict(
            layer=6,
            head=3,
            score=11.4,
            why="adds almost nothing; 98% of its attention sits on the first token",
        ),
        dict(layer=2, head=1, score=3.1, why="its output equals head 5's (cosine 0.998)"),
        dict(layer=10, head=7, score=2.6, why="largest logit 14.9, half as much again as its layer's median"),
    ]
    load = [dict(index=i, experts=[dict(load=round(float(np.exp(0.22 * noise(f"load{i}", EXPERTS)[e])), 3), gate_norm=1.0)
            for e in range(EXPERTS)]) for i in range(1, LAYERS)]  # fmt: skip
    load[8]["experts"][4]["load"] = 0.0
    dead = [dict(layer=9, expert=4, score=14.0, why="no token reached it in 28,000 steps")]
    return dict(step=STEPS, layers=layers, suspects=suspects, experts=load, suspects_experts=dead)


def attention(query: dict[str, list[str]]) -> dict[str, Any]:
    length = 4096
    start, size = int(query.get("start", ["0"])[0]), int(query.get("size", [str(length)])[0])
    pixels = min(int(query.get("pixels", ["512"])[0]), size)
    at = np.linspace(start, start + size, pixels, endpoint=False)
    q, k = at[:, None], at[None, :]
    near = np.exp(-np.abs(q - k) / 90) + 0.5 * np.exp(-np.abs(((q - k) % 512) - 256) / 40)
    columns = np.isin((k // 16).astype(int), [0, 31, 77, 140, 201]) * 0.7
    map_ = np.where(k <= q, near + columns, 0) + 0.02 * np.abs(
        noise("map", pixels * pixels).reshape(pixels, pixels)
    ) * (k <= q)
    top = float(map_.max())
    words = [
        "the",
        "tide",
        "rises",
        "and",
        "the",
        "moon",
        "pulls",
        "water",
        "over",
        "the",
        "old",
        "stone",
        "quay",
        "while",
        "ships",
        "wait",
    ]
    tokens = [dict(id=i, text=f" {words[(i * 7) % len(words)]}") for i in range(start, start + size)]
    values_ = base64.b64encode((255 * (map_ / top) ** 0.5).astype(np.uint8).tobytes()).decode()
    return dict(
        size=size, length=length, start=start, pixels=pixels, tokens=tokens, values=values_,
        scale=round(0.31 * top, 4), gamma=2.0, branch="", branches=["window", "pooled"],
    )  # fmt: skip


def histograms() -> dict[str, Any]:
    def one(name: str, wide: float) -> dict[str, Any]:
        x = noise(name) * wide
        low, high = np.quantile(x, [0.001, 0.999])
        counts = np.histogram(x, np.linspace(low, high, 65))[0].tolist()
        told = dict(low=low, high=high, counts=counts, below=50, above=50, count=len(x), zeros=0, nonfinite=0)
        return {**told, "min": x.min(), "max": x.max(), "rms": float(x.std()), "kurtosis": 3.02}

    kinds = dict(activations=("residual", "attention", "feed-forward"), weights=("attention.q", "moe.up"))
    made = lambda i, kind: {n: one(f"{n}{i}", 1 + 0.12 * i) for n in kinds[kind]}  # noqa: E731
    return dict(layers=[dict(index=i, **{kind: made(i, kind) for kind in kinds}) for i in range(LAYERS)])


SPEEDSCOPE = {
    "$schema": "https://www.speedscope.app/file-format-schema.json",
    "shared": {"frames": [{"name": "forward"}, {"name": "backward"}, {"name": "all_reduce"}]},
    "profiles": [{"type": "evented", "name": "rank 0", "unit": "milliseconds", "startValue": 0, "endValue": 30, "events": [
        {"type": "O", "frame": 0, "at": 0}, {"type": "C", "frame": 0, "at": 10}, {"type": "O", "frame": 1, "at": 10},
        {"type": "O", "frame": 2, "at": 20}, {"type": "C", "frame": 2, "at": 26}, {"type": "C", "frame": 1, "at": 30}]}],
}  # fmt: skip


class State:
    """What the page changed: commands and marks."""

    def __init__(self) -> None:
        self.commands: list[dict[str, Any]] = []
        self.marks: dict[str, str] = {}
        self.asked: list[str] = []
        self.notes: list[dict[str, Any]] = []
        self.posted: list[dict[str, Any]] = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def log_message(self, *_: Any) -> None:
        pass

    def answer(
        self, body: bytes, kind: str = "application/json", status: int = 200, policy: str = POLICY
    ) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Content-Security-Policy": policy}
        for key, value in {**headers, "Cache-Control": "no-cache"}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def json(self, value: Any, status: int = 200) -> None:
        self.answer(json.dumps(value).encode(), status=status)

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        self.server.state.asked.append(self.path)
        if path.startswith("/api/"):
            return self.api(path[5:].split("/"), query)
        file = DIST / (path.lstrip("/") or "index.html")
        if not file.is_file() or DIST not in file.resolve().parents:
            return self.json({"error": "not found"}, 404)
        policy = VIEWER if path.startswith("/speedscope/") else POLICY
        return self.answer(
            file.read_bytes(), TYPES.get(file.suffix, "application/octet-stream"), policy=policy
        )

    def api(self, path: list[str], query: dict[str, list[str]]) -> None:
        number = lambda key, other: int(float(query.get(key, [other])[0]))  # noqa: E731
        if path == ["runs"]:
            return self.json([card(r, i) for i, r in enumerate(self.server.runs)])
        if path == ["compare"]:
            found = {}
            for i, run in enumerate(query["run"]):
                w = window(
                    query["name"][0], number("start", 0), number("stop", STEPS + 1), number("points", 1500)
                )
                shift = 1 + 0.02 * i
                found[run] = {**w, **{k: [x * shift for x in w[k]] for k in ("low", "high", "mean")}}
            return self.json(found)
        if len(path) == 2:
            return (
                self.json(run_info(path[1])) if path[1] in RUNS else self.json({"error": "no such run"}, 404)
            )
        rest = "/".join(path[2:])
        if rest == "data":
            spans = (number("start", 0), number("stop", STEPS + 1), number("points", 1500))
            return self.json({n: window(n, *spans) for n in query.get("name", [])})
        if rest == "stream":
            return self.stream()
        if rest.startswith("incidents/"):
            return self.json(next(x for x in self.marked() if x["id"] == path[3]))
        if rest.startswith("traces/"):
            return self.json(SPEEDSCOPE)
        made = {
            "series": series, "incidents": self.marked, "lineage": lineage, "ranks": ranks, "experts": experts,
            "notes": lambda: self.server.state.notes, "actions": lambda: self.server.state.commands,
            "events": lambda: [dict(event="precision", step=24_000, time=NOW - 50_000, format="bf16", reason="loss scale fell below 2^10")],
            "inspect": lambda: dict(steps=CHECKPOINTS, layers=[dict(index=i, kind="hybrid", heads=HEADS) for i in range(LAYERS)]),
            "inspect/heads": heads, "inspect/attention": lambda: attention(query), "inspect/histograms": histograms,
            "traces": lambda: [
                dict(id="step-049210", step=49_210, steps=3, time=NOW - 600, verdict="communication-bound", seconds=1.51,
                     reason="31% of a step waits for the all-reduce of gradients.", advice="Try larger buckets.",
                     shares=dict(compute=0.58, communication=0.31, memory=0.08, host=0.02, data=0.01),
                     top=[dict(name="nccl:all_reduce", seconds=0.47, share=0.31), dict(name="aten::mm", seconds=0.4, share=0.27)])
            ],
        }  # fmt: skip
        return self.json(made[rest]()) if rest in made else self.json({"error": "not found"}, 404)

    def marked(self) -> list[dict[str, Any]]:
        marks = self.server.state.marks
        return [{**x, "status": marks.get(x["id"], x["status"])} for x in incidents()]

    def stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            while not self.server.ended.wait(0.2):
                self.wfile.write(b": still here\n\n")
                self.wfile.flush()
        except OSError:
            return
        finally:
            self.close_connection = True

    def change(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers.get("X-Deepseek") != "1":
            return self.json({"error": "the header X-Deepseek is missing"}, 403)
        path = urlsplit(self.path).path
        state = self.server.state
        if path.endswith("/notes"):
            state.notes.append({**body, "id": len(state.notes) + 1, "time": time.time(), "by": "you"})
            return self.json(state.notes[-1])
        if path.endswith("/ablate"):
            return self.json(dict(loss=2.113, ablated_loss=2.1144, delta=0.0014))
        if path.endswith("/actions"):
            state.posted.append(body)
            result = {
                "text": "went back from step 50000 to 30000; the batches of steps 31214 to 31217 are left out"
            }
            arguments = {**body.get("arguments", {}), "incident": body.get("incident")}
            command = dict(id=len(state.commands) + 1, action=body["action"], arguments=arguments, by="you")
            command.update(status="done", result=result, created=time.time(), finished=time.time())
            state.commands.append(command)
            return self.json(command)
        state.marks[path.rsplit("/", 1)[1]] = body["status"]
        return self.json(body)

    do_POST = do_PATCH = change


class FakeServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.state, self.runs, self.ended = State(), list(RUNS), threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A page that was left hangs up in the middle of an answer: no error."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    """Serve the built page with invented answers on a free port of the loopback."""
    server = FakeServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
        thread.join(5)


if __name__ == "__main__":
    FakeServer(int(sys.argv[1]) if len(sys.argv) > 1 else 6170).serve_forever()
