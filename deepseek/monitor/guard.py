"""Telemetry that may fail and never ends a run: the first failure is told, then there is silence."""

from __future__ import annotations

from deepseek.events import Event, Sink, emit


class Guarded(Sink):
    """A sink whose failures end nothing: the first is told, then it hears no more."""

    def __init__(self, inner: Sink, name: str) -> None:
        self.inner, self.name, self.failed = inner, name, False

    def write(self, event: Event) -> None:
        if self.failed:
            return
        try:
            self.inner.write(event)
        except Exception as error:
            self._fail(error)

    def close(self) -> None:
        try:
            self.inner.close()
        except Exception as error:
            if not self.failed:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.failed = True
        tell_failure(self.name, error)


def tell_failure(what: str, error: Exception) -> None:
    """Say once that a part of the monitor has failed."""
    text = " ".join(str(error).split()) or type(error).__name__
    emit("warning", text=f"monitor: {what} failed and is off from here on ({text}); training goes on")
