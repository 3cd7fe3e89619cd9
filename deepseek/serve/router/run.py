"""``route``: the router under uvicorn, and how it stops.

SIGTERM (or the first Ctrl-C): ``/ready`` says 503 and answers end their connections; after ``linger`` seconds nothing
new is accepted; what is running has ``drain`` seconds, then it ends with an error. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from deepseek.address import bind, is_loopback, url
from deepseek.errors import EngineError, MissingExtraError
from deepseek.serve.router.application import Beside, Router, RouterConfig
from deepseek.serve.server.keys import Keyring

PORT = 8080
LAST_WORDS = 1.0  #: seconds for running answers to say that they end


def route(urls: Sequence[str], config: RouterConfig | None = None, *, host: str = "127.0.0.1", port: int = PORT,
          keys: Keyring | None = None, listening: Callable[[str], None] | None = None,
          beside: Beside | None = None) -> int:  # fmt: skip
    """Serve a ``Router`` until SIGTERM or SIGINT.

    Returns the exit status: 0, or 128 plus its number when a second signal ended it at once.

    Args:
        host: other machines can reach one that is no loopback address; then replicas must ask for keys, and
            ``/metrics`` does too.
        keys: who may read ``/metrics``.
        listening: told the address once connections are accepted.
        beside: what lives as long as the router.

    Raises:
        ConfigError: a URL is none; the port is taken. EngineError: what is ``beside`` failed.
        MissingExtraError: without the extra ``serve``.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise MissingExtraError("uvicorn", "serve", "the router") from error
    from deepseek.serve.server.connection import allow_connections

    router = Router(urls, config, keys, local=is_loopback(host), beside=beside)

    class Server(uvicorn.Server):
        """Drains before it closes, and says where it listens. ``killed``: the signal that ended it at once, or 0."""

        killed = 0
        _ending: asyncio.Task[None] | None = None

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            self._loop.call_soon_threadsafe(self._stop, sig)

        def _stop(self, sig: int) -> None:
            if self._ending is None:
                self._ending = asyncio.create_task(self._drain())
            elif not self.killed:
                self.killed = sig
                if beside is not None:
                    beside.patience = 1.0
                self._ending.cancel()
                self._ending = asyncio.create_task(self._kill())

        async def _drain(self) -> None:
            router.draining = True
            router.say(f"draining: {len(router.calls)} requests are passing through")
            await asyncio.sleep(router.config.linger)
            self.should_exit = True
            await router.emptied(router.config.drain)
            await router.end_all(LAST_WORDS)

        async def _kill(self) -> None:
            await router.end_all(LAST_WORDS)
            self.should_exit = self.force_exit = True

        async def on_tick(self, counter: int) -> bool:
            self.should_exit |= bool(beside and beside.failed)
            return await super().on_tick(counter)

        async def startup(self, sockets: Any = None) -> None:
            self._loop = asyncio.get_running_loop()
            router.keys.read_on_hangup()
            allow_connections()
            await super().startup(sockets)
            if listening is not None:
                listening(url(bound))

    with bind(host, port) as bound:
        server = Server(settings(router))
        server.run([bound])
    if beside is not None and beside.failed:
        raise EngineError(beside.failed)
    return 128 + server.killed if server.killed else 0


def settings(router: Router) -> Any:
    """uvicorn's settings, an ``uvicorn.Config``: nothing that the replicas say is changed or said twice."""
    import uvicorn

    from deepseek.serve.server.connection import Protocol

    limits = router.config
    return uvicorn.Config(
        router, lifespan="on", http=type("Protocol", (Protocol,), {"head_seconds": limits.body_seconds}), ws="none",
        access_log=False, log_level="critical", proxy_headers=False, server_header=False, date_header=False,
        timeout_keep_alive=round(limits.keep_alive),
        timeout_graceful_shutdown=round(limits.drain + 2 * LAST_WORDS),
    )  # fmt: skip
