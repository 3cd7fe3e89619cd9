"""Betas that move: the schedule, and AdamW's bias correction by their product, against a slow fp64 Adam."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek.train import OptimConfig, Schedule, ScheduleConfig, build_optimizer
from deepseek.train.betas import DynamicBetas


def test_beta1_rises_over_the_warm_up_and_beta2_follows_adafactor() -> None:
    betas = DynamicBetas(warmup_steps=10).betas
    assert betas(0) == (pytest.approx(0.85), 0.0)
    assert betas(5) == (pytest.approx(0.90), pytest.approx(1 - 6**-0.8))
    assert betas(10) == (betas(1000)[0], pytest.approx(1 - 11**-0.8))
    assert betas(10_000) == (pytest.approx(0.95), 0.95)
    assert DynamicBetas(0).betas(0)[0] == pytest.approx(0.95)


def test_the_schedule_moves_only_the_betas_that_may() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    for kind, moves in (("constant", False), ("dynamic", True)):
        optimizer = build_optimizer(model, OptimConfig(name="muon", betas_schedule=kind))  # type: ignore[arg-type]
        Schedule(ScheduleConfig(warmup=0.5), 10).apply(optimizer, 2)
        for group in optimizer.parts[-1].param_groups:
            want = DynamicBetas(5).betas(2) if moves else (0.9, 0.95)
            assert (group["beta1"], group["beta2"]) == want
        assert "beta1" not in optimizer.parts[0].param_groups[0]


def test_adamw_with_moving_betas_is_adam_with_the_products() -> None:
    """One step in the middle does not apply: neither moments nor products move."""
    p = nn.Parameter(torch.randn(4, 5, dtype=torch.float64))
    model = nn.Module()
    model.register_parameter("weight", p)
    optimizer = build_optimizer(
        model, OptimConfig(name="adamw", betas_schedule="dynamic", lr=0.05, weight_decay=0.1)
    )
    schedule = Schedule(ScheduleConfig(kind="constant", warmup=0.5), 8)
    weight, mean, square = p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)
    product1 = product2 = 1.0
    for step in range(8):
        p.grad = torch.randn(4, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        lr = schedule.apply(optimizer, step)
        apply = step != 3
        if apply:
            b1, b2 = DynamicBetas(4).betas(step)
            mean = b1 * mean + (1 - b1) * p.grad
            square = b2 * square + (1 - b2) * p.grad**2
            product1, product2 = product1 * b1, product2 * b2
            root = (square / (1 - product2)).sqrt() + 1e-8
            weight = weight * (1 - lr * 0.1) - lr * mean / (1 - product1) / root
        optimizer.step(apply=torch.tensor(apply))
    torch.testing.assert_close(p.detach(), weight, rtol=1e-6, atol=1e-7)  # the product is kept in fp32
    assert optimizer.state_dict()["weight|step"] == 7
