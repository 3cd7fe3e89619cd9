"""Matrices stored in bf16 with fp32 masters in the optimizer: what is lowered, what a step does, what is saved."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepseek.batch import Batch
from deepseek.errors import ConfigError
from deepseek.models import Transformer
from deepseek.models.config import tiny
from deepseek.nn.attention import AttentionConfig
from deepseek.nn.moe import MoEConfig
from deepseek.precision import Policy, lower
from deepseek.train import OptimConfig, StepResult, TrainStep, build_optimizer, evaluate, next_token_loss
from deepseek.train.losses import Loss

BF16 = Policy("bf16", torch.bfloat16, 1.0, "", masters=True)
FP32 = Policy("fp32", torch.float32, 1.0, "")
NAMES = ("muon", "adamw", "adafactor")


def model(seed: int = 0, tied: bool = False) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(
        tiny(
            vocab_size=30, hidden=16, layers=2, ffn=24, pattern="LH", ffn_pattern="DE", tie_embeddings=tied,
            attention=AttentionConfig(heads=2, kv_heads=1, head_dim=8, window=4, block=4, stride=2),
            moe=MoEConfig(experts=4, top_k=2, expert_ffn=8, shared_experts=1),
        )
    )  # fmt: skip


def batch(seed: int = 0, rows: int = 4) -> Batch:
    return Batch.from_rows(torch.randint(0, 30, (rows, 13), generator=torch.Generator().manual_seed(seed)))


def step_of(net: Transformer, name: Any = "muon", policy: Policy = BF16, **options: Any) -> TrainStep:
    masters = lower(net, policy)
    return TrainStep(
        net,
        next_token_loss,
        build_optimizer(net, OptimConfig(name=name, lr=0.01), masters),
        policy,
        **options,
    )


def whole(step: TrainStep) -> dict[str, Tensor]:
    """What a checkpoint holds."""
    state = {**step.optimizer.master_state(step.model.state_dict()), **step.optimizer.state_dict()}
    return {k: v.clone() for k, v in state.items()}


@pytest.mark.parametrize("tied", [False, True])
def test_matrices_are_lowered_and_the_rest_is_not(tied: bool) -> None:
    net, before = model(tied=tied), {n: p.detach().clone() for n, p in model(tied=tied).named_parameters()}
    masters = lower(net, BF16)
    low = {n for n, p in net.named_parameters() if p.dtype == torch.bfloat16}
    for name, p in net.named_parameters():
        kept = any(part in name for part in ("norm", "router", "gate_bias", "sink", "pool"))
        assert (name in low) == (not kept), name
        assert (p in masters) == (name in low)
        if p in masters:
            assert torch.equal(masters[p], before[name])
            assert torch.equal(p, before[name].bfloat16())
    assert {"embedding.weight", "blocks.1.ffn.gate_up", "blocks.0.ffn.down.weight"} <= low
    assert lower(model(), Policy("bf16", torch.bfloat16, 1.0, "")) == {}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("micro_rows", [0, 1])
def test_training_follows_fp32(name: str, micro_rows: int) -> None:
    low, high = step_of(model(), name, micro_rows=micro_rows), step_of(model(), name, FP32)
    for i in range(8):
        a, b = low(batch(i % 2)), high(batch(i % 2))
        assert not a.skipped
        assert a.loss.dtype == torch.float32
        torch.testing.assert_close(a.loss, b.loss, rtol=0.02, atol=0)
    assert b.loss < 3.3  # it learns: at first the loss is log 30 = 3.4
    kept = {k: t.dtype for k, t in whole(low).items() if t.is_floating_point() and not k.endswith("|moment")}
    assert set(kept.values()) == {torch.float32}
    assert whole(low).keys() == whole(high).keys()
    for p, master in low.optimizer.masters.items():
        assert torch.equal(p, master.bfloat16())
        assert not torch.equal(p.float(), master)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_of_masters_goes_on_bit_for_bit(name: str) -> None:
    straight, first = step_of(model(), name), step_of(model(), name)
    for i in range(3):
        straight(batch(i))
        first(batch(i))
    saved_model = {k: v.clone() for k, v in first.optimizer.master_state(first.model.state_dict()).items()}
    saved = {k: v.clone() for k, v in first.optimizer.state_dict().items()}
    again = step_of(model(seed=5), name)
    again.model.load_state_dict(saved_model)
    again.optimizer.load_master_state(saved_model)
    again.optimizer.load_state_dict(saved)
    for i in range(3, 6):
        a, b = straight(batch(i)), again(batch(i))
        assert torch.equal(a.loss, b.loss)
    x, y = whole(straight), whole(again)
    assert all(torch.equal(x[k], y[k]) for k in x)


def test_a_checkpoint_does_not_depend_on_the_precision_it_was_made_in() -> None:
    low = step_of(model())
    low(batch())
    plain = model(seed=5)
    plain.load_state_dict(low.optimizer.master_state(low.model.state_dict()))
    optimizer = build_optimizer(plain, OptimConfig(lr=0.01))
    optimizer.load_state_dict(low.optimizer.state_dict())
    result = TrainStep(plain, next_token_loss, optimizer, FP32)(batch(1))
    torch.testing.assert_close(result.loss, low(batch(1)).loss, rtol=0.02, atol=0)
    found = [evaluate(net, [batch(2)], policy).loss for net, policy in (
        (plain, Policy("bf16", torch.bfloat16, 1.0, "")), (low.model, BF16)
    )]  # fmt: skip
    assert found[0] == pytest.approx(found[1], rel=0.01)


def gradients_of(net: Transformer, micro_rows: int) -> tuple[TrainStep, dict[str, Tensor], StepResult]:
    """The gradients that a step hands to its optimizer, which keeps everything as it is."""
    step, seen = step_of(net, micro_rows=micro_rows), dict[str, Tensor]()
    sums = step.optimizer.gradients

    def keep(scale: Tensor, apply: Tensor) -> None:
        for p, name in step.optimizer.names.items():
            grad = sums.get(p, p.grad)
            assert grad is not None
            seen[name] = grad.clone()

    step.optimizer.update = keep  # type: ignore[method-assign, assignment]
    return step, seen, step(batch())


def test_micro_batches_add_up_in_fp32_and_leave_no_second_gradient() -> None:
    _, whole_batch, _ = gradients_of(model(), 0)
    step, parts, _ = gradients_of(model(), 1)
    lowered = {step.optimizer.names[p] for p in step.optimizer.masters}
    assert {n for n, g in whole_batch.items() if g.dtype == torch.bfloat16} == lowered
    assert {g.dtype for g in parts.values()} == {torch.float32}
    assert all(p.grad is None for p in step.optimizer.masters)
    # An independent sum: each row's own gradient, in fp32.
    sums: dict[str, Tensor] = {}
    for row in batch().split(1):
        net = model()
        lower(net, BF16)
        next_token_loss(net, row).total.backward()
        for name, p in net.named_parameters():
            assert p.grad is not None
            sums[name] = sums.get(name, torch.zeros_like(p, dtype=torch.float32)) + p.grad.float()
    for name, total in sums.items():
        torch.testing.assert_close(parts[name], total, msg=name)


def test_a_step_that_is_forgotten_is_freed() -> None:
    step = step_of(model(), micro_rows=1)
    step(batch())
    held = [weakref.ref(p) for p in step.parameters] + [weakref.ref(step.accumulator)]
    del step
    gc.collect()
    assert [ref for ref in held if ref() is not None] == []


def test_a_second_step_starts_from_zero_sums() -> None:
    """Its gradients are those of the same weights in a first step."""
    a, b = step_of(model(), micro_rows=1), step_of(model(seed=5), micro_rows=1)
    a(batch(0))
    b.model.load_state_dict(a.model.state_dict())
    x, y = a(batch(1)), b(batch(1))
    assert torch.equal(x.grad_norm, y.grad_norm)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("micro_rows", [0, 2])
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(name: str, micro_rows: int) -> None:
    def poison(net: Transformer, part: Batch) -> Loss:
        found = next_token_loss(net, part)
        return found._replace(total=found.total + (net.norm.weight * 0).sum().sqrt())

    step = step_of(model(), name, micro_rows=micro_rows)
    step(batch(0))
    before, stored = whole(step), {n: p.detach().clone() for n, p in step.model.named_parameters()}
    step.loss_fn = poison
    assert step(batch(1)).skipped
    after = whole(step)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(torch.equal(p, stored[n]) for n, p in step.model.named_parameters())
    step.loss_fn = next_token_loss
    healthy = step_of(model(), name, micro_rows=micro_rows)
    healthy(batch(0))
    step(batch(1))
    healthy(batch(1))
    x, y = whole(step), whole(healthy)
    assert all(torch.equal(x[k], y[k]) for k in x)


def test_a_policy_with_masters_refuses_an_optimizer_without() -> None:
    net = model()
    with pytest.raises(ConfigError, match="lower"):
        TrainStep(net, next_token_loss, build_optimizer(net, OptimConfig()), BF16)


def test_the_first_step_may_be_the_one_that_is_skipped() -> None:
    """There are no moments yet: nothing may be divided by zero."""
    for name in NAMES:
        step = step_of(model(), name)
        before = {k: v.clone() for k, v in step.optimizer.master_state(step.model.state_dict()).items()}
        step.loss_fn = lambda net, part: next_token_loss(net, part)._replace(
            total=net.embedding.weight.float().sum() * torch.nan
        )
        assert step(batch()).skipped
        after = step.optimizer.master_state(step.model.state_dict())
        assert all(torch.equal(before[k], after[k]) for k in before)
        step.loss_fn = next_token_loss
        assert torch.isfinite(step(batch()).loss)
        assert all(bool(torch.isfinite(t).all()) for t in whole(step).values())


def test_muon_with_masters_is_muon_on_the_masters() -> None:
    master = torch.randn(3, 8, 12)
    p, q = nn.Parameter(master.bfloat16()), nn.Parameter(master.clone())
    from deepseek.train.muon import Muon

    low = Muon([{"params": [p]}], 0.02, 0.9, 0.1, masters={p: master})
    high = Muon([{"params": [q]}], 0.02, 0.9, 0.1)
    for step in range(4):
        grad = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(step)).bfloat16()
        p.grad, q.grad = grad, grad.float()
        low.step()
        high.step()
    torch.testing.assert_close(master, q.detach())
    assert torch.equal(p, master.bfloat16())
