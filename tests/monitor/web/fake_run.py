"""What the API would tell of a run that nobody trained: cards, incidents, lineage, experts, heads, traces."""

from __future__ import annotations

import base64
import itertools
from typing import Any

import numpy as np
from fake_series import CHECKPOINTS, EXPERTS, HEADS, LAYERS, LEAD, NOW, RANKS, SPIKE, STEPS, noise, values


def card(run: str, index: int = 0) -> dict[str, Any]:
    rough = noise(run, 48)
    spark = (2.1 + 0.03 * index + 5 * np.exp(-np.arange(48) / 9) + 0.06 * rough).round(4).tolist()
    status = ("running", "finished", "interrupted", "crashed")[index % 4]
    return {
        "id": run,
        "name": run.replace("~", "/"),
        "status": status,
        "step": STEPS if index == 0 else 60_000 - 1700 * index,
        "total_steps": 60_000,
        "loss": round(2.113 + 0.03 * index, 4),
        "tokens_per_second": round(182_000 - 3000.0 * index),
        "started": NOW - 86_400 * (index + 1),
        "updated": NOW - (2 if index == 0 else 3600 * index),
        "incidents_open": 3 if index == 0 else (2 if index == 3 else 0),
        "device": "8 × H100",
        "parameters": 3_420_000_000,
        "spark": spark,
    }


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
        "checkpoints": [
            {"step": s, "bytes": 37 * 2**30, "time": NOW - (STEPS - s) * 1.44} for s in CHECKPOINTS
        ],
        "pages": ["experts", "data", "precision", "lineage", "inspect"],
    }


TEXT = "aGVsbG8gd29ybGQ=" * 9 + "\n" + "0x7f 0x45 0x4c 0x46 " * 12


def incidents() -> list[dict[str, Any]]:
    movers = [
        {"name": "layer/7/grad_norm", "step": LEAD, "score": 41.2, "before": 0.36, "after": 16.3},
        {"name": "train/grad_norm", "step": LEAD + 1, "score": 33.0, "before": 0.35, "after": 18.1},
        {"name": "layer/6/grad_norm", "step": LEAD + 1, "score": 18.8, "before": 0.35, "after": 1.6},
        {"name": "layer/8/grad_norm", "step": LEAD + 1, "score": 17.0, "before": 0.36, "after": 1.5},
        {"name": "train/loss", "step": SPIKE, "score": 52.7, "before": 2.09, "after": 8.11},
        {"name": "train/bits_per_byte", "step": SPIKE, "score": 52.6, "before": 0.94, "after": 3.65},
        {"name": "precision/nonfinite", "step": SPIKE, "score": 9.0, "before": 0, "after": 1},
    ]
    steps = list(range(SPIKE - 40, SPIKE + 21))
    grid = [[float(f"{values(f'layer/{i}/grad_norm')[s]:.4g}") for s in steps] for i in range(LAYERS)]
    samples = [
        {
            "row": 11,
            "column": 0,
            "length": 4096,
            "source": "web",
            "path": "corpus/web/shard-00417.jsonl",
            "offset": 88_231_004,
            "start": 0,
            "loss": 9.72,
            "text": TEXT,
        },
        {
            "row": 3,
            "column": 0,
            "length": 1880,
            "source": "code",
            "path": "corpus/code/shard-00031.jsonl",
            "offset": 1_204_551,
            "start": 0,
            "loss": 3.41,
            "text": "def resolve(path):\n    return path if path.exists() else None\n",
        },
        {
            "row": 7,
            "column": 0,
            "length": 2216,
            "source": "papers",
            "path": "corpus/papers/shard-00102.jsonl",
            "offset": 77_120,
            "start": 512,
            "loss": 2.48,
            "text": "We consider the limit in which the number of experts grows.",
        },
        {
            "row": 1,
            "column": 0,
            "length": 901,
            "source": "dialogue",
            "path": "corpus/dialogue/shard-7.jsonl",
            "offset": 5_110,
            "start": 0,
            "loss": 2.07,
            "text": "Could you tell me how the tide tables are made?",
        },
    ]
    spike = {
        "id": "3",
        "step": SPIKE,
        "first_step": LEAD,
        "kind": "loss_spike",
        "severity": "critical",
        "verdict": "DATA",
        "confidence": 0.91,
        "title": "Loss jumped from 2.09 to 8.11 in one step",
        "summary": "Layer 7's gradient rose three steps before the loss. One document of 4,096 tokens, base64 without "
        "spaces, carries 71% of the batch's loss; the same step in the sibling run jumped too.",
        "evidence": [
            {
                "text": "The same data step jumped in sweep/lr-2e-4, which has other weights.",
                "series": "train/loss",
                "step": SPIKE,
                "value": 7.9,
                "score": 48.0,
            },
            {
                "text": "Row 11 alone has a loss of 9.72; the other rows are at their usual 2.1.",
                "series": "train/loss",
                "step": SPIKE,
                "value": 9.72,
                "score": 52.7,
            },
            {
                "text": "Layer 7's gradient norm led the loss by three steps.",
                "series": "layer/7/grad_norm",
                "step": LEAD,
                "value": 16.3,
                "score": 41.2,
            },
            {
                "text": "No rank was slow and no value was lost before the step.",
                "series": "rank/5/step_seconds",
                "step": SPIKE,
                "value": 1.39,
                "score": 0.4,
            },
        ],
        "movers": movers,
        "window": [SPIKE - 200, SPIKE + 200],
        "samples": samples,
        "gradient_map": {"layers": list(range(LAYERS)), "steps": steps, "values": grid},
        "status": "open",
        "actions": [],
        "time": NOW - 27_000,
        "siblings": [
            {"run": "sweep~lr-2e-4", "step": SPIKE, "loss": 7.9},
            {"run": "sweep~lr-4e-4", "step": SPIKE, "loss": 8.3},
        ],
    }
    rest = {"evidence": [], "samples": [], "gradient_map": {}, "status": "open", "time": NOW - 9000}
    slow = dict(
        id="4",
        step=41_003,
        first_step=41_001,
        kind="slow_rank",
        severity="warning",
        verdict="HARDWARE",
        confidence=0.88,
        title="Rank 5 is 1.5 times slower than the others",
        summary="Every rank waits for it: 34% of the throughput is gone.",
        window=[40_800, 41_200],
        movers=[
            {"name": "rank/5/step_seconds", "step": 41_001, "score": 22.1, "before": 1.39, "after": 2.08},
            {
                "name": "train/tokens_per_second",
                "step": 41_001,
                "score": -19.0,
                "before": 182_000,
                "after": 120_000,
            },
        ],
        actions=[],
        **rest,
    )
    drift = dict(
        id="5",
        step=46_610,
        first_step=46_501,
        kind="data_drift",
        severity="warning",
        verdict="DATA",
        confidence=0.84,
        title="The source dialogue has shifted: PSI 0.32",
        summary="Documents are shorter and their bytes more even than in the reference window.",
        window=[46_400, 46_800],
        movers=[{"name": "data/dialogue/psi", "step": 46_501, "score": 38.0, "before": 0.01, "after": 0.32}],
        actions=[],
        **rest,
    )
    return [spike, slow, drift]


