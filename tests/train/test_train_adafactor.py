"""Adafactor against torch's where they coincide, banks against single matrices, the size and precision of its state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepseek.train.adafactor import DSAdafactor, Moment, dequantize, quantize


def gradients(shape: tuple[int, ...], step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)


def adafactor(params: list[nn.Parameter], lr: float = 0.01, **options: Any) -> DSAdafactor:
    return DSAdafactor([{"params": params}], lr, **options)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7,)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_without_a_moment_it_is_torchs(shape: tuple[int, ...], scale: float) -> None:
    start = torch.randn(shape, dtype=torch.float64) * 0.3
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = adafactor([ours], 0.02, weight_decay=0.1, relative=True)
    reference = torch.optim.Adafactor([theirs], lr=0.02, weight_decay=0.1)
    for step in range(6):
        ours.grad = gradients(shape, step) * scale
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    state = reference.state[theirs]
    if len(shape) == 2:
        torch.testing.assert_close(mine.state[ours]["row"], state["row_var"][:, 0])
        torch.testing.assert_close(mine.state[ours]["column"], state["col_var"][0])


def test_a_bank_moves_like_its_matrices() -> None:
    stack = nn.Parameter(torch.randn(3, 5, 8))
    single = [nn.Parameter(m.clone()) for m in stack.detach()]
    together, apart = (adafactor(params, moment="bf16", relative=True) for params in ([stack], single))
    for step in range(4):
        stack.grad = gradients((3, 5, 8), step, torch.float32)
        stack.grad[1] *= 1e3
        for p, g in zip(single, stack.grad):
            p.grad = g.clone()
        together.step()
        apart.step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in single]))


def test_an_update_is_at_most_lr_in_root_mean_square() -> None:
    p = nn.Parameter(torch.zeros(20, 30))
    optimizer = adafactor([p], 0.01)
    for step, size in enumerate((1.0, 1.0, 1e4)):
        before = p.detach().clone()
        p.grad = gradients((20, 30), step, torch.float32) * size
        optimizer.step()
        assert float((p.detach() - before).square().mean().sqrt()) <= 0.01 * 1.001


def test_the_second_moment_of_a_large_matrix_is_a_thousandth_of_adamws() -> None:
    p = nn.Parameter(torch.empty(4096, 4096, device="meta"))
    shapes = adafactor([p], moment="int8").state_shapes(p)
    kept = sum(
        torch.Size(shape).numel() for key, shape in shapes.items() if key in ("row", "column", "square")
    )
    assert kept / p.numel() <= 0.001
    assert torch.Size(shapes["moment_scale"]).numel() * 4 <= 0.02 * p.numel()


@pytest.mark.parametrize(("moment", "error"), [("bf16", 0.01), ("int8", 0.02)])
def test_a_small_first_moment_follows_the_exact_average(moment: Moment, error: float) -> None:
    """Against the published recurrence on the updates of an optimizer without a moment."""
    bare, p = nn.Parameter(torch.zeros(24, 50)), nn.Parameter(torch.zeros(24, 50))
    plain, averaged = adafactor([bare]), adafactor([p], beta1=0.9, moment=moment)
    exact, want = torch.zeros(24, 50), torch.zeros(24, 50)
    for step in range(30):
        before = bare.detach().clone()
        bare.grad = gradients((24, 50), step, torch.float32)
        p.grad = bare.grad.clone()
        plain.step()
        averaged.step()
        exact = 0.9 * exact + 0.1 * (bare.detach() - before)
        want += exact
    assert float((p.detach() - want).norm() / want.norm()) < error
    assert averaged.state[p]["moment"].dtype == {"bf16": torch.bfloat16, "int8": torch.int8}[moment]


def test_int8_blocks_do_not_share_a_scale() -> None:
    x = torch.cat([torch.randn(256), torch.randn(256) * 1e-4, torch.zeros(40)])
    values, scales = quantize(x)
    assert values.shape == (3, 256)
    back = dequantize(values, scales, x)
    for a, b in zip(x.split(256), back.split(256)):
        assert float((a - b).abs().max()) <= float(a.abs().max()) / 254 * 1.001


@pytest.mark.parametrize("moment", ["none", "bf16", "int8"])
@pytest.mark.parametrize("masters", [False, True])
def test_a_step_that_does_not_apply_changes_nothing(moment: Moment, masters: bool) -> None:
    weights = [torch.randn(4, 300), torch.randn(5)]
    params = [nn.Parameter(w.bfloat16() if masters else w.clone()) for w in weights]
    optimizer = adafactor(params, moment=moment, masters=dict(zip(params, weights)) if masters else None)
    yes, no = torch.tensor(True), torch.tensor(False)
    for step in range(2):
        for p in params:
            p.grad = gradients(tuple(p.shape), step, p.dtype)
        optimizer.step(torch.tensor(0.5), yes)
    states = [v for p in params for v in (p, optimizer.weight(p), *optimizer.state[p].values())]
    before = [v.detach().clone() for v in states]
    for p in params:
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step(torch.tensor(float("nan")), no)
    assert all(torch.equal(a, b) for a, b in zip(states, before))
    if masters:
        assert all(torch.equal(p, w.bfloat16()) for p, w in zip(params, weights))


def test_gradients_times_scale_are_scaled_gradients() -> None:
    p, q = nn.Parameter(torch.ones(6, 5)), nn.Parameter(torch.ones(6, 5))
    a, b = adafactor([p]), adafactor([q])
    for step in range(3):
        p.grad = gradients((6, 5), step, torch.float32)
        q.grad = p.grad * 0.25 * (step + 1)
        a.step(torch.tensor(0.25 * (step + 1)))
        b.step()
    assert torch.equal(p, q)
