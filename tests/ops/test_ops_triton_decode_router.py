"""The serving step's router against a product in float64: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from deepseek.ops import expert_rows
from deepseek.ops.triton import decode_router as kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def normalised(x: Tensor, norm: tuple[Tensor, float] | None) -> Tensor:
    """In float64."""
    x = x.double()
    return x if norm is None else torch.nn.functional.rms_norm(x, x.shape[1:], norm[0].double(), norm[1])


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(("rows", "hidden", "experts"), [(1, 40, 6), (18, 300, 17), (2, 2100, 33)])
def test_parts_add_up_to_the_product(rows: int, hidden: int, experts: int, with_norm: bool) -> None:
    x, weight = make(0, rows, hidden), make(1, experts, hidden)
    norm = (make(2, hidden), 1e-5) if with_norm else None
    h = normalised(x, norm)
    want = h @ weight.double().T
    logits, squares = kernel.router_logits(x, weight, norm)
    assert logits.shape[1] <= kernel.MOST_PARTS
    got = logits.double().sum(1)
    if norm is not None:
        assert squares is not None
        got *= (squares.double().sum(1) / hidden + norm[1]).rsqrt()[:, None]
    assert float((got - want).norm() / want.norm()) < 1e-6
    (logits, _), rows_after = kernel.row_logits(x, weight, norm)
    assert logits.shape[1] == 1
    assert float((logits.double().sum(1) - want).norm() / want.norm()) < 1e-6
    torch.testing.assert_close(rows_after.double(), h, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("experts", "top_k"), [(6, 2), (17, 3), (64, 1)])
def test_chooses_as_the_router_of_training(
    experts: int, top_k: int, normalise: bool, with_norm: bool
) -> None:
    hidden = 200
    x, weight, bias = make(0, 20, hidden), make(1, experts, hidden) * 0.1, make(2, experts) * 0.05
    norm = (make(3, hidden), 1e-5) if with_norm else None
    h = normalised(x, norm)
    _, expert, gate = expert_rows.router(h, weight, bias, top_k, normalise)
    got_expert, got_gate, rows = kernel.route_rows(x, weight, bias, top_k, normalise, norm)
    assert got_expert.equal(expert)
    torch.testing.assert_close(got_gate.double(), gate, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows.double(), h, rtol=1e-5, atol=1e-5)


def test_of_equals_the_first_is_chosen() -> None:
    x = make(0, 3, 64)
    weight = make(1, 1, 64).expand(5, 64).contiguous()
    bias = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0], device=DEVICE)
    expert, gate, _ = kernel.route_rows(x, weight, bias, 3, True)
    assert expert.tolist() == [[1, 3, 0]] * 3
    torch.testing.assert_close(gate, torch.full((3, 3), 1 / 3, device=DEVICE))


def test_a_row_does_not_depend_on_the_others() -> None:
    x, weight, bias, norm = make(0, 60, 150), make(1, 20, 150), make(2, 20), (make(3, 150), 1e-5)
    x[5] *= 1e4
    whole = kernel.route_rows(x, weight, bias, 2, True, norm)
    for first, rows in ((0, 1), (59, 1), (3, 2), (30, 17)):
        part = kernel.route_rows(x[first : first + rows], weight, bias, 2, True, norm)
        assert all(got.equal(want[first : first + rows]) for got, want in zip(part, whole))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter: NumPy says what it thinks of NaN
def test_rows_that_are_not_finite_still_go_to_experts_that_exist() -> None:
    x, weight, bias, norm = make(0, 4, 150), make(1, 20, 150), make(2, 20), (make(3, 150), 1e-5)
    clean = kernel.route_rows(x[:1], weight, bias, 3, True, norm)
    x[1], x[2, 7], x[3, 140] = float("nan"), float("inf"), float("nan")
    expert, gate, rows = kernel.route_rows(x, weight, bias, 3, True, norm)
    assert int(expert.min()) >= 0
    assert int(expert.max()) < 20
    assert all(got[:1].equal(want) for got, want in zip((expert, gate, rows), clean))
