"""FlashAttention-4's operation: on a CPU with a stand-in of its two functions, on a GPU with the package itself."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.errors import ConfigError, MissingExtraError
from deepseek.models import ModelConfig, Transformer
from deepseek.nn import attention as layers
from deepseek.nn.attention import AttentionConfig
from deepseek.ops import flash_attention as flash
from deepseek.ops.attention import causal_mask, dense_attention
from deepseek.parallel.flops import flop_counter
from deepseek.parallel.memory import activation_checkpoint
from deepseek.recipes import doctor

#: Dynamo looks at the gradient of every input, and hides this warning with a filter that pytest overrides.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def visible(length: int, left: int | None) -> Tensor:
    """``[T, T]``: whether a query (row) may see a key (column)."""
    t = torch.arange(length)
    seen = t[:, None] >= t
    return seen if left is None else seen & (t[:, None] - t <= left)


def spans_of(q: Tensor, offsets: Tensor | None) -> list[tuple[Any, ...]]:
    """Indices of each document: of a row of ``[B, T, …]``, or of ``[B·T, …]`` between two offsets."""
    if offsets is None:
        return [(b,) for b in range(q.shape[0])]
    return [(slice(a, b),) for a, b in zip(offsets.tolist(), offsets.tolist()[1:]) if b > a]


def check(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> None:
    """What the package asserts of its inputs."""
    assert options["causal"] is True
    offsets = options.get("cu_seqlens_q")
    assert q.dim() == k.dim() == v.dim() == (4 if offsets is None else 3)
    assert k.shape == v.shape
    assert q.shape[-1] == k.shape[-1]
    assert q.shape[-2] % k.shape[-2] == 0
    for x in (q, k, v):
        assert x.stride(-1) == 1
    if offsets is not None:
        assert offsets.dtype == torch.int32
        assert options["cu_seqlens_k"] is offsets
        assert isinstance(options["max_seqlen_q"], int)


def forward(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **options: Any) -> tuple[Any, ...]:
    """``_flash_attn_fwd``: ``[B, T, H, D]`` or ``[B·T, H, D]``; five results, as version 4.0.0b36 has."""
    check(q, k, v, options)
    assert return_lse
    out, group = torch.empty(q.shape, dtype=q.dtype), q.shape[-2] // k.shape[-2]
    offsets = options.get("cu_seqlens_q")
    B, T, H = (1, *q.shape[:2]) if offsets is not None else q.shape[:3]
    lse = torch.empty((B, H, T), dtype=torch.float32)
    for index in spans_of(q, offsets):
        a, b, c = (x[index].transpose(0, 1).double() for x in (q, k, v))
        b, c = (x.repeat_interleave(group, 0) for x in (b, c))
        seen = visible(a.shape[1], options.get("window_size_left"))
        scores = (a @ b.mT / math.sqrt(a.shape[-1])).masked_fill(~seen, -math.inf)
        out[index] = (scores.softmax(-1) @ c).transpose(0, 1).to(q.dtype)
        where = (0, slice(None), index[0]) if offsets is not None else index
        lse[where] = scores.logsumexp(-1).float()
    return out, lse[0] if offsets is not None else lse, None, None, None


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, *,
    dq: Tensor, dk: Tensor, dv: Tensor, deterministic: bool, **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``_flash_attn_bwd``, from the saved output and log-sums as the kernels do it."""
    check(q, k, v, options)
    assert dout.shape == out.shape == q.shape
    offsets, group = options.get("cu_seqlens_q"), q.shape[-2] // k.shape[-2]
    assert lse.shape == (
        (q.shape[1], q.shape[0]) if offsets is not None else (q.shape[0], q.shape[2], q.shape[1])
    )
    for index in spans_of(q, offsets):
        a, b, c, o, do = (x[index].transpose(0, 1).double() for x in (q, k, v, out, dout))
        b, c = (x.repeat_interleave(group, 0) for x in (b, c))
        seen = visible(a.shape[1], options.get("window_size_left"))
        sums = lse[:, index[0]] if offsets is not None else lse[index]
        scale = 1 / math.sqrt(a.shape[-1])
        p = (a @ b.mT * scale - sums.double()[..., None]).exp().masked_fill(~seen, 0)
        ds = p * (do @ c.mT - (do * o).sum(-1, keepdim=True)) * scale
        fold = lambda x: x.unflatten(0, (-1, group)).sum(1)  # noqa: E731
        for into, x in ((dq, ds @ b), (dk, fold(ds.mT @ a)), (dv, fold(p.mT @ do))):
            into[index] = x.transpose(0, 1).to(into.dtype)
    return dq, dk, dv


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The package's module, as functions in plain torch; what was found out about it is forgotten before and after."""
    module = SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward)
    monkeypatch.setattr(flash, "kernels", lambda: module)
    yield from fresh(module)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a Hopper GPU with whatever ``flash.kernels`` gives: the small problem is done on the CPU instead."""
    real = flash.relative_error
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(flash, "relative_error", lambda device, *rest: real(CPU, *rest))
    monkeypatch.delenv("DEEPSEEK_FLASH", raising=False)
    yield from fresh(None)


def fresh(value: Any) -> Iterator[Any]:
    flash.package.forget()
    yield value
    flash.package.forget()


def tensors(B: int, T: int, H: int, K: int, D: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v ``[B, heads, T, D]``, as slices of one product that lies in memory as ``[B, T, (H + 2 K) D]``."""
    random = torch.Generator().manual_seed(T + D)
    product = torch.randn(B, T, (H + 2 * K) * D, generator=random, dtype=dtype).requires_grad_()
    parts = product.split([H * D, K * D, K * D], -1)
    return [product, *(x.unflatten(-1, (-1, D)).transpose(1, 2) for x in parts)]


