"""``run/step-000500/``: everything a run needs to go on, written so that no crash can spoil it.

    run/step-000500/model.safetensors    one file (or shards and an index) per tensor group
                    optimizer.safetensors
                    state.json           loader cursor, schedule, random state, config: what the caller gives
                    manifest.json        size and hash of every file, step, parent, metric, code version

``save`` copies the tensors to host memory and returns; a thread writes them into a hidden directory, flushes
it and renames it. A checkpoint is therefore either absent or complete, and ``load`` refuses one that has
changed since. Nothing is ever silently replaced by something older: a damaged checkpoint is an error that
names the way out.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.metadata
import json
import math
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from deepseek.config import configclass
from deepseek.errors import CheckpointError, ConfigError
from deepseek.events import emit
from deepseek.files import clean, discard, staged, write_file
from deepseek.weights.manifest import GROUP, STATE, GroupRecord, Manifest
from deepseek.weights.reader import (
    Checkpoint,
    best,
    best_of,
    latest,
    list_checkpoints,
    load,
    manifest_or_none,
    step_of,
)
from deepseek.weights.rng import rng_state, set_rng_state
from deepseek.weights.shards import (
    SHARD_BYTES,
    Group,
    HostBuffers,
    Pending,
    untie,
    write_group,
    write_shards,
)

__all__ = [
    "Checkpoint",
    "CheckpointConfig",
    "Checkpointer",
    "best",
    "latest",
    "list_checkpoints",
    "load",
    "rewind",
    "rng_state",
    "set_rng_state",
    "write_first",
]

ABANDONED = "abandoned"  #: where checkpoints go that a run resumed from an earlier step has left behind


@configclass
class CheckpointConfig:
    """When checkpoints are made and which are kept.

    Attributes:
        every: optimizer steps between checkpoints; 0 means only at the end and on interrupt. ``None``: a recipe
            chooses, so that a run can be taken back.
        keep_last: how many of the newest to keep; 0 keeps all.
        keep_best: also keep the one with the lowest metric.
        asynchronous: write in the background; costs host memory for one copy of the state.
    """

    every: int | None = None
    keep_last: int = 3
    keep_best: bool = True
    asynchronous: bool = True

    def check(self) -> None:
        for name in ("every", "keep_last"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 or more")


@dataclass(frozen=True)
class _Job:
    """One save, ready to be written: ``started`` is on the clock of ``time.perf_counter``, seconds."""

    path: Path
    groups: dict[str, Group]
    state: bytes
    manifest: Manifest
    started: float

    @property
    def bytes(self) -> int:
        return sum(g.bytes for g in self.groups.values()) + len(self.state)


class Checkpointer:
    """Writes the checkpoints of one run, at most one at a time.

    State that every process of a data-parallel run holds alike is written by rank 0 alone; on other ranks
    every method returns at once, and a barrier, where one is needed, is the caller's. Use as a context
    manager, or call ``close``: an error of the last background save is raised there.

    Args:
        run: the run directory; created if missing. Left-overs of dead writers are removed from it.
        config: when and what to keep.
        rank: this process.
        world: how many processes the run has.
        parent: the step this run continues from, for the lineage; ``None`` for a new run.
        shard_bytes: larger tensor groups are cut into files of at most this size.
    """

    def __init__(
        self,
        run: Path,
        config: CheckpointConfig | None = None,
        *,
        rank: int = 0,
        world: int = 1,
        parent: int | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.run, self.config = Path(run), config or CheckpointConfig()
        self.rank, self.world, self.parent, self.shard_bytes = rank, world, parent, shard_bytes
        self._buffers = HostBuffers()
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        if rank == 0:
            try:
                self.run.mkdir(parents=True, exist_ok=True)
                clean(self.run)
            except OSError as error:
                raise CheckpointError(
                    f"cannot write checkpoints in {run}: {error.strerror or error}"
                ) from error

    def save(
        self,
        step: int,
        *,
        tensors: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        metric: float | None = None,
        wait: bool = False,
    ) -> Path:
        """Save ``step``; returns where it will be. On return the caller may change every tensor.

        Waits for the save before it, if that is still being written. An existing checkpoint of the
        same step is replaced once the new one is complete; ones of later steps move to
        ``abandoned/``.

        Args:
            step: optimizer steps done.
            tensors: groups of named tensors, any device, dtype and strides: ``{"model": state_dict}``.
            state: what JSON can hold, with string keys.
            metric: for ``keep_best``, lower is better.
            wait: return only when the checkpoint is on the disk.

        Raises:
            CheckpointError: this save, or the background save before it, is impossible or failed; the
                checkpoints on the disk are as they were.
        """
        started = time.perf_counter()
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise CheckpointError(f"a checkpoint's step is a whole number of 0 or more, not {step!r}")
        path = self.run / f"step-{step:06d}"
        if self.rank != 0:
            return path
        self.wait()
        job = self._job(path, step, tensors, state, metric, started)
        self._check_space(job)
        if self.config.asynchronous and not wait:
            job = _Job(path, self._buffers.copy(job.groups), job.state, job.manifest, started)
            stall = time.perf_counter() - started
            self._thread = threading.Thread(target=self._write, args=(job, stall), name=f"save {path.name}")
            self._thread.start()  # not a daemon: the interpreter waits for it before it exits
        else:
            self._write(job, None)
            self.wait()
        return path

    def wait(self) -> None:
        """Wait for the background save. Raises its ``CheckpointError``, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """``wait``, and free the host copy."""
        self._buffers = HostBuffers()
        self.wait()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        with contextlib.suppress(CheckpointError):  # do not hide the error that is on its way
            self.close()

    def _job(
        self,
        path: Path,
        step: int,
        tensors: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        metric: float | None,
        started: float,
    ) -> _Job:
        for name in tensors:
            if not GROUP.fullmatch(name):
                raise CheckpointError(
                    f"a tensor group cannot be called {name!r}; use lower-case letters, digits, _"
                )
        groups = {name: untie(name, group) for name, group in tensors.items()}
        manifest = Manifest(
            step=step,
            time=time.time(),
            parent=self.parent,
            metric=float(metric) if metric is not None and math.isfinite(metric) else None,
            world=self.world,
            code=code_version(),
            groups={},
            files={},
        )
        return _Job(path, groups, _dump_state(state), manifest, started)

    def _check_space(self, job: _Job) -> None:
        needed = job.bytes + (1 << 20) + 256 * sum(len(g.tensors) for g in job.groups.values())
        try:
            free = shutil.disk_usage(self.run).free
        except OSError as error:
            raise CheckpointError(f"cannot write {job.path}: {error.strerror or error}") from error
        if needed > free:
            raise _disk_full(job.path, needed, free)

    def _write(self, job: _Job, stall: float | None) -> None:
        saved = False
        try:
            size = self._write_directory(job)
            saved, self.parent = True, job.manifest.step
            self._retain(job.manifest.step)
            seconds = time.perf_counter() - job.started
            stall = seconds if stall is None else stall
            path = str(job.path)
            emit("checkpoint", job.manifest.step, path=path, seconds=seconds, stall_seconds=stall, bytes=size)
        except Exception as error:
            self._error = self._explain(error, job, saved)
            self._error.__cause__ = error

    def _explain(self, error: Exception, job: _Job, saved: bool) -> CheckpointError:
        if isinstance(error, CheckpointError):
            return error
        if saved:
            return CheckpointError(f"saved {job.path}, but could not tidy up after it: {error}")
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _disk_full(job.path, job.bytes, shutil.disk_usage(self.run).free)
        return CheckpointError(f"could not write {job.path}: {error!r}; earlier checkpoints are intact")

    def _write_directory(self, job: _Job) -> int:
        with staged(job.path) as directory:
            files = {STATE: write_file(directory / STATE, [job.state])}
            groups: dict[str, GroupRecord] = {}
            for name, group in job.groups.items():
                written = write_group(directory, name, group, self.shard_bytes)
                shards = tuple(file for file in written if file.endswith(".safetensors"))
                groups[name] = GroupRecord(shards, len(group.tensors), group.tied)
                files.update(written)
            m = job.manifest
            whole = Manifest(m.step, m.time, m.parent, m.metric, m.world, m.code, groups, files)
            whole.write(directory)
            whole.check_files(directory, verify=False)
        return whole.bytes

    def _retain(self, step: int) -> None:
        """Set aside what lies beyond ``step``, then delete all but the newest few and the best."""
        rewind(self.run, step)
        if self.config.keep_last == 0:
            return
        intact = {p: m for p in list_checkpoints(self.run) if (m := manifest_or_none(p)) is not None}
        keep = set(list(intact)[-self.config.keep_last :])
        if self.config.keep_best and (winner := best_of(intact)) is not None:
            keep.add(winner)
        for path in intact:
            if path not in keep:
                discard(path)


