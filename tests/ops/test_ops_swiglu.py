"""The second half of a dense SwiGLU as one operation: values, gradients, what is kept, and how it compiles."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.nn import layers
from deepseek.nn.layers import SwiGLU
from deepseek.ops import swiglu as op
from deepseek.ops.experts import swiglu
from deepseek.ops.swiglu import swiglu_linear
from deepseek.ops.triton import DTYPES, fuses
from deepseek.parallel.flops import flop_counter
from deepseek.parallel.memory import activation_checkpoint
from deepseek.parallel.saved import SavedBytes
from deepseek.parallel.selective import is_dear

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers use the operation off a GPU, too (its plain torch)."""
    monkeypatch.setattr(layers, "fuses", lambda hidden: hidden.dtype in DTYPES)


def near(got: Tensor, want: Tensor) -> None:
    """Within what the kernels' exponential and the order of sums may change."""
    slack = 1e-10 if got.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(got, want, rtol=slack, atol=slack)


def plain(h: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(swiglu(h), weight, bias)


def given(dtype: torch.dtype, *shape: int, features: int = 5, outputs: int = 3) -> list[Tensor]:
    sizes = [(*shape, 2 * features), (outputs, features), (outputs,)]
    return [torch.randn(s, dtype=dtype, device=DEVICE, requires_grad=True) for s in sizes]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4,), (2, 3), ()])
def test_it_equals_plain_torch(shape: tuple[int, ...], bias: bool) -> None:
    tensors = given(torch.float64, *shape)[: 3 if bias else 2]
    got, want = swiglu_linear(*tensors), plain(*tensors)
    near(got, want)
    d = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, tensors, d), torch.autograd.grad(want, tensors, d)):
        near(a, b)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_gradients_against_differences(needed: tuple[int, ...]) -> None:
    tensors = given(torch.float64, 3)
    for i, t in enumerate(tensors):
        t.requires_grad_(i in needed)
    assert torch.autograd.gradcheck(swiglu_linear, tensors)


@pytest.mark.parametrize(
    "change", [lambda y: y.sum(), lambda y: y.mT.contiguous().square().sum(), lambda y: y[:, ::2].sum()]
)
def test_gradients_that_are_not_contiguous(change: Callable[[Tensor], Tensor]) -> None:
    tensors = given(torch.float32, 6)
    got = torch.autograd.grad(change(swiglu_linear(*tensors)), tensors)
    want = torch.autograd.grad(change(plain(*tensors)), tensors)
    for a, b in zip(got, want):
        near(a, b)


def test_bf16_is_as_near_to_float64_as_plain_torch_is() -> None:
    tensors = given(torch.bfloat16, 64, features=32, outputs=16)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    d = torch.randn(64, 16, device=DEVICE).bfloat16()
    want = torch.autograd.grad(plain(*wide), wide, d.double())
    got, eager = (torch.autograd.grad(f(*tensors), tensors, d) for f in (swiglu_linear, plain))
    for a, b, c in zip(got, eager, want):
        assert (a - c).norm() <= 1.1 * (b - c).norm() + 1e-9


def test_only_gate_and_up_are_kept() -> None:
    h, weight, _ = given(torch.float32, 8, features=6)
    pre = h * 1
    with SavedBytes([weight]) as kept:
        y = swiglu_linear(pre, weight)
    assert kept.total == pre.nbytes
    assert not any(t.shape == (8, 6) for t in y.grad_fn.next_functions[0][0].saved_tensors)  # type: ignore[union-attr]
    with SavedBytes([weight]) as kept:
        plain(pre, weight)
    assert kept.total > pre.nbytes


def test_what_is_kept_outlives_a_backward_pass() -> None:
    tensors = given(torch.float32, 4)
    loss = swiglu_linear(*tensors).square().sum()
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, tensors)):
        assert a.equal(b)


@pytest.mark.parametrize("bias", [True, False])
def test_the_operations_are_well_formed(bias: bool) -> None:
    h, weight, bias_C = given(torch.float32, 4)
    ops = torch.ops.deepseek
    torch.library.opcheck(ops.swiglu_linear.default, (h, weight, bias_C if bias else None))
    d = torch.randn(4, 3, device=DEVICE)
    for weight_too in (True, False):
        torch.library.opcheck(
            ops.swiglu_linear_backward.default, (d, h.detach(), weight.detach(), weight_too)
        )


