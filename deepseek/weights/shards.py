"""Groups of named tensors as safetensors files: the one format in which weights touch the disk.

The writer streams: it never holds a second copy of a tensor on the host, hashes while it writes, and cuts a
large group into shards with the index file that the Hugging Face hub uses. Reading is left to the
``safetensors`` library.

safetensors refuses tensors that share memory. Here a tied tensor (same memory, same shape and strides) is
written once and restored under each of its names as the same tensor; tensors that merely overlap are written
separately.

Format: https://github.com/huggingface/safetensors (8 bytes of header length, JSON header, raw little-endian
data).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepseek.errors import CheckpointError
from deepseek.files import FileRecord, write_file

SHARD_BYTES = 4 << 30

DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Pending:
    """A tensor that is made when it is written, and forgotten then: a file larger than memory is a dict of them."""

    dtype: torch.dtype
    shape: torch.Size
    make: Callable[[], Tensor]

    def numel(self) -> int:
        return self.shape.numel()

    def element_size(self) -> int:
        return self.dtype.itemsize


@dataclass(frozen=True)
class Group:
    """Tensors that do not share memory, and the other names of those that did: ``tied[name] = kept name``."""

    tensors: dict[str, Tensor]
    tied: dict[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


def untie(name: str, tensors: dict[str, Tensor]) -> Group:
    """``tensors``, tied ones once. Raises ``CheckpointError`` for what safetensors cannot hold."""
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for key, tensor in tensors.items():
        _check_savable(f"{name}: {key!r}", key, tensor)
        place = (
            tensor.device,
            tensor.data_ptr(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
            tensor.is_conj(),
        )
        if tensor.numel() and place in first:
            tied[key] = first[place]
        else:
            first[place] = key
            kept[key] = tensor.detach()
    return Group(kept, tied)


def _check_savable(where: str, key: Any, tensor: Any) -> None:
    if not isinstance(key, str) or key == "__metadata__":
        raise CheckpointError(f"{where} cannot name a tensor; names are strings other than '__metadata__'")
    if not isinstance(tensor, Tensor):
        raise CheckpointError(
            f"{where} is a {type(tensor).__name__}, not a tensor; put plain values in `state`"
        )
    if hasattr(tensor, "full_tensor"):
        raise CheckpointError(
            f"{where} is a shard of a distributed tensor; gather it first: tensor.full_tensor()"
        )
    if tensor.is_meta:
        raise CheckpointError(f"{where} has no data (it is on the meta device); materialise the model first")
    if tensor.layout != torch.strided or tensor.dtype not in DTYPES:
        raise CheckpointError(
            f"{where} is {tensor.layout} {tensor.dtype}; safetensors holds dense plain tensors"
        )


class HostBuffers:
    """Host memory for snapshots, kept from one to the next so that a save does not wait for fresh pages.

    Holds one copy of what is saved (pinned when it comes from CUDA) for as long as the object lives.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def copy(self, groups: dict[str, Group]) -> dict[str, Group]:
        """The groups with every tensor copied; complete on return. Overwrites the copies made before."""
        used: dict[tuple[str, str], Tensor] = {}
        devices: set[torch.device] = set()
        for name, group in groups.items():
            for key, tensor in group.tensors.items():
                buffer = self._buffers.get((name, key))
                if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                    buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                used[name, key] = buffer.copy_(tensor, non_blocking=True)
                devices.add(tensor.device)
        for device in devices:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
        self._buffers = used
        return {
            name: Group({key: used[name, key] for key in group.tensors}, group.tied)
            for name, group in groups.items()
        }


def write_group(directory: Path, name: str, group: Group, limit: int = SHARD_BYTES) -> dict[str, FileRecord]:
    """Write a group as ``NAME.safetensors``, or as shards of at most ``limit`` bytes and their index.

    A tensor larger than ``limit`` gets a shard of its own. Returns what was written, by file name.
    """
    return write_shards(directory, name, group.tensors, limit)


def write_shards(
    directory: Path, name: str, tensors: Mapping[str, Tensor | Pending], limit: int = SHARD_BYTES
) -> dict[str, FileRecord]:
    """``write_group`` of tensors that share no memory, some of which may be yet to be made."""
    shards = _cut(tensors, limit)
    if len(shards) == 1:
        return {f"{name}.safetensors": write_tensors(directory / f"{name}.safetensors", shards[0])}
    records: dict[str, FileRecord] = {}
    places: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"{name}-{i:05d}-of-{len(shards):05d}.safetensors"
        records[file] = write_tensors(directory / file, shard)
        places.update(dict.fromkeys(shard, file))
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    file = f"{name}.safetensors.index.json"
    records[file] = write_file(directory / file, [json.dumps(index, indent=1).encode()])
    return records


def write_tensors(path: Path, tensors: Mapping[str, Tensor | Pending]) -> FileRecord:
    """One safetensors file. Widest elements first, so that every tensor is aligned to its element size."""
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key in order:
        tensor = tensors[key]
        end = offset + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def chunks() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for key in order:
            if tensors[key].numel():
                yield _raw(_made(key, tensors[key]))

    return write_file(path, chunks())


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors of one safetensors file. Raises ``CheckpointError`` when it is not one."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None


def _made(key: str, tensor: Tensor | Pending) -> Tensor:
    if not isinstance(tensor, Pending):
        return tensor
    made = tensor.make()
    assert (made.dtype, made.shape) == (tensor.dtype, tensor.shape), key
    return made


def _raw(tensor: Tensor) -> memoryview:
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    raw: Any = plain.reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)


def _cut(tensors: Mapping[str, Tensor | Pending], limit: int) -> list[dict[str, Tensor | Pending]]:
    shards: list[dict[str, Tensor | Pending]] = [{}]
    filled = 0
    for key, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and filled + size > limit:
            shards.append({})
            filled = 0
        shards[-1][key] = tensor
        filled += size
    return shards
