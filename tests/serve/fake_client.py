"""An engine that only pretends: scripted texts, delays and failures behind the interface of ``EngineClient``."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from deepseek.address import bind
from deepseek.data import Tokenizer
from deepseek.data.tokenizer import train_tokenizer
from deepseek.errors import EngineError, RequestError
from deepseek.serve.client import EngineLost
from deepseek.serve.request import EngineStats, ModelInfo, Output, Request, TokenLogprobs, TokenTrace
from deepseek.serve.server.config import ServerConfig
from deepseek.serve.server.front import Front
from deepseek.serve.server.keys import Key, KeyConfig, Keyring
from deepseek.serve.server.serving import Server

TEXT = "Hello, this is an answer of many words, é€漢 included. "
INFO = ModelInfo("fake", "/models/fake", 512, 320, 8, 1234, 7, ("polite",))
KEY, ADMIN = "sk-test-0123456789abcdef", "sk-admin-0123456789abcdef"


def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT * 20, "the quick brown fox jumps over the lazy dog " * 20], 320)


class FakeChat:
    """Our own chat form, written out."""

    takes_tools = False

    def ids(
        self, tokenizer: Tokenizer, messages: Sequence[Any], *, tools: Any = None, add_generation_prompt: bool = True,
        continue_final_message: bool = False, variables: Any = None,
    ) -> list[int]:  # fmt: skip
        ids = [tokenizer.eos_id]
        for message in messages:
            role = message["role"] if message["role"] in ("system", "user", "assistant") else "user"
            ids += [
                tokenizer.token_id(f"<|{role}|>"),
                *tokenizer.encode(message["content"]),
                tokenizer.token_id("<|end|>"),
            ]
        return [*ids, tokenizer.token_id("<|assistant|>")] if add_generation_prompt else ids


@dataclass
class FakeClient:
    """Every request is answered with ``text``, a token a step. ``running`` and ``aborted`` are looked at by tests."""

    tokenizer: Tokenizer = field(default_factory=tokenizer)
    text: str | Callable[[Request], str] = TEXT
    delay: float = 0.0  # before every token
    prefill: float = 0.0  # before the first
    hold_at: int | None = None  # tokens after which an answer waits, until this is None again
    fail_after: int | None = None  # tokens, then EngineError
    lost: bool = False  # EngineLost instead
    refuse: str = ""  # RequestError with this text
    finish: str = ""  # instead of 'stop'
    slots: int = 64
    info: ModelInfo = INFO
    ready: tuple[bool, str] = (True, "ready")
    running: set[str] = field(default_factory=set)
    aborted: list[str] = field(default_factory=list)
    seen: list[Request] = field(default_factory=list)
    generated: int = 0
    reloads: list[str] = field(default_factory=list)
    draining: bool = False
    gate: asyncio.Semaphore | None = None

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        if self.refuse:
            raise RequestError(self.refuse, "prompt")
        if self.draining:
            raise EngineError("draining")
        self.seen.append(request)
        self.running.add(request.id)
        self.gate = self.gate or asyncio.Semaphore(self.slots)
        done = False
        try:
            async with self.gate:
                began = time.monotonic()
                while time.monotonic() < began + self.prefill:  # which a test may change meanwhile
                    await asyncio.sleep(0.01)
                async for output in self._outputs(request):
                    done = output.finish is not None
                    yield output
        finally:
            if not done:
                self.aborted.append(request.id)
            self.running.discard(request.id)  # last: a test in another thread waits for it

    async def _outputs(self, request: Request) -> AsyncIterator[Output]:
        sampling, first = request.sampling, True
        sizes: dict[str, Any] = {
            "prompt_tokens": len(request.prompt),
            "cached_tokens": len(request.prompt) // 2,
        }
        if request.embed:
            vector = tuple(float(sum(request.prompt) % (i + 7)) for i in range(self.info.hidden))
            yield Output(request.id, embedding=vector, finish="stop", **sizes)
            return
        text = self.text(request) if callable(self.text) else self.text
        ids = self.tokenizer.encode(text)
        if sampling.ignore_eos:
            ids = (ids * (1 + sampling.max_tokens // max(1, len(ids))))[: sampling.max_tokens]
        decoder, end = self.tokenizer.stream(), time.monotonic() + (request.deadline or 1e9)
        for place, token in enumerate([*ids, self.tokenizer.eos_id]):
            if self.delay:
                await asyncio.sleep(self.delay)
            else:
                await asyncio.sleep(0)
            while self.hold_at is not None and place >= self.hold_at and time.monotonic() < end:
                await asyncio.sleep(0.005)
            if time.monotonic() > end:
                yield Output(request.id, finish="timeout", **sizes)
                return
            if self.fail_after is not None and place >= self.fail_after:
                kind = EngineLost if self.lost else EngineError
                raise kind("the step process died (SIGKILL) after part of the answer was sent")
            last = place + 1 >= sampling.max_tokens or token == self.tokenizer.eos_id
            finish: Any = None
            if last:
                finish = self.finish or ("stop" if token == self.tokenizer.eos_id else "length")
            shown = "" if token == self.tokenizer.eos_id else decoder.push(token)
            logprobs = ()
            if sampling.logprobs is not None:
                logprobs = (_logprobs(token, sampling.logprobs),)
            prompt_logprobs = None
            if first and sampling.prompt_logprobs is not None:
                top = sampling.prompt_logprobs
                prompt_logprobs = (None, *(_logprobs(t, top) for t in request.prompt[1:]))
            traces = (TokenTrace(((1, ((3, 0.75), (0, 0.25))),), ((0, 0.5),)),) if request.trace else ()
            self.generated += 1
            yield Output(request.id, shown, (token,), logprobs, prompt_logprobs, traces, None, finish,
                         None, error="planted" if finish == "error" else "", **sizes)  # fmt: skip
            first = False
            if last:
                return

    def readiness(self) -> tuple[bool, str]:
        return self.ready

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.running), pages_total=10, pages_used=len(self.running), steps=self.generated,
            generated_tokens=self.generated, prefix_queries=10, prefix_hits=5,
        )  # fmt: skip

    async def reload(self, path: str) -> ModelInfo:
        self.reloads.append(path)
        await asyncio.sleep(0.01)
        self.info = replace(self.info, path=path, step=(self.info.step or 0) + 1)
        return self.info

    async def drain(self, seconds: float) -> None:
        self.draining = True

    async def close(self) -> None:
        pass


def _logprobs(token: int, top: int) -> TokenLogprobs:
    return TokenLogprobs(
        token, -0.5, 1, tuple((t % INFO.vocab_size, -0.5 - t / 100) for t in range(token, token + top))
    )


def keyring(**limits: Any) -> Keyring:
    return Keyring(
        (Key("alice", KeyConfig(key=KEY, **limits)), Key("root", KeyConfig(key=ADMIN, admin=True)))
    )


@dataclass
class Served:
    """A running server: its address, and what is behind it."""

    url: str
    port: int
    client: FakeClient
    front: Front
    server: Server
    thread: threading.Thread

    def call(self, work: Callable[[], Any]) -> None:
        """Run ``work`` in the server's loop."""
        assert self.server._loop is not None
        self.server._loop.call_soon_threadsafe(work)

    def stop(self) -> None:
        self.call(self.server.stop)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), 60)


@contextlib.contextmanager
def serving(
    client: FakeClient | None = None, keys: Keyring | None = None, chat: Any = FakeChat, **options: Any
) -> Iterator[Served]:
    """A server on a free port of loopback, in a thread."""
    client = client or FakeClient()
    options.setdefault("log", "")
    front = Front(
        client, lambda path: (client.tokenizer, chat() if chat else None), ServerConfig(**options), keys
    )
    begun = threading.Event()
    server = Server(front, started=begun.set)
    with bind("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        thread = threading.Thread(target=lambda: server.run(sockets=[bound]), daemon=True)
        thread.start()
        assert begun.wait(60)
        served = Served(f"http://127.0.0.1:{port}", port, client, front, server, thread)
        try:
            yield served
        finally:
            if thread.is_alive():
                with contextlib.suppress(RuntimeError):
                    served.stop()
                    if client.running:
                        served.stop()
            thread.join(60)
            assert not thread.is_alive()
