"""How fast each layer's weights move: the size of the update as a share of the size of the weights.

Between two checkpoints the update is what all steps in between add up to; the live series ``layer/*/update_ratio`` tell
single steps, and how much these vary. A ratio near 1e-3 a step is usual for Adam; a layer far above the others is
unstable, one far below has stopped to learn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek.weights import checkpoint


def layer_of(name: str) -> str:
    """The layer that a parameter belongs to: ``0``, ``1``, … for blocks, ``embedding``, ``head`` or ``norm``."""
    parts = name.split(".")
    return parts[1] if parts[0] == "blocks" else parts[0]


def update_ratios(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """``‖after − before‖ / ‖before‖`` per layer, Frobenius norms over all its parameters that both have.

    Buffers that are no weights (the routers' bias and averages) should be left out by the caller.
    """
    moved: dict[str, float] = {}
    size: dict[str, float] = {}
    for name, old in before.items():
        new = after.get(name)
        if new is None or new.shape != old.shape or not old.is_floating_point():
            continue
        layer = layer_of(name)
        moved[layer] = moved.get(layer, 0.0) + float(
            (new.float() - old.float()).square().sum(dtype=torch.float64)
        )
        size[layer] = size.get(layer, 0.0) + float(old.float().square().sum(dtype=torch.float64))
    return {k: math.sqrt(moved[k] / size[k]) if size[k] else math.inf for k in moved}


def checkpoint_updates(run: Path, parameters: Sequence[str], most: int = 8) -> list[dict[str, Any]]:
    """``update_ratios`` between successive checkpoints of a run, oldest first, for the last ``most`` of them.

    Args:
        parameters: the names of the model's parameters.
    """
    wanted, found = set(parameters), list[dict[str, Any]]()
    before: tuple[int, dict[str, Tensor]] | None = None
    for path in checkpoint.list_checkpoints(run)[-most:]:
        loaded = checkpoint.load(path, groups=("model",))
        now = {name: t for name, t in loaded.model.items() if name in wanted}
        if before is not None:
            ratios, steps = update_ratios(before[1], now), loaded.step - before[0]
            found.append({"from": before[0], "step": loaded.step, "layers": ratios,
                          "per_step": {k: v / max(steps, 1) for k, v in ratios.items()}})  # fmt: skip
        before = loaded.step, now
    return found


def recorded_updates(run: Path, points: int = 400) -> dict[str, Any]:
    """What the live probes recorded: per layer the update ratio over the steps, its mean and its variation.

    ``variation`` is the standard deviation of the logarithm: 0.1 means that steps differ by about 10%.
    """
    if not (run / "monitor").is_dir():
        return {}
    from deepseek.monitor.series import SeriesReader

    reader = SeriesReader(run / "monitor")
    found = {}
    for name in reader.names():
        parts = name.split("/")
        if len(parts) != 3 or parts[0] != "layer" or parts[2] != "update_ratio":
            continue
        window = reader.read(name, points=points)
        mean = torch.as_tensor(window.mean).double()
        good = mean[mean.isfinite() & (mean > 0)]
        found[parts[1]] = {
            "step": torch.as_tensor(window.step).tolist(),
            "mean": mean.tolist(),
            "average": float(good.mean()) if len(good) else None,
            "variation": float(good.log().std()) if len(good) > 1 else None,
        }
    return found
