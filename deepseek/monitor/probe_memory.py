"""Where memory goes: weights, gradients, optimizer, activations, the allocator, the process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from deepseek.batch import Batch
from deepseek.models.transformer import Transformer
from deepseek.parallel.saved import SavedBytes
from deepseek.train.losses import Loss
from deepseek.train.step import TrainStep


class MemoryProbe:
    """Bytes by class, as ``memory/{weights,gradients,optimizer,activations,allocated,reserved,rss}``.

    On a GPU ``activations`` is the allocator's peak less what stays: workspace included. On a CPU, which has no such
    statistics, it is what autograd keeps of one micro-batch, counted once; allocated and reserved are left out there.
    """

    def __init__(self, step: TrainStep) -> None:
        self.step = step
        self.cuda = step.device.type == "cuda"
        self._held: dict[str, int] = {}
        self._activations = 0

    def __call__(self, batch: Batch) -> dict[str, float]:
        """The figures now, after a step; nothing is read from the device's queue."""
        if not self._held.get("gradients"):
            self._held = self._classes()
        found = {f"memory/{name}": float(size) for name, size in self._held.items()}
        if self.cuda:
            stats = torch.cuda.memory_stats(self.step.device)
            peak = stats.get("allocated_bytes.all.peak", 0)
            found["memory/allocated"] = float(stats.get("allocated_bytes.all.current", 0))
            found["memory/reserved"] = float(stats.get("reserved_bytes.all.current", 0))
            found["memory/activations"] = float(max(0, peak - sum(self._held.values())))
        else:
            self._activations = self._activations or self._kept(batch)
            found["memory/activations"] = float(self._activations)
        if rss := resident():
            found["memory/rss"] = float(rss)
        return found

    def _classes(self) -> dict[str, int]:
        model, optimizer = self.step.model, self.step.optimizer
        state = [t for part in optimizer.parts for s in part.state.values() for t in s.values()]
        return {
            "weights": size_of([*model.parameters(), *model.buffers()]),
            "gradients": self.step.gradient_bytes,
            "optimizer": size_of([*state, *optimizer.masters.values()]),
        }

    def prepare(self) -> None:
        """Count what the next step keeps of its first micro-batch while it runs, which costs next to nothing."""
        if self.cuda or self._activations:
            return
        inner = self.step.loss_fn

        def counted(model: Transformer, part: Batch) -> Loss:
            self.step.loss_fn = inner
            with self._counting(part) as saved:
                loss = inner(model, part)
            self._activations = saved.total
            return loss

        self.step.loss_fn = counted

    def _kept(self, batch: Batch) -> int:
        """The same of a micro-batch that is computed for it alone; its gradient is not."""
        step = self.step
        part = batch.part(0, min(step.micro_rows or batch.rows, batch.rows)).to(step.device)
        with self._counting(part) as saved, step.policy.compute(step.device):
            step.loss_fn(step.model, part)
        return saved.total

    def _counting(self, part: Batch) -> SavedBytes:
        model = self.step.model
        return SavedBytes([*model.parameters(), *model.buffers(), part.tokens, part.targets])


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind ``tensors``."""
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values())


def resident() -> int:
    """Bytes of physical memory that this process holds; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the largest so far, in KiB but for macOS
    return peak if sys.platform == "darwin" else peak * 1024


def device_memory(device: torch.device) -> float:
    """Bytes of this rank's device in use: the allocator's on a GPU, the process's on a CPU."""
    return float(torch.cuda.memory_allocated(device) if device.type == "cuda" else resident())