def lineage() -> dict[str, Any]:
    rows: list[dict[str, Any]] = [{"kind": "start", "step": 0, "time": NOW - 90_000}]
    rows += [
        {"kind": "checkpoint", "step": s, "time": NOW - 90_000 + 1.5 * s, "bytes": 37 * 2**30}
        for s in CHECKPOINTS[:9]
    ]
    rows.append({"kind": "interrupted", "step": 18_640, "time": NOW - 60_000, "reason": "SIGTERM"})
    rows.append(
        {
            "kind": "resume",
            "step": 18_000,
            "to": 18_000,
            "time": NOW - 59_000,
            "by": "deepseek pretrain --resume",
        }
    )
    rows += [{"kind": "checkpoint", "step": s, "time": NOW - 59_000 + s - 18_000} for s in CHECKPOINTS[9:14]]
    rows.append({"kind": "config", "step": 24_500, "time": NOW - 52_000, "what": "train.lr 4e-4 → 3e-4"})
    rows.append(
        {
            "kind": "rollback",
            "step": 28_000,
            "from_step": 29_400,
            "time": NOW - 44_000,
            "steps": [29_380, 29_400],
        }
    )
    rows += [{"kind": "checkpoint", "step": s, "time": NOW - 43_000 + s - 28_000} for s in CHECKPOINTS[14:]]
    return {
        "lines": [{**{k: v for k, v in r.items() if k in ("kind", "step", "time")}, "data": r} for r in rows],
        "events": [],
    }


def ranks() -> dict[str, Any]:
    edges = np.linspace(0, STEPS, 181).astype(int)
    columns = [values(f"rank/{r}/step_seconds") for r in range(RANKS)]
    table = [[float(f"{c[a:b].max():.4g}") for a, b in itertools.pairwise(edges)] for c in columns]
    return {"ranks": list(range(RANKS)), "steps": edges[1:].tolist(), "seconds": table}


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
            {
                "index": i,
                "load": (now / now.mean()).round(4).tolist(),
                "bias": (0.01 * rough).round(5).tolist(),
                "entropy": round(3.1 - 0.02 * i, 3),
                "max_vio": round(float(now.max() / now.mean() - 1), 3),
                "dead": int(i == 9),
                "coverage": round(1 - (i == 9) / EXPERTS, 4),
                "history": {"steps": steps.tolist(), "load": load.round(4).tolist()},
            }
        )
    return {"layers": layers}


