"""The engine as the front end sees it: requests in, outputs out, whatever happens to the process that computes them.

ProcessClient   the engine in a step process of its own: supervised, restarted, drained, replaced while it serves
LocalClient     the engine in a thread of this process, for tests and notebooks
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from deepseek.config import to_dict
from deepseek.errors import EngineError
from deepseek.serve.request import EngineStats, ModelInfo, Output, Request
from deepseek.serve.step_process import StepLoop, StepProcess, StepThread
from deepseek.serve.supervision import (
    EngineBusy,
    EngineCrashed,
    EngineDraining,
    EngineLost,
    EngineReloading,
    SupervisedClient,
    Supervision,
)
from deepseek.serve.worker import StepEngine

if TYPE_CHECKING:
    from deepseek.serve.engine_config import EngineConfig

__all__ = ["EngineBusy", "EngineClient", "EngineCrashed", "EngineDraining", "EngineLost", "EngineReloading",
           "LocalClient", "ProcessClient", "Supervision"]  # fmt: skip

FACTORY = "deepseek.serve.worker:load_engine"


class EngineClient(Protocol):
    """What a server needs of an engine."""

    @property
    def info(self) -> ModelInfo:
        """Of the model that new requests go to. Raises ``EngineError`` before the first is loaded."""

    def generate(self, request: Request) -> AsyncIterator[Output]:
        """Its outputs, the last with ``finish`` set. Closing the iterator, or cancelling the task, aborts it.

        Raises:
            RequestError: the engine can never serve it.
            EngineDraining: after ``drain``. EngineBusy: its first token would come too late.
            EngineLost: the step process died with it. EngineCrashed: so did the next, and it may be the cause.
            EngineError: there is no engine now; nothing was begun.
        """

    def readiness(self) -> tuple[bool, str]:
        """Whether requests are being worked on, from the step loop's own heartbeat; and why not."""

    def stats(self) -> EngineStats:
        """The newest, without a round trip. Counters go on over restarts and reloads."""

    async def reload(self, path: str) -> ModelInfo:
        """New requests go to the model at ``path``, running ones finish on the old one. A model that cannot be
        loaded raises what loading it raised, and the old one serves on. ``EngineReloading``: one reload at a time."""

    async def drain(self, seconds: float) -> None:
        """Refuses new requests and waits for the others; those that need longer end with ``finish='abort'``."""

    async def close(self) -> None:
        """Ends everything, at once; ``drain`` first to be polite."""


class ProcessClient(SupervisedClient):
    """``EngineClient`` around a step process. Use it in one event loop: ``async with ProcessClient("run") as client``.

    Args:
        path: run, checkpoint, Hugging Face directory or ``.gguf`` file.
        config: of the engine.
        factory: ``"module:callable"`` that makes the engine in the child of the path and ``to_dict(config)``.
    """

    def __init__(
        self,
        path: str | Path,
        config: EngineConfig | None = None,
        supervision: Supervision | None = None,
        factory: str = FACTORY,
    ) -> None:
        super().__init__(str(path), supervision or Supervision())
        self._options = to_dict(config) if config is not None else {}
        self._factory = factory

    @property
    def pid(self) -> int | None:
        """Of the step process that new requests go to."""
        return self._current.pid if isinstance(self._current, StepProcess) else None

    def _spawn(self, path: str) -> StepLoop:
        return StepProcess(path, self._options, self._factory, self._ended)


class LocalClient(SupervisedClient):
    """``EngineClient`` around an engine of this process, in a thread. When it fails it stays failed."""

    def __init__(self, engine: StepEngine, supervision: Supervision | None = None) -> None:
        super().__init__(engine.info.path, supervision or Supervision(kill_after=0.0, max_crashes=0))
        self._engine = engine

    def _spawn(self, path: str) -> StepLoop:
        return StepThread(self._engine, self._ended)

    async def reload(self, path: str) -> ModelInfo:
        raise EngineError(
            f"no reload of {path}: LocalClient serves the engine it was given; use ProcessClient"
        )