def gradient(y: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), of)[0]


@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("length", [1, 17, 64])
def test_the_operation_is_attention(heads: int, kv: int, length: int, stand_in: SimpleNamespace) -> None:
    product, q, k, v = tensors(2, length, heads, kv, 8)
    y = flash.flash_attention(q, k, v)
    want = dense_attention(q, k, v)
    assert y.shape == want.shape
    assert y.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient(y, product), gradient(want, product), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 5, 12, 99])
@pytest.mark.parametrize("packed", [False, True])
def test_windows_and_documents(window: int | None, packed: bool, stand_in: SimpleNamespace) -> None:
    product, q, k, v = tensors(2, 12, 4, 2, 8)
    offsets = documents = None
    if packed:
        offsets = torch.tensor(
            [0, 5, 12, 13, 24, 24, 24], dtype=torch.int32
        )  # and two slots that are not used
        documents = torch.tensor([[0] * 5 + [1] * 7, [0] + [1] * 11])
    rows = [x.transpose(1, 2) for x in (q, k, v)]
    y = flash.flash_forward(*rows, offsets, window, False)[0].transpose(1, 2)
    t = torch.arange(12)
    want = dense_attention(q, k, v, causal_mask(t, t, window, documents))
    torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient(y, product), gradient(want, product), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_the_operation_is_sound(packed: bool, stand_in: SimpleNamespace) -> None:
    """Fakes, strides, aliases and autograd's registration, by torch's own checks."""
    _, *heads = tensors(2, 8, 4, 2, 8, torch.float32)
    rows = [x.detach().transpose(1, 2).requires_grad_() for x in heads]
    offsets = torch.tensor([0, 3, 8, 16], dtype=torch.int32) if packed else None
    torch.library.opcheck(flash.flash_forward, (*rows, offsets, None, False))
    with torch.no_grad():
        out, lse = flash.flash_forward(*rows, offsets, None, False)
        torch.library.opcheck(
            flash.flash_backward, (torch.ones_like(out), *rows, out, lse, offsets, None, False)
        )


def test_only_five_tensors_are_saved(stand_in: SimpleNamespace) -> None:
    _, q, k, v = tensors(2, 16, 4, 2, 8)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        flash.flash_attention(q, k, v)
    assert sorted(saved) == sorted([q.numel(), k.numel(), v.numel(), q.numel(), 2 * 4 * 16])


def test_torchs_deterministic_mode_reaches_the_kernels(
    stand_in: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []

    def spy(*args: Any, deterministic: bool, **options: Any) -> Any:
        told.append(deterministic)
        return backward(*args, deterministic=deterministic, **options)

    monkeypatch.setattr(stand_in, "_flash_attn_bwd", spy)
    product, q, k, v = tensors(1, 8, 2, 1, 8)
    for mode in (False, True):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda mode=mode: mode)
        gradient(flash.flash_attention(q, k, v), product)
    assert told == [False, True]


