"""``serve_replicas``: the whole of one machine under one address, a `deepseek serve` process per GPU behind a router.

Each process sees one GPU only (``CUDA_VISIBLE_DEVICES``), or has its share of the processor's cores, and listens on a
loopback port of its own. That socket is this process's: it is bound and listens from the start, every process that
serves it inherits it, so nobody else can have the port, whenever a process ends. While none serves it, this one does:
it hangs up on whoever connects. One that ends is started again, later and later if it ends soon; one that ends before
it was ever ready ends the whole, since the others would too. The router stops first, so the processes have nothing to
do when they are told to stop; if this process is killed, they are told by the kernel.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

from deepseek.address import bind, is_loopback, url
from deepseek.errors import ConfigError
from deepseek.serve.router.application import RouterConfig
from deepseek.serve.router.replica import Fleet
from deepseek.serve.router.run import route
from deepseek.serve.server.keys import Keyring

#: Starts a command of this package, which ends with its parent (``prctl(PR_SET_PDEATHSIG, SIGTERM)``, Linux).
PROGRAM = (
    sys.executable, "-c",
    "import ctypes, runpy, sys\n"
    "sys.platform == 'linux' and ctypes.CDLL(None).prctl(1, 15)\n"
    "runpy.run_module('deepseek', run_name='__main__', alter_sys=True)",
)  # fmt: skip
SOON = 60.0  #: a process that lived shorter waits twice as long as the last time before it is started again
LONGEST_WAIT = 60.0
KILL = 10.0  #: seconds beyond its own drain after which a process that was told to stop is killed


class LocalReplicas:
    """Processes of this machine, each with its own socket and environment. ``close`` it whatever happens.

    Args:
        command: starts one, once ``--fd NUMBER`` is added: the listening socket that it inherits.
        environments: one for each.
        patience: seconds that one gets to end by itself.
        say: told what happens, in words.

    Attributes:
        urls: where they are.
        fleet: of the router before them, which knows who was ever ready.
        failed: why it makes no sense to go on, or ''.
    """

    def __init__(self, command: Sequence[str], environments: Sequence[Mapping[str, str]], patience: float,
                 say: Callable[[str], None]) -> None:  # fmt: skip
        self.command, self.environments, self.patience, self.say = command, environments, patience, say
        with contextlib.ExitStack() as stack:
            self.sockets = [stack.enter_context(bind("127.0.0.1", 0)) for _ in environments]
            self._bound = stack.pop_all()
        self.urls = [url(bound) for bound in self.sockets]
        self.fleet, self.failed = Fleet(), ""
        self.pids: dict[int, int] = {}  # by the number of the replica

    def close(self) -> None:
        """Give the ports back."""
        self._bound.close()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While they run."""
        keeping = [asyncio.create_task(self._keep(i)) for i in range(len(self.sockets))]
        try:
            yield
        finally:
            for task in keeping:
                task.cancel()
            await asyncio.gather(*keeping, return_exceptions=True)

    async def _keep(self, index: int) -> None:
        """Start one, and again when it ends."""
        wait = 1.0
        while True:
            began = time.monotonic()
            status = await self._run(index)
            known = [r for r in self.fleet.replicas if r.name == self.urls[index]]
            for replica in known:
                replica.told(False, f"its process ended with status {status}")
            if not any(r.was_ready for r in known):
                self.failed = (
                    f"a replica ended with status {status} before it was ready; what it said is above"
                )
                return
            wait = min(2 * wait, LONGEST_WAIT) if time.monotonic() - began < SOON else 1.0
            self.say(
                f"replica {self.urls[index]} ended with status {status}; it is started again in {wait:g} s"
            )
            with _hanging_up(self.sockets[index]):
                await asyncio.sleep(wait)

    async def _run(self, index: int) -> int:
        fd = self.sockets[index].fileno()
        process = await asyncio.create_subprocess_exec(
            *self.command, "--fd", str(fd), env=dict(self.environments[index]), pass_fds=(fd,),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self.pids[index] = process.pid
        try:
            return await process.wait()
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGTERM)
                try:
                    await asyncio.wait_for(process.wait(), self.patience)
                except (asyncio.TimeoutError, asyncio.CancelledError):
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
                    raise


def serve_replicas(arguments: Sequence[str], count: int, config: RouterConfig, *, host: str, port: int, keys: Keyring,
                   device: str = "auto", say: Callable[[str], None] | None = None) -> int:  # fmt: skip
    """Run ``deepseek serve ARGUMENTS`` ``count`` times behind a router, until SIGTERM or SIGINT; ``route``'s status.

    Args:
        arguments: of ``deepseek serve``, without ``--host``, ``--port`` and ``--fd``.
        device: of the replicas: ``cpu``, or GPUs as far as there are any.
        keys: the replicas know them too, from where they come from.
        say: told the address once connections are accepted.

    Raises:
        ConfigError: fewer GPUs than replicas, or no keys for an address that other machines can reach.
        EngineError: a replica ended before it was ever ready.
    """
    if not keys and not is_loopback(host):
        raise ConfigError(
            f"--host {host} lets other machines use the model: give --keys-file FILE or DEEPSEEK_API_KEYS"
        )
    gpus = [] if device == "cpu" else visible_gpus(os.environ)
    with contextlib.closing(LocalReplicas(
        [*PROGRAM, "serve", *arguments], environments(count, gpus, os.environ), config.drain + KILL,
        lambda line: print(f"router: {line}", file=sys.stderr, flush=True),
    )) as replicas:  # fmt: skip
        return route(replicas.urls, config, host=host, port=port, keys=keys, listening=say, beside=replicas)


def environments(count: int, gpus: Sequence[str], environment: Mapping[str, str]) -> list[dict[str, str]]:
    """One environment for each of ``count`` replicas: its GPU, or its share of the cores. Raises ``ConfigError``."""
    if gpus and count > len(gpus):
        raise ConfigError(
            f"--replicas {count}: this machine shows {len(gpus)} GPUs, and a replica needs one of its own"
        )
    if gpus:
        return [{**environment, "CUDA_VISIBLE_DEVICES": gpus[i]} for i in range(count)]
    threads = str(max(1, _cores() // count))
    return [{"OMP_NUM_THREADS": threads, **environment} for _ in range(count)]


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """The GPUs that this process may use, by the names that ``CUDA_VISIBLE_DEVICES`` takes."""
    if (told := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in told.split(",") if name.strip() not in ("", "-1")]
    asked = subprocess.run(  # not here: a router needs no torch
        [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"],
        capture_output=True,
        text=True,
        check=False,
    )
    return [str(i) for i in range(int(asked.stdout.strip() or 0))]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _hanging_up(bound: socket.socket) -> Iterator[None]:
    """While nobody serves ``bound``: whoever has connected, or does, is not left to wait for the next start."""

    def hang_up() -> None:
        with contextlib.suppress(OSError):  # nobody is there any more
            while True:
                bound.accept()[0].close()

    bound.setblocking(False)
    loop = asyncio.get_running_loop()
    loop.add_reader(bound, hang_up)
    try:
        yield
    finally:
        loop.remove_reader(bound)
