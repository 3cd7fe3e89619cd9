"""A model in one GGUF file, or in several: ``NAME-00001-of-00003.gguf``, as ``llama-gguf-split`` cuts it.

The first part holds the metadata, every part some of the tensors. Three keys tie them together: ``split.no`` (from 0),
``split.count`` (parts) and ``split.tensors.count`` (tensors of all parts). Any part may be named; all must be there.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from deepseek.errors import WeightsError, did_you_mean
from deepseek.weights.gguf import GGUFFile, TensorPlace

NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def model_name(path: Path) -> str:
    """What a model in this file is called: its name without ``.gguf`` and the number of the part."""
    named = NAME.fullmatch(path.name)
    return named["stem"] if named else path.name.removesuffix(".gguf")


def part_paths(path: Path) -> list[Path]:
    """All parts of the model that ``path`` is a part of, in order; ``[path]`` for a name of another form.

    Raises:
        WeightsError: one of them is not there.
    """
    named = NAME.fullmatch(path.name)
    if named is None or not 1 <= int(named["number"]) <= int(named["count"]):
        return [path]
    count = int(named["count"])
    paths = [path.with_name(f"{named['stem']}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]
    missing = [p for p in paths if not p.is_file()]
    if missing:
        raise WeightsError(
            f"{missing[0]} is not there: the model is in {count} parts, and {len(missing)} of them are missing"
        )
    return paths


class GGUFParts:
    """The parts of one model, open, as if they were one ``GGUFFile``. A context manager.

    Attributes:
        path: of the part that holds the metadata. metadata: of that part. places: of all parts' tensors.

    Raises:
        WeightsError: a part is missing, damaged, or belongs to another model.
    """

    def __init__(self, path: Path | str) -> None:
        paths = part_paths(Path(path))
        self.path = paths[0]
        with ExitStack() as held:
            self._parts = [held.enter_context(GGUFFile(p)) for p in paths]
            self.metadata: dict[str, Any] = self._parts[0].metadata
            self._holder: dict[str, GGUFFile] = {}
            self._check()
            self._held = held.pop_all()

    def __enter__(self) -> GGUFParts:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    @property
    def names(self) -> list[str]:
        return list(self._holder)

    @property
    def places(self) -> dict[str, TensorPlace]:
        return {name: part.places[name] for name, part in self._holder.items()}

    def get(self, name: str) -> Tensor:
        """As ``GGUFFile.get``, from the part that has it."""
        if name not in self._holder:
            raise WeightsError(f"{self.path} has no tensor {name!r}{did_you_mean(name, self._holder)}")
        return self._holder[name].get(name)

    def _check(self) -> None:
        for number, part in enumerate(self._parts):
            self._check_keys(part, number)
            for name in part.names:
                if name in self._holder:
                    raise WeightsError(
                        f"{part.path} has the tensor {name!r}, and so has {self._holder[name].path}"
                    )
                self._holder[name] = part
        total = self.metadata.get("split.tensors.count")
        if len(self._parts) > 1 and total is not None and total != len(self._holder):
            raise WeightsError(
                f"{self.path}: split.tensors.count is {total!r}, but its {len(self._parts)} parts hold "
                f"{len(self._holder)} tensors"
            )

    def _check_keys(self, part: GGUFFile, number: int) -> None:
        parts, count = len(self._parts), part.metadata.get("split.count", 0)
        if parts == 1 and count in (0, 1):
            return
        if parts == 1 and NAME.fullmatch(part.path.name) is None:
            raise WeightsError(
                f"{part.path} is one of {count} parts (split.count), but is not named NAME-00001-of-0000N.gguf as "
                "parts are: give all of them such names, or join them: llama-gguf-split --merge"
            )
        found = part.metadata.get("split.no"), count
        if found != (number, parts):
            raise WeightsError(
                f"{part.path} is named as part {number + 1} of {parts}, but its split.no is {found[0]!r} and its "
                f"split.count {found[1]!r}; they should be {number} and {parts}"
            )
        if part.metadata.get("split.tensors.count") != self.metadata.get("split.tensors.count"):
            raise WeightsError(
                f"{part.path} belongs to another model than {self.path}: split.tensors.count is "
                f"{part.metadata.get('split.tensors.count')!r} in one and "
                f"{self.metadata.get('split.tensors.count')!r} in the other"
            )
