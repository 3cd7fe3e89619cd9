"""The fused kernels, in Triton's interpreter, against the float64 reference: outputs and every gradient."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from deepseek.ops.attention import (
    DocumentSpans,
    causal_mask,
    document_spans,
    window_attention_kernel,
)
from deepseek.ops.hybrid_attention import (
    hybrid_attention_kernel,
    hybrid_attention_reference,
    pool_blocks,
    pooled_mask,
    pooled_spans,
)
from deepseek.ops.triton import hybrid_attention as kernels
from deepseek.ops.triton.hybrid_attention import Tiles, Tuning, forced_tuning
from deepseek.ops.triton.pooling import pool_forward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Tuning(Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1), programs=8)
UNEVEN = Tuning(Tiles(32, 16, 4, 1), Tiles(16, 32, 4, 1), Tiles(32, 16, 4, 1), programs=1)
ENGINE = Tuning(Tiles(16, 32, 4, 1, True), Tiles(32, 16, 4, 1, True), Tiles(16, 32, 4, 1, True), programs=5)


def random_documents(rows: int, length: int, seed: int = 0) -> Tensor:
    """``[B, T]`` contiguous document ids, the last run of some rows being padding."""
    random = torch.Generator().manual_seed(seed)
    ids = (torch.rand(rows, length, generator=random) < 3 / length).long().cumsum(1).int()
    ids[::2, length - length // 4 :] = -1
    return ids.to(DEVICE)


def inputs(rows: int, heads: int, kv: int, length: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, rotated q, rotated k (as the projections lay them out), sink, gate."""
    random = torch.Generator().manual_seed(length + size)
    shapes = [(rows, length, n, size) for n in (heads, kv, kv, heads, kv)]
    made = [torch.randn(s, generator=random).to(DEVICE, dtype).transpose(1, 2) for s in shapes]
    made.append(torch.randn(2, kv, size, generator=random).to(DEVICE))
    made.append(torch.rand(rows, heads, length, generator=random).to(DEVICE))
    return [x.requires_grad_() for x in made]


