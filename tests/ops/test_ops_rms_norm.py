"""RMSNorm with the residual stream as operations: values, gradients, what is kept, and how a block compiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.config import replace
from deepseek.models import Transformer
from deepseek.models.config import tiny
from deepseek.nn.layers import RMSNorm
from deepseek.ops import rms_norm as op
from deepseek.ops.rms_norm import (
    WIDEST,
    add_rms_norm,
    add_rms_norm_twice,
    fuses,
    rms_norm,
    rms_norm_beside,
)
from deepseek.ops.triton import DTYPES
from deepseek.parallel.flops import flop_counter
from deepseek.parallel.memory import activation_checkpoint
from deepseek.parallel.saved import SavedBytes
from deepseek.parallel.selective import is_dear

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
EPS = 1e-5
#: The compiler looks at it.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers use the operations off a GPU, too (their plain torch)."""
    monkeypatch.setattr(op, "fuses", lambda x: x.dtype in DTYPES)


def near(got: Tensor, want: Tensor, slack: float = 1e-4) -> None:
    """Within what the order of sums may change."""
    slack = 1e-10 if got.dtype == torch.float64 else slack
    torch.testing.assert_close(got, want, rtol=slack, atol=slack)


def today(x: Tensor, weight: Tensor) -> Tensor:
    """The layer's plain torch."""
    wide = x if x.dtype == torch.float64 else x.float()
    return F.rms_norm(wide, weight.shape, weight.to(wide.dtype), EPS).to(x.dtype)


