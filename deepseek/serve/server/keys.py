"""API keys: who may ask, how often, and how much.

A key is known by its SHA-256 only; what a client sends is hashed and compared with every known hash in constant time.
Keys are random, so a plain hash is enough (a password would need a slow one). They come from a TOML file,

    [alice]
    key = "sk-…"                  # or sha256 = "…", so that the file holds no key
    requests_per_minute = 60
    tokens_per_minute = 20000     # prompt and answer
    concurrent = 8                # requests at once
    admin = true                  # may also reload the model

or from the environment (``DEEPSEEK_API_KEYS="alice=sk-…,bob=sk-…"``, ``DEEPSEEK_ADMIN_KEYS`` alike), and never from the
command line, which every user of a machine can read. A file that changes is read again while the server runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import math
import re
import signal
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deepseek.config import configclass, from_dict, load_toml
from deepseek.errors import ConfigError, DeepseekError
from deepseek.serve.server.errors import ApiError

SHORTEST = 16  #: characters of a key
VARIABLES = (("DEEPSEEK_API_KEYS", False), ("DEEPSEEK_ADMIN_KEYS", True))

log = logging.getLogger("deepseek.serve")


@configclass
class KeyConfig:
    """One table of the keys file. 0 means no limit."""

    key: str = ""
    sha256: str = ""
    requests_per_minute: float = 0.0
    tokens_per_minute: float = 0.0
    concurrent: int = 0
    admin: bool = False

    def check(self) -> None:
        if bool(self.key) == bool(self.sha256):
            raise ConfigError("a key has either key = … or sha256 = …")
        if self.key and len(self.key) < SHORTEST:
            raise ConfigError(f"a key of {len(self.key)} characters can be guessed; use {SHORTEST} or more")
        if self.key and not (self.key.isascii() and self.key.isprintable() and " " not in self.key):
            raise ConfigError("a key must be printable ASCII without blanks, or no header can carry it")
        if self.sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", self.sha256):
            raise ConfigError(
                "sha256 must be 64 hexadecimal digits: printf %s KEY | sha256sum | cut -d' ' -f1"
            )
        if min(self.requests_per_minute, self.tokens_per_minute, self.concurrent) < 0:
            raise ConfigError("a limit must be at least 0 (0: none)")

    @property
    def digest(self) -> bytes:
        return bytes.fromhex(self.sha256) if self.sha256 else hashlib.sha256(self.key.encode()).digest()


class Bucket:
    """A token bucket that holds a minute's worth: it fills at ``per_minute`` and may be overdrawn by ``take``."""

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._level, self._at = per_minute, clock()

    @property
    def level(self) -> float:
        now = self._clock()
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / 60)
        self._at = now
        return self._level

    def take(self, amount: float) -> None:
        self._level = self.level - amount

    def seconds_until(self, level: float) -> float:
        return max(0.0, (level - self.level) * 60 / self.per_minute)


