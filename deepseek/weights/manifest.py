"""``manifest.json``: what a checkpoint must be, so that anything else is refused by name.

It lists every file with its size and hash and carries a hash of itself; it is read only if its bytes are
exactly those that this module writes. The hashes find damage and careless edits. They are no signature: who
can write the directory can also write a new manifest, and gains nothing by it, because no file here holds
code.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepseek.errors import CheckpointError
from deepseek.files import FileRecord, hash_file, write_file

FORMAT = 1
NAME = "manifest.json"
STATE = "state.json"
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.(safetensors|json)")
GROUP = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class GroupRecord:
    """Where a tensor group lies: its safetensors files, how many tensors they hold, and the tied names."""

    files: tuple[str, ...]
    tensors: int
    tied: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``.

    Attributes:
        step: optimizer steps done.
        time: Unix time of the save, seconds.
        parent: the step this one continued from, ``None`` for the first: the lineage.
        metric: what ``keep_best`` compares, lower is better; ``None`` if not given or not finite.
        world: number of processes of the run that saved.
        code: ``{"version": ..., "commit": ...}`` of this package.
        groups: tensor groups by name.
        files: every other file of the directory by name.
    """

    step: int
    time: float
    parent: int | None
    metric: float | None
    world: int
    code: dict[str, str]
    groups: dict[str, GroupRecord]
    files: dict[str, FileRecord]

    @property
    def bytes(self) -> int:
        return sum(record.size for record in self.files.values())

    def write(self, directory: Path) -> None:
        body = asdict(self)
        body["files"] = {name: record._asdict() for name, record in self.files.items()}
        write_file(directory / NAME, [_text({"format": FORMAT, **body})])

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """The manifest of a directory. Raises ``CheckpointError`` if it is missing or not intact."""
        path = directory / NAME
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            raise CheckpointError(f"{directory} has no {NAME}, so it is not a complete checkpoint") from None
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
        try:
            whole = json.loads(raw)
            body = whole["manifest"]
            version = body["format"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise CheckpointError(f"{path} is damaged: it is not a checkpoint manifest") from None
        if version != FORMAT:
            raise CheckpointError(
                f"{path} has format {version!r}; this version of deepseek-framework reads {FORMAT}"
            )
        if raw != _text(body):
            raise CheckpointError(f"{path} is damaged: its content does not match its own hash")
        try:
            return _parse(body)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise CheckpointError(f"{path} is not a valid manifest: {error}") from None

    def check_files(self, directory: Path, names: set[str] | None = None, *, verify: bool = True) -> None:
        """Refuse missing, resized, foreign and, with ``verify``, changed files (of ``names``, if given)."""
        for entry in sorted(directory.iterdir()):
            if entry.name != NAME and entry.name not in self.files and not entry.name.startswith("."):
                raise CheckpointError(f"{entry} does not belong to this checkpoint; move it elsewhere")
        for name, record in self.files.items():
            path = directory / name
            if path.is_symlink() or not path.is_file():
                raise CheckpointError(f"{directory} is damaged: {name} ({record.size:,} bytes) is missing")
            if (size := path.stat().st_size) != record.size:
                raise CheckpointError(
                    f"{path} is damaged: it has {size:,} bytes and should have {record.size:,}"
                )
            if verify and (names is None or name in names) and hash_file(path) != record:
                raise CheckpointError(f"{path} is damaged: its content does not match the hash in {NAME}")


def _text(body: dict[str, Any]) -> bytes:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    digest = hashlib.blake2b(canonical, digest_size=32).hexdigest()
    return (json.dumps({"blake2b": digest, "manifest": body}, indent=1, sort_keys=True) + "\n").encode()


def _parse(body: dict[str, Any]) -> Manifest:
    files = {name: FileRecord(int(r["size"]), str(r["blake2b"])) for name, r in body["files"].items()}
    for name in files:
        if not _FILE.fullmatch(name) or name == NAME:
            raise ValueError(f"it lists a file {name!r}")
    groups = {
        name: GroupRecord(tuple(g["files"]), int(g["tensors"]), dict(g["tied"]))
        for name, g in body["groups"].items()
    }
    for name, group in groups.items():
        if missing := [f for f in group.files if f not in files]:
            raise ValueError(f"group {name!r} names the unlisted file {missing[0]!r}")
    owned = {file for group in groups.values() for file in group.files}
    if orphans := sorted(f for f in files if f.endswith(".safetensors") and f not in owned):
        raise ValueError(f"the file {orphans[0]!r} belongs to no tensor group")
    if STATE not in files:
        raise ValueError(f"it does not list {STATE}")
    metric, parent = body["metric"], body["parent"]
    return Manifest(
        step=int(body["step"]),
        time=float(body["time"]),
        parent=None if parent is None else int(parent),
        metric=None if metric is None or not math.isfinite(metric) else float(metric),
        world=int(body["world"]),
        code={str(k): str(v) for k, v in body["code"].items()},
        groups=groups,
        files=files,
    )
