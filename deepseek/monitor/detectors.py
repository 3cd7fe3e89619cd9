"""The detectors: each looks at one row against the baselines and says what is wrong, in a sentence with numbers.

They are small and independent; ``detect.Watch`` runs all of them and merges what they say. A detector keeps what it
has to remember in ``memory``, a dictionary that JSON can hold, so that a resumed run goes on where it stopped.

Thresholds were set on the tuning half of the public curves and on the tuning seeds of injected faults
(benchmarks/bench_detect.py); the figures in LOG.md come from the other half and the other seeds.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from deepseek.config import configclass
from deepseek.errors import ConfigError
from deepseek.monitor.baseline import Baselines, Floats, Ints, Scores

NUMBERS, CLOCK, MEMORY = "numbers", "clock", "memory"  #: families: alarms of one family make one incident


@configclass
class DetectConfig:
    """How much evidence an alarm needs. Sums are in standard deviations, see ``baseline``."""

    loss_sum: float = 28.0  # cumulative sum of the loss above its forecast
    loss_drop_sum: float = 15.0  # below it: repeated or leaked data
    gradient_sum: float = 16.0
    long_sum: float = 14.0  # of the sums that look for small shifts that last
    long_drop_sum: float = 22.0
    source_sum: float = 7.0  # the same, for one source's loss or contents
    joint: float = 0.3  # of both sums, when loss and gradient norm are high together
    habit: float = 2.0  # a sum must also exceed what the series has done before, by this factor
    growth: float = 10.0  # the gradient norm over its level, when it grows three rows in a row
    settled: int = 80  # steps or rows after which growth of norms and idle experts count: the start is wild
    slow_ratio: float = 1.03  # of the usual step time
    lost_seconds: float = 2.0  # time lost to slow steps before it is worth an alarm
    rank_ratio: float = 1.05  # of the other ranks' step time
    idle_factor: float = 20.0  # step times without a row: a hang
    idle_seconds: float = 30.0  # and at least so long
    learning: int = 500  # rows before a loss that falls suddenly counts: young runs do that
    dead_rows: int = 25  # rows without tokens before an expert that was cut off is dead; twice if it faded
    psi: float = 0.25  # population stability index: the customary bound of a major shift
    merge_rows: int = 100  # alarms this close belong to one incident
    window: int = 200  # steps before and after that an incident shows
    rows: int = 512  # rows kept for looking back

    def check(self) -> None:
        for name in ("loss_sum", "loss_drop_sum", "gradient_sum", "habit", "growth", "lost_seconds", "psi"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"detect.{name}={getattr(self, name)} must be positive")
        if self.rows < 2 * self.window:
            raise ConfigError(f"detect.rows={self.rows} must hold both sides of detect.window={self.window}")


@dataclass(frozen=True)
class Alarm:
    """What a detector found in a row. ``score`` is in standard deviations, or another figure the text names."""

    kind: str
    series: str
    step: int
    value: float
    score: float
    text: str
    severity: str = "warning"
    family: str = NUMBERS


class Groups:
    """Places of series by pattern, such as ``layer/*/grad_norm``; looked up again only when series were added."""

    def __init__(self, base: Baselines) -> None:
        self._base, self._known = base, dict[str, tuple[int, list[str], Ints]]()

    def __call__(self, head: str, tail: str) -> tuple[list[str], Ints]:
        """The middle parts and places of every ``{head}/{middle}/{tail}``."""
        key, size = f"{head}/*/{tail}", len(self._base.names)
        found = self._known.get(key)
        if found is None or found[0] != size:
            names = [n for n in self._base.names if n.startswith(f"{head}/") and n.endswith(f"/{tail}")]
            labels = [n[len(head) + 1 : -len(tail) - 1] for n in names]
            places = np.array([self._base.place[n] for n in names], np.int64)
            found = self._known[key] = (size, labels, places)
        return found[1], found[2]


