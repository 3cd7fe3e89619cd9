"""Which rows of a serving step belong to which sequence, and what plain torch derives from that once a step.

Shape letters: N rows of the step, S sequences, P pages of a table, L gathered keys, K key/value heads, D head size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepRows:
    """Which rows of a step belong to which sequence; made once a step and shared by all layers.

    Rows of a sequence are neighbours, in order of position. Rows beyond the last sequence's are padding: they are
    written to the trash page and what comes out for them is zero or meaningless.

    Attributes:
        position_N: int64, position of each row in its sequence.
        ends_S: int32 ``[S+1]``, first row of each sequence, and the end of the last.
        length_S: int32, positions in the cache after this step.
        global_SP, window_SP: int32 page tables, entry i for positions ``i·page …``; 0, the trash page, for none.
        global_slot_N, window_slot_N: int64 ``page number · page + offset``, where each row's key and value go.
        page: positions of a page, a multiple of a hybrid layer's stride.
        rows, lengths: the same on the host: rows of each sequence, and ``length_S`` (kernels take an upper bound too).
        decodes: the first so many sequences have exactly one row each.
        exact: compute each row in one fixed order, so that its result is the same to the last bit whatever other rows,
            chunks, pages and threads there are (``deepseek.ops.paged_exact``).
        static: every sequence has one row, and ``lengths`` are the most that there may be: nothing may be decided by
            them (``deepseek.ops.paged_static``).
    """

    position_N: Tensor
    ends_S: Tensor
    length_S: Tensor
    global_SP: Tensor
    window_SP: Tensor
    global_slot_N: Tensor
    window_slot_N: Tensor
    page: int
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    decodes: int
    exact: bool = False
    static: bool = False
    _made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make()`` returns, made by the first layer that asks for ``key`` in this step."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @property
    def starts(self) -> tuple[int, ...]:
        """The position of each sequence's first row."""
        return tuple(length - rows for length, rows in zip(self.lengths, self.rows))


class Pooled(NamedTuple):
    """The branch of a hybrid layer over pooled blocks.

    Attributes:
        q_NHD: queries, not rotated. gate_NH: this branch's share of the result, in (0, 1).
        k_PJKD, v_PJKD: global pages of pooled blocks. sink: ``[2, K, D]``, a key and a value that are always seen.
        block, stride: positions that a block covers, and from the start of one to the next.
    """

    q_NHD: Tensor
    gate_NH: Tensor
    k_PJKD: Tensor
    v_PJKD: Tensor
    sink: Tensor
    block: int
    stride: int


_threads = threading.local()


def gather(pages: Tensor, slot: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """Rows ``slot`` of ``pages [pages, slots, K, D]`` seen as ``[pages·slots·K, D]``, in ``dtype``; ``[len(slot), D]``.

    On a CPU the result is memory of this thread that the next call with this ``name`` overwrites: fresh pages from the
    system would cost more than the attention itself.
    """
    rows = pages.view(-1, pages.shape[-1])
    if not pages.is_cpu:
        return rows.index_select(0, slot).to(dtype)
    out = _scratch(name, len(slot) * rows.shape[1], pages.dtype).view(len(slot), rows.shape[1])
    torch.index_select(rows, 0, slot, out=out)
    if dtype == pages.dtype:
        return out
    return _scratch(name, out.numel(), dtype).view(out.shape).copy_(out)


def _scratch(name: str, size: int, dtype: torch.dtype) -> Tensor:
    held: dict[tuple[str, torch.dtype], Tensor] = _threads.__dict__.setdefault("held", {})
    key = name, dtype
    if key not in held or held[key].numel() < size:
        with torch.inference_mode(False):
            held[key] = torch.empty(max(size, 1 << 16), dtype=dtype)
    return held[key][:size]


def key_slots(table_Sn: Tensor, place_SL: Tensor, end_S1: Tensor | None, slots: int, heads: int) -> Tensor:
    """What ``gather`` takes to make ``[S, K, L, D]``.

    Args:
        table_Sn: page tables whose entry i is of slots ``i·slots …``.
        place_SL: slots of the sequences; those from ``end_S1`` on, which nobody sees, are looked up in the trash page:
            what an earlier owner left in a sequence's last page may be NaN, and zero times NaN is NaN.
        slots: of a page. heads: K.
    """
    index = place_SL // slots
    if end_S1 is not None:
        index = index.clamp(max=table_Sn.shape[1] - 1)
    at_SL = table_Sn.gather(1, index).long() * slots + place_SL % slots
    if end_S1 is not None:
        at_SL = torch.where(place_SL < end_S1, at_SL, 0)
    return (at_SL[:, None] * heads + torch.arange(heads, device=at_SL.device)[:, None]).flatten()
