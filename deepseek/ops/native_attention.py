"""Paged attention and cache writes by the native CPU kernels: the backend ``native``.

``deepseek/ops/native/attention.cpp`` does a branch for a range of slots that each row sees; which range that is, full,
window and pooled attention say here, once a step for all layers.

Shape letters: as in ``deepseek.ops.paged_attention``.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek.ops import native
from deepseek.ops.native import pointer
from deepseek.ops.paged_rows import Pooled, StepRows
from deepseek.registry import register_op

DTYPES = (torch.float32, torch.bfloat16)
MOST_GROUP = 32  #: query heads of a key head


class Shape(ctypes.Structure):
    """``Shape`` of attention.cpp."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("sequences", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("ends", ctypes.c_void_p),
    )


class Branch(ctypes.Structure):
    """``Branch`` of attention.cpp."""

    _fields_ = (
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("bf16", ctypes.c_int64),
        ("table", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("slots", ctypes.c_int64),
        ("low", ctypes.c_void_p),
        ("high", ctypes.c_void_p),
        ("sink", ctypes.c_void_p),
        ("share", ctypes.c_void_p),
        ("flip", ctypes.c_int64),
        ("add", ctypes.c_int64),
    )


class Append(ctypes.Structure):
    """``Append`` of attention.cpp."""

    _fields_ = (
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("norm", ctypes.c_void_p),
        ("eps", ctypes.c_double),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("raw", ctypes.c_void_p),
        ("bf16", ctypes.c_int64),
    )


class Seen(NamedTuple):
    """Slots ``low <= i < high`` of its sequence that each row sees, int64 ``[N]``."""

    low: Tensor
    high: Tensor


def takes(pages_PTKD: Tensor, heads: int) -> bool:
    """Whether the kernels take so many query heads over these pages."""
    kv_heads, dim = pages_PTKD.shape[2:]
    fits = dim % 16 == 0 and dim <= 1024 and heads <= MOST_GROUP * kv_heads
    return pages_PTKD.is_cpu and fits and pages_PTKD.dtype in DTYPES and native.available()


def _positions(rows: StepRows, window: int | None) -> Seen:
    def make() -> Seen:
        high = rows.position_N + 1
        return Seen(torch.zeros_like(high) if window is None else (high - window).clamp_(min=0), high)

    seen: Seen = rows.once(("seen", window), make)
    return seen


def _blocks(rows: StepRows, block: int, stride: int) -> Seen:
    def make() -> Seen:
        first = (block - 1) // stride
        complete = (rows.position_N + 1 - block).div(stride, rounding_mode="floor") + 1
        low = torch.full_like(complete, first)
        return Seen(low, low + complete.clamp_(min=0))

    seen: Seen = rows.once(("seen blocks", block, stride), make)
    return seen


def _branch(k: Tensor, v: Tensor, table_SP: Tensor, seen: Seen) -> Branch:
    assert table_SP.stride(1) == 1, "the entries of a table lie side by side"
    return Branch(
        k.data_ptr(), v.data_ptr(), int(k.dtype == torch.bfloat16), table_SP.data_ptr(), table_SP.stride(0), k.shape[1],
        seen.low.data_ptr(), seen.high.data_ptr(), None, None, 0, 0,
    )  # fmt: skip


def _run(branches: list[Branch], queries: list[Tensor], kv_heads: int, rows: StepRows) -> Tensor:
    wide = [q.float().contiguous() for q in queries]
    N, H, D = wide[0].shape
    y = torch.zeros(N, H, D) if sum(rows.rows) < N else torch.empty(N, H, D)
    shape = Shape(N, rows.ends_S.shape[0] - 1, H, kv_heads, D, rows.ends_S.data_ptr())
    made = (Branch * len(branches))(*branches)
    native.function("ds_attention")(
        ctypes.addressof(shape), ctypes.addressof(made), len(made), wide[0].data_ptr(), wide[-1].data_ptr(),
        y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y.to(queries[0].dtype)


@register_op("paged_attention", "native")
def paged_attention(
    q_NHD: Tensor, k_PTKD: Tensor, v_PTKD: Tensor, table_SP: Tensor, rows: StepRows, window: int | None = None
) -> Tensor:
    """``deepseek.ops.paged_attention.paged_attention``."""
    branch = _branch(k_PTKD, v_PTKD, table_SP, _positions(rows, window))
    return _run([branch], [q_NHD], k_PTKD.shape[2], rows)


@register_op("paged_hybrid_attention", "native")
def paged_hybrid_attention(
    q_NHD: Tensor, k_PTKD: Tensor, v_PTKD: Tensor, pooled: Pooled, rows: StepRows, window: int
) -> Tensor:
    """``deepseek.ops.paged_attention.paged_hybrid_attention``."""
    share, sink = pooled.gate_NH.float().contiguous(), pooled.sink.float().contiguous()
    local = _branch(k_PTKD, v_PTKD, rows.window_SP, _positions(rows, window))
    local.share, local.flip = share.data_ptr(), 1
    blocks = _branch(pooled.k_PJKD, pooled.v_PJKD, rows.global_SP, _blocks(rows, pooled.block, pooled.stride))
    blocks.share, blocks.sink, blocks.add = share.data_ptr(), sink.data_ptr(), 1
    return _run([local, blocks], [q_NHD, pooled.q_NHD], k_PTKD.shape[2], rows)


class NativeAppend:
    """Norms, turns and writes the rows of one layer; made once its pages are there.

    Args:
        heads, kv_heads: of the layer. k, v, raw_k: its pages. norm: ``[H + K, D]`` and epsilon, or ``None``.
    """

    def __init__(
        self, heads: int, k: Tensor, v: Tensor, raw_k: Tensor | None, norm: tuple[Tensor, float] | None
    ) -> None:
        kv_heads, dim = k.shape[2:]
        self.heads, self.dim = heads, dim
        self._norm = None if norm is None else norm[0].float().contiguous()
        self._append = Append(
            heads, kv_heads, dim, pointer(self._norm), 0.0 if norm is None else norm[1], k.data_ptr(), v.data_ptr(),
            pointer(raw_k), int(k.dtype == torch.bfloat16),
        )  # fmt: skip
        self._at = ctypes.addressof(self._append)
        self._call = native.function("ds_append")

    def __call__(self, qkv: Tensor, rope: tuple[Tensor, Tensor] | None, slot_N: Tensor) -> Tensor:
        """Turned queries ``[N, H, D]``; ``qkv [N, (H + 2K)·D]``, fp32, is normed in place.

        Args:
            rope: cosines and sines ``[N, 1, D]`` as ``serve.decoder.Rope`` has them, fp32; ``None``: not turned.
        """
        n = qkv.shape[0]
        q = torch.empty(n, self.heads, self.dim)
        cos, sin = (None, None) if rope is None else (rope[0].data_ptr(), rope[1].data_ptr())
        self._call(
            self._at, qkv.data_ptr(), cos, sin, slot_N.data_ptr(), q.data_ptr(), n, torch.get_num_threads()
        )
        return q
