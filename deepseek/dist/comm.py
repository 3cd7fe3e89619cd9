"""Collectives over all ranks that are no-ops in one process, so that the same code runs everywhere.

Launch with ``torchrun --nproc-per-node N -m -- deepseek pretrain …``: ``start`` reads its environment.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


TORCHRUN = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  #: what it leaves in the environment


def start() -> tuple[int, int]:
    """Join the group that torchrun described, if it did. Returns ``(rank, world)``."""
    if not dist.is_available() or (not dist.is_initialized() and not os.environ.keys() >= TORCHRUN):
        return 0, 1
    if not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        if not cuda:
            atexit.register(stop)  # gloo's threads must have ended before Python does, or the process aborts
    return dist.get_rank(), dist.get_world_size()


def stop() -> None:
    """Leave the group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def barrier() -> None:
    if world() > 1:
        dist.barrier()


def sum_in_place(tensors: Iterable[Tensor]) -> None:
    """Add each tensor over all ranks, in place; one collective per dtype."""
    if world() == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for same in by_dtype.values():
        flat = torch.cat([t.reshape(-1) for t in same])
        dist.all_reduce(flat)
        for tensor, part in zip(same, flat.split([t.numel() for t in same])):
            tensor.copy_(part.view_as(tensor))


class Gathering:
    """Equal tensors of all ranks, on their way to each of them."""

    def __init__(self, rows: list[Tensor], work: Any = None) -> None:
        self._rows, self._work = rows, work

    def read(self) -> list[Tensor]:
        """One tensor per rank; waits until all have sent theirs."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._rows


def gather_later(row: Tensor) -> Gathering:
    """Send ``row``, a CPU tensor of the same shape on every rank, to all ranks in the background."""
    if world() == 1:
        return Gathering([row])
    rows = [torch.empty_like(row) for _ in range(world())]
    return Gathering(rows, dist.all_gather(rows, row, async_op=True))


def agree(flag: bool) -> bool:
    """Whether any rank says yes."""
    return any(gather(flag))


def gather(value: T) -> list[T]:
    """What every rank has, in their order."""
    if world() == 1:
        return [value]
    held: list[Any] = [None] * world()
    dist.all_gather_object(held, value)
    return held


def from_first(value: T) -> T:
    """What rank 0 has: for decisions that were measured, and must be the same everywhere."""
    if world() == 1:
        return value
    held: list[Any] = [value]
    dist.broadcast_object_list(held)
    return held[0]
