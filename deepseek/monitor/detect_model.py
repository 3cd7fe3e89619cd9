"""Detectors of the model's parts and of its data: experts and routers, weights, updates, sources.

They look at many series at once: ``[L, E]`` layers and experts, or one value a layer or a source.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from deepseek.monitor.baseline import FIRST, Floats, Ints
from deepseek.monitor.detectors import (
    Alarm,
    DetectConfig,
    Detector,
    Divergence,
    Excess,
    Growth,
    Jointly,
    NonFinite,
    Precision,
    View,
)


class Experts(Detector):
    """Experts that get no tokens any more, and routers that send everything to a few of them.

    Layers with as many experts as each other are looked at together: arrays are ``[L, E]``.
    """

    ROWS = 5

    def __init__(self, config: DetectConfig) -> None:
        super().__init__(config)
        self._size, self._found = -1, dict[int, tuple[list[str], Ints]]()

    def check(self, view: View) -> Iterator[Alarm]:
        for size, (layers, places) in self._layers(view).items():
            load = view.values(places)
            total = load.sum(1, keepdims=True)
            if np.isfinite(total).all() and (total > 0).all():
                load = load / total
                yield from self._dead(view, size, layers, load)
                yield from self._collapse(view, size, layers, load)

    def _layers(self, view: View) -> dict[int, tuple[list[str], Ints]]:
        """Layers and places ``[L, E]`` by the number of experts."""
        if self._size != len(view.base.names):
            self._size, by_layer = len(view.base.names), dict[str, list[int]]()
            labels, places = view.groups("expert", "load")
            for label, place in zip(labels, places, strict=True):
                by_layer.setdefault(label.split("/")[0], []).append(int(place))
            sizes = sorted({len(p) for p in by_layer.values() if len(p) > 1})
            self._found = {
                n: ([x for x, p in by_layer.items() if len(p) == n],
                    np.array([p for p in by_layer.values() if len(p) == n], np.int64))
                for n in sizes
            }  # fmt: skip
        return self._found

    def _recall(self, key: str, start: Floats) -> Floats:
        """What was kept under ``key``, if it still has the shape of ``start``."""
        kept = self.memory.get(key)
        kept = start if kept is None else np.asarray(kept, float)
        return kept if kept.shape == start.shape else start

    def _dead(self, view: View, size: int, layers: list[str], load: Floats) -> Iterator[Alarm]:
        fair = 1 / size
        run, mean = self._recall(f"run {size}", np.zeros_like(load)), self._recall(f"mean {size}", load)
        low = load < np.minimum(0.05 * fair, 0.2 * mean)
        # An expert that fades may come back by its bias; one that is cut off from one row to the next does not.
        last, abrupt = self._recall(f"last {size}", load), self._recall(f"abrupt {size}", np.zeros_like(load))
        abrupt = np.where(low & (run == 0), last > 0.5 * mean, abrupt)
        run = np.where(low, run + 1, 0.0)
        mean = np.where(low, mean, 0.95 * mean + 0.05 * load)
        for key, kept in (("run", run), ("mean", mean), ("last", load), ("abrupt", abrupt)):
            self.memory[f"{key} {size}"] = kept
        if run.max() < self.config.dead_rows or self.memory.get(f"n {size}", 0) < self.config.settled:
            return
        patience = np.where(abrupt > 0, self.config.dead_rows, 2 * self.config.dead_rows)
        for k, e in np.argwhere((run == patience) & (mean > 0.15 * fair)).tolist():
            name = view.base.names[self._found[size][1][k, e]]
            yield Alarm(
                "dead_expert", name, view.step, float(load[k, e]), float(mean[k, e] / fair),
                f"expert {name.split('/')[2]} of layer {layers[k]} got no tokens for {int(run[k, e])} steps "
                f"(its share was {mean[k, e]:.1%})",
            )  # fmt: skip

    def _collapse(self, view: View, size: int, layers: list[str], load: Floats) -> Iterator[Alarm]:
        entropy = -(load * np.log(np.maximum(load, 1e-12))).sum(1) / math.log(size)
        usual = self._recall(f"entropy {size}", entropy)
        low, n = self._recall(f"low {size}", np.zeros(len(layers))), self.memory.get(f"n {size}", 0)
        falls = (entropy < np.minimum(0.75 * usual, usual - 0.15)) & (n >= self.config.settled)
        low = np.where(falls, low + 1, 0.0)
        usual = np.where(falls, usual, usual + max(0.03, 1 / (n + 1)) * (entropy - usual))
        for k in np.nonzero(low == self.ROWS)[0]:
            top = int(load[k].argmax())
            name = view.base.names[self._found[size][1][k, top]]
            yield Alarm(
                "router_collapse", name, view.step, float(load[k, top]), float(usual[k] - entropy[k]) * 20,
                f"layer {layers[k]} sends {load[k, top]:.0%} of its tokens to expert {name.split('/')[2]}; entropy of "
                f"the load {entropy[k]:.2f} of 1, usually {usual[k]:.2f}", "critical",
            )  # fmt: skip
        settled = low >= 10 * self.ROWS  # it has become the usual
        usual, low = np.where(settled, entropy, usual), np.where(settled, 0.0, low)
        self.memory.update({f"entropy {size}": usual, f"low {size}": low, f"n {size}": n + 1})


class Sources(Detector):
    """A source of data changes: its loss, length, entropy, duplicates, or the stability index of its tokens."""

    def check(self, view: View) -> Iterator[Alarm]:
        for metric in ("loss", "length", "entropy", "duplicates"):
            labels, places = view.groups("data", metric)
            base, bound = view.base, self.config.source_sum
            if not len(places) or not np.isfinite(view.values(places)).any():
                continue
            up = np.maximum(base.up[places] / 2, base.long_up[places])
            down = np.maximum(base.down[places] / 2, base.long_down[places])
            falls = metric in ("length", "entropy")  # a loss falls by learning, duplicates by their window
            for k in np.nonzero((up > bound) | (falls & (down > bound)))[0]:
                base.forget(places[k : k + 1])
                yield self._alarm(view, f"data/{labels[k]}/{metric}", float(max(up[k], down[k])))
        yield from self._psi(view)

    def _psi(self, view: View) -> Iterator[Alarm]:
        for source in view.groups("data", "psi")[0]:
            name = f"data/{source}/psi"
            value = view.row.get(name)
            if value is None or not math.isfinite(value):
                continue
            usual, run = self.memory.get(name, [value, 0])
            # Small windows lie above zero by chance, each source by its own amount.
            high = value > max(self.config.psi, 3 * usual)
            run, usual = (run + 1, usual) if high else (0, usual + 0.1 * (value - usual))
            self.memory[name] = [usual, run]
            if run == 3:
                yield self._alarm(view, name, value / self.config.psi)

    @staticmethod
    def _alarm(view: View, name: str, score: float) -> Alarm:
        value, usual = view.row.get(name, math.nan), view.base.expected(view.base.place[name])
        source, metric = name.split("/", 1)[1].rsplit("/", 1)
        text = f"source {source}: {metric} {value:.4g}, expected {usual:.4g}"
        return Alarm("data_drift", name, view.step, value, score, text)


class Weights(Detector):
    """One layer's weight norm jumped while updates were as usual: the optimizer did not write that.

    By the triangle inequality the norm of ``w + d`` differs from that of ``w`` by at most ``|d|``, the update ratio
    times ``|w|``, and in fact by far less, for updates have little in common with the weights. What is left over came
    from elsewhere: a flipped bit, a bad copy, a bug that writes.
    """

    ROWS = 6  #: samples before it is known how norms change

    def check(self, view: View) -> Iterator[Alarm]:
        labels, places = view.groups("layer", "weight_norm")
        if not len(places):
            return
        now, lost = view.values(places), view.base.lost[view.now, places]
        if not (np.isfinite(now).any() or lost.any()):
            return
        last = np.asarray(self.memory.get("norm", []), float)
        gap = view.step - self.memory.get("step", view.step)
        self.memory.update(norm=[v if math.isfinite(v) else 0.0 for v in now.tolist()], step=view.step)
        if len(last) != len(now) or gap < 1:
            return
        change = np.abs(now - last) / np.maximum(last, 1e-30)
        change[np.isnan(change)] = 0.0
        change[lost & ~np.isfinite(now) & (last > 0)] = np.inf
        allowed = self._allowed(view, labels) * gap
        bounded = np.minimum(change, 1.0)  # what a first sample may teach: infinity would stay for good
        usual = np.asarray(self.memory.get("usual", bounded), float)
        usual = np.where(np.isfinite(usual), usual, bounded) if len(usual) == len(change) else bounded
        odd = (change > 0.2 * allowed + 0.005) & (last > 0)
        growth = change / np.maximum(usual, 1e-4)
        odd &= (growth > 7) & (float(np.median(growth)) < 3)  # if all layers move, it is the optimizer
        odd &= self.memory.get("n", 0) >= self.ROWS
        n = self.memory.get("n", 0)
        rate = max(0.25, 1 / (n + 1))
        most = 4 * usual + 0.002 if n >= self.ROWS else np.full_like(usual, 1.0)
        self.memory.update(usual=(usual + rate * (np.minimum(change, most) - usual)).tolist(), n=n + 1)
        for k in np.nonzero(odd)[0][:3]:
            limit = f"an update changes them by {allowed[k]:.2%} at most"
            text = limit if change[k] > allowed[k] else f"usually they change by {usual[k]:.2%}"
            yield Alarm(
                "corruption", f"layer/{labels[k]}/weight_norm", view.step, float(now[k]),
                float(min(change[k] / (usual[k] + 1e-3), 1e6)),
                f"weights of layer {labels[k]} went from norm {last[k]:.4g} to {now[k]:.4g}, {change[k]:.2%}, while "
                f"{text}",
                "critical",
            )  # fmt: skip

    @staticmethod
    def _allowed(view: View, labels: list[str]) -> Floats:
        """The most that an update may change each layer by, relative to its weights."""
        known, places = view.groups("layer", "update_ratio")
        ratio = np.full(len(labels), np.nan)
        if len(places):
            at = {label: k for k, label in enumerate(known)}
            where = np.array([at.get(label, -1) for label in labels])
            now, usual = view.values(places), np.exp(np.minimum(view.base.level[places], 700.0))
            # An update that holds the corruption itself says nothing: no more than a few times the usual one.
            limit = np.where(view.base.count[places] > FIRST, np.fmin(now, 5 * usual), now)
            ratio = np.where(where >= 0, limit[where], np.nan)
        middle = float(np.nanmedian(ratio)) if np.isfinite(ratio).any() else 0.02
        return np.fmax(np.where(np.isfinite(ratio), ratio, 0.02), middle)


class Updates(Detector):
    """Updates of most layers change size at once, in proportion to the weights: learning rate, betas, epsilon."""

    ROWS = 2

    def check(self, view: View) -> Iterator[Alarm]:
        _, places = view.groups("layer", "update_ratio")
        if len(places) < 2:
            return
        now = view.values(places)
        if not np.isfinite(now).any() or float(np.nanmax(now)) <= 0 or view.base.count[places].min() <= 12:
            return
        z = float(np.median(view.z(places)))
        factor = float(np.nanmedian(now / np.exp(np.minimum(view.base.level[places], 700.0))))
        reference = self.memory.get("reference")
        if reference is None:
            odd = abs(z) > 5 and (factor > 2 or factor < 0.5)
            self.memory["reference"] = float(np.nanmedian(now) / factor) if odd else None
            self.memory["run"] = int(odd)
        else:
            factor = float(np.nanmedian(now)) / reference
            odd = factor > 2 or factor < 0.5
            self.memory["run"] = self.memory["run"] + 1 if odd else 0
            if not odd or self.memory["run"] > 200:
                self.memory["reference"] = None
        if self.memory["run"] == self.ROWS or (self.memory["run"] == 1 and (factor > 8 or factor < 0.1)):
            yield Alarm(
                "update", "layer/*/update_ratio", view.step, float(np.nanmedian(now)), abs(z),
                f"updates of {len(places)} layers are {factor:.2g} times as large as usual",
            )  # fmt: skip
            self.memory["run"] = self.ROWS + 1


def row_detectors(config: DetectConfig) -> list[Detector]:
    """One of each of this file."""
    kinds: tuple[type[Detector], ...] = (
        Excess, Jointly, Growth, NonFinite, Divergence, Precision, Experts, Sources, Weights, Updates,
    )  # fmt: skip
    return [kind(config) for kind in kinds]
