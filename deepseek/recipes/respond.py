"""What a run does by itself about an incident: ask for its documents to be named, and act as the config says."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek.events import Event, Sink, emit
from deepseek.monitor.config import MonitorConfig
from deepseek.monitor.control import request
from deepseek.monitor.store import RunStore

#: Incidents that a batch may have caused: its documents are named, and leaving it out may help.
OF_DATA = frozenset({"loss_spike", "gradient_spike", "divergence", "nan", "data_drift"})
SEVERITY = ("info", "warning", "critical")
MOST_ACTIONS = 3  #: incidents that a run answers by itself


class Responder(Sink):
    """Hears of incidents, from any thread; answers between two steps, when ``respond`` is called.

    An incident is told again, under the same ``id``, when more is known of it: it is answered once. Its documents are
    named first: after a rollback the same step has others. Actions go the way that a person's go
    (``monitor.control.request``), one at a time, and end after ``MOST_ACTIONS``.
    """

    def __init__(self, config: MonitorConfig, run: Path) -> None:
        self.config, self.run = config, run
        self._heard: deque[dict[str, Any]] = deque()
        self._unexplained: deque[dict[str, Any]] = deque()
        self._explained: set[Any] = set()
        self._acted: set[Any] = set()
        self._acting = False

    def write(self, event: Event) -> None:
        if event.name == "incident":
            self._heard.append({**event.values, "step": event.values.get("step", event.step)})
        elif event.name == "action" and event.values.get("status") in ("done", "failed"):
            self._acting = False

    def begin(self) -> None:
        """Training begins, or goes on after a rollback."""
        self._acting = False

    def respond(self, data_watched: bool = False) -> None:
        """Answer what was heard. ``data_watched``: somebody else names the documents of a drift."""
        while self._heard:
            incident = self._heard.popleft()
            waiting = next((i for i in self._unexplained if i.get("id") == incident.get("id")), None)
            if waiting is not None:
                waiting.update(incident)
            elif self._is_to_explain(incident, data_watched):
                self._explained.add(incident.get("id"))
                self._unexplained.append(incident)
            else:
                self._consider(incident)

    def _is_to_explain(self, incident: Mapping[str, Any], data_watched: bool) -> bool:
        kind = incident.get("kind")
        if kind not in OF_DATA or (kind == "data_drift" and data_watched):
            return False
        known = incident.get("samples") or incident.get("id") in self._explained
        return self.config.explain and self.config.samples > 0 and not known

    @property
    def wanted(self) -> int:
        """The step whose batch is to be explained; 0: none."""
        return int(self._unexplained[0]["step"]) if self._unexplained else 0

    def explained(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Put the documents of ``step``'s batch into the incidents that wait for them, and act on these."""
        waiting = [incident for incident in self._unexplained if int(incident["step"]) == step]
        self._unexplained = deque(i for i in self._unexplained if int(i["step"]) != step)
        for incident in waiting:
            if samples:
                with RunStore(self.run) as store:
                    store.change_incident(incident["id"], samples=list(samples))
            self._consider(incident)

    def _consider(self, incident: Mapping[str, Any]) -> None:
        if self.config.on_incident != "none" and _severe(incident, self.config.act_from):
            self._act(incident)

    def _act(self, incident: Mapping[str, Any]) -> None:
        """Ask the run for what the config says; once at a time, and not for ever."""
        action, step = self.config.on_incident, int(incident["step"])
        arguments: dict[str, Any] = {"incident": incident["id"]}
        if action == "rollback_skip":
            if incident.get("kind") not in OF_DATA:
                return
            arguments["skip"] = [max(1, min(step, int(incident.get("first_step") or step))), step]
        if self._acting or incident["id"] in self._acted or len(self._acted) > MOST_ACTIONS:
            return
        self._acted.add(incident["id"])
        if len(self._acted) > MOST_ACTIONS:
            text = (
                f"monitor: on_incident='{action}' did not help {MOST_ACTIONS} times; it is off from here on"
            )
            emit("warning", step, text=text)
            return
        self._acting = True
        request(self.run, action, arguments, by="monitor.on_incident")


def _severe(incident: Mapping[str, Any], least: str) -> bool:
    severity = str(incident.get("severity", ""))
    return severity in SEVERITY and SEVERITY.index(severity) >= SEVERITY.index(least)