def heads() -> dict[str, Any]:
    layers = []
    for i in range(LAYERS):
        rows = []
        for h in range(HEADS):
            r = noise(f"head{i}.{h}", 6)
            bad = (i, h) == (6, 3)
            rows.append(
                {
                    "output_norm": 0.01 if bad else round(1 + 0.12 * r[0] + 0.03 * i, 3),
                    "entropy": 0.02 if bad else round(abs(2.6 + 0.5 * r[1]), 3),
                    "sink": 0.98 if bad else round(abs(0.2 + 0.1 * r[2]), 3),
                    "max_logit": 61.0 if bad else round(abs(9 + 2 * r[3]), 2),
                    "gate": round(0.5 + 0.1 * r[4], 3),
                    "score": 11.4 if bad else round(abs(r[5]), 2),
                }
            )
        layers.append({"index": i, "heads": rows})
    suspects = [
        {
            "layer": 6,
            "head": 3,
            "score": 11.4,
            "why": "adds almost nothing; 98% of its attention sits on the first token",
        },
        {"layer": 2, "head": 1, "score": 3.1, "why": "its output equals head 5's (cosine 0.998)"},
        {
            "layer": 10,
            "head": 7,
            "score": 2.6,
            "why": "largest logit 14.9, half as much again as its layer's median",
        },
    ]
    load = [
        {
            "index": i,
            "experts": [
                {"load": round(float(np.exp(0.22 * noise(f"load{i}", EXPERTS)[e])), 3), "gate_norm": 1.0}
                for e in range(EXPERTS)
            ],
        }
        for i in range(1, LAYERS)
    ]
    load[8]["experts"][4]["load"] = 0.0
    dead = [{"layer": 9, "expert": 4, "score": 14.0, "why": "no token reached it in 28,000 steps"}]
    return {"step": STEPS, "layers": layers, "suspects": suspects, "experts": load, "suspects_experts": dead}


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
    tokens = [{"id": i, "text": f" {words[(i * 7) % len(words)]}"} for i in range(start, start + size)]
    values_ = base64.b64encode((255 * (map_ / top) ** 0.5).astype(np.uint8).tobytes()).decode()
    return {
        "size": size,
        "length": length,
        "start": start,
        "pixels": pixels,
        "tokens": tokens,
        "values": values_,
        "scale": round(0.31 * top, 4),
        "gamma": 2.0,
        "branch": "",
        "branches": ["window", "pooled"],
    }


def histograms() -> dict[str, Any]:
    def one(name: str, wide: float) -> dict[str, Any]:
        x = noise(name) * wide
        low, high = np.quantile(x, [0.001, 0.999])
        counts = np.histogram(x, np.linspace(low, high, 65))[0].tolist()
        told = {
            "low": low,
            "high": high,
            "counts": counts,
            "below": 50,
            "above": 50,
            "count": len(x),
            "zeros": 0,
            "nonfinite": 0,
        }
        return {**told, "min": x.min(), "max": x.max(), "rms": float(x.std()), "kurtosis": 3.02}

    kinds = {"activations": ("residual", "attention", "feed-forward"), "weights": ("attention.q", "moe.up")}
    made = lambda i, kind: {n: one(f"{n}{i}", 1 + 0.12 * i) for n in kinds[kind]}  # noqa: E731
    return {"layers": [dict(index=i, **{kind: made(i, kind) for kind in kinds}) for i in range(LAYERS)]}


SPEEDSCOPE = {
    "$schema": "https://www.speedscope.app/file-format-schema.json",
    "shared": {"frames": [{"name": "forward"}, {"name": "backward"}, {"name": "all_reduce"}]},
    "profiles": [
        {
            "type": "evented",
            "name": "rank 0",
            "unit": "milliseconds",
            "startValue": 0,
            "endValue": 30,
            "events": [
                {"type": "O", "frame": 0, "at": 0},
                {"type": "C", "frame": 0, "at": 10},
                {"type": "O", "frame": 1, "at": 10},
                {"type": "O", "frame": 2, "at": 20},
                {"type": "C", "frame": 2, "at": 26},
                {"type": "C", "frame": 1, "at": 30},
            ],
        }
    ],
}


def traces() -> list[dict[str, Any]]:
    told = {
        "verdict": "communication-bound",
        "reason": "31% of a step waits for the all-reduce of gradients.",
    }
    shares = {"compute": 0.58, "communication": 0.31, "memory": 0.08, "host": 0.02, "data": 0.01}
    top = [
        {"name": n, "seconds": 1.51 * x, "share": x}
        for n, x in (("nccl:all_reduce", 0.31), ("aten::mm", 0.27))
    ]
    where = {"id": "step-049210", "step": 49_210, "steps": 3, "time": NOW - 600, "seconds": 1.51}
    return [{**where, **told, "advice": "Try larger buckets.", "shares": shares, "top": top}]


def switches() -> list[dict[str, Any]]:
    why = "loss scale fell below 2^10"
    return [{"event": "precision", "step": 24_000, "time": NOW - 50_000, "format": "bf16", "reason": why}]


def inspected() -> dict[str, Any]:
    return {
        "steps": CHECKPOINTS,
        "layers": [{"index": i, "kind": "hybrid", "heads": HEADS} for i in range(LAYERS)],
    }
