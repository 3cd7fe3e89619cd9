"""Histograms of activations and weights, layer by layer, that neither hide outliers nor let them flatten the rest.

The bins lie between robust limits (a little beyond the 0.1% and 99.9% quantiles). What is outside is counted on either
side, and the smallest and largest value are told: a histogram whose tails were cut says so.

Shape letters: B rows, T positions, C hidden size.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from deepseek.batch import Batch
from deepseek.models import Transformer
from deepseek.models.transformer import Block
from deepseek.monitor.inspect.examine import evaluating

BINS = 64
TAIL = 0.001  #: quantile on either side beyond which bins do not reach (but for a margin of a tenth)
SAMPLE = 2**17  #: values that the quantiles are taken from


class Histogram:
    """Counts of a tensor's values, added up piece by piece; the limits are those of the first piece."""

    def __init__(self, bins: int = BINS) -> None:
        self.bins = bins
        self.low = self.high = 0.0
        self.counts = torch.zeros(bins + 2, dtype=torch.int64)
        self.count = self.nonfinite = self.zeros = 0
        self.least, self.most = math.inf, -math.inf
        self.sums = torch.zeros(4, dtype=torch.float64)  # Σx, Σx², Σx³, Σx⁴ of the finite values

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Count the values of ``x`` (any shape, any float dtype)."""
        flat = x.detach().float().flatten()
        finite = flat[flat.isfinite()]
        self.nonfinite += flat.numel() - finite.numel()
        if not finite.numel():
            return
        if not self.count:
            self.low, self.high = robust_limits(finite)
        place = (
            ((finite - self.low) * (self.bins / (self.high - self.low))).floor().clamp(-1, self.bins).long()
        )
        self.counts += torch.bincount(place + 1, minlength=self.bins + 2).cpu()
        self.count += finite.numel()
        self.zeros += int((finite == 0).sum())
        self.least, self.most = min(self.least, float(finite.min())), max(self.most, float(finite.max()))
        wide = finite.cpu().double()
        self.sums += torch.stack([wide.pow(n).sum() for n in (1, 2, 3, 4)])

    def to_dict(self) -> dict[str, Any]:
        """JSON. ``kurtosis`` is 3 for a normal distribution; large values mean outliers."""
        n = max(self.count, 1)
        m1, m2, m3, m4 = (self.sums / n).tolist()
        variance = max(m2 - m1 * m1, 0.0)
        fourth = m4 - 4 * m1 * m3 + 6 * m1 * m1 * m2 - 3 * m1**4
        return {
            "low": self.low,
            "high": self.high,
            "counts": self.counts[1:-1].tolist(),
            "below": int(self.counts[0]),
            "above": int(self.counts[-1]),
            "count": self.count,
            "zeros": self.zeros,
            "nonfinite": self.nonfinite,
            "min": self.least if self.count else None,
            "max": self.most if self.count else None,
            "mean": m1,
            "std": math.sqrt(variance),
            "rms": math.sqrt(m2),
            "kurtosis": fourth / variance**2 if variance > 0 else None,
        }


def robust_limits(x: Tensor, tail: float = TAIL) -> tuple[float, float]:
    """Limits a tenth beyond the quantiles ``tail`` and ``1 − tail`` of ``x``; never of width zero."""
    step = max(1, x.numel() // SAMPLE)
    low, high = (float(v) for v in torch.quantile(x[::step].cpu(), torch.tensor([tail, 1 - tail])))
    margin = (high - low) * 0.1 or max(abs(low) * 0.1, 1e-6)
    return low - margin, high + margin


@torch.no_grad()
def activation_histograms(model: Transformer, batch: Batch, rows: int = 8) -> list[dict[str, Any]]:
    """Per block the values of its input (the residual stream), attention output and feed-forward output; padding too
    counts.

    One forward pass of ``batch``, which is on the model's device.
    """
    found = [{name: Histogram() for name in ("residual", "attention", "feed-forward")} for _ in model.blocks]

    def keep(histogram: Histogram, of_input: bool) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            value = args[0] if of_input else out
            histogram.add(value[0] if isinstance(value, tuple) else value)

        return hook

    with ExitStack() as hooks, evaluating(model):
        for block, own in zip(model.blocks, found):
            parts = cast(Block, block)
            for module, name in (
                (parts, "residual"),
                (parts.attention, "attention"),
                (parts.ffn, "feed-forward"),
            ):
                hook = keep(own[name], name == "residual")
                hooks.callback(module.register_forward_hook(hook).remove)
        for part in batch.split(rows):
            model(part.tokens, part.documents, part.positions)
    return [{name: h.to_dict() for name, h in own.items()} for own in found]


def weight_histograms(model: Transformer) -> list[dict[str, Any]]:
    """Per block the values of each of its matrices, by name."""
    found = []
    for block in model.blocks:
        own = {}
        for name, weight in block.named_parameters():
            if weight.dim() >= 2:
                histogram = Histogram()
                histogram.add(weight)
                own[name] = histogram.to_dict()
        found.append(own)
    return found
