"""``deepseek serve``: the step process, the front end before it, and their end."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from deepseek.address import adopt, bind, is_loopback, url
from deepseek.errors import ConfigError, DataError, EngineError, MissingExtraError
from deepseek.serve.server.config import ServerConfig
from deepseek.serve.server.keys import Keyring

if TYPE_CHECKING:
    from deepseek.data import Tokenizer
    from deepseek.serve.client import ProcessClient, Supervision
    from deepseek.serve.engine_config import EngineConfig
    from deepseek.serve.server.served import Chat

PORT = 8000
NO_KEYS = (
    "--host {host} lets other machines use the model: give --keys-file FILE (a table for each key: [alice], below it "
    'key = "…"), or set DEEPSEEK_API_KEYS; or leave --host out and reach the server through ssh -L'
)


def serve(
    path: Path | str,
    engine: EngineConfig,
    config: ServerConfig,
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
    fd: int | None = None,
    keys_file: str = "",
    supervision: Supervision | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Serve the model at ``path`` over HTTP until SIGTERM or SIGINT, and then until what runs is finished.

    Returns the exit status: 0, or 128 plus its number when a second signal ended it at once.

    Args:
        fd: of a socket that listens already, in place of ``host`` and ``port``: whoever starts this process holds the
            address, over its restarts too.

    Keys come from ``keys_file`` and from the environment (``DEEPSEEK_API_KEYS``, ``DEEPSEEK_ADMIN_KEYS``).

    Raises:
        ConfigError: no keys for an address that other machines can reach; the address cannot be had.
        RunError, CheckpointError, WeightsError: the model cannot be loaded. EngineError: step processes died so often
        that the engine was given up; whoever started this one may start it again. MissingExtraError: without the extra
        ``serve``.
    """
    _require()
    from deepseek.serve.client import ProcessClient

    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of every client that has gone
    keys = Keyring.load(keys_file or None, os.environ)
    if fd is None and not keys and not is_loopback(host):
        raise ConfigError(NO_KEYS.format(host=host))
    if not Path(path).exists():
        raise ConfigError(f"there is no model at {path}; 'deepseek runs' lists runs")
    with bind(host, port) if fd is None else adopt(fd) as bound:
        if not keys and not is_loopback(here := bound.getsockname()[0]):
            raise ConfigError(NO_KEYS.format(host=here))
        client = ProcessClient(path, engine, supervision)
        address = url(bound)
        return asyncio.run(_serve(client, config, keys, bound, lambda: say(f"{path} is served at {address}")))


async def _serve(
    client: ProcessClient,
    config: ServerConfig,
    keys: Keyring,
    bound: socket.socket,
    ready: Callable[[], None],
) -> int:
    """HTTP answers from the start (``/health`` yes, ``/ready`` no); ``ready`` is called when the model is loaded."""
    from deepseek.serve.server.front import Front
    from deepseek.serve.server.serving import Server

    front = Front(client, load_texts, config, keys)
    server = Server(front)

    async def load() -> None:
        await client.start()
        await front.served()
        gc.collect()
        gc.freeze()  # what was loaded stays: a collection that looks at it all again stops every answer for 0.2 s
        ready()

    async def end_when_given_up() -> None:
        await client.given_up.wait()
        if not front.admission.draining:
            server.stop()

    loading, ending = asyncio.create_task(load()), asyncio.create_task(end_when_given_up())
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    try:
        await asyncio.wait({loading, serving}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done() and (error := loading.exception()) is not None:
            server.should_exit = True
            await serving
            raise error
        await serving
        if client.given_up.is_set() and not server.killed:
            raise EngineError(client.readiness()[1])
        return 128 + server.killed if server.killed else 0
    finally:
        loading.cancel()
        ending.cancel()
        await asyncio.gather(loading, ending, return_exceptions=True)
        await client.close()
        gc.unfreeze()  # or libraries that count their objects at the end report them all as leaked


def load_texts(path: str) -> tuple[Tokenizer, Chat | None]:
    """Tokenizer and chat template of a model. Raises ``DataError`` when it has no tokenizer."""
    from deepseek.assemble import load_tokenizer
    from deepseek.serve.chat_template import ChatTemplate

    tokenizer = load_tokenizer(path)
    if tokenizer is None:
        raise DataError(f"{path} has no tokenizer: put its tokenizer.json there")
    return tokenizer, ChatTemplate.of(tokenizer)


def _require() -> None:
    """Raises ``MissingExtraError`` unless what the server needs is installed."""
    for name in ("starlette", "uvicorn", "orjson", "h11"):
        try:
            __import__(name)
        except ImportError as error:
            raise MissingExtraError(name, "serve", "the HTTP server") from error
