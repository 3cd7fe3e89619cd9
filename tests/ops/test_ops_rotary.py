"""Rotary embedding of a packed projection as one operation: values, gradients, what is kept, and layers that use it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek.models import ModelConfig, Transformer
from deepseek.nn import AttentionConfig, attention
from deepseek.nn.attention import Attention, Context
from deepseek.nn.rope import rope_table, rotate
from deepseek.ops import rotary as op
from deepseek.ops.rotary import rotary
from deepseek.ops.triton import DTYPES
from deepseek.parallel.memory import activation_checkpoint
from deepseek.parallel.saved import SavedBytes
from deepseek.parallel.selective import is_dear

#: Dynamo looks at the gradient of every input, and hides this warning with a filter that pytest overrides.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
LENGTH = 24


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers use one product and the operation off a GPU, too (its plain torch)."""
    monkeypatch.setattr(Attention, "_merges", lambda self, x: True)
    monkeypatch.setattr(attention, "fuses", lambda y: y.dtype in DTYPES)


def table(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    cos, sin = rope_table(positions.to(DEVICE), head_dim, 1e4)
    return (cos[:, None], sin[:, None]) if positions.dim() == 2 else (cos, sin)


def tables(rows: int, length: int, head_dim: int) -> list[tuple[Tensor, Tensor]]:
    """One for all rows, one for each row, and one of a single row that serves all."""
    own = torch.randint(0, 999, (rows, length))
    return [table(places, head_dim) for places in (torch.arange(length), own, own[:1])]


def plain(y: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, ...]:
    x = y.unflatten(-1, (-1, 2 * cos.shape[-1]))
    kv = (x.shape[2] - heads) // 2
    q, k, v = x.split([heads, kv, kv], 2)
    q, k = (rotate(z.transpose(1, 2), (cos, sin)).transpose(1, 2) for z in (q, k))
    return q, k, v


def given(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE, requires_grad=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 6), (3, 1, 64), (2, 2, 96)])
def test_it_equals_plain_torch_to_the_last_bit(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    for angles in tables(2, 5, head_dim):
        y = given(dtype, 2, 5, (heads + 2 * kv_heads) * head_dim)
        got, want = rotary(y, *angles, heads), plain(y, *angles, heads)
        for a, b in zip(got, want):
            assert a.equal(b)
            assert a.is_contiguous()
            assert a.dtype == dtype
        ds = [torch.randn_like(a) for a in got]
        assert torch.autograd.grad(got, y, ds)[0].equal(torch.autograd.grad(want, y, ds)[0])


def test_it_turns_pairs_as_complex_numbers_turn() -> None:
    angles = table(torch.arange(7), 10)
    y = given(torch.float64, 2, 7, 5 * 10)
    turn = torch.complex(*(t.double() for t in angles))[:, None]
    x = y.unflatten(-1, (-1, 10))
    z = torch.complex(x[..., :5], x[..., 5:])[:, :, :4] * turn
    q, k, v = rotary(y, *angles, 3)
    torch.testing.assert_close(torch.cat((q, k), 2), torch.cat((z.real, z.imag), -1), rtol=0, atol=1e-12)
    assert v.equal(x[:, :, 4:])


def test_gradients_against_differences() -> None:
    for angles in tables(2, 3, 4):
        wide = [t.double() for t in angles]
        y = given(torch.float64, 2, 3, 5 * 4)
        assert torch.autograd.gradcheck(lambda y: rotary(y, *wide, 3), [y])  # noqa: B023


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)])
def test_parts_that_nobody_uses_and_gradients_of_any_layout(used: tuple[int, ...]) -> None:
    angles = table(torch.arange(5), 8)
    y = given(torch.float32, 2, 5, 6 * 8)
    changes = (lambda t: t.mT.contiguous().square().sum(), lambda t: t[..., ::2].sum(), lambda t: t.sum())
    grads = []
    for f in (rotary, plain):
        parts = f(y, *angles, 2)
        grads.append(torch.autograd.grad(sum(changes[i](parts[i]) for i in used), y)[0])
    torch.testing.assert_close(*grads)


def test_only_the_table_is_kept() -> None:
    angles = table(torch.arange(5), 8)
    y = given(torch.float32, 2, 5, 6 * 8) * 1
    with SavedBytes(angles) as kept:
        parts = rotary(y, *angles, 2)
    assert kept.total == 0
    loss = sum(p.square().sum() for p in parts)
    first = torch.autograd.grad(loss, y, retain_graph=True)
    assert first[0].equal(torch.autograd.grad(loss, y)[0])


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_the_operations_are_well_formed(kind: int) -> None:
    angles = tables(2, 5, 8)[kind]
    torch.library.opcheck(torch.ops.deepseek.rotary.default, (given(torch.float32, 2, 5, 6 * 8), *angles, 2))
    strided = torch.randn(2, 2, 5, 8, device=DEVICE).transpose(1, 2)
    for d in (strided, strided.contiguous()):
        torch.library.opcheck(torch.ops.deepseek.rotary_backward.default, (d, d, d, *angles))


def test_checkpointing_runs_it_again() -> None:
    assert not is_dear(torch.ops.deepseek.rotary.default)


def model(pattern: str, **options: object) -> Transformer:
    torch.manual_seed(0)
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 8, "window": 6, "block": 6, "stride": 3}
    config = AttentionConfig(**{**shape, **options})  # type: ignore[arg-type]
    made = Transformer(
        ModelConfig(vocab_size=61, hidden=24, layers=len(pattern), ffn=32, pattern=pattern, attention=config)
    )
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return made.to(DEVICE)


