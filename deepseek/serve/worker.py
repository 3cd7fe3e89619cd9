"""The step process: one engine, one loop, one socket to the front end that started it.

    while: take messages · step · send what the step added · beat

It exists so that tokenising, JSON and slow readers never take time from a step, and so that a crash of the engine
leaves somebody to say so. ``StepProcess`` starts it. It ends with its parent, however that ends. It ignores SIGINT,
SIGTERM and SIGHUP, which a terminal or a service manager sends to every process of a group: the parent decides.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from typing import Any, Protocol

from deepseek.errors import ConfigError, DeepseekError, EngineError
from deepseek.serve import wire
from deepseek.serve.request import EngineStats, FinishReason, ModelInfo, Output, Request
from deepseek.serve.wire import Channel, Heartbeat

IDLE = 0.25  #: seconds between beats while there is nothing to do
SOON = 0.005  #: and while a request is being prepared
BACKLOG = 16 << 20  #: bytes that the front end has not read yet, above which the loop waits for it
PARENT_DIED, FAILED = 70, 71  #: exit statuses


class StepEngine(Protocol):
    """What the loop needs of an engine; ``deepseek.serve.engine.Engine`` is one."""

    @property
    def info(self) -> ModelInfo: ...
    @property
    def has_work(self) -> bool: ...
    def prepared(self, request: Request) -> bool: ...
    def prepare(self, request: Request) -> None: ...
    def add(self, request: Request) -> None: ...
    def abort(self, id: str, reason: FinishReason = "abort") -> bool: ...
    def step(self) -> list[Output]: ...
    def stats(self) -> EngineStats: ...


#: Makes an engine of a path and the options of its config as plain values (``config.to_dict``).
Factory = Callable[[str, dict[str, Any]], StepEngine]


def load_engine(path: str, options: dict[str, Any]) -> StepEngine:
    """The factory of production: ``Engine.load(path, EngineConfig(**options))``."""
    from deepseek.config import from_dict
    from deepseek.serve.engine import Engine
    from deepseek.serve.engine_config import EngineConfig

    return Engine.load(path, from_dict(EngineConfig, options, "engine"))


def run(engine: StepEngine, channel: Channel, beat: Heartbeat) -> None:
    """Steps ``engine`` until it is told to stop or the front end is gone. Raises what ``engine.step`` raises."""
    steps, taken, preparing = 0, 0, Preparing(engine)
    beat.write(steps, engine.stats())
    channel.send((wire.READY, wire.pack_info(engine.info)))
    while not channel.closed:
        if not engine.has_work:
            channel.wait(SOON if preparing else IDLE)
        for message in channel.receive():
            if message[0] == wire.ADD:
                taken += 1
                preparing.put(wire.unpack_request(message[1]))
            elif message[0] == wire.ABORT:
                preparing.drop(message[1])
                engine.abort(message[1])
            elif message[0] == wire.STOP:
                return
        for request in preparing.take():
            _add(engine, channel, request)
        outputs = engine.step() if (working := engine.has_work) else []
        steps += working
        beat.write(steps, engine.stats(), taken)  # before the outputs: who has an answer finds it counted
        if outputs:
            channel.send((wire.OUT, [wire.pack_output(o) for o in outputs]))
        channel.flush()
        while channel.backlog > BACKLOG and not channel.closed:
            channel.wait(IDLE)
            channel.flush()
            beat.touch()


class Preparing:
    """Requests on their way into the engine; those that need it are prepared in a thread, and no step waits."""

    def __init__(self, engine: StepEngine) -> None:
        self._engine = engine
        self._waiting: dict[str, tuple[Request, Future[None] | None]] = {}
        self._thread = ThreadPoolExecutor(1, "prepare")

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, request: Request) -> None:
        prepared = self._engine.prepared(request)
        job = None if prepared else self._thread.submit(self._engine.prepare, request)
        self._waiting[request.id] = request, job

    def drop(self, id: str) -> None:
        request, job = self._waiting.pop(id, (None, None))
        if request is not None and job is not None:
            job.cancel()

    def take(self) -> list[Request]:
        """Those that are ready, in the order they came; one that waits is overtaken."""
        ready = [request for request, job in self._waiting.values() if job is None or job.done()]
        for request in ready:
            del self._waiting[request.id]
        return ready


def _add(engine: StepEngine, channel: Channel, request: Request) -> None:
    """A request that cannot be served is refused; whatever it raises, it must not end the others."""
    try:
        engine.add(request)
    except Exception as error:
        channel.send((wire.REFUSED, request.id, wire.pack_error(error)))


def factory(name: str) -> Factory:
    """The callable that ``"module:callable"`` names."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"no engine factory '{name}': {error}") from None


def serve(channel: Channel, beat: Heartbeat, make: str, path: str, options: dict[str, Any]) -> int:
    """Loads the engine and runs it; every failure is told before it is the exit status."""
    try:
        engine = factory(make)(path, options)
        gc.collect()
        gc.freeze()  # what was loaded stays: no collection needs to look at it again
        run(engine, channel, beat)
        return 0
    except BaseException as error:
        channel.send((wire.FAILED, wire.pack_error(error)))
        until = time.monotonic() + 2.0
        while not channel.flush() and time.monotonic() < until:
            channel.wait(0.1)
        if isinstance(error, EngineError) or not isinstance(error, DeepseekError):
            traceback.print_exc()
        return FAILED


def main() -> None:
    """``worker.main`` in a new interpreter: argv is socket, heartbeat, parent's pid, then factory, path, options."""
    fd, page, parent = map(int, sys.argv[1:4])
    for inherited in (fd, page):
        os.set_inheritable(inherited, False)  # a compiler that torch starts must not keep our end open
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1)  # the front end asks for our stack before it ends a hung step
    faulthandler.enable()
    sock = socket.socket(fileno=fd)
    _end_with_parent(sock, parent)
    channel, beat = Channel(sock), Heartbeat(page)
    os.close(page)
    make, path, options = _first(channel)
    status = serve(channel, beat, make, path, options)
    channel.close()
    sys.stderr.flush()
    os._exit(status)  # CUDA contexts and compilers' threads take seconds to come down, to nobody's gain


def _first(channel: Channel) -> tuple[str, str, dict[str, Any]]:
    while not channel.closed:
        channel.wait(1.0)
        for message in channel.receive():
            make, path, options = message
            return make, path, options
    os._exit(PARENT_DIED)


def _end_with_parent(sock: socket.socket, parent: int) -> None:
    """Two ways, for steps that never return to the loop: the kernel's signal; a thread that sees the socket close."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        pr_set_pdeathsig, pr_set_name = 1, 15
        libc.prctl(pr_set_pdeathsig, signal.SIGKILL)
        libc.prctl(pr_set_name, b"deepseek-step")
    if os.getppid() != parent:  # it died before we asked
        os._exit(PARENT_DIED)

    def watch() -> None:
        poll = select.poll()
        poll.register(sock, 0)  # hang-up only: data does not wake it
        while not poll.poll(60_000):
            pass
        time.sleep(1.0)  # the loop sees it too, and ends more gently
        os._exit(PARENT_DIED)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
