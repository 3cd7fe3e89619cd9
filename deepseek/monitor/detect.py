"""``Watch``: rows in, incidents out.

A row goes through the baselines and past every detector. Alarms that come close together, and are about the same thing
(numbers, time, memory), make one incident, which is told when it opens and again when it becomes worse, changes its
verdict, or has its aftermath to show. Everything a watch remembers fits into JSON, so that a resumed run knows what is
usual for it.

    watch = Watch()
    for incident in watch.update(step, {"train/loss": 2.1, "train/grad_norm": 0.3}, time.time()):
        print(incident.title, incident.verdict)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from deepseek.errors import ConfigError
from deepseek.events import plain
from deepseek.monitor.baseline import Baselines
from deepseek.monitor.detect_clock import Hang, clock_detectors
from deepseek.monitor.detect_model import row_detectors
from deepseek.monitor.detectors import Alarm, DetectConfig, Groups, View
from deepseek.monitor.incident import (
    TITLES,
    Incident,
    gradient_map,
    leading_kind,
    movers,
    severity_of,
    with_alarmed,
)
from deepseek.monitor.verdict import Case, Sibling, diagnose

AGAIN = (3, 12, 50, 200)  #: rows after the alarm at which an incident is looked at again
CLOSE = 15  #: rows within which alarms about different things belong together
EXPERT_KINDS = frozenset({"dead_expert", "router_collapse"})
MOST_ALARMS = 64  #: kept of an incident


@dataclasses.dataclass
class Open:
    """An incident that may still change."""

    id: str
    family: str
    alarms: list[Alarm]
    rows: int = 0  # since it opened
    quiet: int = 0  # since its last alarm
    ended: str = ""  # how it went on, for what is over
    told: Incident | None = None


class Watch:
    """Looks at every row of a run.

    Args:
        siblings: other runs with the same data order: if they jumped at the same step, it is the data.

    Raises:
        ConfigError: from ``prior`` and ``load_state_dict``.
    """

    def __init__(self, config: DetectConfig | None = None, *, siblings: Iterable[Sibling] = ()) -> None:
        self.config = config or DetectConfig()
        self.siblings = tuple(siblings)
        self.base = Baselines(rows=self.config.rows)
        self._groups = Groups(self.base)
        self.detectors = [*row_detectors(self.config), *clock_detectors(self.config)]
        self._open: list[Open] = []
        self._number, self._step = 0, -1

    def update(self, step: int, row: Mapping[str, float], time: float) -> list[Incident]:
        """Look at a row.

        Args:
            step: of the row; one that is lower than the last means that the run went back. row: values by series name,
                in any order, as many as there are. time: Unix time of the row, seconds.

        Returns:
            Incidents that are new, or known by their ``id`` and changed.
        """
        if step < self._step:
            self._go_back()
        self._step = step
        # A row may hold any numbers; what overflows is infinite, and so found.
        with np.errstate(all="ignore"):
            scores = self.base.update(step, row)
            view = View(step, time, row, scores, self.base, self._groups)
            alarms = [alarm for detector in self.detectors for alarm in detector.check(view)]
            changed = self._file(alarms)
            changed += self._went_on(step)
            return [incident for case in self._due(changed) if (incident := self._tell(case)) is not None]

    def idle(self, now: float) -> list[Incident]:
        """Look at the clock while no rows come; a hang shows here.

        Args:
            now: Unix time, seconds.
        """
        alarms = [a for d in self.detectors if isinstance(d, Hang) for a in d.idle(now)]
        with np.errstate(all="ignore"):  # as in ``update``
            return [i for case in self._file(alarms) if (i := self._tell(case)) is not None]

    tick = idle  #: the name by which a sink calls it

    def prior(self, name: str, level: float, spread: float, rows: int = 64) -> None:
        """Tell what is usual for a series before its first row: see ``Baselines.prior``."""
        self.base.prior(name, level, spread, rows)

    def _file(self, alarms: Sequence[Alarm]) -> list[Open]:
        """Put alarms into the open incident of their family, or into a new one."""
        changed = []
        for alarm in alarms:
            case = next((o for o in self._open if self._takes(o, alarm)), None)
            if case is None:
                self._number += 1
                case = Open(f"{alarm.step}-{alarm.kind}-{self._number}", alarm.family, [])
                self._open.append(case)
            if len(case.alarms) < MOST_ALARMS:
                case.alarms.append(alarm)
            case.quiet = 0
            if case not in changed:
                changed.append(case)
        return changed

    def _went_on(self, step: int) -> list[Open]:
        """Hangs that are over with this row: it was a long pause."""
        over = any(d.memory.get("over") for d in self.detectors if isinstance(d, Hang))
        ended = [o for o in self._open if over and not o.ended and o.alarms[0].kind == "hang"]
        for case in ended:
            case.ended = f"the run went on with step {step}"
        return ended

    def _takes(self, case: Open, alarm: Alarm) -> bool:
        """Whether an alarm belongs to a case: same family, and close; closer if one is about experts, one is not."""
        if case.ended:
            return False
        about_experts = {a.kind in EXPERT_KINDS for a in case.alarms}
        near = self.config.merge_rows if (alarm.kind in EXPERT_KINDS) in about_experts else CLOSE
        return case.family == alarm.family and case.quiet <= near

    def _due(self, changed: list[Open]) -> list[Open]:
        """Those with new alarms, and those whose aftermath is worth a look; closes what has been quiet."""
        due = [o for o in self._open if o in changed or o.rows in AGAIN]
        for case in self._open:
            case.rows, case.quiet = case.rows + 1, case.quiet + 1
        self._open = [o for o in self._open if o.quiet <= self.config.merge_rows or o.rows <= AGAIN[-1]]
        return due

    def _tell(self, case: Open) -> Incident | None:
        """The incident of a case, unless it is as it was when last told."""
        new = self._describe(case)
        old, case.told = case.told, new
        if old is not None and _essence(old) == _essence(new) and case.rows not in AGAIN:
            return None
        return new

    def _describe(self, case: Open) -> Incident:
        first = min(a.step for a in case.alarms)
        moved = with_alarmed(movers(self.base, first), case.alarms, self.base)
        verdict = diagnose(Case(case.alarms, moved, self.base, self.siblings))
        kind = leading_kind(case.alarms)
        alarm = next(a for a in case.alarms if a.kind == kind)
        window = [max(0, first - self.config.window), first + self.config.window]
        texts = list(dict.fromkeys(a.text for a in case.alarms))
        evidence = [f.to_dict() for f in verdict.findings]
        known = {e["text"] for e in evidence}
        evidence += [
            {"text": a.text, "series": a.series, "step": a.step, "value": a.value, "score": a.score}
            for a in _unique(case.alarms)
            if a.text not in known
        ]
        earliest = min((m.step for m in moved), default=first)
        return Incident(
            id=case.id,
            step=first,
            first_step=min(earliest, first),
            kind=kind,
            severity="info" if case.ended else severity_of(case.alarms),
            verdict=verdict.cause,
            confidence=verdict.confidence,
            title=f"{TITLES[kind]} at step {alarm.step}",
            status="resolved" if case.ended else "open",
            summary="; ".join([*texts[:3], *([case.ended] if case.ended else [])]) + ".",
            evidence=evidence[:24],
            movers=[dataclasses.asdict(m) for m in moved],
            window=window,
            gradient_map=gradient_map(self.base, *window),
        )

    def _go_back(self) -> None:
        """The run went back to a checkpoint: what was open is history, levels stay, sums start anew."""
        self._open.clear()
        self.base.forget(np.arange(len(self.base.names)))
        self.base.steps[:] = -1
        self.base.z[:] = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Everything it remembers; JSON can hold it. Incidents that were open are not part of it."""
        memories = {type(d).__name__: plain(d.memory) for d in self.detectors}
        return {
            "version": 1,
            "base": self.base.state_dict(),
            "detectors": memories,
            "number": self._number,
            "step": self._step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``.

        Raises:
            ConfigError: the state is of another version or keeps another number of rows.
        """
        if state.get("version") != 1:
            raise ConfigError(
                f"a watch's state of version {state.get('version')} cannot be read by version 1; start anew"
            )
        self.base.load_state_dict(state["base"])
        for detector in self.detectors:
            detector.memory = dict(state["detectors"].get(type(detector).__name__, {}))
        self._number, self._step = int(state["number"]), int(state["step"])


def _essence(incident: Incident) -> tuple[object, ...]:
    """What makes an incident worth telling again."""
    return incident.kind, incident.severity, incident.status, incident.verdict, round(incident.confidence, 1)


def _unique(alarms: Sequence[Alarm]) -> list[Alarm]:
    """The first alarm of each kind and series."""
    seen = dict[tuple[str, str], Alarm]()
    for alarm in alarms:
        seen.setdefault((alarm.kind, alarm.series), alarm)
    return [a for a in seen.values() if not math.isnan(a.score)]
