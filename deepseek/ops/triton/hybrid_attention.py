"""Fused attention over a sliding window, over pooled blocks, and their blend, as operations for autograd and compile.

Here are the sizes of tiles, the launches and the registrations; what runs is in ``attention_kernels``.

Shape letters: B rows, H query heads, K key/value heads, T positions, D head size, J pooled slots, S splits.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from deepseek.ops.triton.attention_kernels import add_kernel, forward_kernel, keys_kernel, queries_kernel
from deepseek.ops.triton.pooling import rows_of, strides_of


@dataclass(frozen=True)
class Tiles:
    """Sizes of one kernel's tiles.

    Attributes:
        own, step: rows a program keeps, and rows it reads at a time.
        tma: whether the loops read through Hopper's copy engine, which spares registers; else through pointers.
    """

    own: int
    step: int
    warps: int
    stages: int
    tma: bool = False


@dataclass(frozen=True)
class Tuning:
    """Tiles of the three kernels; ``programs``: how many slot programs to aim for when splitting their queries."""

    forward: Tiles
    queries: Tiles
    keys: Tiles
    programs: int = 528

    def reading(self, tma: bool) -> Tuning:
        """The same tiles, all read in one way."""
        forward, queries, keys = (replace(x, tma=tma) for x in (self.forward, self.queries, self.keys))
        return Tuning(forward, queries, keys, self.programs)


#: By padded head size, for 16-bit inputs; before Hopper there is less shared memory, and products cost registers.
HOPPER = {
    64: Tuning(Tiles(128, 128, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 3)),
    128: Tuning(Tiles(64, 64, 4, 3, tma=True), Tiles(64, 64, 4, 2, tma=True), Tiles(64, 32, 4, 3, tma=True)),
}
#: The window alone, where own rows as wide as the window read the fewest keys.
HOPPER_WINDOW = {
    64: HOPPER[64],
    128: Tuning(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(64, 32, 4, 3)),
}
AMPERE = {
    64: Tuning(Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 1)),
    128: Tuning(Tiles(128, 32, 8, 2), Tiles(128, 32, 8, 1), Tiles(64, 32, 8, 1)),
}
#: fp32 by three tf32 products, which is exact enough to compare with and slow.
WIDE = Tuning(Tiles(64, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1))

_forced: Tuning | None = None


@contextmanager
def forced_tuning(tuning: Tuning) -> Iterator[None]:
    """Use ``tuning`` inside a ``with`` block, for tests and for finding better tables."""
    global _forced
    before, _forced = _forced, tuning
    try:
        yield
    finally:
        _forced = before


def tuning_for(q: Tensor, pooled: bool = True) -> Tuning:
    """The tiles for queries ``[B, H, T, D]`` of this dtype on this device, with pooled slots or for a window alone."""
    if _forced is not None:
        return _forced
    if q.dtype == torch.float32:
        return WIDE
    hopper = not q.is_cuda or torch.cuda.get_device_capability(q.device) >= (9, 0)
    tables = (HOPPER if pooled else HOPPER_WINDOW) if hopper else AMPERE
    return tables[_padded(q.shape[-1])]


def _descriptors(rows: int, DP: int, *tensors: Tensor) -> list[TensorDescriptor] | None:
    """Descriptors of ``[B, H, T, D]`` tensors read ``rows`` positions at a time; ``None`` if memory is misaligned."""
    made = []
    for x in tensors:
        if not x.numel():
            x = tensors[0]  # no pooled slot: never read
        strides = [s if n > 1 else x.shape[-1] for n, s in zip(x.shape, x.stride())]
        if x.data_ptr() % 16 or any(s * x.element_size() % 16 for s in strides[:-1]):
            return None
        made.append(TensorDescriptor(x, list(x.shape), [*strides[:-1], 1], [1, 1, rows, DP]))
    return made


def _new(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Empty ``[B, H, T, D]`` laid out as ``[B, T, H, D]``, where the projections before and after want it."""
    B, H, T, D = like.shape
    return like.new_empty(B, T, H, D, dtype=dtype or like.dtype).transpose(1, 2)


