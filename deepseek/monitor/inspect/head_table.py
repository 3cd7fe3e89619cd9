"""What is told about the heads of a model: figures, z-scores, reasons and ranks, ready for JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from deepseek.monitor.inspect.examine import LayerHeads
from deepseek.monitor.inspect.heads import HeadStatistics
from deepseek.monitor.inspect.suspects import Suspect, rank_heads, unusual

Answer = dict[str, Any]
T = TypeVar("T")

KINDS = {"F": "full", "L": "window", "H": "hybrid"}  #: what the letters of a model's pattern stand for
COLOURED = ("output_norm", "entropy", "sink", "max_logit", "gate")  #: figures that get z-scores


def head_table(layers: Sequence[LayerHeads]) -> Answer:
    """``layers``: per layer its heads; ``suspects``: those with a score of 1 or more; ``ranking``: the ten highest."""
    ranked = rank_heads(layers)
    worst = {(s.layer, s.head): s for s in ranked}
    scores = _z_scores(layers)
    told = [
        {
            "index": layer.index,
            "kind": KINDS[layer.kind],
            "heads": [
                {
                    **_figures(layer, h),
                    **_reason(worst[layer.index, h]),
                    "z": {name: z[layer.index][h] for name, z in scores.items() if layer.index in z},
                }
                for h in range(len(layer.removal))
            ],
        }
        for layer in layers
    ]
    suspects = [s.to_dict() for s in ranked if s.score >= 1]
    return {"layers": told, "suspects": suspects, "ranking": [s.to_dict() for s in ranked[:10]]}


def _reason(suspect: Suspect) -> Answer:
    return {"score": suspect.score, "kind": suspect.kind, "why": suspect.why}


def _figures(layer: LayerHeads, head: int) -> Answer:
    figures = {name: float(value[head]) for name, value in layer.statistics._asdict().items()}
    alike = (
        torch.minimum(layer.patterns, layer.outputs).maximum(layer.weights).clone().fill_diagonal_(-1.0)[head]
    )
    alone = len(alike) < 2
    return {
        "index": head,
        **figures,
        "removal": float(layer.removal[head]),
        "size": float(layer.size[head]),
        "similarity": None if alone else float(alike.max()),
        "twin": None if alone else int(alike.argmax()),
    }


def _z_scores(layers: Sequence[LayerHeads]) -> dict[str, dict[int, list[float]]]:
    """Of each figure that the grid is coloured by, the z-scores of the heads of every layer that has it."""
    found = {}
    for name in COLOURED:
        figures = {layer.index: _scale(name, layer.statistics) for layer in layers}
        figures = {i: x for i, x in figures.items() if bool(x.isfinite().all())}
        if figures:
            scores = unusual(list(figures.values()), 0.05).layer
            found[name] = {i: z.tolist() for i, z in zip(figures, scores)}
    return found


def _scale(name: str, statistics: HeadStatistics) -> Tensor:
    """The figure on the scale on which heads are compared."""
    value: Tensor = getattr(statistics, name)
    if name == "output_norm":
        return value.clamp(min=1e-12).log()
    if name == "max_logit":
        return torch.asinh(value)
    return value


def plain(value: T) -> T:
    """``value`` with numbers that JSON lacks as ``None``."""
    found: Any = value
    if isinstance(value, float) and not math.isfinite(value):
        found = None
    elif isinstance(value, dict):
        found = {k: plain(v) for k, v in value.items()}
    elif isinstance(value, (list, tuple)):
        found = [plain(v) for v in value]
    return found