def write_first(path: Path, tensors: Mapping[str, Pending], state: dict[str, Any]) -> int:
    """Write the checkpoint ``path``, a new directory, of a run that begins with a model from elsewhere: step 0.

    Each tensor is made, written and forgotten in turn. The directory must lie in one that nobody reads yet
    (``files.staged``). Returns its bytes.

    Raises:
        CheckpointError: the state is no JSON. OSError: it could not be written.
    """
    path.mkdir()
    files = {STATE: write_file(path / STATE, [_dump_state(state)])}
    files |= write_shards(path, "model", tensors)
    shards = tuple(file for file in files if file.endswith(".safetensors"))
    groups = {"model": GroupRecord(shards, len(tensors), {})}
    manifest = Manifest(0, time.time(), None, None, 1, code_version(), groups, files)
    manifest.write(path)
    return manifest.bytes


def rewind(run: Path, step: int) -> None:
    """Move every checkpoint above ``step`` to ``abandoned/``: the run goes on from ``step``. None is deleted."""
    for path in list_checkpoints(run):
        if step_of(path) > step:
            _set_aside(path)


def _set_aside(path: Path) -> None:
    shelf = path.parent / ABANDONED
    shelf.mkdir(exist_ok=True)
    target, n = shelf / path.name, 1
    while target.exists():
        target, n = shelf / f"{path.name}-{n}", n + 1
    path.rename(target)


