"""The decoding step as CUDA graphs: at one token a sequence, launching kernels costs more than running them.

A graph is for one *size*: so many sequences, tables so wide. A step of fewer sequences is filled up with rows that read
and write the trash page, and takes the smallest graph that holds it. What changes from step to step (tokens, positions,
slots, tables) lies in one buffer that is written before a replay, in one copy; the tables only when they have changed.

All of it is queued on one stream, so a step's buffer is written after the replay that read it before, and what a replay
leaves (graphs share their memory) is read by the sampling that was queued before the next one. What is not in the
stream's order is the host's side of the copy: two sets of pinned memory in turn, each with an event that says when it
has been copied.

Shape letters: S sequences, U of them whose tables changed, P pages of a table, C hidden size, V vocabulary.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deepseek.ops.paged_attention import StepRows
from deepseek.serve.ahead import DrawnTokens, Tokens
from deepseek.serve.decoder import Decoder
from deepseek.serve.distribution import likeliest
from deepseek.serve.tables import HostRows

SEQUENCES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
WIDEN = 4  #: a table is so many times as wide as the next smaller one

Found = tuple[Tensor, Tensor, Tensor]
Run = Callable[[], Found]


class Size(NamedTuple):
    sequences: int
    width: int


class _Side:
    """One copy of a step's buffer, as the parts that it has: on the device, or one of the host's two.

    ``small`` is the beginning, which changes at every step; the tables follow.
    """

    def __init__(self, size: Size, ints: Tensor) -> None:
        S, P = size
        self.ints, self.small = ints, ints[: 11 * S]
        self.long = ints[: 10 * S].view(torch.int64).view(5, S)
        self.length_S = ints[10 * S : 11 * S]
        self.tables_2SP = ints[11 * S :].view(2, S, P)


class _HostSide:
    """The host's numbers of a step, in memory that the device copies from while the host goes on.

    Attributes:
        stamp_S: which tables it holds (``PageTables.stamps``; 0: none).
    """

    def __init__(self, size: Size, device: torch.device) -> None:
        self._size, (S, P) = size, size
        cuda = device.type == "cuda"
        side = _Side(size, torch.zeros(S * (11 + 2 * P), dtype=torch.int32, pin_memory=cuda))
        self.stamp_S, self._side, self._filled = np.zeros(S, np.int64), side, 0
        self.long, self.length_S = side.long.numpy(), side.length_S.numpy()
        self.length_S[:] = 1
        self._tables_2SP = side.tables_2SP.numpy()
        self._copied = torch.cuda.Event() if cuda else None

    def write(self, host: HostRows) -> None:
        """A step but for its tokens; what is left pads. Only table rows that are not there already are written."""
        if self._copied is not None:
            self._copied.synchronize()  # long since, as a rule: the other side has been in between
        n, tables = len(host.rows), host.tables
        if n < self._filled:
            self.long[:, n:], self.length_S[n:], self._tables_2SP[:, n:] = 0, 1, 0
        self._filled = n
        self.long[1, :n], self.long[2:4, :n], self.length_S[:n] = host.position_N, host.slot_2N, host.length_S
        stamp_S = np.zeros(len(self.stamp_S), np.int64)
        stamp_S[:n] = tables.stamps[host.place_S]
        (row_U,) = (stamp_S[:n] != self.stamp_S[:n]).nonzero()
        if len(row_U):
            width = self._tables_2SP.shape[2]
            self._tables_2SP[:, row_U] = tables.both[:, host.place_S[row_U], :width]
        self.stamp_S = stamp_S

    def copy_to(self, device: torch.device) -> _Side:
        return _Side(self._size, self._side.ints.to(device, copy=True))

    def send(self, to: _Side, tables: bool) -> None:
        """Queue the copy, perhaps without the tables."""
        if tables:
            to.ints.copy_(self._side.ints, non_blocking=True)
        else:
            to.small.copy_(self._side.small, non_blocking=True)
        if self._copied is not None:
            self._copied.record()


class StepBuffers:
    """What a captured step reads, and the ``StepRows`` over it."""

    def __init__(self, size: Size, page: int, device: torch.device, exact: bool = False) -> None:
        S, P = size
        self._hosts = [_HostSide(size, device) for _ in range(2)]
        self._turn = 0
        side = self._device = self._hosts[0].copy_to(device)
        self._tables_there = self._hosts[0].stamp_S  #: on the device
        self.tokens, position, global_slot, window_slot, self._source = side.long.unbind()
        self._count, self._taken, self._from = 0, self.tokens[:0], self._source[:0]
        self.rows = StepRows(
            position_N=position, ends_S=torch.arange(S + 1, dtype=torch.int32, device=device),
            length_S=side.length_S, global_SP=side.tables_2SP[0], window_SP=side.tables_2SP[1],
            global_slot_N=global_slot, window_slot_N=window_slot, page=page,
            rows=(1,) * S, lengths=(P * page,) * S, decodes=S, exact=exact, static=True,
        )  # fmt: skip

    def fill(self, tokens: Tokens, host: HostRows) -> None:
        """Write a step into the buffers; what is left of them pads."""
        self._turn ^= 1
        side = self._hosts[self._turn]
        side.write(host)
        count = len(host.rows)
        if not isinstance(tokens, DrawnTokens):
            side.long[0, :count] = tokens
        elif tokens.row_S is not None:
            side.long[4, :count] = tokens.row_S
        same = bool((side.stamp_S == self._tables_there).all())
        self._tables_there = side.stamp_S
        side.send(self._device, tables=not same)
        if isinstance(tokens, DrawnTokens):
            self._take(tokens, count)

    def _take(self, drawn: DrawnTokens, count: int) -> None:
        """The step's tokens from where the last one's sampling left them."""
        if count != self._count:
            self._count, self._taken, self._from = count, self.tokens[:count], self._source[:count]
        if drawn.row_S is None:
            self._taken.copy_(drawn.token_R)
        else:
            torch.index_select(drawn.token_R, 0, self._from, out=self._taken)


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

        def replay() -> Found:
            graph.replay()
            return out

        return replay


class _Captured:
    """A captured size. What a replay leaves lies where it lay before, so it is cut to a step's sequences only once."""

    def __init__(self, buffers: StepBuffers, replay: Run, vocabulary: int) -> None:
        self._buffers, self._replay, self._vocabulary = buffers, replay, vocabulary
        self._found: Found | None = None
        self._cut: dict[int, Found] = {}

    def __call__(self, tokens: Tokens, host: HostRows) -> Found:
        self._buffers.fill(tokens, host)
        found, n = self._replay(), len(host.rows)
        if found is not self._found:
            self._found, self._cut = found, {}
        if n not in self._cut:
            hidden, logits, best = found
            self._cut[n] = hidden[:n], logits[:n, : self._vocabulary], best[:n]
        return self._cut[n]


