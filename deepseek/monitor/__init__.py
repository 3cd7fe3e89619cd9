"""What happens in a run: series, incidents, a live terminal view, a dashboard, and the list of runs.

In a loop of your own:

    import deepseek.monitor as wandb

    wandb.init(project="mine", config={"lr": 3e-4})
    wandb.log({"loss": loss})
    wandb.finish()

Nothing heavy is imported before it is asked for.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepseek.monitor.keepers import MovingAverage, MultiGPUAggregator, RateCounter
    from deepseek.monitor.narrator import Narrator, comparison, headline, table
    from deepseek.monitor.report import write_report
    from deepseek.monitor.runs import RunSummary, list_runs
    from deepseek.monitor.series import SeriesReader, SeriesWriter, Window
    from deepseek.monitor.session import alert, define_metric, finish, init, log, login
    from deepseek.monitor.session_run import Run
    from deepseek.monitor.sink import StoreSink
    from deepseek.monitor.store import RunStore
    from deepseek.monitor.terminal import TerminalSink
    from deepseek.monitor.training_monitor import Alert, TrainingMonitor

    run: Run | None
    summary: Any

_HOMES = {
    "Alert": "training_monitor",
    "MovingAverage": "keepers",
    "MultiGPUAggregator": "keepers",
    "Narrator": "narrator",
    "RateCounter": "keepers",
    "Run": "session_run",
    "RunStore": "store",
    "RunSummary": "runs",
    "SeriesReader": "series",
    "SeriesWriter": "series",
    "StoreSink": "sink",
    "TerminalSink": "terminal",
    "TrainingMonitor": "training_monitor",
    "Window": "series",
    "alert": "session",
    "comparison": "narrator",
    "define_metric": "session",
    "finish": "session",
    "headline": "narrator",
    "init": "session",
    "list_runs": "runs",
    "log": "session",
    "login": "session",
    "table": "narrator",
    "write_report": "report",
}

__all__ = [
    "Alert", "MovingAverage", "MultiGPUAggregator", "Narrator", "RateCounter", "Run", "RunStore", "RunSummary",
    "SeriesReader", "SeriesWriter", "StoreSink", "TerminalSink", "TrainingMonitor", "Window", "alert", "comparison",
    "define_metric", "finish", "headline", "init", "list_runs", "log", "login", "table", "write_report",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in ("run", "summary"):  # of the current run: asked for anew each time
        from deepseek.monitor import session

        return session.current() if name == "run" else session.current_summary()
    if name not in _HOMES:
        from deepseek.errors import did_you_mean

        raise AttributeError(f"deepseek.monitor has no '{name}'{did_you_mean(name, __all__)}")
    value = getattr(import_module(f"deepseek.monitor.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _Front(ModuleType):
    """This module, whose ``config`` is that of the current run and not the submodule of this name."""

    @property
    def config(self) -> Any:
        from deepseek.monitor import session

        return session.current_config()

    @config.setter
    def config(self, value: Any) -> None:
        """Importing the submodule ``config`` would put it here; ``from deepseek.monitor.config import ...`` works."""


sys.modules[__name__].__class__ = _Front
