"""The command that puts one address before several servers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from tyro.conf import Positional

from deepseek.cli.terminal import tell


@dataclass(frozen=True)
class Route:
    """Pass requests on to several `deepseek serve`: the least busy, or the one that knows the prompt's beginning."""

    replicas: Positional[tuple[str, ...]]  # http://HOST:PORT …; every address of a name is a replica
    port: int = 8080  # 0: any free one
    host: str = "127.0.0.1"  # anything else can be reached from other machines
    open: bool = False  # also give requests of other machines to replicas that ask for no key
    keys_file: str = ""  # TOML: who may read /metrics; DEEPSEEK_API_KEYS too. Other keys pass through
    affinity: int = 1024  # characters of a prompt by which equal beginnings meet; 0: the least busy
    ready_path: str = "/ready"  # what a replica is asked, once a second; `/health` for other servers
    resolve: float = 10.0  # seconds after which names are looked up again
    max_body: int = 16 << 20  # bytes of a request
    silence: float = 660.0  # seconds that a replica may say nothing
    linger: float = 0.0  # seconds after SIGTERM in which new connections are still taken
    drain: float = 60.0  # seconds that running requests get after that

    def go(self, rest: Sequence[str]) -> int:
        from deepseek.serve.router import RouterConfig, route
        from deepseek.serve.server.keys import Keyring

        options = ("affinity", "ready_path", "resolve", "max_body", "silence", "linger", "drain", "open")
        config = RouterConfig(**{name: getattr(self, name) for name in options})
        keys = Keyring.load(self.keys_file or None, os.environ)
        return route(
            self.replicas,
            config,
            host=self.host,
            port=self.port,
            keys=keys or None,
            listening=lambda address: tell(f"routing on {address}"),
        )