class Key:
    """A client: its name, its limits, and how much of them is used."""

    def __init__(self, name: str, config: KeyConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self.digest, self.running = name, config.digest, 0
        self._clock = clock
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None
        self.limit(config)

    def limit(self, config: KeyConfig) -> None:
        """The limits of ``config`` from now on; what has been used stays used."""
        self.admin, self.concurrent = config.admin, config.concurrent
        self.requests = self._bucket(self.requests, config.requests_per_minute)
        self.tokens = self._bucket(self.tokens, config.tokens_per_minute)

    def _bucket(self, old: Bucket | None, per_minute: float) -> Bucket | None:
        if old is not None and old.per_minute == per_minute:
            return old
        new = Bucket(per_minute, self._clock) if per_minute else None
        if new is not None and old is not None:
            new.take(old.per_minute - old.level)
        return new

    def enter(self) -> None:
        """Count one more request. Raises ``ApiError`` 429 when a limit is reached."""
        if self.concurrent and self.running >= self.concurrent:
            raise self._limited(
                f"{self.running} requests of this key are running; its limit is {self.concurrent}", 1.0
            )
        if self.tokens is not None and self.tokens.level <= 0:
            raise self._limited(
                f"this key has used its {self.tokens.per_minute:,.0f} tokens per minute",
                self.tokens.seconds_until(1),
            )
        if self.requests is not None:
            if self.requests.level < 1:
                raise self._limited(
                    f"this key has used its {self.requests.per_minute:,.0f} requests per minute",
                    self.requests.seconds_until(1),
                )
            self.requests.take(1)
        self.running += 1

    def leave(self) -> None:
        self.running -= 1

    def spend(self, tokens: int) -> None:
        """Prompt and answer tokens are paid when they are known, so one request may overdraw; the next one waits."""
        if self.tokens is not None:
            self.tokens.take(tokens)

    def headers(self) -> dict[str, str]:
        """The limits and what is left of them, under OpenAI's names."""
        found = {}
        for kind, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                found[f"x-ratelimit-limit-{kind}"] = f"{bucket.per_minute:.0f}"
                found[f"x-ratelimit-remaining-{kind}"] = f"{max(0, math.floor(bucket.level))}"
                found[f"x-ratelimit-reset-{kind}"] = f"{bucket.seconds_until(bucket.per_minute):.3f}s"
        return found

    def _limited(self, reason: str, seconds: float) -> ApiError:
        wait = str(max(1, math.ceil(seconds)))
        return ApiError(
            f"{reason}; try again in {wait} s", 429, code="rate_limit_exceeded", headers={"retry-after": wait}
        )


@dataclass(eq=False)
class Keyring:
    """All keys of a server; an empty one lets everybody in, as nobody in particular.

    ``look`` once a second keeps it true to its file, ``read_again`` does so at once. A file that cannot be read, or
    holds no usable keys, leaves those that are known in force, and is told in the log.
    """

    keys: tuple[Key, ...] = ()
    path: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    _read: tuple[int, ...] = field(default=(), repr=False)  # signature of the file that was read
    _seen: tuple[int, ...] = field(default=(), repr=False)  # and of the one at the last look

    def __bool__(self) -> bool:
        return bool(self.keys)

    def find(self, authorization: str) -> Key | None:
        """The key that a header ``Authorization: Bearer …`` carries. Takes the same time whichever it is."""
        scheme, _, given = authorization.partition(" ")
        digest = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).digest()
        found = None
        for key in self.keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found if scheme.lower() == "bearer" else None

    @classmethod
    def load(cls, path: Path | str | None, environment: Mapping[str, str]) -> Keyring:
        """Keys of a file and of the environment. Raises ``ConfigError``."""
        file = Path(path) if path else None
        signature = _signature(file)
        keys = tuple(Key(name, config) for name, config in _configs(file, environment).items())
        kept = {name: environment[name] for name, _ in VARIABLES if name in environment}
        return cls(keys, file, kept, signature, signature)

    def look(self) -> None:
        """Read the file again if it has changed, once it looks the same at two looks: it may be half written."""
        signature = _signature(self.path)
        settled, self._seen = signature == self._seen, signature
        if settled and signature != self._read:
            self.read_again()

    def read_on_hangup(self) -> None:
        """From now on SIGHUP reads the file again. Call it in the event loop; nothing without a file, or off the main
        thread."""
        if self.path is not None and hasattr(signal, "SIGHUP"):
            with contextlib.suppress(RuntimeError, ValueError, NotImplementedError):
                asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.read_again)

    def read_again(self) -> None:
        """Know the keys that the file holds now; those that stay keep what they have used."""
        self._read = self._seen = _signature(self.path)
        if self.path is None or (self.path.exists() and not self.path.is_file()):  # a pipe is read once
            return
        try:
            configs = _configs(self.path, self.environment)
        except (DeepseekError, OSError, ValueError) as error:
            log.warning("the keys stay as they were: %s", error)
            return
        known = {(key.name, key.digest): key for key in self.keys}
        keys = []
        for name, config in configs.items():
            key = known.pop((name, config.digest), None)
            if key is None:
                key = Key(name, config)
            else:
                key.limit(config)
            keys.append(key)
        before, self.keys = {key.name for key in self.keys}, tuple(keys)
        gone, new = sorted({name for name, _ in known}), sorted({key.name for key in keys} - before)
        log.warning("%s was read again: %d keys; new: %s; gone or changed: %s", self.path, len(keys),
                    ", ".join(new) or "none", ", ".join(gone) or "none")  # fmt: skip


def _signature(path: Path | None) -> tuple[int, ...]:
    """Changes when the file does; empty where there is none."""
    with contextlib.suppress(OSError):
        if path and stat.S_ISREG((found := path.stat()).st_mode):
            return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino
    return ()


def _configs(path: Path | None, environment: Mapping[str, str]) -> dict[str, KeyConfig]:
    """What the file and the environment say, by name. Raises ``ConfigError``."""
    configs: dict[str, KeyConfig] = {}
    for name, table in (load_toml(path) if path else {}).items():
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {name!r} must be a table: [{name}] and below it key = …")
        configs[_name(name)] = from_dict(KeyConfig, table, f"{path}: {name}")
    if path and not configs:
        raise ConfigError(f"{path} holds no key; write [NAME] and below it key = …")
    for variable, admin in VARIABLES:
        for entry in filter(None, (e.strip() for e in environment.get(variable, "").split(","))):
            name, separator, key = entry.rpartition("=") if "=" in entry.rstrip("=") else ("", "", entry)
            name = _name(name if separator else ("admin" if admin else "default"))
            if name in configs:
                raise ConfigError(f"{variable}: there are two keys named {name!r}; name them apart: a=…,b=…")
            configs[name] = KeyConfig(key=key, admin=admin)
    owners: dict[bytes, str] = {}
    for name, config in configs.items():
        if (other := owners.setdefault(config.digest, name)) != name:
            raise ConfigError(f"the keys {other!r} and {name!r} are the same")
    return configs


def _name(name: str) -> str:
    if not re.fullmatch(r"[\w.@-]{1,64}", name):
        raise ConfigError(f"{name!r} is no name for a key: letters, digits and . _ - @, at most 64")
    return name
