"""The front end's handle of one step process, from its start to the moment when nothing of it is left.

Everything here runs in the event loop's thread. ``StepThread`` is the same thing without the process: the same loop
and the same messages in a thread, around an engine that is already loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any

from deepseek.errors import DeepseekError, EngineError
from deepseek.serve import wire, worker
from deepseek.serve.engine_config import step_environment
from deepseek.serve.request import EngineStats, ModelInfo
from deepseek.serve.stream import Stream
from deepseek.serve.wire import Channel, Heartbeat

_BOOT = "import sys; n = int(sys.argv[4]); sys.path[:] = sys.argv[5:5 + n]; \
from deepseek.serve.worker import main; main()"


class StepLoop(ABC):
    """The front end's side of one step loop: requests go in, outputs come out to their streams.

    Attributes:
        loaded: done when the engine is; or with the ``DeepseekError`` that loading it raised in the child.
        streams: what it works on, by wire id.
        error: what the loop said before it ended.
        gone: the loop has ended, and ``streams`` are nobody's.
    """

    def __init__(self, path: str, ended: Callable[[StepLoop], None]) -> None:
        self.path, self._ended = path, ended
        self.loop = asyncio.get_running_loop()
        self.loaded: asyncio.Future[ModelInfo] = self.loop.create_future()
        self.loaded.add_done_callback(lambda f: f.cancelled() or f.exception())  # asked for or not
        self.streams: dict[str, Stream] = {}
        self._sent: deque[tuple[int, int]] = (
            deque()
        )  # requests that the loop may not have read: number, tokens
        self._sent_tokens = self._submitted = 0
        self.error: DeepseekError | None = None
        self.gone = self._stopping = self._writing = False
        page = Heartbeat.file()
        ours, theirs = socket.socketpair()
        try:
            self.beat = Heartbeat(page)
            self._start(theirs, page)
        except BaseException:
            ours.close()
            raise
        finally:
            os.close(page)
        self.channel = Channel(ours)
        self.loop.add_reader(ours, self._read)

    @abstractmethod
    def _start(self, theirs: socket.socket, page: int) -> None:
        """Starts the loop on its end of the socket, which it owns from here on."""

    @abstractmethod
    def exited(self) -> str | None:
        """How it ended, or ``None`` while it lives."""

    @abstractmethod
    def dump(self) -> None:
        """Asks for the stack of every thread on standard error."""

    @abstractmethod
    def kill(self) -> None:
        """Ends it at once, where that can be done."""

    def info(self) -> ModelInfo | None:
        """Of its model, once that is loaded."""
        done = self.loaded.done() and not self.loaded.cancelled() and self.loaded.exception() is None
        return self.loaded.result() if done else None

    def stats(self) -> EngineStats:
        return self._last if self.gone else self.beat.stats()

    @property
    def on_the_way(self) -> int:
        """Prompt tokens that were sent and that ``stats`` do not know of yet."""
        self._forget_taken()
        return self._sent_tokens

    @property
    def told(self) -> float:
        """When ``stats`` were written, ``time.monotonic`` seconds."""
        return 0.0 if self.gone else self.beat.written

    def _forget_taken(self) -> None:
        taken = self._submitted if self.gone else self.beat.taken
        while self._sent and self._sent[0][0] <= taken:
            self._sent_tokens -= self._sent.popleft()[1]

    def submit(self, stream: Stream) -> None:
        request = stream.attempt()
        self.streams[stream.wire_id] = stream
        self._submitted += 1
        self._sent.append((self._submitted, len(request.prompt)))
        self._sent_tokens += len(request.prompt)
        self._forget_taken()
        self._send((wire.ADD, wire.pack_request(request)))

    def abort(self, stream: Stream) -> None:
        """The engine forgets it; nothing more reaches the stream."""
        if self.streams.pop(stream.wire_id, None) is not None:
            self._send((wire.ABORT, stream.wire_id))

    async def stop(self, seconds: float = 2.0) -> None:
        """Asks the loop to end, and sees to it that it has."""
        self._stopping = True
        if not self.gone:
            self._send((wire.STOP,))
            await self._until_exit(seconds)
            self.kill()
            self._close()
        await self._until_exit(seconds)

    async def _until_exit(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self.exited() is None and time.monotonic() < until:
            await asyncio.sleep(0.005)

    def _send(self, message: wire.Message) -> None:
        if not self.gone:
            self.channel.send(message)
            self._watch_writing()

    def _watch_writing(self) -> None:
        more = self.channel.backlog > 0
        if more and not self._writing:
            self.loop.add_writer(self.channel.sock, self._write)
        elif self._writing and not more:
            self.loop.remove_writer(self.channel.sock)
        self._writing = more

    def _write(self) -> None:
        self.channel.flush()
        self._watch_writing()

    def _read(self) -> None:
        for message in self.channel.receive(chunks=4):  # the rest at the loop's next turn
            kind = message[0]
            if kind == wire.OUT:
                self._outputs(message[1])
            elif kind == wire.REFUSED:
                if stream := self.streams.pop(message[1], None):
                    stream.fail(wire.unpack_error(message[2]))
            elif kind == wire.READY:
                self.loaded.set_result(wire.unpack_info(message[1]))
            elif kind == wire.FAILED:
                self.error = wire.unpack_error(message[1])
        if self.channel.closed:
            self._close()
            if not self._stopping:
                self._ended(self)

    def _outputs(self, packed: list[wire.Message]) -> None:
        for values in packed:
            output = wire.unpack_output(values)
            if stream := self.streams.get(output.id):
                if output.finish is not None:
                    del self.streams[output.id]
                output.__dict__["id"] = stream.request.id
                stream.push(output)

    def _close(self) -> None:
        """Nothing of ours is left open; ``loaded`` has its answer."""
        if self.gone:
            return
        self._last = self.beat.stats()
        self.gone = True
        self.loop.remove_reader(self.channel.sock)
        if self._writing:
            self.loop.remove_writer(self.channel.sock)
        self.channel.close()
        self.beat.close()
        until = time.monotonic() + 0.02
        while self.exited() is None and time.monotonic() < until:
            time.sleep(0.001)  # its socket ends a moment before the process and its status do
        self.kill()
        if not self.loaded.done():
            self.loaded.set_exception(
                self.error or EngineError(f"{self.path}: {self.ending()} while loading")
            )

    def ending(self) -> str:
        """How it ended, for a message."""
        how = self.error or self.exited()
        return f"the step process ended ({how})" if how else "the step process ended"

    def silence(self) -> float:
        """Seconds since its last sign of life; 0 while it loads."""
        return self.beat.age if not self.gone and self.info() else 0.0


class StepProcess(StepLoop):
    """A step loop in a process of its own, started without a fork of this one's threads (``posix_spawn`` or ``vfork``).

    Args:
        factory: ``"module:callable"`` that makes the engine of ``path`` and ``options``; a test's way in.
    """

    def __init__(
        self, path: str, options: dict[str, Any], factory: str, ended: Callable[[StepLoop], None]
    ) -> None:
        self.factory, self.options = factory, options
        super().__init__(path, ended)
        self._send((factory, path, options))

    @property
    def pid(self) -> int:
        return self.process.pid

    def _start(self, theirs: socket.socket, page: int) -> None:
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, str(theirs.fileno()), str(page), str(os.getpid()),
                 str(len(sys.path)), *sys.path],
                pass_fds=(theirs.fileno(), page), stdin=subprocess.DEVNULL, env=step_environment(),
            )  # fmt: skip

    def exited(self) -> str | None:
        status = self.process.poll()
        if status is None:
            return None
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return f"exit status {status}"

    def dump(self) -> None:
        if self.exited() is None and hasattr(signal, "SIGUSR1"):
            self.process.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()


class StepThread(StepLoop):
    """A step loop in a thread of this process, around ``engine``."""

    def __init__(self, engine: worker.StepEngine, ended: Callable[[StepLoop], None]) -> None:
        self.engine = engine
        super().__init__(engine.info.path, ended)

    def _start(self, theirs: socket.socket, page: int) -> None:
        channel, beat = Channel(theirs), Heartbeat(page)

        def run() -> None:
            try:
                worker.run(self.engine, channel, beat)
            except Exception as error:
                channel.send((wire.FAILED, wire.pack_error(error)))
            finally:
                channel.close()
                beat.close()

        self.thread = threading.Thread(target=run, name="engine-step", daemon=True)
        self.thread.start()

    def exited(self) -> str | None:
        return None if self.thread.is_alive() else "its thread ended"

    def dump(self) -> None:
        faulthandler.dump_traceback()

    def kill(self) -> None:
        """A thread cannot be ended: it ends at its next look at the socket."""
