"""Head and cross-entropy in one operation, against torch's in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.ops import cross_entropy
from deepseek.ops.cross_entropy import IGNORE, chunk_rows, linear_cross_entropy

N, C, V = 29, 7, 31


def case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, C, generator=make, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, C, generator=make, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=make)
    targets[::5] = IGNORE
    return hidden, weight, targets


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("z_weight", [0.0, 0.3])
def test_value_and_gradients_are_torch_s(z_weight: float, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES_CPU", rows * V * 8)
    hidden, weight, targets = case()
    nats, squares = linear_cross_entropy(hidden, weight, targets, z_weight)
    logits = hidden @ weight.T
    want = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    square = logits.logsumexp(-1)[targets != IGNORE].square().sum()
    torch.testing.assert_close((nats, squares), (want, square.detach()))
    torch.testing.assert_close(
        torch.autograd.grad(0.7 * nats, (hidden, weight)),
        torch.autograd.grad(0.7 * (want + z_weight * square), (hidden, weight)),
    )


def test_a_tied_embedding_gets_both_gradients() -> None:
    _, weight, targets = case()
    tokens = torch.arange(N) % V

    def gradient(loss_of: object) -> Tensor:
        hidden = F.embedding(tokens, weight)
        loss = (
            linear_cross_entropy(hidden, weight, targets)[0]
            if loss_of == "ours"
            else F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE, reduction="sum")
        )
        return torch.autograd.grad(loss, weight)[0]

    torch.testing.assert_close(gradient("ours"), gradient("torch"))


def test_no_gradient_is_made_where_none_is_asked_for() -> None:
    hidden, weight, targets = case()
    with torch.no_grad():
        nats, _ = linear_cross_entropy(hidden, weight, targets)
    assert not nats.requires_grad
    frozen, _ = linear_cross_entropy(hidden, weight.detach(), targets)
    (gradient,) = torch.autograd.grad(frozen, hidden)
    assert gradient.shape == hidden.shape


def test_no_rows_are_nothing() -> None:
    hidden, weight, targets = case()
    nats, squares = linear_cross_entropy(hidden[:0], weight, targets[:0])
    assert nats.item() == squares.item() == 0
    assert torch.autograd.grad(nats, weight)[0].eq(0).all()


@pytest.mark.parametrize("rows", [4, 100])
def test_bf16_gradients_are_those_of_fp32_up_to_rounding(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES_CPU", rows * V * 2)
    hidden, weight, targets = case(torch.bfloat16)
    got = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets)[0], (hidden, weight))
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    loss = F.cross_entropy(wide[0] @ wide[1].T, targets, ignore_index=IGNORE, reduction="sum")
    for g, w in zip(got, torch.autograd.grad(loss, wide)):
        assert g.dtype == torch.bfloat16
        assert (g.double() - w).norm() < 0.01 * w.norm()


def test_chunks_are_bounded() -> None:
    assert chunk_rows(32_768, 2, cuda=True) * 32_768 * 2 <= cross_entropy.CHUNK_BYTES
    assert chunk_rows(10**9, 4, cuda=False) == 1


def test_it_compiles_into_one_graph() -> None:
    hidden, weight, targets = case(torch.float32)
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    nats, _ = compiled(hidden, weight, targets)
    want, _ = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(nats, want)
    torch.testing.assert_close(
        torch.autograd.grad(nats, (hidden, weight)), torch.autograd.grad(want, (hidden, weight))
    )
