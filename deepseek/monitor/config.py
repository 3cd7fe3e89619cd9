"""``[monitor]``: what is watched while a model trains, what that may cost, and what happens when something is wrong."""

from __future__ import annotations

from typing import Literal

from deepseek.config import configclass
from deepseek.data.quality import QualityConfig
from deepseek.errors import ConfigError
from deepseek.monitor.detectors import DetectConfig

OnIncident = Literal["none", "pause", "rollback_skip"]
Severity = Literal["info", "warning", "critical"]


@configclass
class MonitorConfig:
    """Options of the monitor that every run has.

    Attributes:
        enabled: keep series in ``run/monitor`` and look at the model; ``False`` leaves ``events.jsonl`` only.
        overhead: share of the wall time that the sampled probes may take.
        every: steps between two sampled probes; 0: as often as ``overhead`` allows, from what they cost here.
        rows: rows of the batch that a sampled probe looks at.
        queries: positions of a row whose attention it computes.
        detect: look for incidents.
        detection: how much evidence an incident needs (``[monitor.detection]``).
        data: look at the data that are trained on, source by source, and whether they drift (``[monitor.quality]``).
        languages: tell each source's commonest language, too (the ``data`` extra; its model takes a while to load).
        explain: losses per document of an incident's batch, so that the incident names its samples.
        samples: documents that an incident names.
        webhook: address that incidents are posted to as JSON; empty: none.
        command: program that incidents are handed to as JSON on its standard input; empty: none.
        on_incident: what the run does by itself: nothing; wait for a person; go back to a checkpoint and skip the data.
        alert_from: the least severity that ``webhook`` and ``command`` are told of.
        act_from: the least severity that ``on_incident`` answers to.
    """

    enabled: bool = True
    overhead: float = 0.002
    every: int = 0
    rows: int = 1
    queries: int = 32
    detect: bool = True
    detection: DetectConfig = DetectConfig()
    data: bool = True
    quality: QualityConfig = QualityConfig()
    languages: bool = False
    explain: bool = True
    samples: int = 16
    webhook: str = ""
    command: str = ""
    on_incident: OnIncident = "none"
    alert_from: Severity = "warning"
    act_from: Severity = "critical"

    def check(self) -> None:
        if not 0 < self.overhead < 1:
            raise ConfigError(
                f"monitor.overhead={self.overhead} is a share of the time, between 0 and 1; 0.005 is half a percent, "
                "and monitor.enabled=false watches nothing"
            )
        for name, least in (("every", 0), ("rows", 1), ("queries", 1), ("samples", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"monitor.{name}={getattr(self, name)} must be at least {least}")
        if self.webhook and not self.webhook.startswith(("http://", "https://")):
            raise ConfigError(f"monitor.webhook={self.webhook!r} must start with http:// or https://")
        if self.on_incident != "none" and not (self.enabled and self.detect):
            raise ConfigError(
                f"monitor.on_incident={self.on_incident!r} needs incidents: set monitor.enabled and monitor.detect, "
                "or on_incident='none'"
            )
