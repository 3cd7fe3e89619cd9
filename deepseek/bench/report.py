"""``Report``: what a benchmark found. Tables are printed as they come and kept as JSON, so that a run that is
cut short leaves what it measured.

Every report says on which machine, with which versions, by which command and when; a figure without those is
no measurement. Values are plain numbers whose unit stands in the column's name.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from deepseek.assemble import pick_device
from deepseek.errors import ConfigError
from deepseek.files import write_atomic
from deepseek.monitor import headline, table
from deepseek.weights.checkpoint import code_version

PACKAGES = ("torch", "triton", "transformers", "liger_kernel")
WIDTH = 180  #: columns of a table that goes into a pipe or a file


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What every benchmark can be told."""

    quick: bool = False  # tiny shapes, a few repeats: to see that it runs, on a CPU too
    json: str = ""  # write the results here as JSON; '-' prints them, and the tables go to stderr
    device: str = "auto"
    seed: int = 0

    @property
    def torch_device(self) -> torch.device:
        """The device asked for. Raises ``ConfigError`` when it is absent."""
        try:
            return pick_device(self.device)
        except ConfigError as error:
            raise ConfigError(str(error).replace("train.device=", "--device=")) from None


class Report:
    """Tables, ceilings and notes of one benchmark.

    Args:
        name: of the benchmark.
        device: where it runs.
        options: a dataclass or a mapping; kept as they are.
        json_path: where to keep the report; empty for nowhere, '-' for the standard output at ``close``.

    Raises:
        ConfigError: ``json_path`` is in a directory that cannot be written in.
    """

    def __init__(
        self, name: str, device: torch.device, options: Any = None, json_path: str = "", quiet: bool = False
    ) -> None:
        self.name, self.json_path = name, json_path
        if json_path not in ("", "-") and not os.access(Path(json_path).parent, os.W_OK):
            raise ConfigError(
                f"--json={json_path}: there is no directory {Path(json_path).parent} to write in"
            )
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.ceilings: dict[str, float] = {}
        self.notes: list[str] = []
        self.environment = environment(device)
        self.options = asdict(options) if is_dataclass(options) else dict(options or {})  # type: ignore[arg-type]
        stream = sys.stderr if json_path == "-" else sys.stdout
        console = Console(file=stream, quiet=quiet)
        self.console = console if console.is_terminal else Console(file=stream, quiet=quiet, width=WIDTH)
        headline(f"bench {name}", self._where(), console=self.console)

    def add(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep a whole table and print it."""
        self.tables.setdefault(title, []).extend(dict(row) for row in rows)
        self.show(title)
        self.flush()

    def keep(self, title: str, row: Mapping[str, Any]) -> None:
        """Keep one row of a table that is printed later, by ``show``."""
        self.tables.setdefault(title, []).append(dict(row))
        self.say(", ".join(f"{name} {_rounded(value)}" for name, value in row.items() if value is not None))
        self.flush()

    def show(self, title: str) -> None:
        """Print what ``title`` holds, columns that every row leaves empty left out."""
        rows = self.tables.get(title, [])
        names = [
            n
            for n in dict.fromkeys(n for row in rows for n in row)
            if any(r.get(n) is not None for r in rows)
        ]
        self.console.print(Text(f"\n{title}", style="italic"), soft_wrap=True)
        table([{n: _rounded(row.get(n)) for n in names} for row in rows], self.console)

    def say(self, text: str) -> None:
        """A quiet line, printed and not kept."""
        self.console.print(Text(text, style="bright_black"), soft_wrap=True)

    def ceiling(self, name: str, value: float) -> float:
        """Keep a ceiling of this machine; the name says the unit. Returns ``value``."""
        self.ceilings[name] = value
        self.say(f"ceiling: {name} {_rounded(value)}")
        self.flush()
        return value

    def note(self, text: str) -> None:
        """A line of prose: what was skipped, and why."""
        self.notes.append(text)
        self.console.print(Text(f"note: {text}", style="yellow"), soft_wrap=True)
        self.flush()

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {
            "bench": self.name, "environment": self.environment, "options": self.options,
            "ceilings": self.ceilings, "tables": self.tables, "notes": self.notes,
        }  # fmt: skip

    def flush(self) -> None:
        """Write what there is so far, if a file was asked for."""
        if self.json_path not in ("", "-"):
            text = json.dumps(self.to_dict(), indent=1, default=str)
            write_atomic(Path(self.json_path), (text + "\n").encode())

    def close(self) -> Report:
        """Write the file, or print the JSON."""
        self.flush()
        if self.json_path == "-":
            print(json.dumps(self.to_dict(), default=str))
        return self

    def _where(self) -> str:
        e = self.environment
        return f"{e['device']} · torch {e['torch']} · triton {e.get('triton', 'none')} · {e['date']}"


def environment(device: torch.device) -> dict[str, Any]:
    """The machine, the versions, the command line and the date."""
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "memory_GiB": _memory(device), "cuda": torch.version.cuda, "python": platform.python_version(),
        "threads": torch.get_num_threads(), "command": command(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()), "code": code_version(),
    }  # fmt: skip
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command() -> str:
    """The command line, without the path of the installation."""
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name
    return shlex.join([name, *sys.argv[1:]])


def cpu_name() -> str:
    """``CPU x86_64, 2 cores``."""
    return f"CPU {platform.machine()}, {os.cpu_count()} cores"


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _rounded(value: Any) -> Any:
    """For reading: four significant digits, and whole numbers from a thousand on."""
    if isinstance(value, float):
        return round(value) if abs(value) >= 1000 else float(f"{value:.4g}")
    return value
