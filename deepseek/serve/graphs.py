"""The decoding step as CUDA graphs: at one token a sequence, launching kernels costs more than running them.

A graph is for one *size*: so many sequences, tables so wide. A step of fewer sequences is filled up with rows that read
and write the trash page, and takes the smallest graph that holds it. What changes from step to step (tokens, positions,
slots, tables) lies in buffers that are written before a replay, all of it in two copies.

Shape letters: S sequences, P pages of a table, C hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deepseek.ops.paged_attention import StepRows
from deepseek.serve.decoder import Decoder, HostRows

SEQUENCES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
WIDEN = 4  #: a table is so many times as wide as the next smaller one

Run = Callable[[], tuple[Tensor, Tensor]]


class Size(NamedTuple):
    sequences: int
    width: int


class StepBuffers:
    """What a captured step reads, and the ``StepRows`` over it."""

    def __init__(self, size: Size, page: int, device: torch.device, exact: bool = False) -> None:
        S, P = self.size = size
        self._long = torch.zeros(4, S, dtype=torch.int64, device=device)
        self._int = torch.zeros(S * (1 + 2 * P), dtype=torch.int32, device=device)
        self._host_long, self._host_int = self._long.cpu(), self._int.cpu()
        if device.type == "cuda":
            self._host_long, self._host_int = self._host_long.pin_memory(), self._host_int.pin_memory()
        self.tokens, position, global_slot, window_slot = self._long.unbind()
        length, global_table, window_table = self._parts(self._int)
        self.rows = StepRows(
            position_N=position, ends_S=torch.arange(S + 1, dtype=torch.int32, device=device),
            length_S=length, global_SP=global_table, window_SP=window_table,
            global_slot_N=global_slot, window_slot_N=window_slot, page=page,
            rows=(1,) * S, lengths=(P * page,) * S, decodes=S, exact=exact, static=True,
        )  # fmt: skip
        self.fill([], None)

    def _parts(self, ints: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Lengths ``[S]`` and both tables ``[S, P]``."""
        S, P = self.size
        length, global_table, window_table = ints.split((S, S * P, S * P))
        return length, global_table.view(S, P), window_table.view(S, P)

    def fill(self, tokens: Sequence[int], host: HostRows | None) -> None:
        """Write a step into the buffers; what is left of them pads."""
        n, longs = len(tokens), self._host_long.numpy()
        length, *tables = (part.numpy() for part in self._parts(self._host_int))
        longs[:, n:], length[n:] = 0, 1
        for table in tables:
            table[:] = 0
        if host is not None:
            longs[:, :n] = np.stack((tokens, host.position_N, host.global_slot_N, host.window_slot_N))
            length[:n] = host.length_S
            for table, given in zip(tables, (host.global_SP, host.window_SP)):
                table[:n, : given.shape[1]] = given
        self._long.copy_(self._host_long, non_blocking=True)
        self._int.copy_(self._host_int, non_blocking=True)


class CudaCapture:
    """Captures a step; all graphs share one pool of memory, as only one runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels are compiled and tuned outside of the capture
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = run()

        def replay() -> tuple[Tensor, Tensor]:
            graph.replay()
            return out

        return replay


class DecodeGraphs:
    """Captured decoding steps by size, made when they are first needed.

    Args:
        most: sequences and pages of one, at most.
        capture: makes a function replayable; ``None``: ``CudaCapture``.
    """

    def __init__(self, decoder: Decoder, most: Size, capture: Callable[[Run], Run] | None = None) -> None:
        self._decoder, self._most = decoder, most
        self._capture = capture or CudaCapture()
        self._sequences = [s for s in SEQUENCES if s < most.sequences] + [most.sequences]
        self._widths = [most.width]
        while self._widths[0] > 4 * WIDEN:
            self._widths.insert(0, -(-self._widths[0] // WIDEN))
        self._made: dict[Size, tuple[StepBuffers, Run]] = {}

    def size_for(self, sequences: int, width: int) -> Size | None:
        """The smallest size that holds a step, ``None`` if none does."""
        if sequences > self._most.sequences or width > self._most.width:
            return None
        return Size(
            next(s for s in self._sequences if s >= sequences), next(w for w in self._widths if w >= width)
        )

    def run(self, tokens: Sequence[int], host: HostRows) -> tuple[Tensor, Tensor] | None:
        """Hidden states ``[S, C]`` and logits ``[S, V]`` of a step in which every sequence has one row, else ``None``.

        They are overwritten by the next step.
        """
        n = len(tokens)
        size = self.size_for(n, host.global_SP.shape[1]) if host.decodes == len(host.rows) else None
        if size is None:
            return None
        if size not in self._made:
            self._made[size] = self._make(size)
        buffers, replay = self._made[size]
        buffers.fill(tokens, host)
        hidden, logits = replay()
        return hidden[:n], logits[:n]

    def _make(self, size: Size) -> tuple[StepBuffers, Run]:
        decoder = self._decoder
        buffers = StepBuffers(size, decoder.layout.page, decoder.device, decoder.exact)

        def run() -> tuple[Tensor, Tensor]:
            hidden = decoder.hidden(buffers.tokens, buffers.rows)
            return hidden, decoder.logits(hidden)

        return buffers, self._capture(run)