def direction(y: Tensor) -> Tensor:
    """The gradient that ``check`` gives to outputs."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)


def check(
    y: Tensor,
    values: list[Tensor],
    want: Tensor,
    wide: list[Tensor],
    tolerance: float = 2e-5,
    terms: float = 1.0,
) -> None:
    """Outputs and gradients of a random linear function of them, each relative to its own size.

    ``terms``: the size of what cancels where a gradient is zero.
    """
    weight = direction(y)
    ours = torch.autograd.grad((y * weight).sum(), values, materialize_grads=True)
    theirs = torch.autograd.grad((want * weight.double()).sum(), wide, materialize_grads=True)
    for at, (a, b) in enumerate(zip([y, *ours], [want, *theirs])):
        assert a.isfinite().all(), at
        off, size = float((a.double() - b).detach().norm()), float(b.detach().norm())
        assert off <= tolerance * (terms if size < 1e-9 else max(size, 1.0)), (at, off, size)


def hybrid(
    values: list[Tensor], window: int, block: int, stride: int, documents: Tensor | None = None
) -> Tensor:
    spans = pooled = None
    if documents is not None:
        spans = document_spans(documents)
        pooled = pooled_spans(documents, spans, block, stride)
    return hybrid_attention_kernel(
        *values, window=window, block=block, stride=stride, spans=spans, pooled=pooled
    )


def compare(
    values: list[Tensor], window: int, block: int, stride: int, documents: Tensor | None, tolerance: float
) -> None:
    wide = [x.detach().double().requires_grad_() for x in values]
    want = hybrid_attention_reference(*wide, window=window, block=block, stride=stride, documents=documents)
    terms = single_key_terms(wide, direction(want)) if window == 1 else 1.0
    check(hybrid(values, window, block, stride, documents), values, want, wide, tolerance, terms)


def single_key_terms(wide: list[Tensor], do: Tensor) -> float:
    """How large ``p·(do·v)·k`` is of a window of one, where the softmax takes exactly that off again."""
    _, _, v, q_rope, k_rope, _, gate = (x.detach() for x in wide)
    v, k_rope = (x.repeat_interleave(q_rope.shape[1] // x.shape[1], 1) for x in (v, k_rope))
    dp = (1 - gate) * (do * v).sum(-1) * v.shape[-1] ** -0.5
    return float(min((dp[..., None] * x).norm() for x in (q_rope, k_rope)))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tuning", [SMALL, UNEVEN, ENGINE])
@pytest.mark.parametrize(
    ("length", "heads", "kv", "size", "window", "block", "stride"),
    [
        (32, 2, 1, 64, 8, 4, 2),  # whole tiles
        (51, 4, 2, 64, 20, 6, 3),  # a ragged end
        (80, 2, 2, 96, 80, 4, 4),  # a padded head size; a window as long as the row
        (48, 2, 1, 128, 1, 2, 1),  # a window of one; more slots than query tiles
        (5, 2, 1, 64, 9, 8, 4),  # shorter than window and block: the sink alone
    ],
)
def test_hybrid_equals_the_reference(
    length: int,
    heads: int,
    kv: int,
    size: int,
    window: int,
    block: int,
    stride: int,
    tuning: Tuning,
    packed: bool,
) -> None:
    rows = 2 if packed else 1
    documents = random_documents(rows, length) if packed else None
    with forced_tuning(tuning):
        compare(inputs(rows, heads, kv, length, size, torch.float32), window, block, stride, documents, 2e-5)


def test_half_precision_stays_near_the_reference() -> None:
    with forced_tuning(SMALL):
        compare(inputs(1, 2, 1, 40, 64, torch.float16), 12, 4, 2, random_documents(1, 40), 5e-3)


@pytest.mark.parametrize("gate", [1e-4, 0.97, 1 - 1e-4])
def test_the_gate_s_gradient_is_as_good_near_its_ends(gate: float) -> None:
    """It is what the branches differ by, and one of them is only known by the blend, in half precision."""
    values = inputs(1, 2, 1, 40, 64, torch.float16)
    values[-1] = torch.full_like(values[-1], gate).requires_grad_()
    with forced_tuning(SMALL):
        compare(values, 12, 4, 2, random_documents(1, 40), 5e-3)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device: the interpreter multiplies bf16 wrongly")
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [64, 96, 128])
def test_default_tiles_in_bf16(size: int, packed: bool, tma: bool) -> None:
    if tma and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs Hopper")
    values = inputs(2, 8, 2, 700, size, torch.bfloat16)
    with forced_tuning(kernels.tuning_for(values[0]).reading(tma)):
        compare(values, 128, 32, 16, random_documents(2, 700) if packed else None, 2e-2)


def test_default_tiles_and_contiguous_heads() -> None:
    values = [x.detach().contiguous().requires_grad_() for x in inputs(1, 2, 1, 70, 64, torch.float32)]
    compare(values, 16, 4, 2, None, 2e-5)


def test_a_static_gate_gets_the_sum_of_its_gradients() -> None:
    values = inputs(1, 2, 1, 24, 64, torch.float32)
    logit = torch.tensor([-3.0, 1.0], device=DEVICE, requires_grad=True)
    values[-1] = logit
    wide = [x.detach().double().requires_grad_() for x in values]
    gates = [x.sigmoid()[None, :, None] for x in (logit, wide[-1])]
    with forced_tuning(SMALL):
        y = hybrid([*values[:-1], gates[0]], 8, 4, 2)
    want = hybrid_attention_reference(*wide[:-1], gates[1], window=8, block=4, stride=2)
    check(y, values, want, wide)


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_a_closed_gate_gives_no_nan(gate: float) -> None:
    values = inputs(1, 2, 1, 24, 64, torch.float32)
    values[-1] = torch.full_like(values[-1], gate).requires_grad_()
    with forced_tuning(SMALL):
        y = hybrid(values, 8, 4, 2)
        grads = torch.autograd.grad(y.sum(), values)
    assert all(x.isfinite().all() for x in (y, *grads))
    silent = 0 if gate == 0 else 3  # the closed branch's queries
    torch.testing.assert_close(grads[silent], torch.zeros_like(grads[silent]), rtol=0, atol=1e-12)


def dense(values: list[Tensor], window: int, documents: Tensor | None) -> Tensor:
    q, k, v = values
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    t = torch.arange(q.shape[2], device=q.device)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return scores.masked_fill(~causal_mask(t, t, window, documents), float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("length", "window"), [(67, 9), (64, 64), (80, 67)])
def test_window_equals_a_dense_softmax(length: int, window: int, packed: bool) -> None:
    documents = random_documents(2, length, 5) if packed else None
    values = inputs(2, 4, 2, length, 64, torch.float32)[:3]
    wide = [x.detach().double().requires_grad_() for x in values]
    spans = document_spans(documents) if documents is not None else None
    with forced_tuning(SMALL):
        y = window_attention_kernel(*values, window, spans)
    check(y, values, dense(wide, window, documents), wide)


def test_the_result_is_the_same_every_time() -> None:
    values = inputs(1, 4, 1, 48, 64, torch.float32)
    runs = []
    for _ in range(2):
        with forced_tuning(SMALL):
            y = hybrid(values, 12, 4, 2)
            runs.append([y, *torch.autograd.grad(y.square().sum(), values)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_registrations_are_sound() -> None:
    values = [x.detach().requires_grad_() for x in inputs(1, 2, 1, 20, 64, torch.float32)]
    q, k, v, q_rope, k_rope, sink, gate = values
    k_pool, v_pool = (x.detach()[:, :, :4].requires_grad_() for x in (k, v))
    with forced_tuning(SMALL):
        torch.library.opcheck(kernels.window_forward, (q, k, v, None, None, 8))
        torch.library.opcheck(
            kernels.hybrid_forward,
            (q, q_rope, k_rope, v, k_pool, v_pool, sink, gate, None, None, None, None, 8, 8, 4),
        )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("length", "block", "stride"), [(40, 8, 4), (37, 6, 4), (29, 5, 5), (16, 1, 1), (3, 4, 2)]
)
def test_pooling_equals_plain_torch(length: int, block: int, stride: int, packed: bool) -> None:
    """Gradients too, also from slots that nobody sees in practice: those get none."""
    k, v = inputs(2, 2, 2, length, 12, torch.float32)[1:3]
    starts = slots = None
    used = torch.ones(2, 1, max(0, (length - block) // stride + 1), 1, device=DEVICE)
    if packed:
        documents = random_documents(2, length, 3)
        starts, slots, _ = pooled_spans(documents, document_spans(documents), block, stride)
        used = (starts < length)[:, None, :, None].float()
    ours = pool_forward(k, v, starts, slots, block, stride)
    want = [pool_blocks(x, block, stride, starts) for x in (k, v)]
    assert ours[0].shape == want[0].shape
    torch.testing.assert_close([y * used for y in ours], [y * used for y in want], rtol=0, atol=1e-6)
    weight = torch.randn_like(want[0]) * used
    grads = [
        torch.autograd.grad((a * weight).sum() + (2 * b * weight).sum(), (k, v), materialize_grads=True)
        for a, b in (ours, want)
    ]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-6)


def test_spans_say_what_the_masks_say() -> None:
    documents, block, stride = random_documents(3, 60, 7).cpu(), 5, 3
    spans = document_spans(documents)
    pooled = pooled_spans(documents, spans, block, stride)
    t, slot = torch.arange(60), torch.arange(pooled.starts.shape[1])
    mask = pooled_mask(t, 60, block, stride, documents)[:, 0, :, 1:]
    first, end = pooled.slots[..., None]
    assert torch.equal((slot >= first) & (slot < end), mask)
    first, end = pooled.seen[:, :, None]
    assert torch.equal((t[:, None] >= first) & (t[:, None] < end), mask)
    same = causal_mask(t, t, None, documents)[:, 0]
    assert torch.equal((t >= spans.start[..., None]) & (t <= t[:, None]), same)
    assert torch.equal((t[:, None] >= t) & (t[:, None] < spans.end[:, None]), same)
    assert isinstance(spans, DocumentSpans)
