"""`deepseek serve` as it is, in a process of its own, around engines that pretend (``fake_engine``).

``python fake_served.py PATH [OPTION=VALUE …]`` with options of ``ServerConfig``, ``keys_file``, ``reload``,
``max_crashes``, ``backoff`` and ``port``; ``PATH`` is what ``fake_engine.load`` takes, and a file of that name has to
exist.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@contextmanager
def process(place: Path, engine: str, **options: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The server in ``place``, and its address."""
    (place / engine).touch()
    words = [f"{name}={value}" for name, value in options.items()]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("DEEPSEEK_API_KEYS", "DEEPSEEK_ADMIN_KEYS"):
        env.pop(name, None)
    running = subprocess.Popen(
        [sys.executable, str(HERE / "fake_served.py"), engine, *words], cwd=place, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert running.stdout is not None
        line = running.stdout.readline()
        assert "is served at" in line, running.communicate(timeout=30)
        yield running, line.split()[-1]
    finally:
        if running.poll() is None:
            running.kill()
        running.communicate(timeout=60)


def main() -> int:
    from fake_client import FakeChat, tokenizer
    from fake_engine import FACTORY

    from deepseek.serve import client
    from deepseek.serve.engine_config import EngineConfig
    from deepseek.serve.server import ServerConfig, launch

    client.ProcessClient = functools.partial(client.ProcessClient, factory=FACTORY)  # type: ignore[misc,assignment]
    words = tokenizer()
    launch.load_texts = lambda path: (words, FakeChat())  # type: ignore[assignment,return-value]
    told = dict(word.split("=", 1) for word in sys.argv[2:])
    keys_file, port = told.pop("keys_file", ""), int(told.pop("port", 0))
    rules: Any = {"reload": told.pop("reload", "beside"), "max_crashes": int(told.pop("max_crashes", 5)),
                  "backoff": float(told.pop("backoff", 1.0))}  # fmt: skip
    config = ServerConfig(**{"log": "", **{name: float(value) for name, value in told.items()}})
    return launch.serve(
        sys.argv[1], EngineConfig(), config, port=port, keys_file=keys_file,
        supervision=client.Supervision(**rules),
        say=lambda line: print(line, flush=True),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
