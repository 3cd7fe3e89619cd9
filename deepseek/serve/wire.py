"""What crosses the border between the front end and the step process: framed messages, and a shared heartbeat.

A message is a tuple of plain values that begins with one of the kinds below, written by ``marshal``: as fast as pickle,
and reading it runs no code. Dataclasses travel as the tuple of their fields; both ends run the same interpreter and
the same source, so no field needs a name.

    to the engine   ADD request · ABORT id · STOP
    from it         READY info · OUT outputs of one step · REFUSED id, error · FAILED error (then it exits)

The heartbeat needs no message: the step loop writes the time, how many requests it has taken, and its ``EngineStats``
into a page of memory that both processes map, so a reader sees the newest values even while the other side hangs.
"""

from __future__ import annotations

import dataclasses
import marshal
import mmap
import os
import select
import socket
import struct
import tempfile
import time
from operator import attrgetter
from typing import Any

from deepseek import errors
from deepseek.errors import DeepseekError, EngineError
from deepseek.serve.request import EngineStats, ModelInfo, Output, Request, TokenLogprobs, TokenTrace
from deepseek.serve.sampling_config import Grammar, SamplingConfig

ADD, ABORT, STOP, READY, OUT, REFUSED, FAILED = range(7)
Message = tuple[Any, ...]

_HEAD = struct.Struct("<I")
CHUNK = 1 << 18  #: bytes read at once


class Channel:
    """Whole messages over a stream socket, never waiting: what the other side does not take yet is kept here.

    Attributes:
        backlog: bytes kept.
        closed: the other side has gone.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.closed = False
        self._in, self._out = bytearray(), bytearray()

    @property
    def backlog(self) -> int:
        return len(self._out)

    def send(self, message: Message) -> None:
        """Queues ``message`` and sends what can be sent. A message to a side that has gone is dropped."""
        try:
            body = marshal.dumps(message)
        except ValueError:  # a subclass of a plain type
            body = marshal.dumps(_plain(message))
        self._out += _HEAD.pack(len(body))
        self._out += body
        self.flush()

    def flush(self) -> bool:
        """Sends what can be sent without waiting; whether nothing is left."""
        while self._out:
            try:
                sent = self.sock.send(self._out)
            except BlockingIOError:
                return False
            except OSError:
                self.closed = True
                self._out.clear()
                return True
            del self._out[:sent]
        return True

    def receive(self, chunks: int = 1 << 20) -> list[Any]:
        """The messages that have arrived, of at most ``chunks`` reads; sets ``closed`` at the end of the stream."""
        while chunks > 0:
            chunks -= 1
            try:
                data = self.sock.recv(CHUNK)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.closed = True
                break
            self._in += data
            if len(data) < CHUNK:
                break
        return self._whole()

    def wait(self, seconds: float) -> None:
        """Until there is something to read, or (with a backlog) something can be sent, or the time is over."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN | (select.POLLOUT if self._out else 0))
        poll.poll(max(0, int(seconds * 1000)))

    def close(self) -> None:
        self.closed = True
        self.sock.close()

    def _whole(self) -> list[Any]:
        found, at, end = [], 0, len(self._in)
        with memoryview(self._in) as view:
            while end - at >= 4:
                (size,) = _HEAD.unpack_from(view, at)
                if end - at - 4 < size:
                    break
                found.append(marshal.loads(view[at + 4 : at + 4 + size]))
                at += 4 + size
        del self._in[:at]
        return found


_STATS: list[tuple[str, type]] = [(f.name, type(f.default)) for f in dataclasses.fields(EngineStats)]
_stats_of = attrgetter(*(name for name, _ in _STATS))


class Heartbeat:
    """A page of memory that the step loop writes and the front end reads: times, counts, ``EngineStats``.

    Numbers are doubles (counts are exact up to 2^53). A reader may see some counters of one step and some of the next.
    """

    _LAYOUT = struct.Struct(f"<{4 + len(_STATS)}d")

    def __init__(self, fd: int) -> None:
        self._page = mmap.mmap(fd, mmap.PAGESIZE)

    @staticmethod
    def file() -> int:
        """A new descriptor to make one from, here and in the child. It has no name, so nothing can be left behind."""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("deepseek-heartbeat")
        else:
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        os.ftruncate(fd, mmap.PAGESIZE)
        return fd

    def write(self, steps: int, stats: EngineStats, taken: int = 0) -> None:
        """After a step, or while idle: ``steps`` done, ``taken`` requests read from the socket, both so far."""
        now = time.monotonic()
        self._LAYOUT.pack_into(self._page, 0, now, steps, now, taken, *_stats_of(stats))

    def touch(self) -> None:
        """The loop is alive, but has nothing new to tell."""
        struct.pack_into("<d", self._page, 0, time.monotonic())

    @property
    def age(self) -> float:
        """Seconds since the last beat; infinite before the first."""
        (at,) = struct.unpack_from("<d", self._page, 0)
        return time.monotonic() - at if at else float("inf")

    @property
    def steps(self) -> int:
        return int(struct.unpack_from("<d", self._page, 8)[0])

    @property
    def written(self) -> float:
        """When ``stats`` were written, ``time.monotonic`` seconds of any process of this machine; 0: not yet."""
        return float(struct.unpack_from("<d", self._page, 16)[0])

    @property
    def taken(self) -> int:
        """Requests that ``stats`` know of."""
        return int(struct.unpack_from("<d", self._page, 24)[0])

    def stats(self) -> EngineStats:
        _, _, _, _, *values = self._LAYOUT.unpack_from(self._page, 0)
        return EngineStats(**{name: kind(v) for (name, kind), v in zip(_STATS, values)})

    def close(self) -> None:
        self._page.close()