class DecodeGraphs:
    """Captured decoding steps by size, made when they are first needed.

    Args:
        most: sequences and pages of one, at most.
        vocabulary: tokens there are; further logits are padding.
        capture: makes a function replayable; ``None``: ``CudaCapture``.
    """

    def __init__(
        self, decoder: Decoder, most: Size, vocabulary: int, capture: Callable[[Run], Run] | None = None
    ) -> None:
        self._decoder, self._most, self._vocabulary = decoder, most, vocabulary
        self._capture = capture or CudaCapture()
        self._sequences = [s for s in SEQUENCES if s < most.sequences] + [most.sequences]
        self._widths = [most.width]
        while self._widths[0] > 4 * WIDEN:
            self._widths.insert(0, -(-self._widths[0] // WIDEN))
        self._made: dict[Size, _Captured] = {}

    def size_for(self, sequences: int, width: int) -> Size | None:
        """The smallest size that holds a step, ``None`` if none does."""
        if sequences > self._most.sequences or width > self._most.width:
            return None
        return Size(
            self._sequences[bisect_left(self._sequences, sequences)],
            self._widths[bisect_left(self._widths, width)],
        )

    def run(self, tokens: Tokens, host: HostRows) -> Found | None:
        """Hidden states ``[S, C]``, logits ``[S, V]`` and their ``likeliest`` tokens, or ``None``.

        Steps in which every sequence has one row are captured, up to a size; the others are not. The three are
        overwritten by the next step.
        """
        n = len(host.rows)
        size = self.size_for(n, host.width) if host.decodes == n else None
        if size is None:
            return None
        captured = self._made.get(size)
        if captured is None:
            captured = self._made[size] = _Captured(*self._make(size), self._vocabulary)
        return captured(tokens, host)

    def _make(self, size: Size) -> tuple[StepBuffers, Run]:
        decoder = self._decoder
        buffers = StepBuffers(size, decoder.layout.page, decoder.device, decoder.exact)

        def run() -> Found:
            hidden = decoder.hidden(buffers.tokens, buffers.rows)
            logits = decoder.logits(hidden)
            return hidden, logits, likeliest(logits[:, : self._vocabulary])

        return buffers, self._capture(run)
