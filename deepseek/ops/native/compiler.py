"""Compiles the kernels for this processor and keeps the library in the user's cache directory.

The library's name says what it was made of: the sources, the flags, the compiler and the processor's features. So
another machine with the same home directory, or a newer version of this package, finds or makes one of its own. It is
written under a hidden name and renamed, so that of two processes that compile at once each leaves a whole one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent
#: No value-changing optimisation: a row must come out of every loop alike, and NaN must stay NaN.
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=off",
         "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")  # fmt: skip
TARGET = ("-march=native",)
LIMIT = 300.0  #: seconds for the compiler


class BuildError(Exception):
    """There is no library, for this reason; who catches it goes on without."""


def build(target: tuple[str, ...] = TARGET) -> Path:
    """The compiled library, made if it is not there.

    Args:
        target: flags that say for which processor.

    Raises:
        BuildError: no compiler, it failed, or the cache directory cannot be trusted.
    """
    if platform.system() != "Linux":
        raise BuildError(f"they are built on Linux only, this is {platform.system()}")
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler (c++, g++ or clang++; the variable CXX names another)")
    files = sorted(p for p in SOURCES.iterdir() if p.suffix in (".cpp", ".h"))
    flags = (*FLAGS, *target)
    library = directory() / f"native-{_key(compiler, flags, files)}.so"
    if not library.exists():
        _compile(compiler, flags, [p for p in files if p.suffix == ".cpp"], library)
    return library


def find_compiler() -> str | None:
    """``$CXX``, or the first of the usual ones that is there."""
    named = os.environ.get("CXX")
    return next(
        (
            found
            for name in ([named] if named else ["c++", "g++", "clang++"])
            if (found := shutil.which(name))
        ),
        None,
    )


def directory() -> Path:
    """Where compiled libraries are kept: ``$XDG_CACHE_HOME/deepseek``, ours alone.

    Raises:
        BuildError: it cannot be made, or somebody else could write there.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = base / "deepseek"
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = path.stat()
    except (OSError, RuntimeError) as error:
        raise BuildError(f"no cache directory {path}: {error}") from error
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(
            f"{path} belongs to or can be written by somebody else; nothing is loaded from there"
        )
    return path


def _key(compiler: str, flags: tuple[str, ...], files: list[Path]) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for file in files:
        digest.update(file.read_bytes())
    digest.update(" ".join(flags).encode())
    digest.update(_run([compiler, "--version"]).encode())
    digest.update(_processor().encode())
    return digest.hexdigest()


def _processor() -> str:
    """What decides the instructions that -march=native may use."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        wanted = ("model name", "flags", "Features", "cpu family", "model", "CPU part")
        return "\n".join(sorted({x for x in lines if x.partition(":")[0].strip() in wanted}))
    return platform.processor()


def _compile(compiler: str, flags: tuple[str, ...], files: list[Path], target: Path) -> None:
    """All files at the same time, then the library."""
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=target.parent) as scratch:
        objects = [Path(scratch) / f"{file.stem}.o" for file in files]
        with ThreadPoolExecutor(len(files)) as threads:
            commands = ([compiler, *flags, "-c", "-o", str(o), str(f)] for o, f in zip(objects, files))
            for done in [threads.submit(_run, command) for command in commands]:
                done.result()
        made = Path(scratch) / target.name
        _run([compiler, *flags, "-shared", "-o", str(made), *map(str, objects)])
        made.replace(target)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT, stdin=subprocess.DEVNULL, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    if done.returncode:
        raise BuildError(f"{command[0]} failed with {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout
