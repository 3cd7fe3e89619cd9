"""The serving step's expert kernels against one assignment at a time: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from deepseek.ops.decode_experts import DeviceExperts, PackedExperts, experts_reference
from deepseek.ops.packed_linear import PackedSwiGLU
from deepseek.ops.triton import decode_experts as kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
C, F = 40, 18


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, a program costs what it costs whatever its size."""
    if DEVICE == "cpu":
        larger = {"few_gate_up": {"BF": 4}, "few_down": {"BC": 8}}
        tiles = {name: tile | larger.get(name, {}) for name, tile in kernel.TILES.items()}
        monkeypatch.setattr(kernel, "TILES", tiles)


def make(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def layer(experts: int, popular: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias = make(1, experts) * 0.05
    bias[experts // 2] += popular
    return make(0, experts, C) * 0.1, bias, make(2, experts, C, 2 * F) * 0.2, make(3, experts, F, C) * 0.2


@pytest.mark.parametrize("path", ["few", "grouped"])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("experts", "top_k"), [(6, 2), (17, 3), (3, 1)])
def test_equals_one_assignment_at_a_time(path: str, experts: int, top_k: int, normalise: bool) -> None:
    router, bias, gate_up, down = layer(experts)
    for rows in (1, 2) if path == "few" else (1, 40):
        x = make(rows, rows, C)
        want = experts_reference(x, router, bias, gate_up, down, top_k, normalise)
        out, expert, gate = getattr(kernel, path)(
            x, router, bias, gate_up.mT.contiguous(), down.mT.contiguous(), top_k, normalise
        )
        assert expert.equal(want[1])
        torch.testing.assert_close(gate, want[2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out, want[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", ["few", "grouped"])
def test_half_precision(path: str) -> None:
    half = (
        torch.bfloat16 if DEVICE == "cuda" else torch.float16
    )  # the interpreter's dot takes bf16 for integers
    router, bias, *weights = layer(6)
    gate_up, down = (w.to(half) for w in weights)
    x = make(2, 3, C).to(half)
    want = experts_reference(x.float(), router, bias, gate_up, down, 2, True)
    weights = gate_up.mT.contiguous(), down.mT.contiguous()
    out, expert, _ = getattr(kernel, path)(x, router, bias, *weights, 2, True)
    assert out.dtype == half
    assert expert.equal(want[1])
    assert float((out.float() - want[0]).norm() / want[0].norm()) < 1e-2


def test_a_popular_expert_fills_several_blocks() -> None:
    router, bias, gate_up, down = layer(5, popular=9.0)
    x = make(7, 45, C)
    want = experts_reference(x, router, bias, gate_up, down, 2, True)
    out, expert, _ = kernel.grouped(x, router, bias, gate_up.mT.contiguous(), down.mT.contiguous(), 2, True)
    assert bool((expert == 2).any(1).all())
    torch.testing.assert_close(out, want[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("n", "experts"), [(1, 4), (40, 4), (300, 7), (129, 65), (64, 200)])
def test_blocks_hold_every_assignment_once(n: int, experts: int) -> None:
    generator = torch.Generator().manual_seed(n)
    expert = (torch.rand(n, generator=generator) ** 3 * experts).int().to(DEVICE)
    order, block_expert, first, rows = (t.tolist() for t in kernel.sort_blocks(expert, experts))
    assert order == expert.argsort(stable=True).tolist()
    places = []
    for e, start, count in zip(block_expert, first, rows):
        assert 0 <= count <= kernel.BLOCK
        mine = list(range(start, start + count))
        assert all(int(expert[order[p]]) == e for p in mine)
        places += mine
    assert places == list(range(n))


@pytest.mark.parametrize("find", [0, 512])
def test_rows_of_the_grouped_path_do_not_depend_on_the_others(
    find: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    router, bias, gate_up, down = layer(4)
    gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
    x, norm, residual = make(5, 50, C), (make(6, C), 1e-5), make(7, 50, C)
    whole = kernel.grouped(x, router, bias, gate_up, down, 2, True, norm=norm, residual_NC=residual)
    monkeypatch.setattr(kernel, "FIND", find)
    for first, rows in ((0, 1), (49, 1), (7, 20)):
        own = slice(first, first + rows)
        part = kernel.grouped(
            x[own], router, bias, gate_up, down, 2, True, norm=norm, residual_NC=residual[own]
        )
        assert all(got.equal(want[own]) for got, want in zip(part, whole))


@pytest.mark.parametrize(
    ("rows", "experts", "popular"),
    [(1, 9, 0.0), (4, 20, 9.0), (7, 14, 0.0), (33, 9, 9.0), (130, 3, 9.0)],
)
def test_every_number_of_rows_finds_its_experts(rows: int, experts: int, popular: float) -> None:
    router, bias, gate_up, down = layer(experts, popular)
    x = make(rows, rows, C)
    want = experts_reference(x, router, bias, gate_up, down, 2, True)
    out, expert, _ = kernel.grouped(x, router, bias, gate_up.mT.contiguous(), down.mT.contiguous(), 2, True)
    assert expert.equal(want[1])
    torch.testing.assert_close(out, want[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", ["few", "grouped"])
def test_the_norm_before_and_the_residual_after(path: str) -> None:
    router, bias, gate_up, down = layer(6)
    x, residual, norm = make(4, 2, C) * 3, make(5, 2, C), (make(6, C), 1e-5)
    h = torch.nn.functional.rms_norm(x, (C,), *norm)
    want = experts_reference(h, router, bias, gate_up, down, 3, False)
    weights = gate_up.mT.contiguous(), down.mT.contiguous()
    out, expert, gate = getattr(kernel, path)(
        x, router, bias, *weights, 3, False, norm=norm, residual_NC=residual
    )
    assert expert.equal(want[1])
    torch.testing.assert_close(gate, want[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out, residual + want[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", ["few", "grouped"])
def test_inputs_in_several_steps(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {"few_gate_up": "BC", "few_down": "BF", "gate_up": "BC", "down": "BF"}
    tiles = {name: tile | {steps[name]: 16} for name, tile in kernel.TILES.items()}
    monkeypatch.setattr(kernel, "TILES", tiles)
    router, bias, gate_up, down = layer(6)
    x = make(4, 2, C)
    want = experts_reference(x, router, bias, gate_up, down, 3, True)
    out, _, _ = getattr(kernel, path)(x, router, bias, gate_up.mT.contiguous(), down.mT.contiguous(), 3, True)
    torch.testing.assert_close(out, want[0], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter: NumPy says what it thinks of NaN
@pytest.mark.parametrize("path", ["few", "grouped"])
def test_rows_that_are_not_finite_still_go_to_experts_that_exist(path: str) -> None:
    router, bias, gate_up, down = layer(6)
    x = make(0, 3, C)
    x[1], x[2, 7] = float("nan"), float("inf")
    out, expert, _ = getattr(kernel, path)(
        x, router, bias, gate_up.mT.contiguous(), down.mT.contiguous(), 2, True
    )
    assert int(expert.min()) >= 0
    assert int(expert.max()) < 6
    assert bool(out[0].isfinite().all())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("rows", [2, 12])
def test_the_layer_with_its_norm_and_residual(rows: int, shared: bool) -> None:
    router, bias, gate_up, down = layer(6)
    x, residual, norm = make(4, rows, C), make(5, rows, C), (make(6, C), 1e-5)
    device = DeviceExperts(router, bias, gate_up, down, 2, True, "fp32", DEVICE, exact=False)
    device.kernels = kernel  # in the interpreter too
    dense = PackedSwiGLU(make(7, 2 * F, C), None, make(8, C, F), None, "fp32", DEVICE) if shared else None
    packed = PackedExperts(router, bias, gate_up, down, 2, True, "fp32", DEVICE, shared=dense)
    packed._layer = device
    out, expert, gate = packed.fused(x, norm, residual)
    h = torch.nn.functional.rms_norm(x, (C,), *norm)
    want = experts_reference(h, router, bias, gate_up, down, 2, True)
    assert expert.equal(want[1])
    torch.testing.assert_close(gate, want[2], rtol=1e-4, atol=1e-5)
    wanted = residual + want[0] + (dense(h) if dense is not None else 0)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-3)