def _names(cls: type) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(cls))


_REQUEST, _SAMPLING, _GRAMMAR = _names(Request), _names(SamplingConfig), _names(Grammar)
_OUTPUT, _INFO = _names(Output), _names(ModelInfo)
_request_of, _sampling_of, _grammar_of = attrgetter(*_REQUEST), attrgetter(*_SAMPLING), attrgetter(*_GRAMMAR)
_info_of = attrgetter(*_INFO)
_logprob_of = attrgetter(*_names(TokenLogprobs))
_PLAIN = {type(None), bool, int, float, str}


def _plain(value: Any) -> Any:
    """``value`` with plain numbers, texts and tuples in place of their subclasses."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, (tuple, list)):
        return tuple(map(_plain, value))
    if isinstance(value, dict):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, str):
        return str.__str__(value)
    return int(value) if isinstance(value, int) else float(value)


def _build(cls: type, names: tuple[str, ...], values: tuple[Any, ...]) -> Any:
    """A frozen dataclass without its constructor: the values were checked when the original was made."""
    made: Any = object.__new__(cls)
    made.__dict__.update(zip(names, values))
    return made


def pack_request(request: Request) -> Message:
    fields = dict(zip(_REQUEST, _request_of(request)))
    fields["prompt"] = tuple(map(int, request.prompt))  # marshal takes numpy's numbers for bytes
    sampling = dict(zip(_SAMPLING, _sampling_of(request.sampling)))
    if request.sampling.grammar is not None:
        sampling["grammar"] = _grammar_of(request.sampling.grammar)
    fields["sampling"] = tuple(sampling.values())
    return tuple(fields.values())


def unpack_request(values: Message) -> Request:
    request = _build(Request, _REQUEST, values)
    sampling = _build(SamplingConfig, _SAMPLING, request.sampling)
    if sampling.grammar is not None:
        sampling.__dict__["grammar"] = _build(Grammar, _GRAMMAR, sampling.grammar)
    request.__dict__["sampling"] = sampling
    return request


def pack_output(output: Output) -> Message:
    values = tuple(output.__dict__.values())  # in the order of the fields, however it was made
    if not (output.logprobs or output.traces or output.prompt_logprobs):
        return values
    fields = dict(zip(_OUTPUT, values))
    fields["logprobs"] = tuple(map(_logprob_of, output.logprobs))
    fields["traces"] = tuple((x.experts, x.gates) for x in output.traces)
    if output.prompt_logprobs is not None:
        fields["prompt_logprobs"] = tuple(x and _logprob_of(x) for x in output.prompt_logprobs)
    return tuple(fields.values())


def unpack_output(values: Message) -> Output:
    output = _build(Output, _OUTPUT, values)
    if output.logprobs or output.traces or output.prompt_logprobs:
        fields = output.__dict__
        fields["logprobs"] = tuple(TokenLogprobs(*x) for x in output.logprobs)
        fields["traces"] = tuple(TokenTrace(*x) for x in output.traces)
        if output.prompt_logprobs is not None:
            fields["prompt_logprobs"] = tuple(x and TokenLogprobs(*x) for x in output.prompt_logprobs)
    return output


def pack_info(info: ModelInfo) -> Message:
    return _info_of(info)


def unpack_info(values: Message) -> ModelInfo:
    return ModelInfo(*values)


def pack_error(error: BaseException) -> Message:
    """The nearest class of ``deepseek.errors`` and what makes one of it; others become an ``EngineError``."""
    for cls in type(error).__mro__:
        if issubclass(cls, DeepseekError) and getattr(errors, cls.__name__, None) is cls:
            args = error.__reduce__()[1] if cls is type(error) else (str(error),)
            plain = isinstance(args, tuple) and all(type(x) in _PLAIN for x in args)
            return cls.__name__, args if plain else (str(error),)
    return EngineError.__name__, (f"{type(error).__name__}: {error}",)


def unpack_error(values: Message) -> DeepseekError:
    name, args = values
    return getattr(errors, name)(*args)
