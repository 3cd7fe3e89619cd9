"""Fused products: on a CPU with a stand-in for the package's kernels, on a GPU with the package itself."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from deepseek.errors import ConfigError, MissingExtraError
from deepseek.nn.layers import SwiGLU
from deepseek.nn.moe import MoE, MoEConfig
from deepseek.ops import expert_rows, experts, fused_products, swiglu
from deepseek.ops.experts import dispatch, run_experts, sample_hidden
from deepseek.parallel.flops import flop_counter

CPU, GPU = torch.device("cpu"), torch.device("cuda")

#: Dynamo looks at the gradient of every input, and hides this warning with a filter that pytest overrides.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


class StandIn:
    """What ``Products`` promises, one expert after the other, and nonsense in the rows that are not used."""

    def up(self, x: Tensor, w: Tensor, starts: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        assert x.is_contiguous()
        assert w.is_contiguous()
        assert starts.dtype == token.dtype == torch.int32
        h = self.rows(x[token.long()], w, starts).unflatten(1, (-1, 2))
        return h, self._product(h)

    def down_gradient(
        self, d: Tensor, w: Tensor, h: Tensor, gate: Tensor, starts: Tensor, token: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert d.is_contiguous()
        assert gate.dtype == torch.promote_types(h.dtype, torch.float32)
        d = self.rows(d[token.long()], w.mT, starts)
        y = self._product(h)
        d_h, product = self._gradient(d * gate[:, None].to(d.dtype), h)
        return d_h, product * gate[:, None].to(d.dtype), (d * y).sum(1).to(gate.dtype)

    def rows(self, x: Tensor, w: Tensor, starts: Tensor) -> Tensor:
        out = x.new_full((x.shape[0], w.shape[2]), float("nan"))
        for e, (a, b) in enumerate(zip(starts.tolist(), starts.tolist()[1:])):
            out[a:b] = x[a:b] @ w[e]
        return out

    def outer(self, x: Tensor, y: Tensor, starts: Tensor, token: Tensor, turned: bool = False) -> Tensor:
        spans = list(zip(starts.tolist(), starts.tolist()[1:]))
        out = torch.stack([x[token[a:b].long()].mT @ y[a:b] for a, b in spans])
        return out.mT.contiguous().mT if turned else out

    def dense_up(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        h = (x @ w.T).unflatten(1, (2, -1)).mT.contiguous()
        return h, self._product(h)

    def dense_down_gradient(self, d: Tensor, w: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        assert d.is_contiguous()
        return self._gradient(d @ w, h)

    def _gradient(self, d: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        a, b = h.unbind(-1)
        s = a.sigmoid()
        return torch.stack((d * b * s * (1 + a * (1 - s)), d * a * s), -1), self._product(h)

    def _product(self, h: Tensor) -> Tensor:
        return F.silu(h[..., 0]) * h[..., 1]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The kernels, in plain torch; what was found out about the package is forgotten before and after."""
    found = StandIn()
    monkeypatch.setattr(fused_products, "products", lambda: found)
    monkeypatch.setattr("deepseek.ops.fused_experts.products", lambda: found)
    yield from fresh(found)


