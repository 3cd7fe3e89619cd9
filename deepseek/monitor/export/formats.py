"""``export_series``: a run's series in one of the formats of ``FORMATS``, for ``deepseek metrics``."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from deepseek.errors import ConfigError, RunError, did_you_mean
from deepseek.files import write_atomic
from deepseek.monitor.export.board import write_board
from deepseek.monitor.export.columns import write_csv, write_parquet
from deepseek.monitor.export.prometheus import Exposition
from deepseek.monitor.openrun import OpenRun

FORMATS = ("csv", "parquet", "tensorboard", "prometheus")
ENDS = {"csv": ".csv", "parquet": ".parquet", "tensorboard": "-tensorboard", "prometheus": ".prom"}


class Exported(NamedTuple):
    """Where it is, how many series, and how many rows, points or samples (``unit``) it has."""

    path: Path
    series: int
    rows: int

    @property
    def unit(self) -> str:
        return "points" if self.path.is_dir() else "samples" if self.path.suffix == ".prom" else "rows"


def export_series(
    run: Path | str, format: str, to: Path | str | None = None, patterns: Sequence[str] = ()
) -> Exported:
    """Write the series of ``run`` whose names match any of ``patterns`` (all unless told).

    Args:
        format: of ``FORMATS``. to: a file, for 'tensorboard' a directory; ``RUN/series.FORMAT`` unless told.

    Raises:
        ConfigError: an unknown format, or a pattern that matches nothing.
        RunError: ``run`` has no series.
        MissingExtraError: 'parquet' without pyarrow.
    """
    if format not in FORMATS:
        near = did_you_mean(format, FORMATS)
        raise ConfigError(f"--format {format!r} is not known{near}; there are {', '.join(FORMATS)}")
    path = Path(run)
    target = Path(to) if to else path / f"series{ENDS[format]}"
    opened = OpenRun(path.resolve().name, path)
    try:
        opened.wait()
        names = _chosen(opened.reader.names(), patterns, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if format == "csv":
            return Exported(target, len(names), write_csv(opened.reader, names, target))
        if format == "parquet":
            return Exported(
                target, len(names), write_parquet(opened.reader, names, target, {"run": opened.name})
            )
        if format == "tensorboard":
            return Exported(target, len(names), write_board(opened.reader, names, target))
        last = opened.reader.last()
        page = Exposition()
        page.run(opened.summary(), opened.facts())
        page.series(opened.name, {name: last[name] for name in names if name in last})
        write_atomic(target, page.text())
        return Exported(target, len(names), len(names))
    finally:
        opened.close()


def _chosen(known: list[str], patterns: Sequence[str], run: Path) -> list[str]:
    if not known:
        raise RunError(
            f"{run} has no series: neither a store in {run / 'monitor'} nor training steps in its events"
        )
    names = [name for name in known if not patterns or any(fnmatch.fnmatchcase(name, p) for p in patterns)]
    if not names:
        raise ConfigError(
            f"no series of {run} matches {', '.join(patterns)}; it has {', '.join(known[:8])}, …"
        )
    return names