def results(made: Transformer, packed: bool) -> list[Tensor]:
    """Hidden states, then every parameter's gradient."""
    tokens = torch.randint(0, 61, (2, LENGTH), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    t = torch.arange(LENGTH, device=DEVICE).expand(2, -1)
    documents = (t >= torch.tensor([[7], [15]], device=DEVICE)).int() if packed else None
    positions = torch.where(documents == 1, t * 3, t) if documents is not None else None
    made.zero_grad()
    y = made(tokens, documents, positions).hidden
    (y * torch.linspace(-1, 1, y.numel(), device=DEVICE).view_as(y)).sum().backward()
    return [y.detach(), *(p.grad if p.grad is not None else torch.zeros_like(p) for p in made.parameters())]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    real = op._rotary
    monkeypatch.setattr(op, "_rotary", lambda *a: calls.append(a[-1]) or real(*a))
    return calls


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("pattern", "options", "uses"),
    [
        ("F", {}, 1), ("L", {"bias": True}, 1), ("FLH", {}, 2),
        ("F", {"full_rope": False}, 0), ("F", {"qk_norm": True}, 0), ("H", {}, 0),
    ],
)  # fmt: skip
def test_layers_with_it_are_layers_without(
    pattern: str, options: dict[str, object], uses: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = model(pattern, **options)
    with monkeypatch.context() as off:
        off.setattr(Attention, "_merges", lambda self, x: False)
        want = results(made, packed)
    calls = counted(monkeypatch)
    monkeypatch.setattr(Attention, "_merges", lambda self, x: True)
    monkeypatch.setattr(attention, "fuses", lambda y: True)
    torch.testing.assert_close(results(made, packed), want, rtol=1e-4, atol=1e-4)
    assert calls == [4] * uses


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize(
    ("mode", "compiled"),
    [("blocks", False), ("selective", False),
     ("none", True), ("blocks", True), ("selective", True), ("budget=0.5", True)],
)  # fmt: skip
def test_layers_in_every_mode(mode: str, compiled: bool) -> None:
    made = model("FL")
    want = results(made, True)
    activation_checkpoint(made, mode)
    if compiled:
        torch._dynamo.reset()
        for block in made.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(made, True), want, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("fused")
def test_cached_positions_are_those_of_the_whole_row() -> None:
    made = model("FL")
    tokens = torch.randint(0, 61, (1, LENGTH)).to(DEVICE)
    with torch.no_grad():
        cache, parts = made.new_cache(), []
        for part in tokens.split([11, 1, 12], dim=1):
            parts.append(made(part, cache=cache).hidden)
        torch.testing.assert_close(torch.cat(parts, 1), made(tokens).hidden, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_layer_does_not_keep_the_projection(
    backend: str, fused: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention keeps rotated queries and keys, and values of their own: backward needs the projection no more."""
    layer = model("F", kv_heads=4).blocks[0].attention
    x = torch.randn(2, LENGTH, 24, device=DEVICE, requires_grad=True)
    context = Context(layer.config, LENGTH, x.device, kinds="F")
    inputs = [x, *layer.parameters()]

    def compiled() -> tuple[Tensor, int]:
        torch._dynamo.reset()
        with SavedBytes([*inputs, *context.rope]) as kept:
            y = torch.compile(layer, fullgraph=True, backend=backend)(x, context)[0]
        return y, kept.total

    got, bytes_fused = compiled()
    monkeypatch.setattr(attention, "fuses", lambda y: False)
    want, bytes_plain = compiled()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (got, want))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    rotated_again = (
        2 * LENGTH * (4 + 4) * 8 * 4
    )  # queries and keys, beside the projection that holds the values
    assert bytes_plain - bytes_fused == rotated_again


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_on_cuda_hands_attention_what_the_operation_makes(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced with tensors that are not there: no GPU is needed to see which path runs."""
    calls, seen = counted(monkeypatch), []
    layer = attention.FullAttention(24, AttentionConfig(heads=4, kv_heads=2, head_dim=8))
    monkeypatch.setattr(layer, "mix", lambda q, k, v, x, *rest: (seen.extend((q, k, v)) or q, None))
    with torch._subclasses.FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        for linear in (layer.query, layer.key, layer.value, layer.output):
            linear.weight = torch.nn.Parameter(torch.empty(linear.weight.shape, dtype=dtype))
        rope = torch.empty(LENGTH, 4), torch.empty(LENGTH, 4)
        layer(torch.empty(2, LENGTH, 24, dtype=dtype), SimpleNamespace(rope=rope))  # type: ignore[arg-type]
    assert calls == [4]
    assert [tuple(t.shape) for t in seen] == [(2, n, LENGTH, 8) for n in (4, 2, 2)]
    assert all(t.is_cuda and t.dtype == dtype and t.transpose(1, 2).is_contiguous() for t in seen)


class Adapted(torch.nn.Linear):
    """A linear layer that answers something else than its weight alone does."""


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_projection_that_is_more_than_its_weight_is_called(name: str) -> None:
    """On a GPU the three are one product of their weights, which an adapter or a listener would never see."""
    layer = attention.FullAttention(24, AttentionConfig(heads=4, kv_heads=2, head_dim=8))
    on_a_gpu: Any = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    assert layer._merges(on_a_gpu)
    handle = getattr(layer, name).register_forward_hook(lambda *args: None)
    assert not layer._merges(on_a_gpu)
    handle.remove()
    setattr(layer, name, Adapted(24, getattr(layer, name).out_features))
    assert not layer._merges(on_a_gpu)
