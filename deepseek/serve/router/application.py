"""``Router``: a stateless reverse proxy over replicas of a server, as an ASGI application.

    client → Call → Fleet.choose → Exchange → replica
                         ↑
                       Watch: /ready of every replica, once a second

A replica that did not begin (no connection; 429; 503; closed before it took the body) costs the client nothing: the
next one is asked, each once. One that is lost with a request (killed, or its step process was) before a byte of its
answer came costs the client time: requests that change nothing (``Call.repeatable``) are given to another one,
``retries`` times at most and while ``RetryBudget`` lasts, because a request that breaks one replica must not break them
all. One that its replica suspects of that (503 ``engine_crashed``) has a far smaller budget. A client that has had a
byte never gets a second answer; comments in a stream that is still silent do not count. Every replica is told how much
of the request's time is over. Streams pass through event by event as they come; what breaks off
in the middle ends with an error that a client can see. Keys pass through: the replicas know them, the router does not.
So one that other machines can reach gives nothing to a replica that asks for no key, unless it is told to.

Own routes: ``/health`` (this process lives), ``/ready`` (a replica is ready and this router is not about to stop) and
``/metrics`` (with one of ``keys``). ``/admin`` is not passed on: what changes a replica is asked of that replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from deepseek.address import is_loopback
from deepseek.config import configclass
from deepseek.errors import ConfigError
from deepseek.serve.router.affinity import prefix_key
from deepseek.serve.router.call import Call, ClientGone, Pairs, Receive, Scope, Send
from deepseek.serve.router.exchange import (
    EVENT_ENDS,
    Exchange,
    ExchangeError,
    first_line,
    gathered,
    whole_events,
)
from deepseek.serve.router.metrics import RouterMetrics
from deepseek.serve.router.replica import Address, Fleet, Replica
from deepseek.serve.router.retry import RetryBudget
from deepseek.serve.router.watch import Watch
from deepseek.serve.server.errors import ApiError
from deepseek.serve.server.keys import Keyring
from deepseek.serve.server.metrics import CONTENT_TYPE
from deepseek.serve.server.room import Room

SAFE = frozenset({"GET", "HEAD", "OPTIONS"})  #: methods that may be tried again although a replica began
#: Error codes of a 503 that comes of work that broke, and not of none: through no fault of the request; perhaps by it.
LOST, CRASHED = "engine_lost", "engine_crashed"
#: Error codes by which a stream that has said nothing yet ends as a 503 would.
ENDED = frozenset({LOST, CRASHED, "engine_unavailable", "aborted", "draining"})
#: For requests that may break replicas: as ``retry_burst``, and what part of ``retry_share``.
SUSPECTS, SUSPECT_SHARE = 2, 0.01
REFUSAL = 1 << 16  #: bytes of a refusal that are kept
#: Bytes of an answer, or of an event, that are held until it is whole: it comes as a whole or not at all.
HELD = 1 << 20
JSON = (b"content-type", b"application/json")

log = logging.getLogger("deepseek.serve")


@configclass
class RouterConfig:
    """Options of the router.

    Attributes:
        affinity: characters of the prompt by which equal prefixes meet the same replica; 0: only the load decides.
        affinity_load: times the mean load above which a preferred replica is passed over.
        max_body: bytes of a request's body; max_bodies: of all that pass through at once.
        max_inside: requests at once, whose bodies are here; one more is answered 429.
        body_seconds: for a body to arrive.
        silence: seconds that a replica may say nothing; above the replicas' own time limit.
        retries: times that a request is given to another replica because one was lost with it; 0: never.
        retry_burst: retries that all requests together may take at once; retry_share: of a retry, that every answer
            gives back.
        stalled: seconds that a client may take nothing of its answer.
        poll, poll_seconds: every how many seconds a replica's readiness is asked, and how long it may take to answer.
        ready_path: what is asked.
        resolve: seconds after which host names are looked up again.
        linger: seconds after SIGTERM during which new connections are still taken, while ``/ready`` says 503.
        drain: seconds that running requests get after that.
        keep_alive: seconds that an idle connection of a client is kept.
        open: also give requests of other machines to replicas that ask for no key.
    """

    affinity: int = 1024
    affinity_load: float = 1.5
    max_body: int = 16 << 20
    max_bodies: int = 1 << 30
    max_inside: int = 4096
    body_seconds: float = 30.0
    silence: float = 660.0
    retries: int = 2
    retry_burst: int = 256
    retry_share: float = 0.1
    stalled: float = 60.0
    poll: float = 1.0
    poll_seconds: float = 2.0
    ready_path: str = "/ready"
    resolve: float = 10.0
    linger: float = 0.0
    drain: float = 60.0
    keep_alive: float = 75.0
    open: bool = False

    def check(self) -> None:
        if self.affinity < 0 or self.affinity_load < 1:
            raise ConfigError(
                f"affinity={self.affinity} must be at least 0, affinity_load={self.affinity_load} at least 1"
            )
        if min(self.max_body, self.max_inside) < 1 or min(self.linger, self.drain) < 0:
            raise ConfigError(f"max_body={self.max_body} and max_inside={self.max_inside} must be at least 1, "
                              f"linger={self.linger} and drain={self.drain} at least 0")  # fmt: skip
        if min(self.retries, self.retry_burst) < 0 or not 0 <= self.retry_share <= 1:
            raise ConfigError(f"retries={self.retries} and retry_burst={self.retry_burst} must be at least 0, "
                              f"retry_share={self.retry_share} from 0 to 1")  # fmt: skip
        if self.max_bodies < self.max_body:
            raise ConfigError(f"max_bodies={self.max_bodies} must be at least max_body={self.max_body}")
        times = {
            k: getattr(self, k)
            for k in ("body_seconds", "silence", "stalled", "poll", "poll_seconds", "resolve")
        }
        if min(times.values()) <= 0:
            raise ConfigError(f"{', '.join(f'{k}={v}' for k, v in times.items() if v <= 0)} must be above 0")
        if not self.ready_path.startswith("/"):
            raise ConfigError(f"ready_path={self.ready_path!r} must begin with '/'")


@dataclass(frozen=True)
class Refusal:
    """How a replica declined: its answer, or no answer (status 0).

    Attributes:
        lost: it had begun, and is gone, or its step process is. suspect: perhaps because of this request.
    """

    why: str
    status: int = 0
    headers: Pairs = ()
    body: bytes = b""
    lost: bool = False
    suspect: bool = False

    @property
    def retry_after(self) -> float:
        """Seconds; infinite where none are told."""
        told = next((v for k, v in self.headers if k == b"retry-after"), b"")
        return float(told) if told.isdigit() else math.inf

    @property
    def code(self) -> str:
        """Of the error that the answer is, or ''."""
        with contextlib.suppress(ValueError, TypeError, KeyError):
            return str(json.loads(self.body)["error"]["code"])
        return ""


class Beside(Protocol):
    """What lives as long as the router does: the replicas, where it starts them itself.

    Attributes:
        fleet: of the router, once there is one.
        failed: why it makes no sense to go on, or ''.
        patience: seconds that it takes to end, at most.
    """

    fleet: Fleet
    failed: str
    patience: float

    def running(self) -> contextlib.AbstractAsyncContextManager[None]:
        """While it lives."""


def _say(line: str) -> None:
    print(f"router: {line}", file=sys.stderr, flush=True)


class Router:
    """The application over the replicas at ``urls``.

    Args:
        urls: ``http://HOST:PORT``; of a name with several addresses each is a replica.
        keys: who may read ``/metrics``; without any that is everybody who reaches a ``local`` router.
        local: only this machine can reach it: requests must name it so, and replicas need no keys.
        beside: started before the first look at a replica, and ended after the last request.
        say: told what changes, in words.

    Raises:
        ConfigError: a URL that is none, one twice, or none at all.
    """

    def __init__(self, urls: Sequence[str], config: RouterConfig | None = None, keys: Keyring | None = None, *,
                 local: bool = True, beside: Beside | None = None,
                 say: Callable[[str], None] = _say) -> None:  # fmt: skip
        addresses = [Address.parse(url) for url in urls]
        if not addresses:
            raise ConfigError("a router needs the address of a replica: http://HOST:PORT …")
        if twice := [str(a) for a in dict.fromkeys(addresses) if addresses.count(a) > 1]:
            raise ConfigError(f"{', '.join(twice)} is given twice")
        self.config = config = config or RouterConfig()
        self.keys, self.local, self.say = keys or Keyring(), local, say
        self.fleet, self.metrics, self.draining = Fleet(config.affinity_load), RouterMetrics(), False
        self.bodies = Room(config.max_bodies, "bytes of bodies")
        self.budget = RetryBudget(config.retry_burst, config.retry_share)
        self.suspects = RetryBudget(min(SUSPECTS, config.retry_burst), SUSPECT_SHARE * config.retry_share)
        self.calls: set[Call] = set()
        self.arriving = 0  # of them: their bodies are still on the way
        self.beside = beside
        if beside is not None:
            beside.fleet = self.fleet
        self._watch = Watch(
            addresses, self.fleet, path=config.ready_path, every=config.poll, patience=config.poll_seconds,
            resolve=config.resolve, guarded=not (local or config.open), say=say,
        )  # fmt: skip
        self._own = {"/health": self._health, "/ready": self._ready, "/metrics": self._metrics}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._live(receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1003})
        call = Call(scope, receive, send)
        call.closing = self.draining
        try:
            if self.local and not is_loopback(call.host):
                raise ApiError(f"the host {call.host[:100]!r} is no name of this machine's loopback", 403,
                               code="unknown_host")  # fmt: skip
            if call.path.startswith("/admin"):
                raise ApiError(
                    f"{call.path[:100]} is for one replica; ask it itself", 404, code="unknown_route"
                )
            if own := self._own.get(call.path):
                if call.method not in ("GET", "HEAD"):
                    raise ApiError(f"{call.path} takes GET", 405, headers={"allow": "GET, HEAD"})
                return await own(call)
            return await self._pass_on(call)
        except ApiError as error:
            await (self._broken_off(call, error) if call.started else call.refuse(error))
        except ClientGone:
            self.metrics.gone()
        except Exception as error:
            log.exception("%s %s", call.method, call.path[:200])
            if not call.started:
                await call.refuse(
                    ApiError(f"a fault of this router: {type(error).__name__}", 500, code="internal_error")
                )

    async def _pass_on(self, call: Call) -> None:
        """The answer of a replica, while the client waits for it."""
        self._check_room()
        self.calls.add(call)
        try:
            with self.bodies.hold() as more:
                self.arriving += 1  # who sends slowly takes no place from others
                try:
                    body = await call.body(self.config.max_body, self.config.body_seconds, more)
                    self._check_room()
                finally:
                    self.arriving -= 1
                await call.while_there(self._ask_in_turn(call, body))
        finally:
            self.calls.discard(call)

    def _check_room(self) -> None:
        """Raises ``ApiError`` 429 where one more would be too many."""
        if len(self.calls) - self.arriving >= self.config.max_inside:
            raise ApiError(f"{self.config.max_inside:,} requests are passing through this router; try again in 1 s",
                           429, code="queue_full", headers={"retry-after": "1", "connection": "close"})  # fmt: skip

    async def _ask_in_turn(self, call: Call, body: bytes) -> None:
        key = prefix_key(body, self.config.affinity)
        tried: list[Replica] = []
        refusals: list[Refusal] = []
        while (replica := self.fleet.choose(key, tried)) is not None:
            if refusals and refusals[-1].lost and not self._again(tried[-1], refusals):
                break
            tried.append(replica)
            with replica.working(), contextlib.closing(Exchange(replica, self.config.silence)) as exchange:
                refusal = await self._ask(call, exchange, body)
            if refusal is None:
                return
            refusals.append(refusal)
            if not refusal.lost:
                self.metrics.refused(replica.name, refusal.why)
        await self._refuse(call, refusals)

    def _again(self, replica: Replica, refusals: Sequence[Refusal]) -> bool:
        """Whether another one is asked what ``replica`` was lost with, which is paid for."""
        if sum(r.lost for r in refusals) > self.config.retries:
            return False
        if not (not refusals[-1].suspect or self.suspects.take()) or not self.budget.take():
            return False
        self.metrics.retried(replica.name)
        return True

    async def _ask(self, call: Call, exchange: Exchange, body: bytes) -> Refusal | None:
        """Pass on what the replica answers; or how it declined or was lost, if another one may be asked."""
        replica, began = exchange.replica, time.monotonic()
        try:
            head = await exchange.ask(call.method, call.target, call.headers(), body)
            self.metrics.answered(replica.name, head.status_code, time.monotonic() - began)
            if head.status_code in (429, 503):
                refusal = await self._refusal(exchange, head)
            elif (found := await self._pass_answer(call, exchange, head)) is None:
                return None
            else:
                refusal = found
        except ExchangeError as error:
            self._failed(replica, error)
            if call.given:
                told = ApiError(f"the answer broke off: {error}", 502, code="replica_lost")
                await self._broken_off(call, told)
                return None
            if not error.begun or call.method in SAFE:
                return Refusal(error.kind)
            if error.kind != "silence" and call.repeatable:
                return Refusal(error.kind, lost=True)
            raise ApiError("the replica that worked on this request gave no whole answer",
                           504 if error.kind == "silence" else 502, code="replica_lost") from None  # fmt: skip
        if refusal.status == 503:
            replica.told(False, "answered 503")
            if exchange.begun and call.method not in SAFE and (code := refusal.code) in (LOST, CRASHED):
                if call.repeatable:
                    return replace(refusal, lost=True, suspect=code == CRASHED)
                await call.answer(refusal.status, refusal.body, refusal.headers)
                return None
        return refusal

    async def _pass_answer(self, call: Call, exchange: Exchange, head: Any) -> Refusal | None:
        """The answer as it comes; or, of a stream that ended before it said anything, why.

        Its head waits for the first piece, and comments are no answer: until then another replica can take over.
        """
        events = any(k == b"content-type" and v.startswith(b"text/event-stream") for k, v in head.headers)
        if call.started and not (events and head.status_code == 200):  # the client has the head of a stream
            found = await self._refusal(exchange, head)
            await call.answer(found.status, found.body, found.headers)
            return None
        pieces = (whole_events if events else gathered)(exchange.pieces(), HELD)
        piece = await anext(pieces, b"")
        while piece and events and not (line := first_line(piece)):
            await self._start(call, head)
            await call.give(piece, comment=True)
            call.between_events = True
            piece = await anext(pieces, b"")
        if events and (refusal := _ended_at_once(line if piece else b"")):
            return refusal
        await self._start(call, head)
        while piece:
            await call.give(piece)
            call.between_events = events and piece.endswith(EVENT_ENDS)
            piece = await anext(pieces, b"")
        await call.end()
        if head.status_code < 500:
            exchange.replica.succeeded()
            self.budget.answered()
            self.suspects.answered()
        else:
            self._count_failure(exchange.replica)
        return None

    async def _start(self, call: Call, head: Any) -> None:
        if not call.started:
            await call.start(head.status_code, head.headers)

    async def _broken_off(self, call: Call, told: ApiError) -> None:
        """End an answer that has begun: as an event where that is possible, else by closing the connection."""
        if call.between_events:
            await call.give(b"data: " + told.encoded() + b"\n\n")
            await call.end()

    async def _refusal(self, exchange: Exchange, head: Any) -> Refusal:
        body = bytearray()
        async for piece in exchange.pieces():
            body += piece
            if len(body) > REFUSAL:
                break
        return Refusal(str(head.status_code), head.status_code, list(head.headers), bytes(body[:REFUSAL]))

    async def _refuse(self, call: Call, refusals: Sequence[Refusal]) -> None:
        """Nobody answered: the 429 with the shortest wait, else a replica's own 503, else ours."""
        for status in (429, 503):
            if found := [r for r in refusals if r.status == status]:
                best = min(found, key=lambda r: (not r.suspect, r.retry_after))
                return await call.answer(status, best.body, best.headers)
        self.metrics.nobody()
        known = len(self.fleet.replicas)
        if lost := sum(r.lost for r in refusals):
            raise ApiError(f"{lost} replica{'s' * (lost != 1)} ended while working on this request, and it is given to "
                           "no other; try again in 1 s", 503, code="replica_lost",
                           headers={"retry-after": "1"})  # fmt: skip
        raise ApiError(f"none of {known} replica{'s' * (known != 1)} can answer now; try again in 1 s", 503,
                       code="no_replica", headers={"retry-after": "1"})  # fmt: skip

    def _failed(self, replica: Replica, error: ExchangeError) -> None:
        self.metrics.failed(replica.name, error.kind)
        if error.kind == "connect":
            replica.told(False, str(error))
            self.say(f"replica {replica.name} is not ready: {error}")
        else:
            self._count_failure(replica)

    def _count_failure(self, replica: Replica) -> None:
        if replica.failed():
            self.metrics.ejected(replica.name)
            rest = replica.ejected_until - time.monotonic()
            self.say(f"replica {replica.name} is ejected for {rest:.0f} s: its last answers failed")

    async def emptied(self, seconds: float) -> None:
        """Until nothing passes through any more, or so long."""
        until = time.monotonic() + seconds
        while self.calls and time.monotonic() < until:
            await asyncio.sleep(0.02)

    async def end_all(self, seconds: float) -> None:
        """Tell everybody who waits that it ends now; they have so long to take it."""
        for call in self.calls:
            call.end_now()
        await self.emptied(seconds)

    async def _health(self, call: Call) -> None:
        await call.answer(200, b'{"status":"ok"}', [JSON])

    async def _ready(self, call: Call) -> None:
        usable, known = len(self.fleet.usable()), len(self.fleet.replicas)
        told = {"status": "draining" if self.draining else "ready" if usable else "no replica is ready",
                "ready": usable, "replicas": known}  # fmt: skip
        await call.answer(200 if usable and not self.draining else 503, json.dumps(told).encode(), [JSON])

    async def _metrics(self, call: Call) -> None:
        needs_key = bool(self.keys) or not self.local
        if needs_key and self.keys.find(call.authorization) is None:
            raise ApiError("/metrics needs a key: send 'Authorization: Bearer KEY', one of those that this router was "
                           "started with", 401, headers={"www-authenticate": "Bearer"})  # fmt: skip
        text = self.metrics.render(self.fleet, len(self.calls))
        await call.answer(200, text, [(b"content-type", CONTENT_TYPE.encode())])

    async def _live(self, receive: Receive, send: Send) -> None:
        """ASGI's lifespan: replicas and the keys' file are watched, and clients that take nothing are cut."""
        await receive()
        async with self.beside.running() if self.beside else contextlib.nullcontext(), self._watch.running():
            cutting = asyncio.ensure_future(self._cut_stalled())
            await send({"type": "lifespan.startup.complete"})
            await receive()
            cutting.cancel()
        await send({"type": "lifespan.shutdown.complete"})

    async def _cut_stalled(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self.config.stalled / 2))
            self.keys.look()
            limit = time.monotonic() - self.config.stalled
            for call in self.calls:
                if call.sending is not None and call.sending < limit:
                    call.cut()
                    self.metrics.stalled()


def _ended_at_once(line: bytes) -> Refusal | None:
    """The refusal that the first line of a stream is, where it is an error of ``ENDED``."""
    if not line.startswith(b"data:") or b'"error"' not in line[:40]:
        return None
    told = Refusal("503", 503, [JSON, (b"retry-after", b"2")], line.removeprefix(b"data:").strip())
    return told if told.code in ENDED else None
