"""Where a server listens: a bound socket, its address, and whether other machines can reach it."""

from __future__ import annotations

import ipaddress
import socket
import sys
from collections.abc import Sequence

from deepseek.errors import ConfigError


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``: ``localhost``, ``127.0.0.0/8`` or ``::1``."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def bind(host: str, ports: int | Sequence[int]) -> socket.socket:
    """A listening socket on a port, 0 for any free one, or on the first free one of several. Raises ``ConfigError``."""
    ports = [ports] if isinstance(ports, int) else ports
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    problem: object = None
    for port in ports:
        bound = socket.socket(
            family, socket.SOCK_STREAM, socket.IPPROTO_TCP
        )  # named, or asyncio leaves Nagle on
        try:
            if sys.platform != "win32":  # there it would let two servers share a port
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((host.strip("[]"), port))
            bound.listen(2048)
            return bound
        except (OSError, OverflowError) as error:
            bound.close()
            problem = error.strerror if isinstance(error, OSError) and error.strerror else error
    tried = ports[0] if len(ports) == 1 else f"{ports[0]} to {ports[-1]}"
    raise ConfigError(
        f"cannot listen on {host}, port {tried}: {problem}; give another --port, or --port 0 for any free one"
    )


def adopt(fd: int) -> socket.socket:
    """The listening TCP socket that whoever started this process left open as ``fd``. Raises ``ConfigError``."""
    try:
        bound = socket.socket(fileno=fd)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--fd {fd} is no socket of this process: {error}") from None
    listens = bound.type == socket.SOCK_STREAM and bound.family in (socket.AF_INET, socket.AF_INET6)
    if not listens or not bound.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        bound.detach()
        raise ConfigError(f"--fd {fd} is no TCP socket that listens")
    bound.set_inheritable(False)
    return bound


def url(bound: socket.socket) -> str:
    """What to open to reach ``bound``."""
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
