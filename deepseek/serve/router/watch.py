"""``Watch``: finds the replicas and asks each whether it is ready, for as long as the router runs."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Sequence

from deepseek.serve.router.exchange import Exchange, ExchangeError
from deepseek.serve.router.replica import Address, Fleet, Replica

REASON = 200  #: characters of a replica's reason that are kept
UNANSWERED = 3  #: questions in a row without an answer before a ready replica counts as not ready
PROTECTED = "/v1/models"  #: a route that wants a key
UNGUARDED = (
    "it asks for no key, and other machines reach this router: give it keys, or tell the router --open"
)


class Watch:
    """Keeps ``fleet`` true.

    Args:
        every: seconds between two questions to a replica; patience: seconds that it may take to answer.
        path: what is asked; 200 means ready.
        guarded: a replica that answers without a key counts as not ready.
        resolve: seconds after which names are looked up again: every address of a name is a replica.
        say: told of what changed, in words.
    """

    def __init__(self, addresses: Sequence[Address], fleet: Fleet, *, path: str, every: float, patience: float,
                 resolve: float, guarded: bool, say: Callable[[str], None]) -> None:  # fmt: skip
        self.addresses, self.fleet, self.say = addresses, fleet, say
        self.path, self.every, self.patience, self.resolve = path, every, patience, resolve
        self.guarded = guarded
        self._asking: dict[Replica, asyncio.Task[None]] = {}

    @contextlib.asynccontextmanager
    async def running(self):  # type: ignore[no-untyped-def]
        """While it runs; from the first look at every replica on."""
        await self._look_up()
        await asyncio.gather(*(self._ask(r) for r in self.fleet.replicas))
        looking = asyncio.create_task(self._look_up_again())
        try:
            yield
        finally:
            tasks = [looking, *self._asking.values()]
            self._asking.clear()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _look_up_again(self) -> None:
        while True:
            await asyncio.sleep(self.resolve)
            await self._look_up()

    async def _look_up(self) -> None:
        """All addresses of all names; a name that cannot be looked up now keeps those that it had."""
        known = {(r.address, r.ip): r for r in self.fleet.replicas}
        found: dict[tuple[Address, str], Replica] = {}
        for address in self.addresses:
            ips = await _addresses(address) or [ip for a, ip in known if a == address]
            for ip in ips:
                found[address, ip] = known.get((address, ip)) or Replica(address, ip)
        for key, replica in found.items():
            if key not in known:
                self._asking[replica] = asyncio.create_task(self._ask_again(replica))
        for key, replica in known.items():
            if key not in found:  # what it is working on, it finishes
                self._asking.pop(replica).cancel()
                self.say(f"replica {replica.name} is gone")
        self.fleet.replicas = list(found.values())

    async def _ask_again(self, replica: Replica) -> None:
        while (
            replica in self._asking
        ):  # a cancellation is lost when an answer comes with it (``wait_for``, Python 3.11)
            await asyncio.sleep(self.every)
            await self._ask(replica)

    async def _ask(self, replica: Replica) -> None:
        before = replica.ready, replica.reason
        try:
            ready, reason = await asyncio.wait_for(self._answer(replica), self.patience)
            replica.unanswered = 0
        except (asyncio.TimeoutError, ExchangeError) as error:
            ready, reason = False, str(error)
            if not isinstance(error, ExchangeError) or error.kind == "silence":
                reason = f"no answer to {self.path} within {self.patience:g} s"
                replica.unanswered += 1
                if replica.ready and replica.unanswered < UNANSWERED:
                    return  # it may only be busy, and so may we
                if replica.ready:
                    replica.hung(reason)
        replica.told(ready, reason)
        if before != (replica.ready, replica.reason):
            self.say(f"replica {replica.name} is {'ready' if ready else f'not ready: {reason}'}")

    async def _answer(self, replica: Replica) -> tuple[bool, str]:
        status, text = await self._get(replica, self.path)
        if status != 200:
            return False, f"{status} {text}"
        if self.guarded and not replica.ready and (await self._get(replica, PROTECTED))[0] not in (401, 403):
            return False, UNGUARDED
        return True, ""

    async def _get(self, replica: Replica, path: str) -> tuple[int, str]:
        """Status and the beginning of the text."""
        with contextlib.closing(Exchange(replica, self.patience)) as exchange:
            head = await exchange.ask("GET", path.encode(), [])
            text = b""
            async for piece in exchange.pieces():
                text += piece
                if len(text) > REASON:
                    break
            return head.status_code, text[:REASON].decode("utf-8", "replace").strip()


async def _addresses(address: Address) -> list[str]:
    """All addresses of a host, of one family: a machine has one of each, and is still one replica."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM
        )
    except OSError:
        return []
    family = socket.AF_INET if any(f[0] == socket.AF_INET for f in found) else socket.AF_INET6
    return sorted({str(f[4][0]) for f in found if f[0] == family})
