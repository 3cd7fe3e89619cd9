"""The verdict: from who moved first, and what else is known, to DATA, MODEL, OPTIMISER, PRECISION or HARDWARE.

Each rule looks for one kind of evidence and says, in a sentence with numbers, what it found and how much that weighs.
Findings for the same cause add up like independent witnesses (noisy or, Pearl 1988); the cause with the most wins, and
its confidence suffers from a strong second. A verdict is a place to look first, not proof, and UNKNOWN is an answer.

    DATA       what the batch holds, or that it did not come        OPTIMISER  learning rate, betas, epsilon, clipping
    MODEL      the network or the program that trains it            PRECISION  the number format is too small
    HARDWARE   a device, a link, a disk, a neighbour on the machine
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from deepseek.monitor.baseline import MAD, Baselines
from deepseek.monitor.detectors import NUMBERS, Alarm
from deepseek.monitor.incident import Mover

Cause = Literal["DATA", "MODEL", "OPTIMISER", "PRECISION", "HARDWARE", "UNKNOWN"]

LEAST = 0.3  #: below it the verdict is UNKNOWN
LASTING = 5.0  #: of a sum that looks for small and lasting shifts: enough to be evidence, not an alarm
LATE = 10**12  #: the step of what did not move


class Series(Protocol):
    """What reads a run's series; see ``series.SeriesReader``."""

    def raw(self, name: str, start: int, stop: int) -> tuple[NDArray[Any], NDArray[Any]]: ...


class Sibling(Protocol):
    """Another run with the same data order, such as a ``RunStore``."""

    @property
    def series(self) -> Series: ...


@dataclass(frozen=True)
class Finding:
    """A piece of evidence: what it points to and how strongly, 0 to 1. Weight 0: told, but points nowhere."""

    cause: Cause
    weight: float
    text: str
    series: str = ""
    step: int = 0
    value: float = math.nan
    score: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "series": self.series,
            "step": self.step,
            "value": self.value,
            "score": self.score,
        }


@dataclass(frozen=True)
class Verdict:
    """``cause`` with its ``confidence`` (0 to 1) and what was found, the strongest first."""

    cause: Cause
    confidence: float
    findings: list[Finding]


