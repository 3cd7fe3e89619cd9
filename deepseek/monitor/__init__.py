"""What happened in a run: a live terminal view, one page that keeps it, and the list of runs."""

from deepseek.monitor.narrator import Narrator, comparison, headline, table
from deepseek.monitor.report import write_report
from deepseek.monitor.runs import RunSummary, list_runs
from deepseek.monitor.terminal import TerminalSink

__all__ = [
    "Narrator",
    "RunSummary",
    "TerminalSink",
    "comparison",
    "headline",
    "list_runs",
    "table",
    "write_report",
]
