"""The command that serves a model over HTTP."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from deepseek.cli.options import as_arguments
from deepseek.cli.terminal import tell
from deepseek.errors import ConfigError

LONGEST_NAME = 256  #: characters of a model's name in a request


@dataclass(frozen=True)
class Serve:
    """Serve a run, a checkpoint, a Hugging Face directory or a GGUF file as the OpenAI API, with a chat page."""

    model: Positional[str]
    host: str = "127.0.0.1"  # anything else can be reached from other machines, and needs keys
    port: int = 8000  # 0: any free one
    fd: int = -1  # a socket that listens already, left open by who starts this; in place of host and port
    keys_file: str = ""  # TOML: [NAME] and below it key = "…"; or in the environment as DEEPSEEK_API_KEYS
    name: str = ""  # what clients call the model; its directory's name unless told
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    memory_gib: float = 0.0  # for the cache; 0: derived
    max_running: int = 0  # sequences computed at once; 0: derived from the device
    max_waiting: int = 256  # sequences that may wait beyond them; then requests are answered 429
    max_step_tokens: int = 0  # tokens of one step; 0: derived
    step_goal: float = 0.0  # seconds a step may take while answers wait; prompts get what it allows; 0: off
    max_length: int = 0  # positions of one request, prompt and answer; 0: the model's own
    speculate: int = 0  # tokens proposed at most by looking back in the text; 0: off
    prefix_cache: bool = True
    deterministic: bool = False  # answers do not depend on what else is running; slower
    graphs: bool = True  # CUDA graphs
    ahead: bool = True  # with them: launch the next step before the last one's tokens are read
    adapter: tuple[
        str, ...
    ] = ()  # NAME=DIRECTORY of a LoRA adapter; clients ask for it as a model of that name
    first_token: float = 0.0  # seconds; a request whose first token is expected later is answered 429; 0: off
    reload: Literal["beside", "inplace"] = "beside"  # where /admin/reload loads the next model
    timeout: float = 600.0  # seconds that a request may take unless it says otherwise; 0: no end
    drain: float = 30.0  # seconds that running requests get to finish after SIGTERM
    replicas: int = 1  # processes of this machine, a GPU each, behind one address
    log: str = "-"  # the access log: '-' is stderr, or a file; '' writes none

    def go(self, rest: Sequence[str]) -> int:
        if self.replicas != 1:
            return self._several()
        from deepseek.serve.client import Supervision
        from deepseek.serve.engine_config import EngineConfig
        from deepseek.serve.server import ServerConfig, serve

        name = self.name or Path(self.model).name.removesuffix(".gguf")  # a reload keeps it
        engine = EngineConfig(
            device=self.device, precision=self.precision, memory_gib=self.memory_gib, max_running=self.max_running,
            max_step_tokens=self.max_step_tokens, step_goal=self.step_goal, max_length=self.max_length,
            speculate=self.speculate,
            prefix_cache=self.prefix_cache, deterministic=self.deterministic, graphs=self.graphs,
            ahead=None if self.ahead else False, adapters=_adapters(self.adapter, name), name=name,
        )  # fmt: skip
        config = ServerConfig(
            name=name, max_running=self.max_running or _running(self.device), max_waiting=self.max_waiting,
            timeout=self.timeout, drain=self.drain, log=self.log,
        )  # fmt: skip
        return serve(
            self.model, engine, config, host=self.host, port=self.port,
            fd=None if self.fd < 0 else self.fd, keys_file=self.keys_file,
            supervision=Supervision(reload=self.reload, first_token=self.first_token),
            say=tell,
        )  # fmt: skip

    def _several(self) -> int:
        from deepseek.serve.router import RouterConfig
        from deepseek.serve.router.machine import serve_replicas
        from deepseek.serve.server.keys import Keyring

        if self.replicas < 1:
            raise ConfigError(f"--replicas {self.replicas} must be at least 1")
        if self.fd >= 0:
            raise ConfigError(f"--fd {self.fd} is for one process; with --replicas give --host and --port")
        if not Path(self.model).exists():
            raise ConfigError(f"there is no model at {self.model}; 'deepseek runs' lists runs")
        arguments = [self.model, *as_arguments(self, ("model", "host", "port", "replicas"))]
        silence = self.timeout + 60 if self.timeout else 86_400.0
        keys = Keyring.load(self.keys_file or None, os.environ)
        return serve_replicas(
            arguments, self.replicas, RouterConfig(drain=self.drain, silence=silence), host=self.host, port=self.port,
            keys=keys, device=self.device,
            say=lambda at: tell(f"{self.model} is served at {at} once a replica is ready"),
        )  # fmt: skip


def _adapters(given: Sequence[str], model: str) -> dict[str, str]:
    """Directories by the names under which clients ask for them, as they ask for the ``model`` itself."""
    found: dict[str, str] = {}
    for entry in given:
        name, separator, directory = entry.partition("=")
        if not separator or not name or not directory:
            raise ConfigError(f"--adapter {entry!r} must be NAME=DIRECTORY")
        if name in found:
            raise ConfigError(
                f"--adapter: {found[name]} and {directory} are both named {name!r}; name them apart"
            )
        if name == model:
            raise ConfigError(
                f"--adapter {entry!r} has the name of the model itself; give another one, or another --name"
            )
        if len(name) > LONGEST_NAME or not name.isprintable():
            raise ConfigError(
                f"--adapter {name[:80]!r}…: a name has at most {LONGEST_NAME} printable characters"
            )
        found[name] = directory
    return found


def _running(device: str) -> int:
    """What the engine takes by itself; torch, which knows for certain, is still being imported by the step process."""
    from deepseek.serve.engine_config import default_running

    found = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()
    return default_running(device == "cpu" or (device == "auto" and not found))