@dataclass(frozen=True)
class Case:
    """What the rules look at."""

    alarms: Sequence[Alarm]
    movers: Sequence[Mover]
    base: Baselines
    siblings: Sequence[Sibling] = field(default_factory=tuple)

    @property
    def kinds(self) -> set[str]:
        return {a.kind for a in self.alarms}

    @property
    def step(self) -> int:
        """Of the first alarm."""
        return min(a.step for a in self.alarms)

    def moved(self, head: str, tail: str = "") -> list[Mover]:
        """Movers whose name starts and ends so, in the order of their moves."""
        return [m for m in self.movers if m.name.startswith(head) and m.name.endswith(tail)]

    def first(self, head: str, tail: str = "") -> int:
        """The step of the first of them."""
        return min((m.step for m in self.moved(head, tail)), default=LATE)

    def alarm(self, kind: str) -> Alarm | None:
        return next((a for a in self.alarms if a.kind == kind), None)

    def values(self, name: str, rows: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Steps and finite values of a series over the last ``rows`` rows."""
        place = self.base.place.get(name)
        if place is None:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        slots = self.base.recent(rows)
        value = self.base.values[slots, place]
        keep = np.isfinite(value)
        return self.base.steps[slots][keep], value[keep]


Rule = Callable[[Case], Iterator[Finding]]


def diagnose(case: Case) -> Verdict:
    """Weigh everything the rules find."""
    rules = NUMERIC if any(a.family == NUMBERS for a in case.alarms) else RESOURCES
    findings = [finding for rule in rules for finding in rule(case)]
    findings.sort(key=lambda f: -f.weight)
    doubt = dict[Cause, float]()
    for finding in findings:
        doubt[finding.cause] = doubt.get(finding.cause, 1.0) * (1 - finding.weight)
    ranked = sorted(((1 - d, cause) for cause, d in doubt.items() if cause != "UNKNOWN"), reverse=True)
    if not ranked or ranked[0][0] < LEAST:
        return Verdict("UNKNOWN", round(1 - ranked[0][0], 2) if ranked else 0.0, findings)
    second = ranked[1][0] if len(ranked) > 1 else 0.0
    return Verdict(ranked[0][1], round(min(ranked[0][0], 0.99) * (1 - second / 2), 2), findings)


def jumped(sibling: Sibling, step: int, name: str = "train/loss") -> tuple[float, float] | None:
    """How far another run's series was from its usual value at ``step``: deviations and value.

    ``None`` if it has not been there, or too little is known of the 40 steps before.
    """
    steps, values = sibling.series.raw(name, max(step - 40, 0), step + 2)
    steps, values = np.asarray(steps), np.asarray(values, np.float64)
    before, at = values[steps < step], values[(steps >= step) & (steps <= step + 1)]
    before = before[np.isfinite(before)]
    if len(before) < 10 or not len(at):
        return None
    if not np.isfinite(at).all():
        return math.inf, float(at[~np.isfinite(at)][0])
    # Differences do not see the slow fall of the loss.
    noise = max(float(np.median(np.abs(np.diff(before)))) * MAD / math.sqrt(2), 1e-4)
    deviations = (at - np.median(before[-10:])) / noise
    worst = int(np.abs(deviations).argmax())
    return float(deviations[worst]), float(at[worst])


def _siblings(case: Case) -> Iterator[Finding]:
    """The same step in sibling runs with the same data order."""
    if not case.kinds & {"loss_spike", "gradient_spike", "nan", "divergence", "data_drift"}:
        return
    step = min(case.first("train/loss"), case.first("train/grad_norm"), case.step)
    seen = [(s, found) for s in case.siblings if (found := jumped(s, step)) is not None]
    same = [(s, found) for s, found in seen if abs(found[0]) >= 6]
    if same:
        _, (z, value) = same[0]
        text = (
            f"the loss also jumped at step {step} in {len(same)} of {len(seen)} sibling runs: the same data"
        )
        yield Finding("DATA", 0.95, text, "train/loss", step, value, z)
    elif seen:
        text = f"{len(seen)} sibling runs passed step {step} without a jump: it is not the data alone"
        yield Finding("MODEL", 0.35, text, "train/loss", step, seen[0][1][1], seen[0][1][0])


def _sources(case: Case) -> Iterator[Finding]:
    """What the batch holds has changed."""
    contents = [
        m for tail in ("psi", "entropy", "length", "duplicates") for m in case.moved("data/", f"/{tail}")
    ]
    contents = [m for m in contents if m.step <= case.step]
    alarmed = [a for a in case.alarms if a.series.startswith("data/") and not a.series.endswith("/loss")]
    if contents or alarmed:
        name = contents[0].name if contents else alarmed[0].series
        step, score = (
            (contents[0].step, contents[0].score) if contents else (alarmed[0].step, alarmed[0].score)
        )
        value = contents[0].after if contents else alarmed[0].value
        text = f"the data itself changed: {name.removeprefix('data/')} moved at step {step}"
        yield Finding("DATA", 0.85, text, name, step, value, score)


def _one_source(case: Case) -> Iterator[Finding]:
    """Some sources' loss rose, by a jump or little by little, and others' did not."""
    names = [n for n in case.base.names if n.startswith("data/") and n.endswith("/loss")]
    moved = {m.name: m for m in case.moved("data/", "/loss")}
    for name in names:
        place = case.base.place[name]
        if name not in moved and (lasting := float(case.base.long_up[place])) > LASTING:
            moved[name] = Mover(name, case.step, lasting, math.nan, case.base.expected(place))
    for alarm in case.alarms:
        if alarm.series in names:
            moved[alarm.series] = Mover(alarm.series, alarm.step, alarm.score, math.nan, alarm.value)
    if moved and len(moved) < len(names):
        worst = max(moved.values(), key=lambda m: m.score)
        text = f"only {len(moved)} of {len(names)} sources changed their loss: {', '.join(sorted(moved))}"
        yield Finding("DATA", 0.8, text, worst.name, worst.step, worst.after, worst.score)


def _single_batch(case: Case) -> Iterator[Finding]:
    """Loss and gradient jumped in the same row, nothing before them, and it passed with the batch."""
    loss, norm = case.first("train/loss"), case.first("train/grad_norm")
    if loss == LATE or norm < loss or case.kinds & {"corruption", "precision", "nan", "update"}:
        return
    steps, values = case.values("train/loss", case.base.rows)
    before, after = values[(steps < loss) & (steps >= loss - 30)], values[steps > loss + 1][:8]
    if len(before) < 5 or len(after) < 3:
        return
    move = values[steps == loss][0] - np.median(before) if (steps == loss).any() else 0.0
    left = float(np.median(after) - np.median(before))
    if abs(move) > 0 and abs(left) < 0.25 * abs(move):
        text = f"loss left its course at step {loss} and was back within {len(after)} steps: the batch, not the model"
        yield Finding("DATA", 0.65, text, "train/loss", loss, float(values[steps == loss][0]), float(move))


def _falls(case: Case) -> Iterator[Finding]:
    """The loss fell faster than learning can explain."""
    alarm = case.alarm("data_drift")
    if alarm is not None and alarm.series == "train/loss":
        text = "the loss fell below its course: the model has seen this data before"
        yield Finding("DATA", 0.75, text, "train/loss", alarm.step, alarm.value, alarm.score)


def _gradient_first(case: Case) -> Iterator[Finding]:
    """The gradient norm moved before the loss did."""
    norm, loss = case.first("train/grad_norm"), case.first("train/loss")
    norm = min(norm, case.first("layer/", "/grad_norm"))
    if (
        norm == LATE
        or norm >= min(loss, case.first("train/lr"))
        or not case.kinds & {"gradient_spike", "loss_spike", "divergence", "nan"}
    ):
        return
    if loss == LATE:
        text = f"the gradient norm left its course at step {norm}; the loss has not yet"
    else:
        text = f"the gradient norm moved {loss - norm} steps before the loss: it is in the model, not in one batch"
    mover = min(case.moved("train/grad_norm") + case.moved("layer/", "/grad_norm"), key=lambda m: m.step)
    yield Finding("MODEL", 0.6, text, mover.name, norm, mover.after, mover.score)


def _learning_rate(case: Case) -> Iterator[Finding]:
    """The learning rate jumped."""
    steps, values = case.values("train/lr", case.base.rows)
    near = (steps >= case.step - 40) & (steps <= case.step + 2)
    steps, values = steps[near], values[near]
    if len(values) < 2 or not (values > 0).all():
        return
    ratio = values[1:] / values[:-1]
    k = int(np.abs(np.log(ratio)).argmax())
    before = values[: k + 1]
    steady = before.max() < 1.5 * before.min()
    if steady and (ratio[k] > 1.8 or ratio[k] < 0.5):
        text = f"the learning rate went from {values[k]:.3g} to {values[k + 1]:.3g} at step {steps[k + 1]}"
        yield Finding(
            "OPTIMISER",
            0.9,
            text,
            "train/lr",
            int(steps[k + 1]),
            float(values[k + 1]),
            float(abs(np.log(ratio[k]))),
        )


def _updates(case: Case) -> Iterator[Finding]:
    """The updates of most layers changed size before the loss moved."""
    labels = [n for n in case.base.names if n.startswith("layer/") and n.endswith("/update_ratio")]
    loss = case.first("train/loss")
    moved = [m for m in case.moved("layer/", "/update_ratio") if m.step < loss]
    alarm = case.alarm("update")
    if alarm is not None and alarm.step <= loss and "corruption" not in case.kinds:
        yield Finding("OPTIMISER", 0.8, alarm.text, alarm.series, alarm.step, alarm.value, alarm.score)
    elif len(moved) >= 2 and 2 * len(moved) >= len(labels) and "corruption" not in case.kinds:
        text = f"the updates of {len(moved)} of {len(labels)} layers changed size before the loss"
        yield Finding("OPTIMISER", 0.6, text, moved[0].name, moved[0].step, moved[0].after, moved[0].score)


def _precision(case: Case) -> Iterator[Finding]:
    """Numbers left the range of their format."""
    alarm = case.alarm("precision")
    if alarm is not None:
        yield Finding("PRECISION", 0.85, alarm.text, alarm.series, alarm.step, alarm.value, alarm.score)
    scale = case.moved("precision/loss_scale")
    if alarm is None and scale and scale[0].after < scale[0].before:
        text = f"the loss scale fell from {scale[0].before:.4g} to {scale[0].after:.4g}"
        yield Finding("PRECISION", 0.6, text, scale[0].name, scale[0].step, scale[0].after, scale[0].score)


def _not_a_number(case: Case) -> Iterator[Finding]:
    """NaN out of calm: nothing had grown before it."""
    alarm = case.alarm("nan")
    if alarm is None or case.alarm("precision") is not None:
        return
    calm = all(m.step >= alarm.step for m in case.movers if not math.isinf(m.score))
    text = f"{alarm.text}; " + ("nothing had moved before" if calm else "other series had moved before it")
    yield Finding("MODEL", 0.6 if calm else 0.3, text, alarm.series, alarm.step, alarm.value, 0.0)


def _corruption(case: Case) -> Iterator[Finding]:
    alarm = case.alarm("corruption")
    if alarm is not None:
        yield Finding("HARDWARE", 0.9, alarm.text, alarm.series, alarm.step, alarm.value, alarm.score)


def _clock(case: Case) -> Iterator[Finding]:
    """Where the time went."""
    for kind, cause, weight in (
        ("slow_rank", "HARDWARE", 0.9), ("stall", "DATA", 0.8), ("hang", "HARDWARE", 0.5), ("slow", "HARDWARE", 0.55),
    ):  # fmt: skip
        alarm = case.alarm(kind)
        if alarm is not None:
            yield Finding(cause, weight, alarm.text, alarm.series, alarm.step, alarm.value, alarm.score)  # type: ignore[arg-type]
    if "slow" in case.kinds and (part := case.moved("time/communication")):
        text = f"communication moved at step {part[0].step}"
        yield Finding("HARDWARE", 0.5, text, part[0].name, part[0].step, part[0].after, part[0].score)


def _experts(case: Case) -> Iterator[Finding]:
    """Experts and routers moved on their own."""
    alarm = case.alarm("router_collapse") or case.alarm("dead_expert")
    if alarm is None:
        return
    load = min(case.first("expert/"), case.first("router/"), alarm.step)
    place = case.base.place.get("train/loss")
    uneasy = place is not None and float(case.base.long_up[place]) > LASTING
    alone = load <= min(case.first("train/loss"), case.first("train/lr")) and not uneasy
    text = alarm.text + ("; it began before the loss moved" if alone else "; the loss had moved before")
    yield Finding("MODEL", 0.85 if alone else 0.5, text, alarm.series, alarm.step, alarm.value, alarm.score)


def _memory(case: Case) -> Iterator[Finding]:
    """What holds the memory that grows."""
    alarm = case.alarm("memory")
    if alarm is not None:
        weight = 0.55 if alarm.series.endswith("/rss") else 0.7
        yield Finding(
            "MODEL",
            weight,
            f"{alarm.text}: the program keeps what it should let go",
            alarm.series,
            alarm.step,
            alarm.value,
            alarm.score,
        )


NUMERIC: tuple[Rule, ...] = (
    _siblings, _sources, _one_source, _single_batch, _falls, _gradient_first, _learning_rate, _updates, _precision,
    _not_a_number, _corruption, _experts,
)  # fmt: skip
RESOURCES: tuple[Rule, ...] = (_clock, _memory)
