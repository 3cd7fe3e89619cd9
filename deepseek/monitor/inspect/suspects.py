"""Which heads (and experts) look wrong, ranked, each with its reason.

Every reason has its own measure, scaled so that 1 is where suspicion begins. What is usual is learnt from the model
itself: a head is compared, by robust z-scores, with the other heads of its layer and with the heads of all layers.

* **duplicated**: its attention pattern *and* its contribution to the residual stream, or its weights, are those of
  another head of the layer.
* **saturated**: its logits are far larger than those of other heads, and its attention is closer to one-hot.
* **noisy**: it writes more than the others do, and the loss would fall if it wrote less. In a trained model the loss
  is stationary in the scale of every head, because that scale is a parameter; a head that was disturbed is not. Or its
  own weights are unusually large, which is what added noise does before it harms.
* **dead**: it writes almost nothing. **broken**: its figures are not finite.

Shape letters: L layers, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deepseek.monitor.inspect.examine import LayerHeads

ALIKE = 0.98  #: cosine from which two heads or experts count as one


@dataclass(frozen=True)
class Suspect:
    """A head or an expert that looks wrong: ``score`` ≥ 1, the larger the worse; ``why`` is for people."""

    layer: int
    head: int | None
    expert: int | None
    kind: str
    score: float
    why: str

    def to_dict(self) -> dict[str, Any]:
        part = {"head": self.head} if self.head is not None else {"expert": self.expert}
        return {
            "layer": self.layer,
            **part,
            "kind": self.kind,
            "score": round(self.score, 3),
            "why": self.why,
        }


def duplicate_score(cosine: float) -> float:
    """1 at a cosine of ``ALIKE``, growing with the digits of agreement; below 0.5 for what is merely similar."""
    return math.log10(1 / max(1 - cosine, 1e-6)) / math.log10(1 / (1 - ALIKE))


@dataclass(frozen=True)
class Unusual:
    """Robust z-scores of one figure: of each head among the others of its layer, and among all others. ``[L][H]``."""

    layer: list[Tensor]
    model: list[Tensor]

    def both(self, index: int, head: int) -> float:
        """The mean of the two: what is unusual for the model but usual in its layer counts half."""
        return float(self.layer[index][head] + self.model[index][head]) / 2


def unusual(figures: Sequence[Tensor], floor: float) -> Unusual:
    """z-scores against the median of the *other* heads, so that one outlier among four does not hide itself.

    Args:
        figures: ``[H]`` per layer. floor: the smallest spread that is believed, in the figure's unit.
    """
    centred = [x - _other_medians(x) for x in figures]
    whole = torch.cat(list(figures))
    within = _spread(torch.cat([x - x.median() for x in figures]), floor)
    over_all = _other_medians(whole)
    spread = _spread(whole - whole.median(), floor)
    return Unusual(
        [c / within for c in centred],
        list(((whole - over_all) / spread).split([len(x) for x in figures])),
    )


def _other_medians(x: Tensor) -> Tensor:
    """Of each entry the median of all others (the mean of the middle two where these are even in number)."""
    if len(x) < 2:
        return x.clone()
    rest = x.repeat(len(x), 1)[~torch.eye(len(x), dtype=torch.bool)].view(len(x), -1)
    return rest.double().quantile(0.5, dim=1).to(x.dtype)


def _spread(deviations: Tensor, floor: float) -> float:
    """The median absolute deviation as a standard deviation, at least ``floor``."""
    return max(1.4826 * float(deviations.abs().median()), floor)


Z_SUSPECT = 4.0  #: robust z-score at which a head becomes suspect
LOUDEST = 1.25  #: the size of weights alone never makes a head more suspect than this
MUTE = 20.0  #: a head that writes this many times less than the middle head of its layer is dead


def rank_heads(layers: Sequence[LayerHeads]) -> list[Suspect]:
    """Every head with its worst reason, the most suspect first; what has a score below 1 is no suspect."""
    return sorted((_worst(found) for found in _reasons(layers)), key=lambda s: -s.score)


def suspect_heads(layers: Sequence[LayerHeads]) -> list[Suspect]:
    """The heads of ``rank_heads`` with a score of 1 or more."""
    return [suspect for suspect in rank_heads(layers) if suspect.score >= 1]


def _worst(found: list[Suspect]) -> Suspect:
    return max(found, key=lambda s: s.score)


def _reasons(layers: Sequence[LayerHeads]) -> list[list[Suspect]]:
    """Of every head, a ``Suspect`` for each reason."""
    finite = [_finite(layer) for layer in layers]
    norm = unusual([x.statistics.output_norm.clamp(min=1e-12).log() for x in finite], 0.25)
    logit = unusual([torch.asinh(x.statistics.max_logit) for x in finite], 0.25)
    sharp = unusual([1 - x.statistics.spread for x in finite], 0.05)
    removal = unusual([-x.removal.nan_to_num(0.0) for x in finite], 5e-4)
    size = unusual([x.size.clamp(min=1e-12).log() for x in finite], 0.07)
    found = []
    for i, layer in enumerate(layers):
        for h in range(len(layer.removal)):
            found.append([
                _broken(layer, h),
                _duplicated(layer, h),
                _saturated(finite[i], i, h, logit, sharp),
                _noisy(finite[i], i, h, norm, removal, size),
                _dead(finite[i], h),
            ])  # fmt: skip
    return found


def _finite(layer: LayerHeads) -> LayerHeads:
    """The layer with figures that are not finite replaced by the middle of the others: they must not spoil the rest."""

    def fill(x: Tensor) -> Tensor:
        good = x[x.isfinite()]
        return torch.where(x.isfinite(), x, good.median() if len(good) else torch.zeros_like(x))

    statistics = type(layer.statistics)(*(fill(x) for x in layer.statistics))
    return replace(layer, statistics=statistics, removal=fill(layer.removal))


def _broken(layer: LayerHeads, head: int) -> Suspect:
    s = layer.statistics
    ok = all(bool(x[head].isfinite()) for x in (s.entropy, s.max_logit, s.output_norm))
    return Suspect(
        layer.index, head, None, "broken", 0.0 if ok else 99.0, "broken: its figures are not finite"
    )


def _duplicated(layer: LayerHeads, head: int) -> Suspect:
    same = torch.minimum(layer.patterns, layer.outputs)
    alike = torch.maximum(same, layer.weights).nan_to_num(0.0).clone().fill_diagonal_(-1.0)[head]
    if len(alike) < 2:
        return Suspect(layer.index, head, None, "duplicated", 0.0, "")
    cosine, twin = float(alike.max()), int(alike.argmax())
    what = "its attention and its output" if float(same[head, twin]) >= cosine else "its weights"
    why = f"duplicated: {what} are those of head {twin} (cosine {cosine:.4f})"
    return Suspect(layer.index, head, None, "duplicated", max(0.0, duplicate_score(cosine)), why)


def _saturated(layer: LayerHeads, i: int, head: int, logit: Unusual, sharp: Unusual) -> Suspect:
    s = layer.statistics
    large, peaked = logit.both(i, head), sharp.both(i, head)
    score = (2 * max(large, 0.0) + min(max(peaked, 0.0), 2 * Z_SUSPECT)) / 3 / Z_SUSPECT if large > 0 else 0.0
    others = torch.cat((s.max_logit[:head], s.max_logit[head + 1 :]))
    usual = float(others.median()) if len(others) else float("nan")
    why = (
        f"saturated: largest logit {float(s.max_logit[head]):.3g} where the layer's other heads have {usual:.3g}; "
        f"the mean largest probability is {float(s.peak[head]):.2f}"
    )
    return Suspect(layer.index, head, None, "saturated", score, why)


def _noisy(layer: LayerHeads, i: int, head: int, norm: Unusual, removal: Unusual, size: Unusual) -> Suspect:
    harm, loud, big = (figure.both(i, head) for figure in (removal, norm, size))
    score = max((harm + max(loud, 0.0)) / 2, 0.75 * harm) / Z_SUSPECT if harm > 0 else 0.0
    slope = -float(layer.removal[head])
    why = (
        f"noisy: as its output shrinks, the loss falls at a rate of {slope:.2g} nats (z {harm:.1f}); it writes "
        f"{float(layer.statistics.output_norm[head]):.3g} (z {loud:.1f})"
    )
    if big / Z_SUSPECT * 0.75 > score:
        score = min(0.75 * big / Z_SUSPECT, LOUDEST)
        why = (
            f"noisy: its weights are larger than the others' (z {big:.1f}), as if noise had been added; it writes "
            f"{float(layer.statistics.output_norm[head]):.3g} (z {loud:.1f})"
        )
    return Suspect(layer.index, head, None, "noisy", score, why)


def _dead(layer: LayerHeads, head: int) -> Suspect:
    norms = layer.statistics.output_norm
    others = torch.cat((norms[:head], norms[head + 1 :]))
    middle, own = float(others.median()) if len(others) else float(norms[head]), float(norms[head])
    if not middle > 0:
        return Suspect(layer.index, head, None, "dead", 0.0, "")
    score = max(0.0, math.log(middle / max(own, middle * 1e-6)) / math.log(MUTE))
    why = f"dead: it writes {own:.3g} where the middle head of its layer writes {middle:.3g}"
    return Suspect(layer.index, head, None, "dead", score, why)
