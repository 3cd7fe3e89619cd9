"""One exception tree. Every error a user can cause is a ``DeepseekError`` whose message says what was
found, with numbers, and what to do about it.

    DeepseekError
    ├── ConfigError          a configuration that cannot be used
    ├── DataError            a corpus, record or tokenizer that cannot be used
    ├── CheckpointError      a checkpoint that is damaged, missing or cannot be written
    ├── WeightsError         a foreign model directory that cannot be converted
    ├── RunError             a run directory that is not what the command expects
    ├── TrainingError        training cannot go on
    ├── RequestError         a request that the engine cannot serve
    ├── EngineError          the engine cannot go on
    └── MissingExtraError    an optional package is not installed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DeepseekError(Exception):
    """Base class of every error this package raises on purpose."""


class ConfigError(DeepseekError, ValueError):
    """A configuration names something unknown, has a wrong type, or contradicts itself."""


class DataError(DeepseekError, ValueError):
    """A corpus, a record or a tokenizer cannot be used."""


class CheckpointError(DeepseekError, OSError):
    """A checkpoint is damaged, missing, or could not be written."""


class WeightsError(DeepseekError, ValueError):
    """A model directory cannot be read, converted or written."""


class RunError(DeepseekError, ValueError):
    """A run directory is not what the command expects."""


class TrainingError(DeepseekError, RuntimeError):
    """Training cannot go on: too many non-finite steps, a lost worker, ..."""


class RequestError(DeepseekError, ValueError):
    """A request asks for what this engine and model cannot do; ``param`` names the option that is wrong."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def __reduce__(self) -> tuple[type[RequestError], tuple[str, str | None]]:
        return type(self), (str(self), self.param)


class EngineError(DeepseekError, RuntimeError):
    """The engine cannot go on: its step process died, or its weights give numbers that are not finite."""


class MissingExtraError(DeepseekError, ImportError):
    """An optional package is needed and not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}': pip install 'deepseek-framework[{extra}]'"
        )
        self.package, self.extra, self.purpose = package, extra, purpose

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str, str]]:
        return type(self), (self.package, self.extra, self.purpose)  # or a worker process cannot hand it back


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'experts'?)`` for the nearest known name, or the empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""