def _padded(head_dim: int) -> int:
    return 64 if head_dim <= 64 else 128


def _common(
    q: Tensor, k: Tensor, window: int, block: int, stride: int, tiles: Tiles, docs: bool
) -> dict[str, object]:
    T, D = q.shape[2:]
    biggest = max(tiles.own, tiles.step)
    return {
        "GROUP": q.shape[1] // k.shape[1], "BLOCK": block, "STRIDE": stride, "D": D, "DP": _padded(D),
        "WIDE": window >= 4 * biggest, "DOCS": docs, "EVEN": T % biggest == 0,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
        "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip


def _read(tiles: Tiles, *tensors: Tensor) -> tuple[bool, list[Any]]:
    """Whether loops read through descriptors, and what they read: descriptors or the tensors themselves."""
    made = _descriptors(tiles.step, _padded(tensors[0].shape[-1]), *tensors) if tiles.tma else None
    return made is not None, made or list(tensors)


def _window_or_row(window: int, q: Tensor) -> int:
    return min(window, q.shape[2])


@torch.library.custom_op("deepseek::hybrid_attention", mutates_args=())
def hybrid_forward(
    q: Tensor,
    q_rope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    sink: Tensor,
    gate: Tensor,
    doc_start: Tensor | None,
    doc_end: Tensor | None,
    slots: Tensor | None,
    seen: Tensor | None,
    window: int,
    block: int,
    stride: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The blend, each row's branch of the lesser weight, and what ``[2, B, H, T]`` backward needs of the softmaxes.

    Args:
        q, q_rope: ``[B, H, T, D]``; k_rope, v: ``[B, K, T, D]``; k_pool, v_pool: ``[B, K, J, D]``; sink: ``[2, K, D]``;
            gate: ``[B, H, T]``.
        doc_start, doc_end: int32 ``[B, T]``, the bounds of each position's document; None: one document a row.
        slots: int32 ``[2, B, T]``, the slots ``[first, end)`` each query sees; seen: int32 ``[2, B, J]``, the queries
            ``[first, end)`` that see each slot. Given exactly when ``doc_start`` is.
    """
    q, q_rope, k_rope, v, k_pool, v_pool = (rows_of(x) for x in (q, q_rope, k_rope, v, k_pool, v_pool))
    B, H, T, D = q.shape
    tuning, sink = tuning_for(q), sink.contiguous()
    tiles, (tma, loops) = tuning.forward, _read(tuning.forward, k_rope, v, k_pool, v_pool)
    out, lesser = _new(q), _new(q)
    lse = q.new_empty(2, B, H, T, dtype=torch.float32)
    docs = doc_start is not None
    forward_kernel[(B * H, triton.cdiv(T, tiles.own))](
        q, q_rope, *loops, sink, gate, out, lesser, lse,
        doc_start if docs else lse, slots if docs else lse,
        *strides_of(q, q_rope, k_rope, v, k_pool, v_pool, gate, out),
        B, H, T, k_pool.shape[2], _window_or_row(window, q), D**-0.5,
        POOLED=True, BM=tiles.own, BN=tiles.step, TMA=tma, **_common(q, k_rope, window, block, stride, tiles, docs),
    )  # fmt: skip
    return out, lesser, lse


@hybrid_forward.register_fake
def _(
    q, q_rope, k_rope, v, k_pool, v_pool, sink, gate, doc_start, doc_end, slots, seen, window, block, stride
):
    B, H, T, _ = q.shape
    return _new(q), _new(q), q.new_empty(2, B, H, T, dtype=torch.float32)


@torch.library.custom_op("deepseek::hybrid_attention_backward", mutates_args=())
def hybrid_backward(
    do: Tensor,
    q: Tensor,
    q_rope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    sink: Tensor,
    gate: Tensor,
    out: Tensor,
    lesser: Tensor,
    lse: Tensor,
    doc_start: Tensor | None,
    doc_end: Tensor | None,
    slots: Tensor | None,
    seen: Tensor | None,
    window: int,
    block: int,
    stride: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, q_rope, k_rope, v, k_pool, v_pool, sink, gate."""
    do, q, q_rope, k_rope, v, k_pool, v_pool = (
        rows_of(x) for x in (do, q, q_rope, k_rope, v, k_pool, v_pool)
    )
    B, H, T, D = q.shape
    K, J = k_pool.shape[1:3]
    tuning, sink, docs = tuning_for(q), sink.contiguous(), doc_start is not None
    limit = _window_or_row(window, q)
    dq, dq_rope, dk_rope, dv = _new(q), _new(q), _new(v), _new(v)
    delta = torch.empty_like(lse)
    dgate = q.new_empty(B, H, T, dtype=torch.float32)
    tiles, (tma, loops) = tuning.queries, _read(tuning.queries, k_rope, v, k_pool, v_pool)
    query_tiles = triton.cdiv(T, tiles.own)
    dsink = q.new_empty(2, B, K, (H // K) * query_tiles, D, dtype=torch.float32)
    strides = strides_of(q, q_rope, k_rope, v, k_pool, v_pool)
    queries_kernel[(B * H, query_tiles)](
        q, q_rope, *loops, sink, gate, out, lesser, lse,
        doc_start if docs else lse, slots if docs else lse, do, delta, dq, dq_rope, dgate, dsink,
        *strides, *strides_of(gate, out, do), B, H, T, J, limit, D**-0.5,
        POOLED=True, BM=tiles.own, BN=tiles.step, TMA=tma, **_common(q, k_rope, window, block, stride, tiles, docs),
    )  # fmt: skip
    tiles, (tma, (q_loop, qr_loop, do_loop)) = tuning.keys, _read(tuning.keys, q, q_rope, do)
    whole_programs = triton.cdiv(J, tiles.own) * B * K
    most = max(1, triton.cdiv(T, 4 * tiles.step))  # less than four query tiles are not worth a partial sum
    splits = min(most, max(1, triton.cdiv(tuning.programs, max(whole_programs, 1))))
    dk_pool, dv_pool = (x.new_empty(B, K, J, D) for x in (k_pool, v_pool))
    parts_k, parts_v = dk_pool, dv_pool
    if splits > 1:
        parts_k, parts_v = (q.new_empty(B, K, splits, J, D, dtype=torch.float32) for _ in range(2))
    keys_kernel[(whole_programs * splits + triton.cdiv(T, tiles.own) * B * K,)](
        q_loop, qr_loop, k_rope, v, k_pool, v_pool, lse,
        doc_end if docs else lse, seen if docs else lse, do_loop, delta, dk_rope, dv, parts_k, parts_v,
        *strides, *strides_of(do, dk_rope), B, H, T, J, splits, whole_programs * splits, limit, D**-0.5,
        POOLED=True, BN=tiles.own, BM=tiles.step, TMA=tma, **_common(q, k_rope, window, block, stride, tiles, docs),
    )  # fmt: skip
    if splits > 1 and J:
        add_kernel[(B * K, triton.cdiv(J * D, 1024))](
            parts_k, parts_v, dk_pool, dv_pool, J * D, splits, N=1024
        )
    return dq, dq_rope, dk_rope, dv, dk_pool, dv_pool, dsink.sum((1, 3)).to(sink.dtype), dgate


@hybrid_backward.register_fake
def _(do, q, q_rope, k_rope, v, k_pool, v_pool, sink, gate, out, lesser, lse, doc_start, doc_end, slots, seen, window,
      block, stride):  # fmt: skip
    B, H, T, _ = q.shape
    dk, dv = (x.new_empty(x.shape) for x in (k_pool, v_pool))
    return (
        _new(q), _new(q), _new(v), _new(v), dk, dv, sink.new_empty(sink.shape),
        q.new_empty(B, H, T, dtype=torch.float32),
    )  # fmt: skip


def _save(ctx, inputs, output):
    *tensors, window, block, stride = inputs
    ctx.save_for_backward(*tensors[:8], *output, *tensors[8:])
    ctx.sizes = window, block, stride
    ctx.set_materialize_grads(False)


def _differentiate(ctx, do, *_):
    if do is None:
        return (None,) * 15
    return (*hybrid_backward(do, *ctx.saved_tensors, *ctx.sizes), *(None,) * 7)


hybrid_forward.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("deepseek::window_attention", mutates_args=())
def window_forward(
    q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None, doc_end: Tensor | None, window: int
) -> tuple[Tensor, Tensor]:
    """Attention ``[B, H, T, D]`` over the last ``window`` positions, and log-sums ``[1, B, H, T]`` for backward."""
    q, k, v = (rows_of(x) for x in (q, k, v))
    B, H, T, D = q.shape
    tuning, docs = tuning_for(q, pooled=False), doc_start is not None
    tiles, (tma, (k_loop, v_loop)) = tuning.forward, _read(tuning.forward, k, v)
    out, lse = _new(q), q.new_empty(1, B, H, T, dtype=torch.float32)
    start = doc_start if docs else lse
    forward_kernel[(B * H, triton.cdiv(T, tiles.own))](
        q, q, k_loop, v_loop, k_loop, v_loop, lse, lse, out, out, lse, start, start,
        *strides_of(q, q, k, v, k, v, lse[0], out), B, H, T, 0, _window_or_row(window, q), D**-0.5,
        POOLED=False, BM=tiles.own, BN=tiles.step, TMA=tma, **_common(q, k, window, 1, 1, tiles, docs),
    )  # fmt: skip
    return out, lse


@window_forward.register_fake
def _(q, k, v, doc_start, doc_end, window):
    B, H, T, _ = q.shape
    return _new(q), q.new_empty(1, B, H, T, dtype=torch.float32)


@torch.library.custom_op("deepseek::window_attention_backward", mutates_args=())
def window_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    doc_start: Tensor | None,
    doc_end: Tensor | None,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v."""
    do, q, k, v = (rows_of(x) for x in (do, q, k, v))
    B, H, T, D = q.shape
    tuning, docs, limit = tuning_for(q, pooled=False), doc_start is not None, _window_or_row(window, q)
    dq, dk, dv, delta = _new(q), _new(k), _new(v), torch.empty_like(lse)
    strides = strides_of(q, q, k, v, k, v)
    tiles, (tma, (k_loop, v_loop)) = tuning.queries, _read(tuning.queries, k, v)
    start = doc_start if docs else lse
    queries_kernel[(B * H, triton.cdiv(T, tiles.own))](
        q, q, k_loop, v_loop, k_loop, v_loop, lse, lse, out, out, lse, start, start, do, delta, dq, dq, lse, lse,
        *strides, *strides_of(lse[0], out, do), B, H, T, 0, limit, D**-0.5,
        POOLED=False, BM=tiles.own, BN=tiles.step, TMA=tma, **_common(q, k, window, 1, 1, tiles, docs),
    )  # fmt: skip
    tiles, (tma, (q_loop, do_loop)) = tuning.keys, _read(tuning.keys, q, do)
    end = doc_end if docs else lse
    keys_kernel[(triton.cdiv(T, tiles.own) * B * k.shape[1],)](
        q_loop, q_loop, k, v, k, v, lse, end, end, do_loop, delta, dk, dv, lse, lse,
        *strides, *strides_of(do, dk), B, H, T, 0, 1, 0, limit, D**-0.5,
        POOLED=False, BN=tiles.own, BM=tiles.step, TMA=tma, **_common(q, k, window, 1, 1, tiles, docs),
    )  # fmt: skip
    return dq, dk, dv


@window_backward.register_fake
def _(do, q, k, v, out, lse, doc_start, doc_end, window):
    return _new(q), _new(k), _new(v)


def _save_window(ctx, inputs, output):
    q, k, v, doc_start, doc_end, window = inputs
    ctx.save_for_backward(q, k, v, *output, doc_start, doc_end)
    ctx.window = window
    ctx.set_materialize_grads(False)


def _differentiate_window(ctx, do, *_):
    if do is None:
        return (None,) * 6
    return (*window_backward(do, *ctx.saved_tensors, ctx.window), None, None, None)


window_forward.register_autograd(_differentiate_window, setup_context=_save_window)