def alone(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (rms_norm(x + y, weight, EPS),)


def beside(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return rms_norm_beside(x + y, weight, EPS)


def added(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return add_rms_norm(x, y, weight, EPS)


def twice(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Two readers of one norm."""
    total, normed, again = add_rms_norm_twice(x, y, weight, EPS)
    return total, normed * 0.25 + again * 0.75


def plain(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return x + y, today(x + y, weight)


ALL = [alone, beside, added, twice]


def given(dtype: torch.dtype, *shape: int, features: int = 6) -> list[Tensor]:
    sizes = [(*shape, features), (*shape, features), (features,)]
    return [torch.randn(s, dtype=dtype, device=DEVICE, requires_grad=True) for s in sizes]


@pytest.mark.parametrize("f", ALL)
@pytest.mark.parametrize("shape", [(4,), (2, 3), (), (0,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_equals_plain_torch(f: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Both results, and the gradients when both are used and when either is."""
    tensors = given(dtype, *shape)
    got, want = f(*tensors), plain(*tensors)[2 - len(f(*tensors)) :]
    ds = [torch.randn_like(y) for y in want]
    for a, b in zip(got, want):
        near(a, b)
    for used in ([0], [1], [0, 1])[: 3 if len(got) == 2 else 1]:
        results = [
            torch.autograd.grad(
                [y[i] for i in used], tensors, [ds[i] for i in used], retain_graph=True, allow_unused=True
            )
            for y in (got, want)
        ]
        for t, a, b in zip(tensors, *results):
            near(*(torch.zeros_like(t) if g is None else g for g in (a, b)))


@pytest.mark.parametrize("f", ALL)
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_gradients_against_differences(f: Any, needed: tuple[int, ...]) -> None:
    tensors = given(torch.float64, 3)
    for i, t in enumerate(tensors):
        t.requires_grad_(i in needed)
    assert torch.autograd.gradcheck(f, tensors)


@pytest.mark.parametrize("f", [beside, added, twice])
@pytest.mark.parametrize(
    "change", [lambda y: y.sum(), lambda y: y.mT.contiguous().square().sum(), lambda y: y[:, ::2].sum()]
)
def test_gradients_that_are_not_contiguous(f: Any, change: Callable[[Tensor], Tensor]) -> None:
    tensors = given(torch.float32, 6)
    got, want = (
        torch.autograd.grad(change(total) + change(normed), tensors)
        for total, normed in (f(*tensors), plain(*tensors))
    )
    for a, b in zip(got, want):
        near(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_formats_are_as_near_to_float64_as_plain_torch_is(dtype: torch.dtype) -> None:
    tensors = given(dtype, 64, features=48)
    total = (tensors[0] + tensors[1]).detach().double().requires_grad_()
    weight = tensors[2].detach().double().requires_grad_()
    ds = [torch.randn(64, 48, device=DEVICE).to(dtype) for _ in range(2)]
    d, d_weight = torch.autograd.grad(
        [total, F.rms_norm(total, (48,), weight, EPS)], [total, weight], [d.double() for d in ds]
    )
    got, eager = (torch.autograd.grad(f(*tensors), tensors, ds) for f in (added, plain))
    for a, b, c in zip(got, eager, (d, d, d_weight)):
        assert (a - c).norm() <= 1.1 * (b - c).norm() + 1e-9
    for a, b in zip(added(*tensors), plain(*tensors)):
        near(a.float(), b.float(), 1e-4 if not CUDA else 1e-2)
        assert CUDA or a.equal(b)


def test_a_gradient_that_two_inputs_share_is_not_added_to() -> None:
    """``x`` and ``y`` get one tensor; each has another gradient, and each keeps one from before."""
    tensors = given(torch.float32, 5)
    for f in (added, plain):
        for t in tensors:
            t.grad = None
        for _ in range(2):
            x, y = tensors[0] * 2, tensors[1] * 3
            total, normed = f(x, y, tensors[2])
            (total.sin().sum() + normed.cos().sum() + x.square().sum() + y.exp().sum()).backward()
            total, normed = f(tensors[0], tensors[1], tensors[2])
            (total.cos().sum() + normed.sin().sum()).backward()
        if f is added:
            got = [t.grad for t in tensors]
    assert got[0].data_ptr() != got[1].data_ptr()  # type: ignore[union-attr]
    for t, a in zip(tensors, got):
        assert a is not None
        assert t.grad is not None
        near(a, t.grad)


@pytest.mark.parametrize("f", ALL)
def test_the_sum_and_a_number_a_row_are_kept(f: Any) -> None:
    tensors = given(torch.bfloat16, 8)
    tensors[2] = nn.Parameter(tensors[2].detach())
    with SavedBytes() as kept:
        f(*tensors)
    assert kept.total == 8 * 6 * 2 + 8 * 4
    with torch.no_grad():
        assert not any(y.requires_grad for y in f(*tensors))


@pytest.mark.parametrize("f", ALL)
def test_what_is_kept_outlives_a_backward_pass_and_must_not_change(f: Any) -> None:
    tensors = given(torch.float32, 4)
    x, y = tensors[0] * 1, tensors[1] * 1
    results = f(x, y, tensors[2])
    loss = sum(r.square().sum() for r in results)
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, tensors, retain_graph=True)):
        assert a.equal(b)
    with torch.no_grad():
        tensors[2].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("f", ALL)
def test_a_second_derivative_is_refused(f: Any) -> None:
    tensors = given(torch.float32, 4)
    gradient = torch.autograd.grad(f(*tensors)[-1].square().sum(), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|no autograd formula"):
        gradient[0].sum().backward()


def test_the_operations_are_well_formed() -> None:
    x, y, weight = given(torch.float32, 4)
    ops = torch.ops.deepseek
    torch.library.opcheck(ops.rms_norm.default, (x, weight, EPS))
    torch.library.opcheck(ops.add_rms_norm.default, (x, y, weight, EPS))
    d, total, weight = y.detach(), x.detach(), weight.detach()
    rstd = ops.rms_norm(total, weight, EPS)[1]
    for d_again, d_sum, weight_too in ((None, None, True), (None, d.sin(), False), (d.cos(), d.sin(), True)):
        torch.library.opcheck(
            ops.rms_norm_backward.default, (d, d_again, d_sum, total, weight, rstd, weight_too)
        )


def test_no_products_and_nothing_dear() -> None:
    tensors = given(torch.float32, 4)
    with flop_counter() as counter:
        sum(r.sum() for r in added(*tensors)).backward()  # type: ignore[union-attr]
    assert counter.get_total_flops() == 0
    assert not is_dear(torch.ops.deepseek.rms_norm.default)
    assert not is_dear(torch.ops.deepseek.add_rms_norm.default)


def test_only_cuda_and_the_kernels_dtypes_and_sizes_are_fused() -> None:
    assert not fuses(torch.empty(1))
    assert not fuses(torch.empty(1, device="meta"))
    with torch._subclasses.FakeTensorMode():
        assert all(fuses(torch.empty(2, WIDEST, device="cuda", dtype=d)) for d in DTYPES)
        assert not any(fuses(torch.empty(2, n, device="cuda")) for n in (0, WIDEST + 1))
        assert not fuses(torch.empty(2, 3, device="cuda", dtype=torch.float64))


def calls(f: Callable[[], Any]) -> list[str]:
    """Names of the operations of ours, and of torch's additions, that ``f`` runs."""
    names: list[str] = []

    class Listen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.name().partition(".")[0]
            if func.namespace == "deepseek" or name == "aten::add":
                names.append(name)
            return func(*args, **(kwargs or {}))

    with Listen():
        f()
    return names


OURS = ["deepseek::rms_norm", "deepseek::rms_norm", "deepseek::add_rms_norm", "deepseek::add_rms_norm"]


def every(norm: RMSNorm, x: Tensor) -> None:
    """A layer's four ways."""
    norm(x), norm.beside(x), norm.after_sum(x, x), norm.after_sum_twice(x, x)


def test_layers_choose_by_where_a_tensor_is() -> None:
    norm, x = RMSNorm(6, EPS), torch.randn(4, 6)
    for y in (norm(x), norm.beside(x)[1], norm.after_sum(x, x * 0)[1]):
        assert y.equal(today(x, norm.weight))
    assert norm.beside(x)[0] is x
    assert norm.after_sum_twice(x, x * 0)[2] is None
    assert calls(lambda: every(norm, x)) == ["aten::add"] * 2
    # Without gradients: autograd asks after a stream of the device, and it may not be there.
    with torch._subclasses.FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        norm, x = RMSNorm(6), torch.empty(4, 6)
        assert calls(lambda: every(norm, x)) == OURS
        assert calls(lambda: every(norm, x.bfloat16())) == OURS


@pytest.mark.usefixtures("fused")
def test_autocast_is_left_to_a_compiler() -> None:
    """There the norm's result is narrowed, and the sum has two formats."""
    norm, x = RMSNorm(6).to(DEVICE), torch.randn(4, 6, device=DEVICE)
    assert calls(lambda: every(norm, x)) == OURS
    with torch.autocast(DEVICE, torch.bfloat16):
        apart = ["aten::add", "deepseek::rms_norm"]
        assert calls(lambda: every(norm, x)) == [*OURS[:2], *apart, *apart]
        assert calls(lambda: every(norm, x.bfloat16())) == OURS
    assert norm.after_sum(x.bfloat16(), x)[0].dtype == torch.float32


@pytest.mark.usefixtures("fused")
def test_who_listens_to_a_norm_hears_it() -> None:
    norm, x, seen = RMSNorm(6).to(DEVICE), torch.randn(4, 6, device=DEVICE), []
    norm.register_forward_hook(lambda module, args, out: seen.append(out))
    near(norm.beside(x)[1], norm.after_sum(x, x * 0)[1])
    assert len(seen) == 2


@pytest.mark.usefixtures("fused")
def test_a_norm_with_a_forward_of_its_own_is_called() -> None:
    """As libraries do that bring a module's weights when it runs."""
    norm, x, calls = RMSNorm(6).to(DEVICE), torch.randn(4, 6, device=DEVICE), []
    real = norm.forward
    norm.forward = lambda x: calls.append(x) or real(x)  # type: ignore[method-assign, func-returns-value]
    near(norm.beside(x)[1], norm.after_sum(x, x * 0)[1])
    assert len(calls) == 2


class Residual(nn.Module):
    """What a block does with its norms, around matrices instead of attention."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.first, self.second = RMSNorm(size), RMSNorm(size)
        self.mix, self.ffn = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.first.beside(x)
        x, y = self.second.after_sum(x, self.mix(y))
        return x + self.ffn(y)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What one test compiled is nobody else's."""
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fused")
def test_a_compiled_block_adds_nothing_in_backward() -> None:
    """One graph without a break; both parts of the residual's gradient go into the norms' kernels."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition
    )
    block = Residual(8).to(DEVICE)
    x = torch.randn(5, 8, device=DEVICE, requires_grad=True)
    inputs = [x, *block.parameters()]
    want = torch.autograd.grad(block(x * 1).square().sum(), inputs)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for a, b in zip(torch.autograd.grad(compiled(x * 1).square().sum(), inputs), want):
        near(a, b)
    forward, backward = ([n.target for n in g.graph.nodes if n.op == "call_function"] for g in graphs)
    ops, add = torch.ops.deepseek, torch.ops.aten.add.Tensor
    assert backward.count(ops.rms_norm_backward.default) == 2
    assert backward.count(add) == 0
    assert forward.count(ops.rms_norm.default) == forward.count(ops.add_rms_norm.default) == 1
    assert forward.count(add) == 1
    assert not any(target in backward for target in (ops.rms_norm.default, ops.add_rms_norm.default))


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize(
    "backend", ["aot_eager_decomp_partition", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_a_compiled_block_keeps_no_more_than_it_did(backend: str) -> None:
    block = Residual(32).to(DEVICE)
    x = torch.randn(16, 32, device=DEVICE, requires_grad=True)
    inputs, kept, found = [x, *block.parameters()], [], []
    for on in (True, False):
        torch._dynamo.reset()
        with pytest.MonkeyPatch.context() as off:
            if not on:
                off.setattr(op, "fuses", lambda x: False)
            compiled = torch.compile(block, fullgraph=True, backend=backend)
            with SavedBytes([x, *block.parameters()]) as count:
                y = compiled(x)
            kept.append(count.total)
            found.append(torch.autograd.grad(y.square().sum(), inputs))
    assert kept[0] <= kept[1]
    for a, b in zip(*found):
        near(a, b)


MODES = [
    ("none", False), ("blocks", False), ("selective", False), ("budget=0.9", False),
    ("none", True), ("blocks", True), ("selective", True), ("budget=0.5", True),
]  # fmt: skip


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize(("mode", "compiled"), MODES)
def test_blocks_in_every_mode(mode: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = nn.Sequential(Residual(6), Residual(6)).to(DEVICE)
    x = torch.randn(2, 4, 6, device=DEVICE, requires_grad=True)
    inputs = [x, *blocks.parameters()]
    with monkeypatch.context() as off:
        off.setattr(op, "fuses", lambda x: False)
        want = torch.autograd.grad(blocks(x).square().sum(), inputs)
    activation_checkpoint(blocks, mode)
    if compiled:
        for block in blocks:
            block.compile(fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for a, b in zip(torch.autograd.grad(blocks(x).square().sum(), inputs), want):
            near(a, b)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("compiled", [False, True])
def test_selective_keeps_products_and_not_norms(compiled: bool) -> None:
    """Of a block: its input, both products, and nothing else."""
    blocks = nn.Sequential(Residual(32)).to(DEVICE)
    x = torch.randn(16, 32, device=DEVICE, requires_grad=True) * 1
    activation_checkpoint(blocks, "selective")
    if compiled:
        blocks[0].compile(fullgraph=True, backend="aot_eager_decomp_partition")
    with SavedBytes(blocks.parameters()) as kept:
        y = blocks(x)
    assert kept.total <= 3 * 16 * 32 * 4
    y.sum().backward()


def model(pattern: str, ffn: str) -> Transformer:
    torch.manual_seed(0)
    made = Transformer(replace(tiny(vocab_size=64, pattern=pattern, ffn_pattern=ffn), tie_embeddings=False))
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)
    return made.to(DEVICE)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("pattern", "ffn"), [("FLH", "DDD"), ("LF", "DE")])
def test_a_models_gradients(pattern: str, ffn: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms with the residual stream, against norms and sums as they were."""
    made, tokens = model(pattern, ffn), torch.randint(0, 64, (2, 40), device=DEVICE)
    documents = (torch.arange(40, device=DEVICE) >= 13).int().expand(2, 40).contiguous()
    positions = torch.cat((torch.arange(13), torch.arange(27))).expand(2, 40).to(DEVICE)

    def gradients() -> list[Tensor]:
        out = made(tokens, documents, positions)
        loss = made.logits(out.hidden).logsumexp(-1).square().mean()
        found = torch.autograd.grad(loss, list(made.parameters()), allow_unused=True)
        return [loss, *(torch.zeros(()) if g is None else g for g in found)]

    monkeypatch.setattr(op, "fuses", lambda x: False)
    want = gradients()
    monkeypatch.setattr(op, "fuses", lambda x: x.dtype in DTYPES)
    if compiled:
        for block in made.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(), want):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.detach().abs().max() + 1))


def test_a_router_reads_what_a_hook_gives_to_its_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    made, tokens = model("L", "E"), torch.randint(0, 64, (2, 40), device=DEVICE)
    ffn = made.blocks[0].get_submodule("ffn")
    ffn.register_forward_pre_hook(lambda module, args: (args[0].flip(-1), *args[1:]))
    monkeypatch.setattr(op, "fuses", lambda x: False)
    want = made(tokens)
    monkeypatch.setattr(op, "fuses", lambda x: x.dtype in DTYPES)
    got = made(tokens)
    near(got.hidden, want.hidden)
    assert got.layers[0].routing.chosen_E.equal(want.layers[0].routing.chosen_E)