@pytest.fixture
def used(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the CPU go the fused way, in any dtype."""
    monkeypatch.setattr(fused_products, "usable", lambda *args: True)
    monkeypatch.setattr(swiglu, "fuses_network", lambda *args: True)
    monkeypatch.setattr("deepseek.nn.layers.fuses_network", lambda *args: True)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a Hopper GPU with whatever ``products`` gives: the small problems are done on the CPU instead."""
    for name in ("grouped_error", "dense_error"):
        real: Callable[[torch.device], float] = getattr(fused_products, name)
        monkeypatch.setattr(fused_products, name, lambda device, real=real: real(CPU))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.delenv("DEEPSEEK_FUSED_PRODUCTS", raising=False)
    yield from fresh(None)


def fresh(value: Any) -> Iterator[Any]:
    fused_products.package.forget()
    yield value
    fused_products.package.forget()


def problem(tokens: int, n: int, floor: int, skewed: bool, dtype: torch.dtype = torch.float64) -> Any:
    """Leaves ``x, gate, w_in, w_out`` and where assignments go."""
    random = torch.Generator().manual_seed(tokens + n + floor)
    D, inner, k = 12, 8, 2
    draw = lambda *shape: torch.randn(shape, generator=random, dtype=dtype)  # noqa: E731
    probs = draw(tokens, n).softmax(-1)
    if skewed:  # the last experts get nobody
        probs[:, n // 2 :] *= 1e-3
    expert = probs.topk(min(k, n), -1).indices.int()
    where = dispatch(expert, probs.float() if dtype != torch.float64 else probs, None, floor)
    gate = torch.rand(where.row_A.shape[0], generator=random, dtype=torch.promote_types(dtype, torch.float32))
    # The gate of a slot that is not used is 0 (``experts.gates``).
    gate = gate.where(where.row_A >= 0, 0.0)
    leaves = [draw(tokens, D), gate, draw(n, D, 2 * inner) * 0.3, draw(n, inner, D) * 0.3]
    return [x.requires_grad_() for x in leaves], where


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize(
    ("tokens", "n", "floor"), [(1, 3, 0), (40, 5, 0), (40, 5, 6), (33, 4, 33), (20, 1, 0)]
)
def test_experts_are_the_plain_path_s(tokens: int, n: int, floor: int, skewed: bool, used: None) -> None:
    leaves, where = problem(tokens, n, floor, skewed)
    x, gate, w_in, w_out = leaves
    want, plain = run_experts(x, gate, where, w_in, w_out, "loop")
    out, hidden = run_experts(x, gate, where, w_in, w_out)
    assert hidden.shape == (*plain.shape[:1], plain.shape[1] // 2, 2)
    torch.testing.assert_close(out, want)
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), leaves)
    exact = torch.autograd.grad((want * weight).sum(), leaves)
    for a, b in zip(got, exact):
        assert a.is_contiguous()
        torch.testing.assert_close(a, b)
    ends = where.ends_E
    torch.testing.assert_close(sample_hidden(hidden, ends, 4), sample_hidden(plain, ends, 4))


def test_a_layer_of_experts_counts_the_same_flops_and_compiles(
    used: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = MoE(16, MoEConfig(experts=4, top_k=2, expert_ffn=8))
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randn(2, 30, 16)

    def run(call: Any) -> list[Any]:
        layer.zero_grad()
        out, stats = call(x)
        (out.square().sum() + stats[0]).backward()
        return [out, stats.hidden_sum_EF, *(p.grad for p in layer.parameters())]

    with flop_counter() as counted:
        fused = run(layer)
    compiled = run(torch.compile(layer, fullgraph=True, backend="aot_eager"))
    monkeypatch.setattr(fused_products, "usable", lambda *args: False)
    torch._dynamo.reset()
    with flop_counter() as same:
        plain = run(layer)
    assert counted.get_total_flops() == same.get_total_flops() > 0
    for a, b, c in zip(fused, compiled, plain):
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(b, c, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [("gate_up", "down"), ("gate_up",), ("down",)])
def test_a_frozen_network_has_no_products_for_its_weights(frozen: tuple[str, ...], used: None) -> None:
    layer, x = SwiGLU(12, 20).double(), torch.randn(7, 12, dtype=torch.float64, requires_grad=True)
    (want,) = torch.autograd.grad(layer(x).square().sum(), x)
    for name in frozen:
        layer.get_submodule(name).requires_grad_(False)
    with flop_counter() as counted:
        layer(x).square().sum().backward()
    forward = 2 * 7 * (12 * 40 + 20 * 12)
    assert counted.get_total_flops() == forward * (2 if len(frozen) == 2 else 3)
    torch.testing.assert_close(x.grad, want)
    for name in ("gate_up", "down"):
        assert (layer.get_submodule(name).weight.grad is None) == (name in frozen)


def test_a_dense_network_is_the_plain_path_s(used: None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = SwiGLU(12, 20).double()
    x = torch.randn(3, 7, 12, dtype=torch.float64).requires_grad_()
    leaves = [x, *layer.parameters()]
    weight = torch.randn(3, 7, 12, dtype=torch.float64)

    def run(call: Any) -> list[Any]:
        for leaf in leaves:
            leaf.grad = None
        y = call(x)
        (y * weight).sum().backward()
        return [y, *(leaf.grad for leaf in leaves)]

    with flop_counter() as counted:
        fused = run(layer)
    compiled = run(torch.compile(layer, fullgraph=True, backend="aot_eager"))
    monkeypatch.setattr("deepseek.nn.layers.fuses_network", lambda *args: False)
    torch._dynamo.reset()
    with flop_counter() as same:
        plain = run(layer)
    assert counted.get_total_flops() == same.get_total_flops() > 0
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(compiled, plain)
    assert [g.is_contiguous() for g in fused] == [True] * 4


def test_a_network_with_a_bias_or_a_listener_goes_the_plain_way(
    used: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("fused")

    monkeypatch.setattr("deepseek.nn.layers.swiglu_network", never)
    x = torch.randn(4, 12)
    SwiGLU(12, 20, bias=True)(x)
    layer = SwiGLU(12, 20)
    handle = layer.gate_up.register_forward_hook(lambda *args: None)
    layer(x)
    handle.remove()
    with pytest.raises(AssertionError, match="fused"):
        layer(x)


def test_inference_takes_the_plain_path(used: None) -> None:
    (x, gate, w_in, w_out), where = problem(10, 3, 0, False)
    with torch.no_grad():
        assert run_experts(x, gate, where, w_in, w_out)[1].dim() == 2


# --- the package ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [True, False])
def test_kernels_that_work_are_taken(grouped: bool, stand_in: StandIn, gpu: None) -> None:
    state = torch.get_rng_state()
    assert fused_products.usable(GPU, torch.bfloat16, grouped, 1024, 768)
    assert not fused_products.usable(CPU, torch.bfloat16, grouped, 1024, 768)
    assert not fused_products.usable(GPU, torch.float32, grouped, 1024, 768)
    assert not fused_products.usable(GPU, torch.bfloat16, grouped, 1024, 772)
    assert torch.equal(state, torch.get_rng_state())
    with fused_products.forced(False):
        assert not fused_products.usable(GPU, torch.bfloat16, grouped, 1024, 768)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("name", ["up", "down_gradient", "rows", "outer", "dense_up", "dense_down_gradient"])
def test_kernels_that_are_wrong_are_told_once(
    name: str, grouped: bool, stand_in: StandIn, gpu: None, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    real = getattr(stand_in, name)

    def wrong(*args: Any, **options: Any) -> Any:
        found = real(*args, **options)
        return (*found[:-1], found[-1] * 1.1) if isinstance(found, tuple) else found * 1.1

    monkeypatch.setattr(stand_in, name, wrong, raising=False)
    concerned = grouped != name.startswith("dense")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert fused_products.usable(GPU, torch.bfloat16, grouped, 64) is not concerned
    assert len(caplog.records) == concerned
    if concerned:
        assert "off by" in caplog.text
        with fused_products.forced(True), pytest.raises(ConfigError, match="off by"):
            fused_products.usable(GPU, torch.bfloat16, grouped, 64)


@pytest.mark.parametrize("installed", [True, False])
def test_a_package_that_cannot_be_imported(
    installed: bool, gpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ModuleNotFoundError("nothing there", name="einops" if installed else "quack.gemm_interface")

    monkeypatch.setattr(fused_products, "products", fail)
    assert not fused_products.usable(GPU, torch.bfloat16, True, 64)
    assert not fused_products.usable(GPU, torch.bfloat16, False, 64)
    assert len(caplog.records) == installed  # a package that is simply not there is no news
    monkeypatch.setenv("DEEPSEEK_FUSED_PRODUCTS", "1")
    error, text = (ConfigError, "cannot be imported") if installed else (MissingExtraError, r"\[flash\]")
    with pytest.raises(error, match=text):
        fused_products.usable(GPU, torch.bfloat16, True, 64)


# --- gate and up as neighbours --------------------------------------------------------------------------------------


def test_pairs_and_back() -> None:
    w = torch.arange(12).view(2, 6)
    assert expert_rows.pair(w).tolist() == [[0, 3, 1, 4, 2, 5], [6, 9, 7, 10, 8, 11]]
    assert expert_rows.unpair(expert_rows.pair(w)).equal(w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 4, 10), (2, 2048), (1, 3000, 6), (0, 8)])
def test_the_kernels_of_pairs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from deepseek.ops.triton import experts as kernel

    w = torch.randn(shape).to("cuda" if torch.cuda.is_available() else "cpu", dtype)
    assert kernel.pair(w).equal(expert_rows.pair(w))
    assert kernel.unpair(w).equal(expert_rows.unpair(w))
    if w.numel():  # of a view, too
        assert kernel.pair(w.transpose(0, -1)[..., : w.shape[0] // 2 * 2]).equal(
            expert_rows.pair(w.transpose(0, -1)[..., : w.shape[0] // 2 * 2])
        )


@pytest.mark.parametrize("shape", [(6, 5), (2, 2048), (10, 2500), (0, 4)])
def test_the_kernel_of_paired_rows(shape: tuple[int, int]) -> None:
    pytest.importorskip("triton")
    from deepseek.ops.triton import swiglu as kernel

    w = torch.randn(shape).to("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)
    half = shape[0] // 2
    paired = torch.stack((w[:half], w[half:]), 1).flatten(0, 1)
    assert kernel.pair_rows(w).equal(paired)
    assert kernel.pair_rows(paired, reverse=True).equal(w)


@pytest.mark.parametrize("floor", [0, 5])
def test_the_kernels_of_gated_sums_and_neighbours(floor: int) -> None:
    pytest.importorskip("triton")
    from deepseek.ops.triton import experts as kernel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    (_, gate, _, _), where = problem(40, 5, floor, True, torch.float32)
    gate, where = gate.detach().to(device), experts.Dispatch(*(x.to(device) for x in where))
    rows = where.row_A.shape[0]
    y, hidden = torch.randn(rows, 24).to(device), torch.randn(rows, 8, 2).to(device)
    sizes = where.row_A, where.rescued_S, 40, 2
    torch.testing.assert_close(
        kernel.sum_rows(y, *sizes, gate), expert_rows.sum_rows(y, *sizes, gate), rtol=1e-5, atol=1e-5
    )
    for h in (hidden, hidden.mT.flatten(1)):
        got = kernel.sample_hidden(h, where.ends_E, 6)
        torch.testing.assert_close(got, expert_rows.sample_hidden(hidden, where.ends_E, 6))


# --- on a GPU with the package --------------------------------------------------------------------------------------

needs_package = pytest.mark.skipif(
    not torch.cuda.is_available()
    or torch.cuda.get_device_capability() not in fused_products.CAPABILITIES
    or fused_products.package.broken() is not None,
    reason="needs quack-kernels and a GPU of capability 9.0",
)


def close(found: Tensor, exact: Tensor) -> bool:
    return bool((found.double() - exact.double()).norm() <= 2e-2 * exact.double().norm() + 1e-3)


@needs_package
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("tokens", "n", "floor"), [(1, 4, 0), (1000, 8, 0), (1000, 8, 70), (4096, 64, 13)])
def test_the_package_runs_experts(tokens: int, n: int, floor: int) -> None:
    """Output and gradients against float64, with experts that nobody chose."""
    wide, where = problem(tokens, n, floor, True)
    wide = [x.detach().cuda().requires_grad_() for x in wide]
    D, inner = 136, 72
    for i, shape in ((0, (tokens, D)), (2, (n, D, 2 * inner)), (3, (n, inner, D))):
        wide[i] = (torch.randn(shape) * (1 if i == 0 else 0.1)).bfloat16().cuda().double().requires_grad_()
    where = experts.Dispatch(*(x.cuda() for x in where))
    narrow = [x.detach().to(torch.float32 if i == 1 else torch.bfloat16) for i, x in enumerate(wide)]
    narrow = [x.requires_grad_() for x in narrow]
    want = run_experts(wide[0], wide[1], where, wide[2], wide[3], "loop")[0]
    with fused_products.forced(True):
        out, hidden = run_experts(narrow[0], narrow[1], where, narrow[2], narrow[3])
    assert hidden.dim() == 3
    d_out = torch.randn_like(out)
    got = torch.autograd.grad(out, narrow, d_out)
    exact = torch.autograd.grad(want, wide, d_out.double())
    for a, b in zip((out, *got), (want, *exact)):
        assert close(a, b)


@needs_package
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows", [1, 130, 2048])
def test_the_package_runs_a_dense_network(rows: int) -> None:
    layer = SwiGLU(136, 208).cuda().bfloat16()
    exact = SwiGLU(136, 208).cuda().double()
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(rows, 136, device="cuda", dtype=torch.bfloat16).requires_grad_()
    d_y = torch.randn_like(x)
    with fused_products.forced(True):
        assert swiglu.fuses_network(x, layer.gate_up.weight, layer.down.weight)
        y = layer(x)
    got = torch.autograd.grad(y, [x, *layer.parameters()], d_y)
    wide = x.detach().double().requires_grad_()
    with fused_products.forced(False):
        want = exact(wide)
    grads = torch.autograd.grad(want, [wide, *exact.parameters()], d_y.double())
    for a, b in zip((y, *got), (want, *grads)):
        assert close(a, b)


@needs_package
@pytest.mark.filterwarnings("ignore")
def test_the_package_in_a_cuda_graph() -> None:
    layer = MoE(128, MoEConfig(experts=8, top_k=2, expert_ffn=64)).cuda().bfloat16()
    layer.router.float()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x = torch.randn(1, 512, 128, device="cuda", dtype=torch.bfloat16)
    step = lambda: torch.autograd.grad(layer(x)[0].square().sum(), [layer.gate_up, layer.down])  # noqa: E731
    stream = torch.cuda.Stream()
    with fused_products.forced(True), torch.cuda.stream(stream):
        want = [g.clone() for g in step()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with fused_products.forced(True), torch.cuda.graph(graph, stream=stream):
        got = step()
    for g in got:
        g.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(got, want):
        assert close(a, b)
