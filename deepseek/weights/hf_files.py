"""The files of a Hugging Face model directory: JSON, and safetensors in one file or in shards with an index.

Reading is lazy, one tensor at a time, and checks before it trusts: names in an index are plain file names,
every file it names is there, and index and files hold the same tensors. Pickles are never opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepseek.errors import WeightsError
from deepseek.weights.shards import DTYPES, write_tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
REOPEN = 64 << 20  #: bytes read from mapped files before they are mapped anew
NAMED = {name: dtype for dtype, name in DTYPES.items()}
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from ``path``. Raises ``WeightsError`` when there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path.parent} has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"cannot read {path}: {error}") from None
    if not isinstance(values, dict):
        raise WeightsError(f"{path} holds {type(values).__name__}, not an object")
    return values


def model_directory(directory: Path | str) -> Path:
    """``directory`` if it looks like a Hugging Face model. Raises ``WeightsError``."""
    directory = Path(directory)
    if not directory.is_dir():
        raise WeightsError(f"{directory} is {'not a directory' if directory.exists() else 'not there'}")
    if not (directory / "config.json").is_file():
        held = ", ".join(sorted(p.name for p in directory.iterdir())[:5]) or "nothing"
        raise WeightsError(f"{directory} is not a model directory: it has no config.json (it holds {held})")
    return directory


class TensorFiles:
    """Every tensor of a model directory by name, read when asked for. A context manager.

    Pages of a file that were read stay in memory as long as it is open, so files are opened anew after ``REOPEN``
    bytes.
    """

    copies = False

    def __init__(self, directory: Path) -> None:
        self._directory, self._stack = directory, ExitStack()
        self._files: dict[str, Any] = {}
        self._places: dict[str, str] = {}
        self._read = 0

    def __enter__(self) -> TensorFiles:
        try:
            index = self._read_index()
            for file in sorted(set(index.values())) if index is not None else [SINGLE]:
                self._open(file)
            if index is not None:
                self._compare(index)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def names(self) -> list[str]:
        return list(self._places)

    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU; it may share the pages of the file, so copy it."""
        file = self._places[name]
        try:
            if self._read > REOPEN:
                self._reopen()
            tensor: Tensor = self._files[file].get_tensor(name)
        except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError, TypeError) as error:
            raise WeightsError(f"{self._directory / file}: cannot read {name}: {error}") from None
        self._read += tensor.numel() * tensor.element_size()
        return tensor

    def describe(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Type and shape of a tensor, which is not read."""
        file = self._places[name]
        try:
            found = self._files[file].get_slice(name)
            return NAMED[found.get_dtype()], tuple(found.get_shape())
        except KeyError as error:
            raise WeightsError(f"{self._directory / file}: {name} is of the unknown type {error}") from None
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise WeightsError(f"{self._directory / file}: cannot read {name}: {error}") from None

    def _reopen(self) -> None:
        self._stack.close()
        self._read = 0
        for file in self._files:
            self._files[file] = self._stack.enter_context(
                safe_open(self._directory / file, framework="pt", device="cpu")
            )

    def _read_index(self) -> dict[str, str] | None:
        path = self._directory / INDEX
        if (self._directory / SINGLE).is_file() or not path.is_file():
            return None
        places = read_json(path).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise WeightsError(f"{path} has no weight_map")
        for name, file in places.items():
            if (
                not isinstance(file, str)
                or Path(file).name != file
                or "\\" in file
                or not file.endswith(".safetensors")
            ):
                raise WeightsError(f"{path}: {name} is in {file!r}, which is no file name of this directory")
        return places

    def _open(self, file: str) -> None:
        path = self._directory / file
        if not path.is_file():
            pickles = sorted(p.name for p in self._directory.glob("pytorch_model*.bin"))
            hint = (
                f"; {pickles[0]} is a pickle, which we do not open: save the model as safetensors"
                if pickles
                else ""
            )
            raise WeightsError(f"{self._directory} has no {file}{hint}")
        try:
            opened = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            names = list(opened.keys())
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise WeightsError(f"{path} is not a readable safetensors file: {error}") from None
        twice = sorted(set(names) & set(self._places))
        if twice:
            raise WeightsError(f"{path} and {self._places[twice[0]]} both hold {listed(twice)}")
        self._files[file] = opened
        self._places.update(dict.fromkeys(names, file))

    def _compare(self, index: dict[str, str]) -> None:
        wrong = sorted(
            name for name in index.keys() | self._places.keys() if index.get(name) != self._places.get(name)
        )
        if wrong:
            raise WeightsError(f"{self._directory / INDEX} and the files disagree about {listed(wrong)}")


def listed(names: Iterable[str], most: int = 5) -> str:
    """``a, b, c and 7 more (10)``."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def write_weights(
    directory: Path, tensors: dict[str, Tensor], limit: int, cast: Callable[[str, Tensor], torch.dtype]
) -> list[str]:
    """Write ``tensors`` (views are fine) as ``model.safetensors``, or as shards of at most ``limit`` bytes
    and an index.

    ``cast`` gives the dtype of each in the file. Beyond the tensors themselves, at most one shard is held in
    memory, and that only where the dtype changes. Returns the names of the files.
    """
    shards: list[dict[str, Tensor]] = [{}]
    filled = total = 0
    for name, tensor in tensors.items():
        if tensor.is_meta or cast(name, tensor) not in DTYPES:
            raise WeightsError(f"{name} ({tensor.dtype} on {tensor.device}) cannot be written to safetensors")
        size = tensor.numel() * cast(name, tensor).itemsize
        if shards[-1] and filled + size > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled, total = filled + size, total + size
    files = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for file, shard in zip(files, shards):
        write_tensors(directory / file, {n: t.detach().to(cast(n, t)) for n, t in shard.items()})
    if len(shards) > 1:
        places = {name: file for file, shard in zip(files, shards) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_json(directory / INDEX, index)
        files.append(INDEX)
    return files


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
