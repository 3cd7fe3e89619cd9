"""``BackgroundDashboard``: the dashboard of one run, served by a process of its own for as long as the run goes on."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from deepseek.errors import MissingExtraError

PATIENCE = 5.0  #: seconds that the server has to end


class BackgroundDashboard:
    """``deepseek monitor RUN`` on the loopback address, beside a training process.

    It is a process and no thread, so that drawing never takes time from a step. It ends when this object is left, and
    also when this process is killed: it reads a pipe that only this process holds open.

    Args:
        run: the run's directory; it need not exist yet.
        say: is told the address, from a thread, once the server listens.

    Raises:
        MissingExtraError: without the extra ``web``.
    """

    def __init__(self, run: Path, say: Callable[[str], None] = print) -> None:
        for package in ("starlette", "uvicorn", "orjson"):
            if importlib.util.find_spec(package) is None:
                raise MissingExtraError(package, "web", "--monitor")
        self.run, self.say = run, say
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> BackgroundDashboard:
        command = [sys.executable, "-m", "deepseek", "monitor", str(self.run), "--ends-with-stdin"]
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):  # it is no rank
            environment.pop(name, None)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            start_new_session=True, env=environment,
        )  # fmt: skip
        threading.Thread(target=self._read, name="deepseek-dashboard", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _read(self) -> None:
        """Tell the first line that the server prints; read on, so that it never waits for a reader."""
        process = self._process
        if process is None or process.stdout is None:
            return
        with process.stdout as lines:
            for number, line in enumerate(lines):
                if number == 0:
                    self.say(line.split("  (")[0].strip())
