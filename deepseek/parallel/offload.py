"""Activations that wait for backward in host memory: copied out on a stream of their own, and back ahead of their turn.

A storage is copied once, however many views of it are saved. Weights, small tensors and small views of large storages
stay. On a CPU the copy is plain and proves the logic only.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from deepseek.parallel.saved import is_weight, note, note_offloaded

SMALLEST = 1 << 20  #: bytes below which a storage stays
AHEAD = 2  #: how many storages are fetched before their turn


class _Copy:
    """One storage on the host, and on its way back."""

    def __init__(self, storage: torch.UntypedStorage, device: torch.device, streams: _Streams | None) -> None:
        self.device, self.streams = device, streams
        self.back: tuple[Tensor, torch.cuda.Event] | Tensor | None = None
        flat = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
        self.host = torch.empty(flat.shape, dtype=torch.uint8, pin_memory=streams is not None)
        if streams is None:
            self.host.copy_(flat)
            return
        streams.out.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(streams.out):
            self.host.copy_(flat, non_blocking=True)
        flat.record_stream(streams.out)
        self.left = streams.out.record_event()

    def fetch(self) -> None:
        """Start the way back, once."""
        if self.back is not None:
            return
        if self.streams is None:
            self.back = self.host.clone()
            return
        with torch.cuda.stream(self.streams.back):
            self.streams.back.wait_event(self.left)
            flat = torch.empty(self.host.shape, dtype=torch.uint8, device=self.device)
            flat.copy_(self.host, non_blocking=True)
            self.back = flat, self.streams.back.record_event()

    def storage(self) -> torch.UntypedStorage:
        """The storage on the device, there for the current stream."""
        self.fetch()
        if isinstance(self.back, tuple):
            flat, arrived = self.back
            current = torch.cuda.current_stream(self.device)
            current.wait_event(arrived)
            flat.record_stream(current)
            return flat.untyped_storage()
        assert self.back is not None
        return self.back.untyped_storage()


class _Streams:
    def __init__(self, device: torch.device) -> None:
        self.out, self.back = torch.cuda.Stream(device), torch.cuda.Stream(device)


class _Away:
    """A tensor whose storage is a copy."""

    def __init__(self, tensor: Tensor, copy: _Copy, order: list[weakref.ref[_Copy]], place: int) -> None:
        self.copy, self.order, self.place = copy, order, place
        self.like = (tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride())

    def tensor(self) -> Tensor:
        for place in range(self.place, max(-1, self.place - AHEAD - 1), -1):
            copy = self.order[place]()
            if copy is not None:
                copy.fetch()
        dtype, offset, shape, stride = self.like
        empty = torch.empty(0, dtype=dtype, device=self.copy.device)
        return empty.set_(self.copy.storage(), offset, shape, stride)


class Offloader:
    """``pack`` and ``unpack`` for saved-tensor hooks; ``hooks()`` pushes both.

    Args:
        smallest: bytes below which a storage stays where it is.
    """

    def __init__(self, smallest: int = SMALLEST) -> None:
        self.smallest = smallest
        self.streams: dict[torch.device, _Streams] = {}
        self.begin()

    def begin(self) -> None:
        """A new forward pass: what is offloaded from now on is fetched in its own reverse order."""
        self.order: list[weakref.ref[_Copy]] = []
        self.known: dict[tuple[int, int], tuple[StorageWeakRef, weakref.ref[_Copy], int]] = {}

    def __deepcopy__(self, memo: object) -> Offloader:
        return Offloader(self.smallest)

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, tensor: Tensor) -> Any:
        """What is held for ``tensor``: itself, or its place on the host."""
        storage = tensor.untyped_storage() if tensor.layout is torch.strided else None
        if storage is None or is_weight(tensor) or not self._worth_it(tensor, storage.nbytes()):
            note(tensor)
            return tensor
        copy, place = self._copy(tensor, storage)
        return _Away(tensor, copy, self.order, place)

    @staticmethod
    def unpack(held: Any) -> Tensor:
        return held.tensor() if isinstance(held, _Away) else held

    def _worth_it(self, tensor: Tensor, whole: int) -> bool:
        return whole >= self.smallest and 2 * tensor.numel() * tensor.element_size() >= whole

    def _copy(self, tensor: Tensor, storage: torch.UntypedStorage) -> tuple[_Copy, int]:
        key = (storage._cdata, tensor._version)
        if key in self.known:
            _, known, place = self.known[key]
            if (copy := known()) is not None:
                return copy, place
        streams = None
        if tensor.device.type == "cuda":
            if tensor.device not in self.streams:
                self.streams[tensor.device] = _Streams(tensor.device)
            streams = self.streams[tensor.device]
        copy = _Copy(storage, tensor.device, streams)
        note_offloaded(storage.nbytes())
        self.order.append(weakref.ref(copy))
        place = len(self.order) - 1
        # The weak reference to the storage keeps its address from being given to another.
        self.known[key] = (StorageWeakRef(storage), weakref.ref(copy), place)
        return copy, place
