"""What a run leaves out of its data: documents for good (quarantine), batches once (skips).

Neither changes the plan of rows. A quarantined document keeps its place in the plan, and its pieces are left out
of the rows when a batch is built (what follows moves to the left, padding comes in at the end): no target, no
attention, no expert ever sees it, and every other document is where it would have been. A skipped batch is
planned and not delivered. A place in the data therefore means the same before and after, on any number of ranks.

    run/quarantine.jsonl    one document a line: {"source", "path", "offset", "from_step", "by", "time", "reason"}

``offset`` may be null: every document of that file. ``from_step`` is the first step whose batch is without it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deepseek.data.store import TokenStore
from deepseek.errors import DataError, did_you_mean
from deepseek.files import write_atomic

FILE = "quarantine.jsonl"
#: Ranges ``[first, last]`` of batch numbers, both inclusive, sorted, apart.
Skips = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Quarantined:
    """A document that is not trained on: see the top of the file for the fields."""

    source: str
    path: str
    offset: int | None
    from_step: int = 0
    by: str = ""
    time: float = 0.0
    reason: str = ""

    @property
    def key(self) -> tuple[str, str, int | None]:
        return self.source, self.path, self.offset

    @classmethod
    def of(cls, value: Any) -> Quarantined:
        """A document named by a mapping. Raises ``DataError`` for anything else."""
        if not isinstance(value, Mapping):
            raise DataError(f"a document is {{source, path, offset}}, not {value!r}")
        offset = value.get("offset")
        if not isinstance(value.get("source"), str) or not isinstance(value.get("path"), str):
            raise DataError(f"a document needs a source and a path: {dict(value)!r}")
        if offset is not None and (isinstance(offset, bool) or not isinstance(offset, int) or offset < 0):
            raise DataError(f"a document's offset is a whole number of 0 or more, or null: {dict(value)!r}")
        return cls(
            value["source"], value["path"], offset, int(value.get("from_step") or 0), str(value.get("by") or ""),
            float(value.get("time") or 0.0), str(value.get("reason") or ""),
        )  # fmt: skip


def read_quarantine(path: Path | str) -> list[Quarantined]:
    """The documents of a quarantine file; none if there is no file. Raises ``DataError`` naming a bad line."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(Quarantined.of(json.loads(line)))
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {error}") from None
    return found


def add_to_quarantine(
    path: Path | str, documents: Iterable[Quarantined], *, from_step: int, by: str = "", reason: str = ""
) -> list[Quarantined]:
    """Write ``documents`` into a quarantine file, whole or not at all; returns those that were not in it.

    A document that is in it already keeps its line, from the earlier of the two steps on.
    """
    path, now = Path(path), round(time.time(), 3)
    held = {q.key: q for q in read_quarantine(path)}
    new = []
    for document in documents:
        before = held.get(document.key)
        if before is None:
            held[document.key] = replace(document, from_step=from_step, by=by, time=now, reason=reason)
            new.append(held[document.key])
        elif before.from_step > from_step:
            held[document.key] = replace(before, from_step=from_step)
    _write(path, held.values())
    return new


def bring_forward(path: Path | str, from_step: int) -> None:
    """A run goes back and goes on with ``from_step``: what is in quarantine is left out from there on."""
    held = read_quarantine(path)
    if any(q.from_step > from_step for q in held):
        _write(Path(path), [replace(q, from_step=min(q.from_step, from_step)) for q in held])


def _write(path: Path, documents: Iterable[Quarantined]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(asdict(q), ensure_ascii=False) + "\n" for q in documents))


def find_documents(
    stores: Sequence[TokenStore], documents: Iterable[Quarantined], *, missing_ok: bool = False
) -> set[tuple[int, int]]:
    """``(store, document)`` numbers of the named documents.

    Raises:
        DataError: a document is in none of the stores, unless ``missing_ok``.
    """
    found: set[tuple[int, int]] = set()
    for wanted in documents:
        here = _find(stores, wanted.source, wanted.path, wanted.offset)
        if not here and not missing_ok:
            raise DataError(_not_there(stores, wanted))
        found |= here
    return found


def _find(
    stores: Sequence[TokenStore], source: str, path: str, offset: int | None = None
) -> set[tuple[int, int]]:
    return {(i, d) for i, store in enumerate(stores) for d in store.find(source, path, offset)}


def _not_there(stores: Sequence[TokenStore], wanted: Quarantined) -> str:
    sources = [name for store in stores for name in store.sources]
    at = "" if wanted.offset is None else f" at offset {wanted.offset}"
    if wanted.source not in sources:
        near = did_you_mean(wanted.source, sources)
        return f"no source is called '{wanted.source}'{near}; there are: {', '.join(sources)}"
    offsets = [int(stores[i].records["offset"][d]) for i, d in _find(stores, wanted.source, wanted.path)]
    if offsets:
        nearest = min(offsets, key=lambda o: abs(o - (wanted.offset or 0)))
        return f"'{wanted.path}' of '{wanted.source}' has no document{at}; the nearest begins at {nearest}"
    return (
        f"source '{wanted.source}' has no training document '{wanted.path}'{at} "
        "(held-out documents are never trained on)"
    )


def merged(ranges: Iterable[Sequence[int]]) -> Skips:
    """Ranges ``[first, last]`` as sorted ranges that neither overlap nor touch. Raises ``DataError`` for others."""
    found: list[list[int]] = []
    for r in sorted(list(r) for r in ranges):
        if len(r) != 2 or not all(type(n) is int for n in r) or not 0 <= r[0] <= r[1]:
            raise DataError(f"a range of batches is [first, last] with 0 <= first <= last, not {r}")
        if found and r[0] <= found[-1][1] + 1:
            found[-1][1] = max(found[-1][1], r[1])
        else:
            found.append(r)
    return tuple((first, last) for first, last in found)


def is_skipped(skips: Skips, batch: int) -> bool:
    """Whether batch number ``batch`` is left out."""
    return any(first <= batch <= last for first, last in skips)


def delivered_index(skips: Skips, start: int, n: int) -> int:
    """Number of the ``n``-th batch (0 is the next) that is delivered from ``start`` on."""
    at = start
    for first, last in skips:
        if last < at:
            continue
        if n < max(0, first - at):
            return at + n
        n, at = n - max(0, first - at), last + 1
    return at + n
