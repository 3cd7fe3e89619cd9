"""What the commands say to a terminal or a program that reads them, and what they hear from it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def print_json(value: Any) -> None:
    print(json.dumps(value, default=str))


def tell(line: str) -> None:
    """On standard output, of a server: nothing ends because nobody reads it any more."""
    try:
        print(line, flush=True)
    except OSError:
        with Path(os.devnull).open("w") as nowhere:  # or the interpreter stumbles over the same at its end
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def progress(what: str) -> Any:
    """``progress(done, of)`` that writes one line again and again on a terminal, and nothing elsewhere."""

    def told(done: int, of: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {of} {what}", end="\n" if done == of else "", file=sys.stderr, flush=True)

    return told


def read_stdin() -> str:
    """Standard input as text; bytes that are no UTF-8 become replacement characters."""
    return sys.stdin.buffer.read().decode("utf-8", "replace")


def ask(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except EOFError:
        print()
        return ""