def test_flops_count_as_torchs_attention_does(stand_in: SimpleNamespace) -> None:
    _, *heads = tensors(2, 16, 4, 2, 8, torch.float32)
    q, k, v = (x.detach().requires_grad_() for x in heads)
    with flop_counter() as ours:
        flash.flash_attention(q, k, v).sum().backward()
    products = 2 * 2 * 4 * 16 * 16 * 8
    assert ours.get_total_flops() == (2 + 5) * products
    with flop_counter() as window:
        flash.flash_forward(*(x.transpose(1, 2) for x in (q, k, v)), None, 4, False)
    assert window.get_total_flops() == 2 * products * 4 // 16


def model(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    pattern = "L" if "window" in changes else "F"
    options = AttentionConfig(heads=4, kv_heads=2, head_dim=64, **changes)
    made = Transformer(ModelConfig(vocab_size=64, hidden=32, layers=2, pattern=pattern, attention=options))
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return made


#: Rows cut at 13 and 29 with three positions of padding, and one cut at 20; and where their documents start.
DOCUMENTS = torch.tensor([[0] * 13 + [1] * 16 + [2] * 8 + [-1] * 3, [0] * 20 + [1] * 20], dtype=torch.int32)
STARTS = torch.tensor([[0, 13, 29, 37], [0, 20, 40, 40]], dtype=torch.int32)


def test_document_offsets() -> None:
    assert flash.document_offsets(STARTS, 40).tolist() == [0, 13, 29, 37, 40, 60, 80, 80, 80]
    assert flash.document_offsets(STARTS, 40).dtype == torch.int32
    assert flash.countable(STARTS, 4 * flash.SLOT)
    assert not flash.countable(STARTS, 4 * flash.SLOT - 1)
    assert not flash.countable(None, 1000)


def results(made: Transformer, packed: bool) -> list[Tensor]:
    made.zero_grad(set_to_none=True)
    tokens = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(1))
    y = made(tokens, DOCUMENTS if packed else None, starts=STARTS if packed else None).hidden
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y.detach(), *(p.grad for p in made.parameters() if p.grad is not None)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("compiled", "options"),
    [(False, {}), (False, {"full_rope": False}), (True, {}), (False, {"window": 9}), (True, {"window": 9})],
)
def test_the_model_with_it_is_the_model_without(
    compiled: bool,
    options: dict[str, Any],
    packed: bool,
    stand_in: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layers.flash_attention, "WIDE", 9)
    made = model(**options)
    want = results(made, packed)
    calls = []
    monkeypatch.setattr(
        stand_in, "_flash_attn_fwd", lambda *args, **options: (calls.append(1), forward(*args, **options))[1]
    )
    monkeypatch.setattr(layers.flash_attention, "usable", lambda *args, **options: True)
    monkeypatch.setattr(layers.flash_attention, "SLOT", 10)
    if compiled:
        torch._dynamo.reset()
        for block in made.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(made, packed), want, rtol=1e-4, atol=2e-5)
    assert len(calls) == 2


