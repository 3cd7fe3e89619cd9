"""Finding and reading checkpoints. What is damaged is refused by name, with the way out; an older one is
never loaded in its place."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek.errors import CheckpointError, RunError, did_you_mean
from deepseek.files import NEW
from deepseek.weights.manifest import STATE, GroupRecord, Manifest
from deepseek.weights.shards import read_tensors

_STEP = re.compile(rf"step-(\d{{6,}})({re.escape(NEW)})?")


@dataclass(frozen=True)
class Checkpoint:
    """What ``load`` returns: the tensor groups, the caller's state, and the manifest."""

    step: int
    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    manifest: Manifest

    @property
    def model(self) -> dict[str, Tensor]:
        """The group ``model``; empty if there is none."""
        return self.tensors.get("model", {})

    @property
    def optimizer(self) -> dict[str, Tensor]:
        """The group ``optimizer``; empty if there is none."""
        return self.tensors.get("optimizer", {})


def list_checkpoints(run: Path | str) -> list[Path]:
    """The checkpoint directories of a run, oldest step first; empty if there are none."""
    found: dict[int, Path] = {}
    with contextlib.suppress(OSError):
        for path in sorted(Path(run).iterdir()):  # 'step-000500.new' follows and supersedes 'step-000500'
            if (match := _STEP.fullmatch(path.name)) and path.is_dir():
                found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def latest(run: Path | str) -> Path | None:
    """The checkpoint of the highest step, damaged or not; ``None`` if there is none."""
    return next(reversed(list_checkpoints(run)), None)


def best(run: Path | str) -> Path | None:
    """The checkpoint with the lowest metric, the newer of equals; ``None`` if none has a metric."""
    return best_of({p: m for p in list_checkpoints(run) if (m := manifest_or_none(p)) is not None})


def load(
    path: Path | str,
    device: torch.device | str = "cpu",
    groups: Iterable[str] | None = None,
    *,
    verify: bool = True,
) -> Checkpoint:
    """Read a checkpoint, or the newest one of a run.

    Args:
        path: a checkpoint directory or a run directory.
        device: where the tensors go.
        groups: read only these tensor groups; ``None`` reads all.
        verify: compare the hash of every file that is read; sizes are always compared.

    Raises:
        RunError: ``path`` is neither a run nor a checkpoint.
        CheckpointError: the checkpoint is missing or damaged. The message names the newest intact
            one, if any; it is never loaded instead.
    """
    directory = _resolve(Path(path))
    wanted = None if groups is None else list(groups)
    try:
        return _read(directory, device, wanted, verify)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_way_out(directory, verify)}") from error


def _read(directory: Path, device: torch.device | str, wanted: list[str] | None, verify: bool) -> Checkpoint:
    manifest = Manifest.read(directory)
    named = _STEP.fullmatch(directory.name)
    if named and int(named[1]) != manifest.step:
        raise CheckpointError(f"{directory} holds step {manifest.step}; give it its own name back")
    names = list(manifest.groups) if wanted is None else wanted
    for name in names:
        if name not in manifest.groups:
            has = ", ".join(manifest.groups) or "none"
            raise CheckpointError(
                f"{directory} has no tensor group '{name}'{did_you_mean(name, manifest.groups)}; it has {has}"
            )
    read = {STATE, *(file for name in names for file in manifest.groups[name].files)}
    try:
        manifest.check_files(directory, None if wanted is None else read, verify=verify)
        state = json.loads((directory / STATE).read_bytes())
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{directory / STATE} is damaged: {error}") from None
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot read {directory}: {error}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{directory / STATE} is damaged: it is not a JSON object")
    tensors = {name: _read_group(directory, name, manifest.groups[name], device) for name in names}
    return Checkpoint(manifest.step, directory, tensors, state, manifest)


def _read_group(
    directory: Path, name: str, record: GroupRecord, device: torch.device | str
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in record.files:
        tensors.update(read_tensors(directory / file, device))
    if len(tensors) != record.tensors:
        raise CheckpointError(
            f"{directory} is damaged: group '{name}' has {len(tensors)} of {record.tensors} tensors"
        )
    for alias, kept in record.tied.items():
        if kept not in tensors:
            raise CheckpointError(
                f"{directory} is damaged: group '{name}' lacks {kept!r}, to which {alias!r} is tied"
            )
        tensors[alias] = tensors[kept]
    return tensors


def _resolve(path: Path) -> Path:
    """The checkpoint directory that ``path`` means."""
    if match := _STEP.fullmatch(path.name):
        for candidate in (path.with_name(path.name + NEW), path):
            if candidate.is_dir():
                return candidate
        if here := list_checkpoints(path.parent):
            has = ", ".join(p.name for p in here)
            raise CheckpointError(f"{path.parent} has no checkpoint of step {int(match[1])}; it has: {has}")
    if (path / "manifest.json").is_file():
        return path
    newest = latest(path)
    if newest is not None:
        return newest
    what = (
        "it has no checkpoints"
        if path.is_dir()
        else "it does not exist"
        if not path.exists()
        else "it is a file"
    )
    raise RunError(f"{path} is not a run directory: {what}{_similar_run(path)}")


def _similar_run(path: Path) -> str:
    """``; did you mean runs/foo2?`` for the sibling run that is named most alike."""
    runs: list[str] = []
    with contextlib.suppress(OSError):
        runs = [p.name for p in path.parent.iterdir() if p != path and p.is_dir() and latest(p) is not None]
    near = difflib.get_close_matches(path.name, runs, n=1, cutoff=0.6)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _way_out(damaged: Path, verify: bool) -> str:
    for path in reversed(list_checkpoints(damaged.parent)):
        if path != damaged:
            with contextlib.suppress(CheckpointError, OSError):
                Manifest.read(path).check_files(path, verify=verify)
                return f"; the newest intact checkpoint is {path.name}: resume from it with --from {step_of(path)}"
    return "; this run has no other intact checkpoint"


def step_of(path: Path) -> int:
    """The step in a checkpoint directory's name."""
    match = _STEP.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def manifest_or_none(path: Path) -> Manifest | None:
    """The manifest of a checkpoint directory, or ``None`` where it is damaged."""
    with contextlib.suppress(CheckpointError):
        return Manifest.read(path)
    return None


def best_of(manifests: dict[Path, Manifest]) -> Path | None:
    """The path with the lowest metric, the highest step of equals."""
    rated = [(m.metric, -m.step, p) for p, m in manifests.items() if m.metric is not None]
    return min(rated)[2] if rated else None
