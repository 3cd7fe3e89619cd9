"""``ds.jit``: what its passes do to a graph, one compilation for all alike blocks, fewer launches, a cache."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters

import deepseek as ds
from deepseek.bench.fusion import launches
from deepseek.errors import ConfigError
from deepseek.models.config import tiny
from deepseek.nn.attention import Context
from deepseek.ops import fusion
from deepseek.ops.jit import compile_blocks, jit, keep_compiled

# Dynamo looks at `.grad` of what it is given.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


class Projections(nn.Module):
    """Three projections of one input, two of another, one alone."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8, bias), nn.Linear(8, 4, bias), nn.Linear(8, 4, bias)
        self.gate, self.up, self.down = nn.Linear(8, 6, bias), nn.Linear(8, 6, bias), nn.Linear(6, 8, bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.q(x) * torch.cat([self.k(x), self.v(x)], -1)
        return self.down(F.silu(self.gate(y)) * self.up(y))


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


def linears(graph: fx.Graph) -> int:
    return sum(node.target in fusion.LINEAR for node in graph.nodes)


def merged(module: nn.Module, seen: list[int]) -> Callable[..., Any]:
    """``module`` compiled by a backend that does nothing but merge; counts linear layers before and after."""

    def backend(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        seen.append(linears(graph.graph))
        fusion.merge_linears(graph.graph)
        graph.recompile()
        seen.append(linears(graph.graph))
        return graph.forward

    return torch.compile(module, backend=backend, dynamic=False)


def gradients(module: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    module.zero_grad()
    call(x).square().sum().backward()
    assert x.grad is not None
    return [x.grad, *(p.grad.clone() for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("bias", [False, True])
def test_projections_of_one_input_become_one(bias: bool) -> None:
    module, x, seen = Projections(bias).double(), torch.randn(3, 5, 8, dtype=torch.float64), list[int]()
    fast = merged(module, seen)
    torch.testing.assert_close(fast(x), module(x))
    assert seen == [6, 3]
    for a, b in zip(gradients(module, fast, x), gradients(module, module, x), strict=True):
        torch.testing.assert_close(a, b)


def test_few_rows_are_left_alone() -> None:
    seen: list[int] = []
    merged(Projections(True), seen)(torch.randn(7, 8))
    assert seen == [6, 6]


def test_autocast_regions_and_made_weights_are_not_mixed() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8, False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                y = self.a(x)
            return y + self.b(x) + F.linear(x, self.c.weight * 2)

    seen: list[int] = []
    module, x = Mixed(), torch.randn(16, 8)
    torch.testing.assert_close(merged(module, seen)(x), module(x))
    assert seen == [3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations_join_the_matrix_product(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the joint operation computes another gelu, so only relu is compared in value."""
    from torch._inductor.pattern_matcher import fwd_only
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode

    def work(bias: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        tanh = F.gelu(torch.addmm(bias, x, weight), approximate="tanh")
        return tanh, F.relu(torch.addmm(bias, x, weight)), F.gelu(torch.addmm(bias, x, weight))

    inputs = [torch.randn(s, dtype=dtype) for s in ((4,), (6, 3), (3, 4))]
    fake = FakeTensorMode()
    with fake:
        graph = fwd_only(work, [fake.from_tensor(x) for x in inputs])
    joint = torch.ops.aten._addmm_activation.default
    with V.set_fake_mode(fake):
        fusion.fuse_activations(graph.graph)
        assert not any(node.target is joint for node in graph.graph.nodes)
        monkeypatch.setattr(fusion, "EPILOGUES", ("cpu",))
        fusion.fuse_activations(graph.graph)
    graph.recompile()
    assert [n.kwargs.get("use_gelu", False) for n in graph.graph.nodes if n.target is joint] == [True, False]
    found, expected = graph(*inputs), work(*inputs)
    torch.testing.assert_close(found[1], expected[1])
    torch.testing.assert_close(found[2], expected[2])


def test_sixteen_blocks_are_one_compilation() -> None:
    model = ds.Transformer(tiny(layers=16, pattern="F", hidden=32, vocab_size=64, moe=ds.MoEConfig()))
    tokens = torch.randint(0, 64, (2, 16))
    expected = gradients_of(model, tokens)
    compile_blocks(model.blocks, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients_of(model, tokens), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["aot_autograd"]["total"] == 1


def test_one_compilation_for_each_kind_of_block() -> None:
    """Experts and hybrid attention included, without a break in the graph."""
    model = ds.Transformer(tiny(layers=6, pattern="LLH", hidden=32, vocab_size=64))
    compile_blocks(model.blocks, fullgraph=True, backend="aot_eager")
    gradients_of(model, torch.randint(0, 64, (2, 16)))
    assert counters["stats"]["unique_graphs"] == 2


def gradients_of(model: ds.Transformer, tokens: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(tokens).hidden.square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.slow
def test_half_the_launches_and_the_same_result() -> None:
    """A block of ours: at most half as many operators and loops as eagerly, error at most 1e-5."""
    config = tiny(layers=1, pattern="F", hidden=32, vocab_size=64, moe=ds.MoEConfig())
    block = ds.Transformer(config).blocks[0]
    with torch.no_grad():
        for p in block.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    x, context = torch.randn(2, 64, 32), Context(config.attention, 64, torch.device("cpu"), kinds="F")
    with torch.no_grad(), torch._inductor.config.patch({"cpp.enable_kernel_profile": True}):
        fast = jit(block, fullgraph=True, dynamic=False)
        assert float((fast(x, context)[0] - block(x, context)[0]).abs().max()) <= 1e-5
        eager = launches(lambda: block(x, context), x.device)
        compiled = launches(lambda: fast(x, context), x.device)
    assert 0 < compiled <= eager / 2


def test_a_pass_can_be_part_of_the_key_of_torchs_cache() -> None:
    from torch._inductor.custom_graph_pass import CustomGraphPass

    for made in fusion.options().values():
        assert isinstance(made, CustomGraphPass)
        again = pickle.loads(pickle.dumps(made))
        assert again.change is made.change
        assert again.uuid() == made.uuid()
    assert len({made.uuid() for made in fusion.options().values()}) == 2


@pytest.mark.slow
def test_the_next_process_finds_what_was_compiled(tmp_path: Path) -> None:
    code = """
import sys, torch, deepseek as ds
from torch._dynamo.utils import counters
from deepseek.ops.jit import keep_compiled
print(keep_compiled(sys.argv[1]))
linear = torch.nn.Linear(8, 8)
with torch.no_grad():
    ds.jit(lambda x: linear(x).relu() * 2, dynamic=False)(torch.ones(16, 8))
print(counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"])
"""
    hits = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
        )
        place, hit = done.stdout.split()
        assert Path(place).parent == tmp_path
        hits.append(int(hit))
    assert hits[0] == 0
    assert hits[1] > 0


def test_a_machine_does_not_find_what_was_compiled_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    places = []
    for kind in ("AVX512", "AVX2", "NO AVX"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: kind)  # noqa: B023
        places.append(keep_compiled(tmp_path))
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(places[-1])
    assert places == [tmp_path / "avx512", tmp_path / "avx2", tmp_path / "no-avx"]


def test_decorator_and_modes() -> None:
    @jit(fullgraph=True)
    def double(x: Tensor) -> Tensor:
        return 2 * x

    assert callable(double)
    assert ds.jit is jit
    with pytest.raises(ConfigError, match="did you mean 'max-autotune'"):
        jit(nn.Linear(2, 2), mode="max-autotone")


def test_without_the_private_hooks_it_is_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch._inductor.custom_graph_pass", None)
    assert fusion.options() == {}