def _dump_state(state: dict[str, Any]) -> bytes:
    _check_keys(state, "state")
    try:
        return (json.dumps(state, indent=1) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"state cannot be written as JSON: {error}; tensors belong in `tensors`"
        ) from None


def _check_keys(value: Any, where: str) -> None:
    """JSON would quietly turn other keys into strings, and the resumed run would not find them."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise CheckpointError(
                    f"{where} has the key {key!r}; JSON keys are strings, so write {str(key)!r}"
                )
            _check_keys(inner, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            if isinstance(inner, (dict, list, tuple)):
                _check_keys(inner, f"{where}[{i}]")


def _disk_full(path: Path, needed: int, free: int) -> CheckpointError:
    return CheckpointError(
        f"disk full: {path.name} needs {_size(needed)} and {path.parent} has {_size(free)} free; "
        f"earlier checkpoints are intact. Free {_size(max(needed - free, 0))}, or lower keep_last"
    )


def _size(count: int) -> str:
    amount = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


@functools.cache
def code_version() -> dict[str, str]:
    """The package version, and the commit when this is a checkout of its repository."""
    try:
        code = {"version": importlib.metadata.version("deepseek-framework")}
    except importlib.metadata.PackageNotFoundError:
        code = {"version": "unknown"}
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["git", "-C", str(root), "rev-parse", "HEAD"]
            commit = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
            code["commit"] = commit.stdout.strip()
    return code
