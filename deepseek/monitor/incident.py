"""``Incident``: one thing that went wrong, with everything a person needs to judge it.

Alarms that belong together make one incident. It says who moved first, what that points to and why, and what the
gradients of every layer did around it. An incident is a value: what changes it makes a new one with the same ``id``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from deepseek.errors import RunError
from deepseek.monitor.baseline import Baselines
from deepseek.monitor.detectors import Alarm

Status = Literal["open", "acknowledged", "resolved"]
NEXT: dict[str, tuple[str, ...]] = {
    "open": ("acknowledged", "resolved"),
    "acknowledged": ("resolved", "open"),
    "resolved": ("open",),
}
#: The most telling kind of a family names the incident.
RANK = (
    "nan", "corruption", "precision", "router_collapse", "dead_expert", "divergence", "loss_spike", "data_drift",
    "update", "gradient_spike", "hang", "slow_rank", "stall", "slow", "memory", "plateau",
)  # fmt: skip
SEVERITY = ("info", "warning", "critical")
TITLES = {
    "nan": "Not a number", "corruption": "Weights changed without an update", "precision": "Number format overflows",
    "router_collapse": "Router collapse", "dead_expert": "Dead expert", "divergence": "Loss diverges",
    "data_drift": "Data changed", "loss_spike": "Loss spike", "update": "Size of updates changed",
    "gradient_spike": "Gradient spike", "hang": "Run hangs", "slow_rank": "Slow rank", "stall": "Waiting for data",
    "slow": "Slow steps", "memory": "Memory grows", "plateau": "Loss stopped falling",
}  # fmt: skip

MOVED = 5.0  #: standard deviations that count as a move
LOOKBACK = 40  #: rows before the first alarm in which a move is looked for
NEAR = 5  #: rows before it in which a single odd row counts; earlier ones must last
BEFORE = 32  #: rows before that which say how a series was


@dataclass(frozen=True)
class Mover:
    """A series that left its usual course: at ``step``, from ``before`` to ``after``, by ``score`` deviations."""

    name: str
    step: int
    score: float
    before: float
    after: float


@dataclass(frozen=True)
class Incident:
    """See the package's contract: ``to_dict`` is what is stored, sent and shown.

    Attributes:
        id: unique within the run. step: of the alarm. first_step: of the first mover. window: first and last step
            shown. evidence: text, series, step, value and score of each finding. movers: who moved first comes first.
        samples: documents of the batch, filled in by the run. gradient_map: layers, steps, ``values[layer][step]``.
    """

    id: str
    step: int
    first_step: int
    kind: str
    severity: str
    verdict: str
    confidence: float
    title: str
    summary: str
    evidence: list[dict[str, Any]]
    movers: list[dict[str, Any]]
    window: list[int]
    samples: list[dict[str, Any]] = field(default_factory=list)
    gradient_map: dict[str, Any] = field(default_factory=dict)
    status: str = "open"
    actions: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON can hold them: what is not finite is a string."""
        return {k: _plain(v) for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Incident:
        """The incident of a ``to_dict``; fields it does not know (a store's own) are left out."""
        names = {f.name for f in dataclasses.fields(cls)}
        return cls(**{k: v for k, v in values.items() if k in names})

    def moved_to(self, status: Status) -> Incident:
        """The same incident with another status.

        Raises:
            RunError: it cannot go there from where it is.
        """
        if status == self.status:
            return self
        if status not in NEXT.get(self.status, ()):
            known = ", ".join(NEXT.get(self.status, ()))
            raise RunError(
                f"incident {self.id} is {self.status} and cannot become {status}; it may become {known}"
            )
        return dataclasses.replace(self, status=status)

    def with_action(self, action: str, **detail: Any) -> Incident:
        """The same incident, with a note of something that was done about it."""
        return dataclasses.replace(self, actions=[*self.actions, {"action": action, **detail}])


def leading_kind(alarms: Sequence[Alarm]) -> str:
    """The kind that names an incident of these alarms."""
    return min((a.kind for a in alarms), key=lambda k: RANK.index(k) if k in RANK else len(RANK))


def severity_of(alarms: Sequence[Alarm]) -> str:
    """The most severe of the alarms' severities; several kinds that agree make a warning critical."""
    worst = max((a.severity for a in alarms), key=SEVERITY.index)
    numeric = {a.kind for a in alarms} & {"loss_spike", "gradient_spike", "update"}
    return "critical" if worst == "warning" and {"loss_spike", "gradient_spike"} <= numeric else worst


def movers(base: Baselines, first_alarm: int, limit: int = 40) -> list[Mover]:
    """Series that left their course around an alarm, the earliest first, and among equals the strongest.

    Args:
        base: with the rows around it. first_alarm: its step. limit: the most that are given back.

    A series has moved at its first row with ``|z|`` of at least ``MOVED``, or at the rows that lead up to it with half
    as much.
    """
    slots = base.recent(base.rows)
    steps = base.steps[slots]
    start = int(np.searchsorted(steps, first_alarm, "left")) - LOOKBACK
    kept = slots[max(start, 0) :]
    if not len(kept):
        return []
    steps, z, values = base.steps[kept], base.z[kept], base.values[kept]
    strong = np.abs(z) >= MOVED
    strong |= ~np.isfinite(values) & (np.isinf(values) | _was_logged(base, kept, values))
    alarm = int(np.searchsorted(steps, first_alarm, "left"))
    early = strong[: max(alarm - NEAR, 0)]
    if len(early):  # what came and went long before the alarm is noise
        early &= np.abs(z[1 : len(early) + 1]) >= MOVED / 2
    found = []
    for k in np.nonzero(strong.any(0))[0]:
        first = _onset(z[:, k], int(strong[:, k].argmax()))
        peak = float(np.abs(z[:, k]).max()) if np.isfinite(values[strong[:, k], k]).all() else math.inf
        worst = int(np.abs(z[:, k]).argmax()) if math.isfinite(peak) else int(strong[:, k].argmax())
        before = _usual_before(base, int(k), int(steps[first]))
        found.append(Mover(base.names[k], int(steps[first]), peak, before, float(values[worst, k])))
    found.sort(key=lambda m: (m.step, -m.score))
    return found[:limit]


def with_alarmed(moved: list[Mover], alarms: Sequence[Alarm], base: Baselines) -> list[Mover]:
    """``moved`` and the alarms' own series, which too short a history kept from being scored."""
    known = {m.name for m in moved}
    added = dict[str, Mover]()
    for alarm in alarms:
        if alarm.series in base.place and alarm.series not in known:
            usual = _usual_before(base, base.place[alarm.series], alarm.step)
            added.setdefault(alarm.series, Mover(alarm.series, alarm.step, alarm.score, usual, alarm.value))
    return sorted([*moved, *added.values()], key=lambda m: (m.step, -m.score))


def _was_logged(base: Baselines, kept: NDArray[np.int64], values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which missing values are NaN that was logged, not a row without the series."""
    return base.lost[kept] & np.isnan(values)


def _onset(z: NDArray[np.float32], at: int) -> int:
    """Walk back from a strong row while the rows before it lean the same way by at least half of ``MOVED``."""
    side = np.sign(z[at])
    while at > 0 and side * z[at - 1] >= MOVED / 2:
        at -= 1
    return at


def _usual_before(base: Baselines, k: int, step: int) -> float:
    """The median of a series in the rows before ``step``."""
    slots = base.recent(base.rows)
    window = base.values[slots[base.steps[slots] < step][-BEFORE:], k]
    window = window[np.isfinite(window)]
    return float(np.median(window)) if len(window) else math.nan


def gradient_map(base: Baselines, first: int, last: int) -> dict[str, Any]:
    """Gradient norms by layer and step between two steps, of the rows that are still kept.

    Returns:
        ``layers`` (labels, in the order of the network), ``steps``, ``values[layer][step]``; ``None`` where nothing was
        logged. Empty without ``layer/*/grad_norm``.
    """
    labels = [n.split("/")[1] for n in base.names if n.startswith("layer/") and n.endswith("/grad_norm")]
    labels.sort(key=_depth)
    if not labels:
        return {}
    slots = base.recent(base.rows)
    slots = slots[(base.steps[slots] >= first) & (base.steps[slots] <= last)]
    places = [base.place[f"layer/{x}/grad_norm"] for x in labels]
    values = base.values[slots][:, places].T if len(slots) else np.zeros((len(places), 0))
    return {
        "layers": labels,
        "steps": base.steps[slots].tolist(),
        "values": [[float(f"{v:.5g}") if math.isfinite(v) else None for v in row] for row in values.tolist()],
    }


def _depth(label: str) -> tuple[int, int, str]:
    if label.isdigit():
        return (1, int(label), "")
    return (0, 0, label) if label == "embedding" else (2, 0, label)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
