"""What autograd keeps from forward to backward, counted: distinct storages, weights aside.

Saved-tensor hooks do not stack: only the innermost pair sees a tensor. Whoever keeps tensors behind hooks of its
own (checkpointing, offload) therefore says so with ``note``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

_open: list[SavedBytes] = []


def is_weight(tensor: Tensor) -> bool:
    """A parameter or a view of one: it lives anyway, so keeping it costs nothing."""
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


def note(tensor: Tensor) -> None:
    """Tell every open count that ``tensor`` is kept for backward."""
    for count in _open:
        count.add(tensor)


def note_offloaded(n_bytes: int) -> None:
    """Tell every open count that ``n_bytes`` went to the host instead of being kept."""
    for count in _open:
        count.offloaded += n_bytes


class SavedBytes:
    """Context manager: ``total`` bytes of the distinct storages that autograd keeps from the forward inside it.

    A storage counts once, whole, however many views of it are kept. ``offloaded`` are bytes kept on the host instead.

    Args:
        weights: tensors that do not count, beside parameters and their views: a compiled block saves detached views.
        keep: ``False`` where backward is never run: then nothing is kept. An operation that keeps its own output would
            hold its graph, which holds the output: a circle that only backward opens.
    """

    def __init__(self, weights: Iterable[Tensor] = (), *, keep: bool = True) -> None:
        self.sizes: dict[int, int] = {}
        self.weights = {w.untyped_storage()._cdata for w in weights}
        self.offloaded = 0
        self._keep = keep
        self._alive: list[Any] = []  # a storage that is counted must live, or its address would be another's
        self._hooks: saved_tensors_hooks | None = None

    @property
    def total(self) -> int:
        return sum(self.sizes.values())

    def add(self, tensor: Tensor) -> Tensor:
        if is_weight(tensor) or tensor.layout is not torch.strided:
            return tensor
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes and storage._cdata not in self.weights:
            self.sizes[storage._cdata] = storage.nbytes()
            self._alive.append(storage)
        return tensor

    def __enter__(self) -> SavedBytes:
        pack = self.add if self._keep else lambda tensor: (self.add(tensor), None)[1]
        self._hooks = saved_tensors_hooks(pack, lambda held: held)
        self._hooks.__enter__()
        _open.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        assert self._hooks is not None
        _open.remove(self)
        self._hooks.__exit__()
        self._alive.clear()