@pytest.mark.parametrize(("mode", "runs"), [("none", 2), ("blocks", 4), ("selective", 2)])
def test_checkpointing_knows_what_is_dear(
    mode: str, runs: int, stand_in: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The selective rule keeps the operation's results; where blocks are run again, it gives the same gradients."""
    made, calls = model(), []
    monkeypatch.setattr(layers.flash_attention, "usable", lambda *args, **options: True)
    want = results(made, False)
    monkeypatch.setattr(
        stand_in, "_flash_attn_fwd", lambda *args, **options: (calls.append(1), forward(*args, **options))[1]
    )
    activation_checkpoint(made, mode)
    torch.testing.assert_close(results(made, False), want, rtol=0, atol=0)
    assert len(calls) == runs


def test_what_is_not_training_stays_with_what_it_had(
    stand_in: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, tokens = model(), torch.zeros(1, 5, dtype=torch.long)
    monkeypatch.setattr(layers.flash_attention, "usable", lambda *args, **options: True)
    stand_in._flash_attn_fwd = None
    with torch.no_grad():
        made(tokens, cache=made.new_cache())
        made(tokens)
    made(tokens, cache=made.new_cache())
    made(tokens, torch.zeros(1, 5, dtype=torch.int32))  # documents that nobody counted
    with pytest.raises(TypeError):
        made(tokens)


def test_narrow_windows_and_rows_within_one_stay(
    stand_in: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers.flash_attention, "usable", lambda *args, **options: True)
    monkeypatch.setattr(layers.flash_attention, "WIDE", 9)
    stand_in._flash_attn_fwd = None
    model(window=8)(torch.zeros(1, 30, dtype=torch.long))
    model(window=9)(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(TypeError):
        model(window=9)(torch.zeros(1, 10, dtype=torch.long))


def test_the_choice_is_a_constant_of_a_compiled_graph(stand_in: SimpleNamespace, gpu: None) -> None:
    """It is made while tracing, on real tensors."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if flash.usable(GPU, torch.bfloat16, 64, 2):
            return flash.flash_attention(q, k, v)
        return q * 0

    torch._dynamo.reset()
    q, k, v = (x.detach() for x in tensors(1, 16, 4, 2, 64, torch.float32)[1:])
    y = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(y, dense_attention(q, k, v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_a_package_that_works_is_taken(packed: bool, stand_in: SimpleNamespace, gpu: None) -> None:
    assert flash.usable(GPU, torch.bfloat16, 64, 4, packed)
    assert flash.usable(GPU, torch.float16, 128, 1, packed)
    assert flash.usable(GPU, torch.bfloat16, 64, 2, packed, window=True)
    assert not flash.usable(CPU, torch.bfloat16, 64, 4, packed)
    assert not flash.usable(GPU, torch.float32, 64, 4, packed)
    assert not flash.usable(GPU, torch.bfloat16, 80, 4, packed)


def test_the_first_look_leaves_no_trace(stand_in: SimpleNamespace, gpu: None) -> None:
    """Not in random numbers, counted FLOPs or kept results; and it is made once."""
    state = torch.get_rng_state()
    with flop_counter() as counted, torch.inference_mode():
        assert flash.usable(GPU, torch.bfloat16, 64, 2)
    assert counted.get_total_flops() == 0
    assert torch.equal(state, torch.get_rng_state())
    stand_in._flash_attn_fwd = None
    assert flash.usable(GPU, torch.bfloat16, 64, 2)


def wrong(*args: Any, **options: Any) -> Any:
    out, *rest = forward(*args, **options)
    return (out * 1.1, *rest)


def broken(*args: Any, **options: Any) -> Any:
    raise RuntimeError("ptxas says no")


@pytest.mark.parametrize(("function", "why"), [(wrong, "off by"), (broken, "ptxas says no")])
def test_a_package_that_does_not_work_is_told_once(
    function: Any, why: str, stand_in: SimpleNamespace, gpu: None, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in._flash_attn_fwd = function
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert not flash.usable(GPU, torch.bfloat16, 64, 2)
    assert len(caplog.records) == 1
    assert why in caplog.text
    with flash.forced(True), pytest.raises(ConfigError, match=why):
        flash.usable(GPU, torch.bfloat16, 64, 2)


@pytest.mark.parametrize(
    "error", [OSError("libcute.so: not found"), ModuleNotFoundError("no einops", name="einops")]
)
def test_a_package_that_cannot_be_imported_is_told_once(
    error: Exception, gpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(flash, "kernels", fail)
    with caplog.at_level(logging.WARNING):
        assert not flash.usable(GPU, torch.bfloat16, 64, 2)
        assert not flash.usable(GPU, torch.bfloat16, 128, 2)
    assert len(caplog.records) == 1
    assert str(error) in caplog.text
    with flash.forced(True), pytest.raises(ConfigError, match="cannot be imported"):
        flash.usable(GPU, torch.bfloat16, 64, 2)


def test_a_missing_package_is_silent_unless_asked_for(
    gpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> None:
        raise ModuleNotFoundError("No module named 'flash_attn'", name="flash_attn")

    monkeypatch.setattr(flash, "kernels", missing)
    assert not flash.usable(GPU, torch.bfloat16, 64, 2)
    assert not caplog.records
    monkeypatch.setenv("DEEPSEEK_FLASH", "1")
    with pytest.raises(MissingExtraError, match=r"deepseek-framework\[flash\]"):
        flash.usable(GPU, torch.bfloat16, 64, 2)


def test_the_switch(stand_in: SimpleNamespace, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = lambda: flash.usable(GPU, torch.bfloat16, 64, 2)  # noqa: E731
    for value, want in (("0", False), ("1", True), ("auto", True), ("", True)):
        monkeypatch.setenv("DEEPSEEK_FLASH", value)
        assert ask() is want
    with flash.forced(False):
        assert not ask()
    monkeypatch.setenv("DEEPSEEK_FLASH", "yes")
    with pytest.raises(ConfigError, match="must be 0, 1 or auto"):
        ask()
    monkeypatch.setenv("DEEPSEEK_FLASH", "1")
    assert not flash.usable(CPU, torch.bfloat16, 64, 2)
    with pytest.raises(ConfigError, match="not 80"):
        flash.usable(GPU, torch.bfloat16, 80, 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    with pytest.raises(ConfigError, match=r"\(8, 0\)"):
        ask()


def test_deterministic_mode_needs_the_switch(
    stand_in: SimpleNamespace, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not flash.usable(GPU, torch.bfloat16, 64, 2)
    with flash.forced(True):
        assert flash.usable(GPU, torch.bfloat16, 64, 2)


def test_doctor_says_which_attention(
    stand_in: SimpleNamespace, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    say = lambda: doctor._whole_rows(GPU, torch.bfloat16)  # noqa: E731
    assert say().startswith("in training FlashAttention-4 for heads of 64, 96, 128")
    assert "Flash" not in doctor._whole_rows(CPU, torch.bfloat16)
    monkeypatch.setenv("DEEPSEEK_FLASH", "0")
    assert "Flash" not in say()
    monkeypatch.setenv("DEEPSEEK_FLASH", "2")
    assert "must be 0, 1 or auto" in say()


needs_package = pytest.mark.skipif(
    not torch.cuda.is_available()
    or torch.cuda.get_device_capability() not in flash.CAPABILITIES
    or flash.package.broken() is not None,
    reason="needs flash-attn-4 and a GPU of capability 9.0 or 10.0",
)


@needs_package
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("length", "window"), [(1, None), (127, None), (1000, None), (1000, 300)])
@pytest.mark.parametrize(("size", "heads", "kv"), [(64, 8, 2), (96, 4, 4), (128, 8, 2), (128, 6, 2)])
def test_the_package_is_attention(size: int, heads: int, kv: int, length: int, window: int | None) -> None:
    """Outputs and gradients against float64; queries, keys and values are slices of one product."""
    narrow = tensors(2, length, heads, kv, size)[0].detach().cuda().bfloat16().requires_grad_()
    wide = narrow.detach().double().requires_grad_()
    widths, t = [heads * size, kv * size, kv * size], torch.arange(length)
    split = lambda x: [y.unflatten(-1, (-1, size)) for y in x.split(widths, -1)]  # noqa: E731
    for documents in (None, (torch.rand(2, length) < 4 / length).long().cumsum(1)):
        offsets, mask = None, None if window is None else causal_mask(t, t, window).cuda()
        if documents is not None:
            new = F.pad(documents.diff(dim=1) != 0, (1, 0), value=True).flatten()
            offsets = F.pad(new.nonzero()[:, 0], (0, 3), value=new.numel()).int().cuda()
            mask = causal_mask(t, t, window, documents).cuda()
        y = flash.flash_forward(*split(narrow), offsets, window, False)[0]
        want = dense_attention(*(x.transpose(1, 2) for x in split(wide)), mask).transpose(1, 2)
        do = torch.randn_like(y)
        got = torch.autograd.grad(y, narrow, do)[0].split(widths, -1)
        exact = torch.autograd.grad(want, wide, do.double())[0].split(widths, -1)
        for a, b in zip((y, *got), (want, *exact)):
            assert (a.double() - b).norm() <= 2e-2 * b.norm() + 1e-2


@needs_package
@pytest.mark.filterwarnings("ignore")
def test_the_package_in_a_cuda_graph() -> None:
    q, k, v = (x.detach().cuda().bfloat16().requires_grad_() for x in tensors(2, 512, 8, 2, 64)[1:])
    do = torch.randn_like(q)
    step = lambda: torch.autograd.grad(flash.flash_attention(q, k, v), (q, k, v), do)  # noqa: E731
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        want = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        got = step()
    for x in got:
        x.zero_()
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