@dataclass(frozen=True)
class View:
    """A row with everything known about it. ``before`` is the slot of the previous row, ``now`` of this one."""

    step: int
    time: float
    row: Mapping[str, float]
    scores: Scores
    base: Baselines
    groups: Groups

    @property
    def now(self) -> int:
        return (self.base.seen - 1) % self.base.rows

    def place(self, name: str) -> int | None:
        return self.base.place.get(name) if name in self.row else None

    def values(self, index: Ints) -> Floats:
        """This row's values of some series; ``nan`` where the row lacks one."""
        return self.base.values[self.now, index].astype(np.float64)

    def z(self, index: Ints) -> Floats:
        return self.base.z[self.now, index].astype(np.float64)


class Detector(ABC):
    """``check(view)`` yields alarms."""

    def __init__(self, config: DetectConfig) -> None:
        self.config = config
        self.memory: dict[str, Any] = {}

    @abstractmethod
    def check(self, view: View) -> Iterator[Alarm]: ...


class Excess(Detector):
    """The loss or the gradient norm is far too high at once, or a little for too long: cumulative sums."""

    WATCHED: ClassVar[tuple[tuple[str, str, str, str, str], ...]] = (
        ("train/loss", "up", "loss_spike", "loss_sum", "long_sum"),
        ("train/loss", "down", "data_drift", "loss_drop_sum", "long_drop_sum"),
        ("train/grad_norm", "up", "gradient_spike", "gradient_sum", ""),
    )

    def check(self, view: View) -> Iterator[Alarm]:
        for series, side, kind, bound, long_bound in self.WATCHED:
            place = view.place(series)
            if place is None:
                continue
            total = float((view.base.up if side == "up" else view.base.down)[place])
            lasting = float((view.base.long_up if side == "up" else view.base.long_down)[place])
            habit = self.memory.get(f"{series} {side}", 0.0)
            if side == "down" and view.base.count[place] < self.config.learning:
                view.base.down[place] = view.base.long_down[place] = 0.0
                continue  # a run that has just begun to learn falls as it likes
            at_once = total > max(getattr(self.config, bound), self.config.habit * habit)
            if at_once or (long_bound and lasting > getattr(self.config, long_bound)):
                view.base.forget(np.array([place]))
                z, value = float(view.base.z[view.now, place]), view.row[series]
                text = excess_text(view, series, side, z, value, place)
                yield Alarm(kind, series, view.step, value, max(total, lasting), text)
            else:
                self.memory[f"{series} {side}"] = max(habit * 0.9995, total)


def excess_text(view: View, series: str, side: str, z: float, value: float, place: int) -> str:
    """How far a series is from its level."""
    name = {"train/loss": "loss", "train/grad_norm": "gradient norm"}[series]
    where = "above" if side == "up" else "below"
    return f"{name} {value:.4g}, {abs(z):.1f} standard deviations {where} {view.base.expected(place):.4g}"


class Jointly(Detector):
    """Loss and gradient norm are both too high: each needs less evidence than alone."""

    def check(self, view: View) -> Iterator[Alarm]:
        loss, norm = view.place("train/loss"), view.place("train/grad_norm")
        if loss is None or norm is None:
            return
        up, c = view.base.up, self.config
        both = float(up[loss]) > c.joint * c.loss_sum and float(up[norm]) > c.joint * c.gradient_sum
        if both and view.step - self.memory.get("step", -(10**9)) > c.merge_rows:
            self.memory["step"] = view.step
            for series, kind, place in (
                ("train/loss", "loss_spike", loss), ("train/grad_norm", "gradient_spike", norm),
            ):  # fmt: skip
                z, value = float(view.base.z[view.now, place]), view.row[series]
                text = excess_text(view, series, "up", z, value, place)
                yield Alarm(kind, series, view.step, value, float(up[place]), text)
                up[place] = 0.0