def test_flops_are_those_of_the_products() -> None:
    tensors = given(torch.float32, 4)
    totals = []
    for f in (swiglu_linear, plain):
        with flop_counter() as counter:
            f(*tensors[:2]).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] == 3 * 2 * 4 * 5 * 3
    with flop_counter() as counter:
        swiglu_linear(tensors[0], tensors[1].detach()).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 4 * 5 * 3


def test_only_cuda_and_the_kernels_dtypes_are_fused() -> None:
    assert not fuses(torch.empty(1))
    assert not fuses(torch.empty(1, device="meta"))
    with torch._subclasses.FakeTensorMode():
        cuda = torch.empty(1, device="cuda")
        assert fuses(cuda)
        assert fuses(cuda.bfloat16())
        assert not fuses(cuda.double())


def test_a_layer_on_a_cpu_is_plain_torch() -> None:
    ffn, x = SwiGLU(6, 10), torch.randn(4, 6)
    assert ffn(x).equal(ffn.down(swiglu(ffn.gate_up(x))))


@pytest.mark.usefixtures("fused")
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # the compiler looks at it
@pytest.mark.parametrize(
    ("mode", "compiled"),
    [("none", False), ("blocks", False), ("selective", False),
     ("none", True), ("blocks", True), ("selective", True), ("budget=0.5", True)],
)  # fmt: skip
def test_a_layer_in_every_mode(mode: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    real = op._swiglu_linear
    ffn = torch.nn.Sequential(SwiGLU(6, 10, bias=True), SwiGLU(6, 10)).to(DEVICE)
    x = torch.randn(2, 4, 6, device=DEVICE, requires_grad=True)
    inputs = [x, *ffn.parameters()]
    with monkeypatch.context() as off:
        off.setattr(layers, "fuses", lambda hidden: False)
        want = torch.autograd.grad(ffn(x).square().sum(), inputs)
    activation_checkpoint(ffn, mode)
    if compiled:
        for block in ffn:
            block.compile(fullgraph=True, backend="aot_eager")
    else:
        monkeypatch.setattr(op, "_swiglu_linear", lambda *a: calls.append(True) or real(*a))
    got = torch.autograd.grad(ffn(x).square().sum(), inputs)
    for a, b in zip(got, want):
        near(a, b)
    assert compiled or len(calls) >= 2


@pytest.mark.usefixtures("fused")
def test_a_compiled_layer_keeps_no_product() -> None:
    """One graph without a break, whose backward gets gate and up, the weights and the input."""
    ffn = SwiGLU(32, 64).to(DEVICE)  # sizes that the compiler does not pad on a GPU
    x = torch.randn(16, 32, device=DEVICE, requires_grad=True)
    compiled = torch.compile(ffn, fullgraph=True)
    with SavedBytes([x, *ffn.parameters()]) as kept:
        y = compiled(x)
    assert kept.total == 16 * 128 * 4
    near(y, plain(ffn.gate_up(x), ffn.down.weight))
    got = torch.autograd.grad(y.square().sum(), [x, *ffn.parameters()])
    want = torch.autograd.grad(plain(ffn.gate_up(x), ffn.down.weight).square().sum(), [x, *ffn.parameters()])
    for a, b in zip(got, want):
        near(a, b)


@pytest.mark.usefixtures("fused")
def test_hooks_and_other_layers_in_the_place_of_down_are_called() -> None:
    ffn, x = SwiGLU(6, 10).to(DEVICE), torch.randn(4, 6, device=DEVICE)
    seen: list[Tensor] = []
    handle = ffn.down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    want = ffn(x)
    assert len(seen) == 1
    handle.remove()
    near(ffn(x), want)
    assert len(seen) == 1
    ffn.down = torch.nn.Sequential(ffn.down, torch.nn.ReLU())  # type: ignore[assignment]
    near(ffn(x), want.relu())


@pytest.mark.usefixtures("fused")
def test_autocast_computes_as_the_layer_does() -> None:
    ffn, x = SwiGLU(6, 10, bias=True).to(DEVICE), torch.randn(4, 6, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        hidden = ffn.gate_up(x)
        got, want = ffn(x), ffn.down(swiglu(hidden))
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    got.sum().backward()
    assert {p.grad.dtype for p in ffn.parameters() if p.grad is not None} == {torch.float32}
    assert all(p.grad is not None for p in ffn.parameters())


def test_is_dear() -> None:
    """Selective checkpointing keeps the result, as it keeps those of products."""
    assert is_dear(torch.ops.deepseek.swiglu_linear.default)
