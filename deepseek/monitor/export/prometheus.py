"""The newest value of every series, in the text formats of Prometheus and of OpenMetrics 1.0.

A series' name becomes a metric and labels: ``expert/3/17/load`` is
``deepseek_expert_load{run="…",layer="3",expert="17"}`` and ``time/backward`` is
``deepseek_time_seconds{run="…",phase="backward"}``. Names that a user made up keep their own name in the label
``series``, as two of them may become one metric.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from deepseek.monitor.catalogue import Metric, describe

PREFIX = "deepseek_"
TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPEN_METRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

#: First parts whose last part is a label of one metric.
ENUMERATED = {"time": ("time_seconds", "phase"), "memory": ("memory_bytes", "kind")}
#: The catalogue's units as Prometheus names them; what is not here gets no suffix.
UNITS = {"s": "seconds", "bytes": "bytes"}
#: Prometheus wants bytes where we say bits; the unit of compression is bits per byte all the same.
RENAMED = {"bits_per_byte": "bpb"}
#: Ends of a name that the format keeps for other kinds of metrics.
RESERVED = ("_total", "_count", "_sum", "_bucket", "_info", "_created")
HELP = {
    "run_info": "What a run is; the value is always 1.",
    "run_step": "The newest step of a run.",
    "run_total_steps": "How many steps a run will have.",
    "run_up": "1 while the run's process is at work, else 0.",
    "run_updated_timestamp_seconds": "Unix time of the run's newest event.",
    "run_incidents_open": "Incidents that nobody has acknowledged.",
    "time_seconds": "Where the time of a step went.",
    "memory_bytes": "Memory of this process by what it holds.",
}


class Sample(NamedTuple):
    """A family's name without the prefix, and labels."""

    family: str
    labels: dict[str, str]


class Family:
    """The samples of one metric."""

    def __init__(self, help: str, unit: str) -> None:
        self.help, self.unit = help, unit
        self.samples: dict[tuple[tuple[str, str], ...], float] = {}


class Exposition:
    """Collects samples; ``text`` is the page that Prometheus reads."""

    def __init__(self) -> None:
        self.families: dict[str, Family] = {}

    def add(
        self, family: str, labels: Mapping[str, str], value: float, help: str = "", unit: str = ""
    ) -> None:
        """Set one sample; the first help of a family counts."""
        found = self.families.setdefault(family, Family(help or HELP.get(family, family), unit))
        found.samples[tuple(labels.items())] = value

    def series(self, run: str, values: Mapping[str, float]) -> None:
        """Add the newest ``values`` of a run's series."""
        for name, value in values.items():
            metric = describe(name)
            family, labels = sample_of(name, metric)
            help = metric.en if metric else "Logged by the user; the label 'series' has its name."
            unit = UNITS.get(metric.unit, "") if metric else ""
            self.add(family, {"run": run, **labels}, value, HELP.get(family, help), unit)

    def run(self, summary: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Add what is known of a run as a whole."""
        label = {"run": str(summary["id"])}
        keys = ("device", "dtype", "parameters", "active_parameters", "code_version")
        about = {key: str(facts[key]) for key in keys if facts.get(key) is not None}
        self.add("run_info", {**label, **about}, 1)
        self.add("run_up", label, float(summary.get("status") == "running"))
        numbers = {"run_step": "step", "run_total_steps": "total_steps", "run_updated_timestamp_seconds": "updated",
                   "run_incidents_open": "incidents_open"}  # fmt: skip
        for family, key in numbers.items():
            if isinstance(summary.get(key), (int, float)):
                self.add(family, label, float(summary[key]))

    def text(self, open_metrics: bool = False) -> str:
        """The page, in the older text format or in OpenMetrics."""
        lines: list[str] = []
        for family, content in sorted(self.families.items()):
            name = PREFIX + family
            lines.append(f"# HELP {name} {_help(content.help)}")
            lines.append(f"# TYPE {name} gauge")
            if open_metrics and content.unit and name.endswith(f"_{content.unit}"):
                lines.append(f"# UNIT {name} {content.unit}")
            lines += [f"{name}{_labels(labels)} {number_text(v)}" for labels, v in content.samples.items()]
        return "\n".join([*lines, *(["# EOF"] if open_metrics else []), ""])


def sample_of(name: str, metric: Metric | None) -> Sample:
    """The metric and the labels (without the run) of a series; ``metric`` is its entry in the catalogue."""
    if metric is None:
        return Sample(_family(name.split("/"), ""), {"series": name})
    if metric.group in ENUMERATED:
        family, label = ENUMERATED[metric.group]
        return Sample(family, {label: name.split("/", 1)[1]})
    fixed = [RENAMED.get(part, part) for part in metric.pattern.split("/") if not part.startswith("{")]
    return Sample(_family(fixed, metric.unit), metric.labels(name))


def number_text(value: float) -> str:
    """A float as both formats write it."""
    if value != value:
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "+Inf" if value > 0 else "-Inf"
    return repr(float(value)) if value != int(value) or abs(value) >= 1e15 else str(int(value))


def _family(parts: Iterable[str], unit: str) -> str:
    family = re.sub(r"[^a-z0-9_]+", "_", "_".join(parts).lower()).strip("_") or "series"
    suffix = UNITS.get(unit, "")
    if suffix and not family.endswith(suffix):
        family += f"_{suffix}"
    return f"{family}_value" if family.endswith(RESERVED) else family


def _labels(labels: Iterable[tuple[str, str]]) -> str:
    return "{" + ",".join(f'{key}="{_escaped(value)}"' for key, value in labels) + "}"


def _escaped(value: str) -> str:
    clean = value.encode("utf-8", "replace").decode()
    return clean.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", " ")


def _help(text: str) -> str:
    return " ".join(text.replace("\\", "\\\\").split())
