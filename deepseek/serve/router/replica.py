"""``Replica`` and ``Fleet``: who may be asked, and who is asked next.

A replica is *ready* when it says so itself (``/ready``, asked every second) and *ejected* for a while when its answers
fail in spite of that: after 3 failures in a row for 5 seconds, then 10, 20, … up to a minute. One that refuses a
connection or answers 503 is not ready from that moment on, until it says that it is.

Among those left the one with the fewest requests outstanding is asked, the longest unused one first among equals.
A request with a prefix key prefers replicas in an order of its own, by rendezvous hashing (Thaler and Ravishankar
1998): the same prefix meets the same prefix cache, and a replica that comes or goes moves only its own share of them.
A preferred replica that has more than ``load`` times the mean outstanding is passed over: consistent hashing with
bounded loads (Mirrokni, Thorup and Zadimoghaddam 2018).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from deepseek.errors import ConfigError

FAILURES = 3  #: failures in a row that eject a replica
REST, LONGEST_REST = 5.0, 60.0  #: seconds of the first ejection, and of the longest


@dataclass(frozen=True)
class Address:
    """Where replicas are: ``http://host:port``. One name may stand for several machines."""

    scheme: str
    host: str
    port: int

    @classmethod
    def parse(cls, url: str) -> Address:
        """Raises ``ConfigError`` for what is no such URL."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or not port:
            raise ConfigError(f"{url!r} is no address of a replica; write http://HOST:PORT")
        if parts.path.strip("/") or parts.query or parts.fragment or parts.username:
            raise ConfigError(
                f"{url!r} has more than a host and a port; write {parts.scheme}://{parts.netloc.rpartition('@')[2]}"
            )
        return cls(parts.scheme, parts.hostname, port)

    @property
    def authority(self) -> str:
        """The value of the header ``Host``."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.scheme == "https" else 80) else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


@dataclass(eq=False)
class Replica:
    """One server, and what is known of it.

    Attributes:
        address: as it was configured; ip: one address that its host has.
        ready, reason: what ``/ready`` said, or why it was not believed.
        outstanding: requests that this router has given it and that are not over.
        continues: answers ``Expect: 100-continue``, so that a body is sent only when it is wanted.
        used: number of the last request it got, for turns.
        was_ready: it has been ready at least once.
        unanswered: questions for its readiness, in a row, that it gave no answer to.
        waiting: what to call, with the reason, for each request that has nothing of its answer yet, when it hangs.
    """

    address: Address
    ip: str
    ready: bool = False
    reason: str = "not asked yet"
    outstanding: int = 0
    continues: bool = True
    used: int = 0
    was_ready: bool = False
    unanswered: int = 0
    waiting: set[Callable[[str], None]] = field(default_factory=set, repr=False)
    failures: int = field(default=0, repr=False)
    ejections: int = field(default=0, repr=False)
    ejected_until: float = field(default=-math.inf, repr=False)
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)

    @property
    def name(self) -> str:
        return str(Address(self.address.scheme, self.ip, self.address.port))

    @property
    def ejected(self) -> bool:
        return self.clock() < self.ejected_until

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """While it has one more request."""
        self.outstanding += 1
        try:
            yield
        finally:
            self.outstanding -= 1

    def told(self, ready: bool, reason: str = "") -> None:
        """What it, or the lack of an answer, says of its readiness."""
        self.continues |= ready and not self.ready  # a new start, perhaps as another program
        self.ready, self.reason = ready, "" if ready else reason
        self.was_ready |= ready

    def hung(self, reason: str) -> None:
        """It says nothing any more, not even that it is not ready: nobody waits for it."""
        for give_up in tuple(self.waiting):
            give_up(reason)

    def succeeded(self) -> None:
        self.failures = self.ejections = 0

    def failed(self) -> bool:
        """An answer failed. True if that ejects it."""
        self.failures += 1
        if self.failures < FAILURES:
            return False
        self.ejected_until = self.clock() + min(LONGEST_REST, REST * 2**self.ejections)
        self.failures, self.ejections = 0, min(self.ejections + 1, 10)
        return True


class Fleet:
    """The replicas, and the choice among them."""

    def __init__(self, load: float = 1.5) -> None:
        self.replicas: list[Replica] = []
        self.load = load
        self._turn = 0

    @property
    def outstanding(self) -> int:
        return sum(r.outstanding for r in self.replicas)

    def usable(self, tried: Collection[Replica] = ()) -> list[Replica]:
        """Those that may be asked. When all that are ready are ejected, they are better than nobody."""
        ready = [r for r in self.replicas if r.ready and r not in tried]
        return [r for r in ready if not r.ejected] or ready

    def choose(self, key: bytes | None = None, tried: Collection[Replica] = ()) -> Replica | None:
        """The next to ask for a request with the prefix ``key``, or ``None`` when everybody was."""
        there = self.usable(tried)
        if not there:
            return None
        found = self._preferred(key, there) if key else min(there, key=lambda r: (r.outstanding, r.used))
        self._turn += 1
        found.used = self._turn
        return found

    def _preferred(self, key: bytes, there: list[Replica]) -> Replica:
        most = math.ceil(self.load * (sum(r.outstanding for r in there) + 1) / len(there))
        order = sorted(there, key=lambda r: hashlib.blake2b(r.name.encode(), key=key, digest_size=8).digest())
        return next(r for r in order if r.outstanding < most)  # not all are above their mean
