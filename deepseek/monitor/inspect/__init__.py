"""Looking into a model: heads, experts, attention maps, ablations, histograms, and the time line of a step."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepseek.monitor.inspect.inspector import Inspector
    from deepseek.monitor.inspect.trace import TraceCapture

__all__ = ["Inspector", "TraceCapture"]


def __getattr__(name: str) -> Any:
    """``Inspector`` and ``TraceCapture`` are loaded when they are asked for: a dashboard starts without the model."""
    if name == "Inspector":
        from deepseek.monitor.inspect.inspector import Inspector

        return Inspector
    if name == "TraceCapture":
        from deepseek.monitor.inspect.trace import TraceCapture

        return TraceCapture
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
