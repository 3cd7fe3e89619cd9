"""``Front``: what all routes of one server share. One per server, in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from functools import partial
from importlib import metadata
from typing import Any

import anyio.to_thread

from deepseek.errors import DeepseekError
from deepseek.serve.client import EngineClient
from deepseek.serve.server.access_log import AccessLog
from deepseek.serve.server.admission import Admission
from deepseek.serve.server.config import ServerConfig
from deepseek.serve.server.instruments import ServerMetrics
from deepseek.serve.server.keys import Keyring
from deepseek.serve.server.room import Room
from deepseek.serve.server.served import Loader, Served
from deepseek.serve.server.sse import Stream

TICK = 1.0  #: seconds between two looks at the live streams
INSTANCE = secrets.token_hex(4)


class Front:
    """The engine's client, the model it serves, the queue, the keys, the metrics and the log.

    Args:
        client: a started client; it is not closed here.
        load: reads tokenizer and chat template of a model's path.
    """

    def __init__(
        self,
        client: EngineClient,
        load: Loader,
        config: ServerConfig,
        keys: Keyring | None = None,
    ) -> None:
        self.client, self.load, self.config = client, load, config
        self.keys = keys or Keyring()
        self.admission = Admission(config.max_running, config.max_waiting)
        self.metrics = ServerMetrics()
        self.log = AccessLog(config.log)
        self.streams: set[Stream] = set()
        self.bodies = Room(config.max_bodies, "bytes of bodies")
        self.logprobs = Room(config.max_logprobs, "log-probabilities of answers that are not streamed")
        self.began = time.time()
        self._served: Served | None = None
        self._texts: dict[str, tuple[Any, Any]] = {}
        self._loading = asyncio.Lock()
        self._number = 0

    def new_id(self) -> str:
        """A name for a sequence that no other has."""
        self._number += 1
        return f"{INSTANCE}-{self._number}"

    async def served(self) -> Served:
        """The model that new requests go to. Raises ``EngineError`` when none is loaded yet."""
        while self._served is None or self._served.info is not self.client.info:
            async with self._loading:
                info = self.client.info
                if self._served is not None and self._served.info is info:
                    break
                texts: Any = self._texts.get(info.path)
                if texts is None:
                    texts = await anyio.to_thread.run_sync(self.load, info.path)
                make = partial(Served.of, info, self.config.name or info.name, *texts)
                self._served = await anyio.to_thread.run_sync(make)
                self._texts = {info.path: texts}
        return self._served

    async def reload(self, path: str) -> Served:
        """Serve the model at ``path`` from now on. Raises ``DeepseekError`` and serves on what it served."""
        texts = self._texts[path] = await anyio.to_thread.run_sync(self.load, path)
        info = await self.client.reload(path)
        self._texts[info.path] = texts
        return await self.served()

    @property
    def version(self) -> str:
        """Of this package, as it is installed."""
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version("deepseek-framework")
        return "unknown"

    @property
    def ready(self) -> tuple[bool, str]:
        if self.admission.draining:
            return False, "draining: this server is shutting down"
        return self.client.readiness()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Front]:
        """While the server runs: the log, and the clock of streams."""
        ticking = asyncio.create_task(self._tick())
        with contextlib.suppress(DeepseekError, OSError):  # told by the first request
            await self.served()
        try:
            yield self
        finally:
            ticking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ticking
            self.log.close()

    async def _tick(self) -> None:
        """Once a second: cut streams that nobody reads, send a comment on those that are silent, count steps, look
        whether the keys have changed."""
        while True:
            await asyncio.sleep(TICK)
            now = time.monotonic()
            for stream in list(self.streams):
                stream.look(now, self.config.beat, self.config.stalled)
            if self._served is not None:
                self.metrics.look(self._served.name, self.client.stats())
            self.keys.look()
