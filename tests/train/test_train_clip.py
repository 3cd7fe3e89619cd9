"""Adaptive clipping: spikes, statistics, false alarms, units; and a training that survives spikes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from deepseek.batch import Batch
from deepseek.models import Transformer
from deepseek.models.config import tiny
from deepseek.nn.attention import AttentionConfig
from deepseek.precision import choose
from deepseek.train import OptimConfig, TrainStep, build_optimizer, next_token_loss
from deepseek.train.clip import AGC, Clip, NormClip, ZClip, build_clip, total_norm, unit_norm
from deepseek.train.losses import Loss

YES, NO = torch.tensor(True), torch.tensor(False)


def test_the_norm_of_mixed_precisions_is_that_of_fp64() -> None:
    found = [torch.randn(300) * 1e-3, torch.randn(20, 30).bfloat16(), torch.randn(4, 5, dtype=torch.float64)]
    want = math.sqrt(sum(float(t.double().square().sum()) for t in found))
    assert float(total_norm(found)) == pytest.approx(want, rel=1e-6)
    many = torch.full((2**20,), 1e-3, dtype=torch.bfloat16)  # a bf16 sum would stop growing at 256 additions
    assert float(total_norm([many])) == pytest.approx(float(many[0]) * 2**10, rel=1e-3)


def norms(n: int, deviation: float, seed: int = 0) -> Tensor:
    return (torch.randn(n, generator=torch.Generator().manual_seed(seed)) * deviation).exp() * 0.7


@pytest.mark.parametrize("deviation", [0.05, 0.1, 0.2, 0.4])
def test_without_spikes_fewer_than_one_step_in_a_hundred_is_clipped(deviation: float) -> None:
    clip = ZClip(threshold=0.0)
    clipped = sum(bool(clip([], norm, YES)[1]) for norm in norms(4000, deviation))
    assert clipped < 40


@pytest.mark.parametrize("every", [10, 50])
def test_spikes_are_clipped_to_the_usual_and_do_not_become_usual(every: int) -> None:
    clip, clean = ZClip(threshold=0.0), ZClip(threshold=0.0)
    for i, norm in enumerate(norms(600, 0.1)):
        spiked = i > 30 and i % every == 0
        factor, clipped = clip([], norm * 50 if spiked else norm, YES)
        clean([], norm, YES)
        if spiked:
            assert clipped
            assert 0.4 < float(factor * norm * 50) < 1.2
        else:
            assert float(factor * norm) == pytest.approx(float(norm), rel=0.35)
    usual = float(clean.state["mean"].exp())
    assert float(clip.state["mean"].exp()) == pytest.approx(usual, rel=0.05)


def test_zclip_warms_up_with_the_fixed_threshold_and_plain_averages() -> None:
    clip, values = ZClip(threshold=0.5, warmup=20), norms(20, 0.3)
    for norm in values:
        factor, clipped = clip([], norm, YES)
        assert float(factor) == pytest.approx(min(1.0, 0.5 / float(norm)), rel=1e-4)
        assert bool(clipped) == (norm > 0.5)
    logs = values.log()
    torch.testing.assert_close(clip.state["mean"], logs.mean())
    torch.testing.assert_close(clip.state["variance"], logs.var(correction=0))


def test_steps_that_do_not_apply_teach_nothing() -> None:
    clip = ZClip(1.0)
    for norm in norms(30, 0.1):
        clip([], norm, YES)
    before = {k: v.clone() for k, v in clip.state.items()}
    for bad in ("nan", "inf"):
        clip([], torch.tensor(float(bad)), NO)
    assert all(torch.equal(clip.state[k], before[k]) for k in before)


@pytest.mark.parametrize("loss_scale", [1.0, 128.0])
def test_agc_bounds_each_unit_by_its_weights(loss_scale: float) -> None:
    torch.manual_seed(0)
    matrix, bank, vector, free = (nn.Parameter(torch.randn(s)) for s in [(4, 6), (3, 6, 5), (7,), (4, 6)])
    matrix.data[1] = 0
    gradients = [torch.randn_like(p) * 0.02 for p in (matrix, bank, vector, free)]
    gradients[0][0] *= 1e-3  # one row that needs no clipping
    found = [g * loss_scale for g in gradients]
    pairs = list(zip((matrix, bank, vector, free), found))
    factor, clipped = AGC(0.01, except_for=[free])(pairs, torch.tensor(1.0), YES, loss_scale)
    assert factor == 1
    assert clipped
    for p, g, was in zip((matrix, bank), found, gradients):
        units = (-1,) if p.dim() == 2 else (-2,)
        for weight, now, before in zip(
            p.detach().movedim(units[0], -1).reshape(-1, 6), (g / loss_scale).movedim(units[0], -1).reshape(-1, 6),
            was.movedim(units[0], -1).reshape(-1, 6),
        ):  # fmt: skip
            limit = 0.01 * max(float(weight.norm()), 1e-3)
            torch.testing.assert_close(now, before * min(1.0, limit / float(before.norm())))
    torch.testing.assert_close(found[0][0] / loss_scale, gradients[0][0])
    torch.testing.assert_close(found[3] / loss_scale, gradients[3])
    assert unit_norm(bank.detach()).shape == (3, 1, 5)


def small_step(clip: Clip) -> TrainStep:
    torch.manual_seed(0)
    model = Transformer(
        tiny(
            vocab_size=16, hidden=16, layers=1, ffn=24, pattern="F", ffn_pattern="D",
            attention=AttentionConfig(heads=2, kv_heads=1, head_dim=8),
        )
    )  # fmt: skip
    optimizer = build_optimizer(model, OptimConfig(name="adamw", lr=0.01))
    return TrainStep(model, next_token_loss, optimizer, choose("fp32", torch.device("cpu")), grad_clip=clip)


def cycle(seed: int) -> Batch:
    """Rows that count upwards: learnable to almost nothing."""
    start = torch.randint(0, 16, (8, 1), generator=torch.Generator().manual_seed(seed))
    return Batch.from_rows((start + torch.arange(13)) % 16)


def spike(model: Transformer, batch: Batch) -> Loss:
    """Noise, and 50 times as loud."""
    found = next_token_loss(model, Batch.from_rows(torch.randint(0, 16, (8, 13))))
    return found._replace(total=found.total * 50)


def recovers(clip: Clip) -> bool:
    """Whether the loss is back where it was five steps after each of two spikes, and stays there."""
    step, losses = small_step(clip), list[float]()
    for i in range(90):
        step.loss_fn = spike if i in (60, 80) else next_token_loss
        result = step(cycle(i))
        losses.append(float(result.loss))
        assert i not in (60, 80) or float(result.grad_norm) > 5
    return all(max(losses[at + 5 : at + 9]) <= max(losses[at - 5 : at]) + 0.01 for at in (60, 80))


def test_training_recovers_from_spikes_within_five_steps() -> None:
    assert recovers(ZClip(1.0))
    assert not recovers(NormClip(0.0))


def test_statistics_are_in_the_optimizers_state_and_come_back() -> None:
    step = small_step(ZClip(1.0))
    for i in range(3):
        step(cycle(i))
    state = {k: v.clone() for k, v in step.optimizer.state_dict().items()}
    assert state["*clip|count"] == 3
    again = small_step(ZClip(1.0))
    again.optimizer.load_state_dict(state)
    assert again.clip.state["count"] == 3
    again.model.load_state_dict(step.model.state_dict())
    assert torch.equal(again(cycle(3)).loss, step(cycle(3)).loss)
    assert torch.equal(again.clip.state["mean"], step.clip.state["mean"])
    small_step(NormClip(1.0)).optimizer.load_state_dict(state)  # a run may change how it clips
    fresh = small_step(ZClip(1.0))
    fresh.optimizer.load_state_dict({k: v for k, v in state.items() if not k.startswith("*")})
    assert fresh.clip.state["count"] == 0


def test_clips_by_name() -> None:
    model = small_step(NormClip(1.0)).model
    assert isinstance(build_clip("norm", 0.5, model), NormClip)
    assert isinstance(build_clip("zclip", 0.5, model), ZClip)
    agc = build_clip("agc", 0.5, model)
    assert isinstance(agc, AGC)
    assert model.embedding.weight in agc.except_for
    before = [p.detach().clone() for p in model.parameters()]
    step = small_step(agc)
    assert math.isfinite(float(step(cycle(0)).loss))
    assert any(not torch.equal(p, b) for p, b in zip(step.model.parameters(), before))
