"""One step: clipping against torch's, the guard, loss scaling, number formats, accumulation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepseek.batch import Batch
from deepseek.errors import ConfigError, TrainingError
from deepseek.events import MemorySink, attached
from deepseek.models import Transformer
from deepseek.models.config import tiny
from deepseek.nn.attention import AttentionConfig
from deepseek.nn.moe import MoEConfig
from deepseek.precision import Policy, choose, lower
from deepseek.train import (
    OptimConfig,
    Schedule,
    ScheduleConfig,
    StepResult,
    Stop,
    TrainingConfig,
    TrainStep,
    build_optimizer,
    fit,
    next_token_loss,
    seed_everything,
)
from deepseek.train.clip import clip_gradients
from deepseek.train.loop import NonFiniteGuard
from deepseek.train.losses import Loss
from deepseek.train.pace import Readback

CPU = torch.device("cpu")
FP32 = choose("fp32", CPU)


def model(seed: int = 0, **moe: Any) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(
        tiny(
            vocab_size=30,
            hidden=16,
            layers=2,
            ffn=24,
            pattern="LH",
            attention=AttentionConfig(heads=2, kv_heads=1, head_dim=8, window=4, block=4, stride=2),
            moe=MoEConfig(experts=4, top_k=2, expert_ffn=8, **moe),
        )
    )


def batch(seed: int = 0, rows: int = 4) -> Batch:
    return Batch.from_rows(torch.randint(0, 30, (rows, 13), generator=torch.Generator().manual_seed(seed)))


def step_of(
    net: Transformer, policy: Policy = FP32, loss_fn: Any = next_token_loss, **options: Any
) -> TrainStep:
    return TrainStep(net, loss_fn, build_optimizer(net, OptimConfig(lr=0.01)), policy, **options)


def snapshot(step: TrainStep) -> dict[str, Tensor]:
    whole = {**step.model.state_dict(), **step.optimizer.state_dict()}
    return {k: v.clone() for k, v in whole.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("threshold", [0.01, 1.0, 1e6])
def test_clipping_is_torchs(threshold: float) -> None:
    ours = [nn.Parameter(torch.zeros(s)) for s in [(3,), (4, 5), (2, 3, 4)]] + [nn.Parameter(torch.zeros(1))]
    theirs = [nn.Parameter(torch.zeros_like(p)) for p in ours]
    for p, q in zip(ours[:-1], theirs):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    norm = clip_gradients(ours, threshold)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs, threshold))
    for p, q in zip(ours[:-1], theirs):
        assert p.grad is not None
        assert q.grad is not None
        torch.testing.assert_close(p.grad, q.grad)


def test_a_threshold_of_zero_only_measures() -> None:
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.full((4,), 3.0)
    assert clip_gradients([p], 0.0) == 6.0
    assert torch.equal(p.grad, torch.full((4,), 3.0))
    assert clip_gradients([nn.Parameter(torch.zeros(4))], 1.0) == 0


@pytest.mark.parametrize("grad_clip", [0.0, 0.05, 1e3])
def test_a_step_is_backward_clip_and_update(grad_clip: float) -> None:
    ours, theirs = model(), model()
    step = step_of(ours, grad_clip=grad_clip)
    reference = build_optimizer(theirs, OptimConfig(lr=0.01))
    for i in range(3):
        result = step(batch(i))
        found = next_token_loss(theirs, batch(i))
        found.total.backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), grad_clip or float("inf"))
        reference.step()
        reference.zero_grad()
        for index, moe in theirs.moe_layers().items():
            routing = found.layers[index].routing
            assert routing is not None
            moe.update(routing)
        assert result.clipped == bool(0 < grad_clip < norm)
        assert not result.skipped
        assert result.tokens == 48
        torch.testing.assert_close(result.grad_norm, norm)
        torch.testing.assert_close(result.loss, found.cross_entropy)
        torch.testing.assert_close(result.balance_loss, found.total.detach() - found.cross_entropy)
    for (name, p), q in zip(ours.state_dict().items(), theirs.state_dict().values()):
        torch.testing.assert_close(p, q, msg=name)
    assert all(p.grad is None for p in ours.parameters())


@pytest.mark.parametrize("rows", [1, 3])
def test_statistics_of_micro_batches_are_those_of_the_whole(rows: int) -> None:
    """Also when the last micro-batch is smaller; routing of a token does not depend on its neighbours here."""
    whole = step_of(model(token_floor=0.0))(batch(rows=4))
    parts = step_of(model(token_floor=0.0), micro_rows=rows)(batch(rows=4))
    torch.testing.assert_close(parts.loss, whole.loss)
    torch.testing.assert_close(parts.router_entropy, whole.router_entropy)
    assert parts.gates.keys() == whole.gates.keys() == {1}
    torch.testing.assert_close(parts.gates[1], whole.gates[1])
    for a, b in zip(parts.load, whole.load):
        assert a.sum() == pytest.approx(1)
        torch.testing.assert_close(a, b)
    assert 0 < parts.coverage <= 1
    assert parts.max_violation >= 0


def test_a_dense_model_has_nothing_to_tell_and_accumulates() -> None:
    def dense() -> Transformer:
        torch.manual_seed(0)
        return Transformer(
            tiny(
                vocab_size=30, hidden=16, layers=1, ffn=24, pattern="F", ffn_pattern="D",
                attention=AttentionConfig(heads=2, kv_heads=1, head_dim=8),
            )
        )  # fmt: skip

    whole, parts = step_of(dense())(batch()), step_of(dense(), micro_rows=1)(batch())
    torch.testing.assert_close(whole.loss, parts.loss)
    torch.testing.assert_close(whole.grad_norm, parts.grad_norm)
    assert (parts.load, parts.gates, float(parts.coverage), float(parts.balance_loss)) == ([], {}, 0.0, 0.0)


def poison_gradient(net: Transformer, part: Batch) -> Loss:
    """A finite loss whose gradient is not."""
    found = next_token_loss(net, part)
    edge = (net.norm.weight * 0).sum()
    return found._replace(total=found.total + edge.sqrt())


def poison_loss(net: Transformer, part: Batch) -> Loss:
    found = next_token_loss(net, part)
    return found._replace(total=found.total * float("nan"), cross_entropy=found.cross_entropy * float("nan"))


@pytest.mark.parametrize("poison", [poison_gradient, poison_loss])
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(poison: Any) -> None:
    step = step_of(model(), micro_rows=2)
    step(batch(0))
    before = snapshot(step)
    assert any("momentum" in k for k in before)
    assert any("router.bias" in k for k in before)
    assert any("default_EC" in k for k in before)
    step.loss_fn = poison
    assert step(batch(1)).skipped
    assert same(snapshot(step), before)
    step.loss_fn = next_token_loss
    assert not step(batch(1)).skipped
    healthy = step_of(model(), micro_rows=2)
    healthy(batch(0))
    healthy(batch(1))
    assert same(snapshot(step), snapshot(healthy))  # nothing of the bad step is left


@pytest.mark.parametrize("masters", [False, True])
def test_of_a_step_that_fails_half_way_nothing_reaches_the_next(masters: bool) -> None:
    """Whoever catches the error (out of memory, say) and goes on must not add half a batch to the next one."""

    def stepped() -> TrainStep:
        net = model()
        policy = replace(FP32, dtype=torch.bfloat16, masters=True) if masters else FP32
        optimizer = build_optimizer(net, OptimConfig(lr=0.01), lower(net, policy))
        return TrainStep(net, next_token_loss, optimizer, policy, micro_rows=1)

    step, calls = stepped(), []

    def fail(net: Transformer, part: Batch) -> Loss:
        calls.append(part)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return next_token_loss(net, part)

    step.loss_fn = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        step(batch(0))
    step.loss_fn = next_token_loss
    step(batch(1))
    untroubled = stepped()
    untroubled(batch(1))
    assert same(snapshot(step), snapshot(untroubled))


def fake(skipped: bool) -> StepResult:
    loss = torch.tensor(float("nan") if skipped else 1.0)
    flag = torch.tensor(skipped)
    return StepResult(loss, loss, loss, flag, ~flag, 1, 1, [], {}, loss)


def test_the_guard_forgives_as_many_steps_as_it_was_told() -> None:
    sink, guard = MemorySink(), NonFiniteGuard(2)
    with attached(sink):
        for i, skipped in enumerate([True, True, False, True, True]):
            guard(i, fake(skipped))
        with pytest.raises(TrainingError, match=r"3 consecutive non-finite steps up to step 7.*lr"):
            guard(7, fake(True))
    warnings = [e for e in sink.events if e.name == "warning"]
    assert [e.step for e in warnings] == [0, 1, 3, 4, 7]
    assert "weights unchanged" in warnings[0].values["text"]
    with pytest.raises(TrainingError, match="1 consecutive"):
        NonFiniteGuard(0)(1, fake(True))


def test_a_guard_that_looks_a_step_late_names_the_right_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Readback, "waiting", property(lambda self: True))
    sink, guard = MemorySink(), NonFiniteGuard(1)
    with attached(sink):
        guard(4, fake(True))
        assert not sink.events
        guard(5, fake(False))
        assert [e.step for e in sink.events] == [4]
        guard(6, fake(True))
        guard(7, fake(True))
        with pytest.raises(TrainingError, match="2 consecutive non-finite steps up to step 7"):
            guard.flush()
        guard.flush()
    assert [e.step for e in sink.events] == [4, 6, 7]


def test_fit_lets_a_late_guard_see_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Readback, "waiting", property(lambda self: True))
    with pytest.raises(TrainingError, match="up to step 2"):
        fit(step_of(model(), loss_fn=poison_loss), batches(), SCHEDULE, steps=2, hooks=[NonFiniteGuard(1)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_speeds_are_those_of_the_device_and_guards_are_late() -> None:
    """Steps of a known length: the host must not take the time of filling the queue for the time of the work."""

    def slow(net: Transformer, part: Batch) -> Loss:
        torch.cuda._sleep(100_000_000)  # cycles: some 50 ms
        return poison_loss(net, part) if part.n_bytes == 3 else next_token_loss(net, part)

    def stream() -> Iterator[Batch]:
        for i in range(6):
            yield replace(batch(i), n_bytes=i)

    net = model().cuda()
    sink, guard = MemorySink(), NonFiniteGuard(2)
    with attached(sink):
        fit(step_of(net, loss_fn=slow), stream(), SCHEDULE, steps=6, hooks=[guard])
    seconds = [48 / speed for speed in sink.series("train", "tokens_per_second")]
    assert all(s > 0.02 for s in seconds)
    assert [e.step for e in sink.events if e.name == "warning"] == [4]


@pytest.mark.parametrize("factor", [1.0, 128.0, 4096.0])
def test_the_loss_scaling_factor_is_undone_before_clipping_and_reporting(factor: float) -> None:
    """A power of two changes no mantissa, so scaled fp32 steps are bit-identical to plain ones."""
    plain, scaled = (
        step_of(model(), grad_clip=0.5),
        step_of(model(), Policy("s", torch.float32, factor, ""), grad_clip=0.5),
    )
    for i in range(2):
        a, b = plain(batch(i)), scaled(batch(i))
        assert torch.equal(a.loss, b.loss)
        assert torch.equal(a.grad_norm, b.grad_norm)
    assert same(snapshot(plain), snapshot(scaled))


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_half_formats_compute_low_and_keep_high(name: str) -> None:
    seen: list[torch.dtype] = []
    net = model()
    query = next(m for m in net.modules() if isinstance(m, nn.Linear))
    query.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    policy = choose(name, CPU)
    assert policy.loss_scale == (128.0 if name == "fp16" else 1.0)
    low, high = step_of(net, policy), step_of(model())
    for i in range(3):
        a, b = low(batch(i)), high(batch(i))
        assert not a.skipped
        assert a.loss.dtype == torch.float32
        torch.testing.assert_close(a.loss, b.loss, rtol=0.01, atol=0)
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=0.1, atol=0)
    assert set(seen) == {policy.dtype}
    assert {t.dtype for t in snapshot(low).values() if t.is_floating_point()} == {torch.float32}


def test_fp16_gradients_below_its_range_survive_by_the_factor() -> None:
    """Gradients of 1e-9 vanish in fp16 unless they are scaled: the reason why the factor exists."""

    def faint(net: Transformer, part: Batch) -> Loss:
        found = next_token_loss(net, part)
        return found._replace(
            total=found.cross_entropy + (net.head_weight.half() * 1e-3).sum().float() * 3e-6
        )

    norms = [
        float(step_of(model(), Policy("fp16", torch.float16, factor, ""), faint)(batch()).grad_norm)
        for factor in (1.0, 2.0**14)
    ]
    want = 3e-9 * (30 * 16) ** 0.5
    assert norms[1] == pytest.approx(want, rel=0.05)
    assert abs(norms[0] - want) > 0.2 * want


def batches() -> Iterator[Batch]:
    seed = 0
    while True:
        yield batch(seed)
        seed += 1


SCHEDULE = Schedule(ScheduleConfig(), 6)


def test_fit_counts_from_one_calls_hooks_in_order_and_reports() -> None:
    called: list[tuple[str, int]] = []
    hooks = [lambda s, r, n=n: called.append((n, s)) for n in "ab"]
    sink = MemorySink()
    with attached(sink):
        done = fit(step_of(model()), batches(), SCHEDULE, steps=3, hooks=hooks, peak_tokens_per_second=1e6)
    assert done == 3
    assert called == [(n, s) for s in (1, 2, 3) for n in "ab"]
    assert [e.step for e in sink.events] == [1, 2, 3]
    assert sink.series("train", "lr") == pytest.approx([0.01 * SCHEDULE.factor(i) for i in range(3)])
    for event in sink.events:
        nats = float(event.values["loss"])
        bytes_per_target = 1.0  # ``from_rows``
        assert float(event.values["bits_per_byte"]) == pytest.approx(nats / 0.6931472 / bytes_per_target)
        assert event.values["mfu"] > 0


def test_fit_from_a_later_step_uses_that_steps_rate_and_does_nothing_when_done() -> None:
    sink = MemorySink()
    with attached(sink):
        assert fit(step_of(model()), batches(), SCHEDULE, steps=6, start=4) == 6
        assert fit(step_of(model()), batches(), SCHEDULE, steps=6, start=6) == 6
        assert fit(step_of(model()), batches(), SCHEDULE, steps=6, start=8) == 8
    assert [e.step for e in sink.events] == [5, 6]
    assert sink.series("train", "lr") == pytest.approx([0.01 * SCHEDULE.factor(i) for i in (4, 5)])


def test_fit_says_when_the_data_ends() -> None:
    with pytest.raises(TrainingError, match="before step 3 of 6"):
        fit(step_of(model()), [batch(0), batch(1)], SCHEDULE, steps=6)


def test_a_requested_stop_ends_after_the_step_and_its_hooks() -> None:
    stop, seen = Stop(), []

    def hook(step: int, result: StepResult) -> None:
        seen.append((step, stop.agreed))
        if step == 2:
            stop.request("enough")
            stop.request("later reasons do not count")

    assert fit(step_of(model()), batches(), SCHEDULE, steps=6, hooks=[hook], stop=stop) == 3
    assert seen == [
        (1, False),
        (2, False),
        (3, True),
    ]  # a hook's own request is agreed on after the next step
    assert stop.reason == "enough"


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": -1}, {"length": 1}, {"batch_tokens": 8, "length": 16}, {"loss_scaling_factor": 0.0},
        {"grad_clip_threshold": -1.0}, {"grad_clip_threshold": float("nan")}, {"max_nonfinite": -1}, {"micro_rows": -2},
    ],
)  # fmt: skip
def test_training_options_that_cannot_be_used_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"train\.|must be a finite number"):
        TrainingConfig(**wrong)


def test_seeding_repeats_python_numpy_and_torch() -> None:
    import random

    import numpy as np

    def draw() -> tuple[float, float, float]:
        seed_everything(-5)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draw() == draw()
