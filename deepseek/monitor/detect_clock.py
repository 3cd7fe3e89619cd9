"""Detectors of time and memory: slow steps, stalls, slow ranks, hangs, and memory that only grows.

A slow step is not counted in standard deviations alone but in seconds lost: a step of 30 ms that takes 60 is noise,
and a step of 100 s that takes 105 is worth a person's attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from deepseek.monitor.detectors import CLOCK, MEMORY, Alarm, DetectConfig, Detector, View

PARTS = tuple(
    f"time/{x}" for x in ("data", "compute", "forward", "backward", "optimizer", "communication", "other")
)


def step_seconds(row: Mapping[str, float]) -> float | None:
    """The seconds of a step: ``time/step``, or all its parts together; ``None`` if the row tells neither."""
    whole = row.get("time/step")
    if whole is not None and math.isfinite(whole):
        return float(whole)
    parts = [v for name in PARTS if (v := row.get(name)) is not None and math.isfinite(v)]
    return float(sum(parts)) if parts else None


class SlowSteps(Detector):
    """Steps take longer than they used to: ``slow``, or ``stall`` if it is the data they wait for."""

    NEED = 10  #: rows before the step time is known
    KNOWN = 30  #: and before it is known well: until then it takes three slow steps to believe it
    LONG = 5.0  #: seconds of a step in which a machine's hiccups, which last seconds, hardly show

    def check(self, view: View) -> Iterator[Alarm]:
        seconds = step_seconds(view.row)
        if seconds is None or not seconds > 0:
            return
        usual, spread, n = self.memory.get("usual", [seconds, 0.0, 0])
        error = math.log(seconds / usual)
        limit = max(math.log(self.config.slow_ratio), 4 * spread)
        if n >= self.NEED and error > limit:
            needed = 2 if n >= self.KNOWN or usual >= self.LONG else 3
            yield from self._lose(view, seconds, usual, error / max(spread, 0.005), needed)
            return
        self._recover()
        # Outliers are clipped, and the scale follows the median of the errors, as in ``baseline``.
        rate = max(0.03, 1 / (n + 1))
        usual *= math.exp(rate * min(max(error, -3 * spread - 0.02), 3 * spread + 0.02)) if n else 1.0
        spread += rate * (1.25 * min(abs(error), 4 * spread + 0.02) - spread)
        self.memory["usual"] = [usual, max(spread, 0.004), n + 1]
        self._remember_parts(view, rate)

    def _lose(self, view: View, seconds: float, usual: float, score: float, needed: int) -> Iterator[Alarm]:
        lost, rows, _ = self.memory.get("lost", [0.0, 0, 0])
        lost, rows = lost + seconds - usual, rows + 1
        self.memory["lost"] = [lost, rows, 0]
        waited = view.row.get("time/data", 0.0)
        usual_wait = self.memory.get("parts", {}).get("time/data", 0.0)
        data = waited - usual_wait > 0.6 * (seconds - usual)
        enough = lost >= self.config.lost_seconds and (
            rows >= needed or (data and seconds >= max(4 * usual, usual + 2.0))
        )
        kind, series = ("stall", "time/data") if data else ("slow", "time/step")
        if enough and kind not in self.memory.get("told", []):
            self.memory["told"] = [*self.memory.get("told", []), kind]
            what = f", {waited:.3g} s of them waiting for data" if data else ""
            text = f"a step takes {seconds:.3g} s{what}; usually {usual:.3g} s; {lost:.3g} s lost in {rows} steps"
            yield Alarm(kind, series, view.step, seconds, score, text, "warning", CLOCK)
        if rows > 400:  # it has become the usual
            self.memory.update(usual=[seconds, 0.02, self.NEED], lost=[0.0, 0, 0], told=[])

    def _recover(self) -> None:
        lost, rows, fine = self.memory.get("lost", [0.0, 0, 0])
        if rows:
            fine += 1
            self.memory["lost"] = [lost, rows, fine] if fine < 5 else [0.0, 0, 0]
            if fine >= 5:
                self.memory["told"] = []

    def _remember_parts(self, view: View, rate: float) -> None:
        parts = self.memory.setdefault("parts", {})
        for name in PARTS:
            if (value := view.row.get(name)) is not None and math.isfinite(value):
                parts[name] = parts.get(name, value) + rate * (
                    min(value, 3 * parts.get(name, value)) - parts.get(name, value)
                )


class SlowRank(Detector):
    """One rank needs longer than its peers, step after step: in a synchronous run all wait for it."""

    ROWS = 3

    def check(self, view: View) -> Iterator[Alarm]:
        ranks, places = view.groups("rank", "step_seconds")
        if len(ranks) < 2:
            return
        seconds = view.values(places)
        if not np.isfinite(seconds).all() or not (seconds > 0).all():
            return
        middle = float(np.sort(seconds)[(len(seconds) - 1) // 2])
        excess = np.log(seconds / middle)
        usual = np.asarray(self.memory.get("usual", excess), float)
        if len(usual) != len(excess):
            usual = excess
        spread, n = self.memory.get("spread", [0.02, 0])
        over = excess - usual
        slow = (over > max(math.log(self.config.rank_ratio), 5 * spread)) & (n >= 10)
        run = np.asarray(self.memory.get("run", np.zeros(len(ranks))), float)
        run = np.where(slow, (run if len(run) == len(slow) else 0) + 1, 0.0)
        lost = np.asarray(self.memory.get("lost", np.zeros(len(ranks))), float)
        lost = np.where(slow, (lost if len(lost) == len(slow) else 0) + seconds - middle, 0.0)
        rate = max(0.03, 1 / (n + 1))
        usual = np.where(slow, usual + 0.002 * over, usual + rate * np.clip(over, -0.1, 0.1))
        spread += rate * (1.25 * float(np.median(np.abs(over))) - spread)
        self.memory.update(
            usual=usual.tolist(), spread=[max(spread, 0.002), n + 1], run=run.tolist(), lost=lost.tolist()
        )
        told = self.memory.setdefault("told", {})
        for k in np.nonzero((run >= self.ROWS) & (lost >= self.config.lost_seconds / 10))[0]:
            if view.step - told.get(ranks[k], -(10**9)) > self.config.merge_rows:
                yield Alarm(
                    "slow_rank", f"rank/{ranks[k]}/step_seconds", view.step, float(seconds[k]),
                    float(over[k] / max(spread, 0.005)),
                    f"rank {ranks[k]} takes {seconds[k]:.3g} s a step, the others {middle:.3g} s, for {int(run[k])} "
                    "steps", "warning", CLOCK,
                )  # fmt: skip
            told[ranks[k]] = view.step


class Hang(Detector):
    """No row for much longer than a step takes. ``check`` notes when rows come, ``idle`` looks at the clock."""

    def check(self, view: View) -> Iterator[Alarm]:
        last, usual, pause = self.memory.get("clock", [view.time, 0.0, 0.0])
        gap = max(view.time - last, 0.0)
        n = self.memory.get("rows", 0)
        if n >= 3 and usual > 0 and gap > self.config.idle_factor * usual:
            pause = max(pause, gap)  # evaluation or a checkpoint: healthy pauses of the run
        elif gap > 0:
            usual = gap if usual == 0 else usual + 0.1 * (min(gap, 3 * usual) - usual)
        over = bool(self.memory.get("told"))
        self.memory.update(
            clock=[view.time, usual, 0.9999 * pause], rows=n + 1, told=False, step=view.step, over=over
        )
        yield from ()

    def idle(self, now: float) -> Iterator[Alarm]:
        """The alarm of a run that has been silent for too long at Unix time ``now``."""
        if self.memory.get("rows", 0) < 5 or self.memory["told"]:
            return
        last, usual, pause = self.memory["clock"]
        silent = now - last
        limit = max(self.config.idle_seconds, self.config.idle_factor * usual, 2 * pause)
        if silent > limit:
            self.memory["told"] = True
            text = f"no step for {silent:.0f} s; a step takes {usual:.3g} s"
            step = self.memory["step"]
            yield Alarm("hang", "time/step", step, silent, silent / max(usual, 1e-3), text, "critical", CLOCK)


class Growing(Detector):
    """Memory grows by about as much with every stretch of steps: something is kept that should be let go."""

    CHUNK, CHUNKS = 3, 5
    LEAST = 8 * 2**20  #: bytes over all chunks; less is not worth a word
    SHARE = 0.01  #: of what was in use

    def check(self, view: View) -> Iterator[Alarm]:
        for name in [n for n in view.row if n.startswith("memory/")]:
            value = view.row[name]
            if not math.isfinite(value):
                continue
            low, n, history = self.memory.get(name, [None, 0, []])
            low, n = value if low is None else min(low, value), n + 1
            if n % self.CHUNK == 0:  # the least of each chunk: what was still in use at its quietest moment
                history, low = [*history, [low, view.step]][-(self.CHUNKS + 1) :], None
                yield from self._judge(view, name, history)
            self.memory[name] = [low, n, history]

    def _judge(self, view: View, name: str, history: list[list[float]]) -> Iterator[Alarm]:
        if len(history) <= self.CHUNKS:
            return
        steps = np.diff([low for low, _ in history])
        first, last, span = history[0][0], history[-1][0], history[-1][1] - history[0][1]
        total, middle = float(steps.sum()), float(np.median(steps))
        if total < max(self.LEAST, self.SHARE * first) or middle <= 0:
            return
        if (steps > 0.4 * middle).all() and (steps < 2.5 * middle).all():
            told = self.memory.get("told", -(10**9))
            if view.step - told > 4 * self.config.merge_rows:
                rate = total / max(span, 1)
                text = (
                    f"{name} grows by {rate / 2**20:.3g} MiB a step: {total / 2**20:.4g} MiB in "
                    f"{span} steps, evenly"
                )
                yield Alarm("memory", name, view.step, last, total / first * 100, text, "warning", MEMORY)
            self.memory["told"] = view.step


class Plateau(Detector):
    """The loss has stopped falling, long before the end, or has never begun to."""

    STRETCH = 1000  #: rows of each of the stretches that are compared
    LEAST = 5e-4  #: of the loss: an improvement smaller than this, and within its error, is none

    def check(self, view: View) -> Iterator[Alarm]:
        loss = view.row.get("train/loss", math.nan)
        if not math.isfinite(loss):
            return
        total, square, n = self.memory.get("sum", [0.0, 0.0, 0])
        total, square, n = total + loss, square + loss * loss, n + 1
        if n == self.STRETCH:
            mean = total / n
            error = math.sqrt(max(square / n - mean * mean, 0.0) / n)
            stretches = [*self.memory.get("stretches", []), [mean, error]][-6:]
            self.memory["stretches"] = stretches
            total, square, n = 0.0, 0.0, 0
            yield from self._judge(view, stretches)
        self.memory["sum"] = [total, square, n]

    def _judge(self, view: View, stretches: list[list[float]]) -> Iterator[Alarm]:
        if len(stretches) < 6 or self.memory.get("told"):
            return
        early, late = np.array(stretches[:3]), np.array(stretches[3:])
        fell = float(early[:, 0].mean() - late[:, 0].mean())
        error = float(np.sqrt((early[:, 1] ** 2).sum() + (late[:, 1] ** 2).sum()) / 3)
        if fell + 2 * error < self.LEAST * float(early[:, 0].mean()):
            self.memory["told"] = True
            means = early[:, 0].mean(), late[:, 0].mean()
            text = f"the loss has not fallen for {6 * self.STRETCH} steps: {means[0]:.4g}, {means[1]:.4g}"
            yield Alarm(
                "plateau",
                "train/loss",
                view.step,
                view.row["train/loss"],
                fell / max(error, 1e-9),
                text,
                "info",
            )


def clock_detectors(config: DetectConfig) -> list[Detector]:
    """One of each."""
    return [SlowSteps(config), SlowRank(config), Hang(config), Growing(config), Plateau(config)]