class Growth(Detector):
    """The gradient norm multiplies row after row: the lead of a blow-up, however short the history.

    In BLOOM-176B's spike it went 0.24, 0.95, 2.4, 16 while the loss was still near its level.
    """

    def check(self, view: View) -> Iterator[Alarm]:
        place = view.place("train/grad_norm")
        if place is None or view.step < self.config.settled or view.base.seen < 4:
            return
        last = view.base.values[view.base.recent(4), place]
        if not (np.isfinite(last).all() and last[0] > 0 and (last[1:] > 1.3 * last[:-1]).all()):
            return
        steps = view.base.steps[view.base.recent(4)]
        ratio = float(last[3] / last[0])
        if steps[3] - steps[0] == 3 * (steps[3] - steps[2]) and ratio >= self.config.growth:
            yield Alarm(
                "gradient_spike",
                "train/grad_norm",
                view.step,
                float(last[3]),
                math.log(ratio) / 0.3,
                f"gradient norm grew {ratio:.0f} times in three steps: "
                + ", ".join(f"{v:.3g}" for v in last),
            )


class NonFinite(Detector):
    """NaN or infinity in the loss, the gradient norm or a layer's activations.

    A single infinite gradient norm beside a loss scale is how dynamic loss scaling works, and left to ``Precision``.
    """

    def check(self, view: View) -> Iterator[Alarm]:
        if len(view.scores.index) == len(view.row):
            return
        scaled = "precision/loss_scale" in view.row and math.isfinite(view.row.get("train/loss", 0.0))
        for name, value in view.row.items():
            if math.isfinite(value) or not name.startswith(("train/loss", "train/grad_norm", "layer/")):
                continue
            if scaled and "grad" in name:
                continue
            if view.step - self.memory.get("step", -(10**9)) > self.config.merge_rows:
                yield Alarm("nan", name, view.step, value, math.inf, f"{name} is {value}", "critical")
            self.memory["step"] = view.step
            return


class Divergence(Detector):
    """The loss has left its best level and does not come back."""

    ROWS = 40

    def check(self, view: View) -> Iterator[Alarm]:
        place = view.place("train/loss")
        if (
            place is None
            or view.base.count[place] < 2 * self.ROWS
            or not math.isfinite(view.row["train/loss"])
        ):
            return
        level, spread = float(view.base.level[place]), float(view.base.spread[place])
        best = self.memory.get("best", level)
        margin = max(3 * self.memory.get("spread", spread), 0.04 * abs(best))
        above = self.memory.get("above", 0) + 1 if level > best + margin else 0
        self.memory.update(above=above)
        if level <= best:
            self.memory.update(best=level, spread=spread)
        if above == self.ROWS:
            text = f"loss level {level:.4g}, for {above} steps above its best {best:.4g} by more than {margin:.2g}"
            score = (level - best) / self.memory.get("spread", spread)
            yield Alarm(
                "divergence", "train/loss", view.step, view.row["train/loss"], score, text, "critical"
            )


class Precision(Detector):
    """The number format is too small: the loss scale collapses, or steps are skipped again and again."""

    def check(self, view: View) -> Iterator[Alarm]:
        yield from self._scale(view)
        if view.row.get("precision/loss_scale", 1.0) == 1.0:
            return  # a format that needs no scale has the range of fp32
        count = view.row.get("precision/nonfinite", self.memory.get("count", 0.0))  # so far, of the whole run
        lost = view.row.get("train/skipped", 0.0) > 0 or count > self.memory.get("count", count)
        self.memory["count"] = count
        history = [*self.memory.get("lost", []), int(lost)][-20:]
        self.memory["lost"] = history
        if lost and sum(history) == 3 and sum(history[-6:]) >= 2:
            yield Alarm(
                "precision", "precision/nonfinite", view.step, 3.0, 3.0,
                f"{sum(history)} of the last {len(history)} steps had non-finite gradients",
            )  # fmt: skip

    def _scale(self, view: View) -> Iterator[Alarm]:
        scale = view.row.get("precision/loss_scale")
        if scale is None or not scale > 0:
            return
        recent = [*self.memory.get("scale", []), scale][-30:]
        self.memory["scale"] = recent
        fall = max(recent) / scale
        if fall >= 8:
            self.memory["scale"] = [scale]
            yield Alarm(
                "precision", "precision/loss_scale", view.step, scale, math.log2(fall),
                f"loss scale fell {fall:.0f} times within {len(recent)} steps, to {scale:.4g}",
            )  # fmt: skip
