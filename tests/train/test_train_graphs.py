"""Graphed steps against ordinary ones: on a GPU for real, on a CPU with a recorder that keeps CUDA graphs' rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from deepseek.batch import IGNORE, Batch
from deepseek.errors import ConfigError, TrainingError
from deepseek.models import Transformer
from deepseek.models.config import tiny
from deepseek.monitor.probes import SampledProbe, StepProbe
from deepseek.nn.attention import AttentionConfig
from deepseek.nn.moe import MoEConfig
from deepseek.precision import Policy, lower
from deepseek.train import (
    OptimConfig,
    Schedule,
    ScheduleConfig,
    StepResult,
    TrainingConfig,
    TrainStep,
    build_optimizer,
    next_token_loss,
)
from deepseek.train.clip import ZClip
from deepseek.train.graphs import GraphedStep
from deepseek.train.losses import Loss

T = TypeVar("T")
CUDA = torch.cuda.is_available()
FP32, BF16 = Policy("fp32", torch.float32, 1.0, ""), Policy("bf16", torch.bfloat16, 1.0, "", masters=True)


def model(device: str = "cpu") -> Transformer:
    torch.manual_seed(0)
    return Transformer(
        tiny(
            vocab_size=64, hidden=32, layers=2, ffn=32, pattern="LF", ffn_pattern="DE",
            attention=AttentionConfig(heads=2, kv_heads=1, head_dim=16, window=4, block=4, stride=2),
            moe=MoEConfig(experts=4, top_k=2, expert_ffn=16),
        )
    ).to(device)  # fmt: skip


def batch(seed: int, rows: int = 4, length: int = 16) -> Batch:
    """Packed documents, with positions that are not targets: a different number in every batch."""
    random = torch.Generator().manual_seed(seed)
    plain = Batch.from_rows(torch.randint(0, 64, (rows, length + 1), generator=random))
    documents = (torch.arange(length) >= 3 + seed % 5).int().expand(rows, length).contiguous()
    targets = plain.targets.clone()
    targets[:, 2 + seed % 5] = IGNORE
    positions = torch.arange(length, dtype=torch.int32) - documents * (3 + seed % 5)
    found = replace(plain, targets=targets, documents=documents, positions=positions.contiguous())
    return replace(found, n_targets=int((targets != IGNORE).sum()), n_bytes=100 + seed)


def step_of(policy: Policy, micro_rows: int, name: Any = "muon", device: str = "cpu") -> TrainStep:
    net = model(device)
    config = OptimConfig(name=name, lr=0.01, betas_schedule="dynamic")
    optimizer = build_optimizer(net, config, lower(net, policy))
    clip = ZClip(1.0, warmup=2, device=device)
    return TrainStep(net, next_token_loss, optimizer, policy, micro_rows=micro_rows, grad_clip=clip)


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, StepResult):
        yield from tensors(vars(value))
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from tensors(inner)


class Rerun:
    """Recording on a CPU: work is done and undone; every replay does it again, into the tensors it first returned."""

    def __init__(self, step: TrainStep) -> None:
        self.step = step

    def everything(self) -> list[Tensor]:
        held = [*self.step.model.state_dict().values(), *self.step.optimizer.masters.values()]
        return held + list(self.step.optimizer.state_dict().values())

    def __call__(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        before = [t.clone() for t in self.everything()]
        found = work()
        for t, was in zip(self.everything(), before, strict=True):
            t.copy_(was)

        def replay() -> None:
            with self.step.accumulator.over(2 if self.step.micro_rows else 1):
                again = work()
            for old, new in zip(tensors(found), tensors(again), strict=True):
                old.copy_(new)

        return found, replay


def run(step: TrainStep, steps: range, moved: Callable[[int], Batch] = batch) -> list[StepResult]:
    schedule, results = Schedule(ScheduleConfig(warmup=0.5), 12), []
    for i in steps:
        schedule.apply(step.optimizer, i)
        results.append(step(moved(i)))
    return results


def compare(
    a: TrainStep, b: TrainStep, x: list[StepResult], y: list[StepResult], tight: dict[str, float]
) -> None:
    for one, other in zip(x, y, strict=True):
        assert (one.tokens, one.n_bytes) == (other.tokens, other.n_bytes)
        for s, t in zip(tensors(one), tensors(other), strict=True):
            torch.testing.assert_close(s, t, **tight)
    assert all(p.grad is None for p in [*a.model.parameters(), *b.model.parameters()])
    state_a = a.optimizer.master_state(a.model.state_dict()) | a.optimizer.state_dict()
    state_b = b.optimizer.master_state(b.model.state_dict()) | b.optimizer.state_dict()
    assert state_a.keys() == state_b.keys()
    for name in state_a:
        torch.testing.assert_close(state_a[name], state_b[name], msg=name, **tight)


@pytest.mark.parametrize(("policy", "micro_rows"), [(FP32, 0), (FP32, 2), (BF16, 0), (BF16, 2), (BF16, 1)])
def test_replayed_steps_are_ordinary_ones(policy: Policy, micro_rows: int) -> None:
    ordinary = step_of(policy, micro_rows)
    inner = step_of(policy, micro_rows)
    graphed = GraphedStep(inner, warmup=2, record=Rerun(inner))
    x, y = run(ordinary, range(7)), run(graphed, range(7))
    assert graphed._captured is not None
    compare(ordinary, graphed, x, y, {"rtol": 1e-3, "atol": 1e-4})
    assert len({float(r.loss) for r in y}) == 7  # results are copies


def test_other_shapes_go_through_the_ordinary_step() -> None:
    ordinary, inner = step_of(FP32, 0), step_of(FP32, 0)
    graphed = GraphedStep(inner, warmup=1, record=Rerun(inner))

    def mixed(i: int) -> Batch:
        found = batch(i, rows=3 if i == 3 else 4)
        return replace(found, documents=None, positions=None) if i == 4 else found

    x, y = run(ordinary, range(6), mixed), run(graphed, range(6), mixed)
    compare(ordinary, graphed, x, y, {"rtol": 1e-3, "atol": 1e-4})


def probed(step: TrainStep, recorded: TrainStep, moved: Callable[[int], Batch]) -> list[list[float]]:
    """Figures of the probes of six steps, looking closer at every other one."""
    each, closer, told = StepProbe(step), SampledProbe(recorded), []
    schedule = Schedule(ScheduleConfig(warmup=0.5), 12)
    for i in range(6):
        schedule.apply(step.optimizer, i)
        if i % 2:
            closer.prepare()
        told.append(each(step(moved(i))).values.tolist())
        if i % 2:
            told.append(closer(moved(i))[0].values.tolist())
    return told


def test_probes_between_replayed_steps_see_what_they_see_between_ordinary_ones() -> None:
    ordinary, captured = step_of(FP32, 2), step_of(FP32, 2)
    graphed = GraphedStep(captured, warmup=2, record=Rerun(captured))
    wanted, found = probed(ordinary, ordinary, batch), probed(graphed, captured, batch)
    assert graphed._captured is not None
    for a, b in zip(wanted, found, strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-6)


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("policy", [FP32, BF16])
def test_probes_between_replayed_steps_on_a_gpu(policy: Policy) -> None:
    def moved(i: int) -> Batch:
        return batch(i, rows=4, length=128).to("cuda")

    ordinary, captured = step_of(policy, 2, device="cuda"), step_of(policy, 2, device="cuda")
    graphed = GraphedStep(captured, warmup=2)
    wanted, found = probed(ordinary, ordinary, moved), probed(graphed, captured, moved)
    assert graphed._captured is not None
    for a, b in zip(wanted, found, strict=True):
        assert b == pytest.approx(a, rel=5e-2, abs=5e-2)


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_probes_on_a_gpu_wait_for_nothing() -> None:
    step, part = step_of(BF16, 2, device="cuda"), batch(0, rows=4, length=128).to("cuda")
    each, closer = StepProbe(step), SampledProbe(step)
    for _ in range(2):
        closer.prepare()
        each(step(part))
        closer(part)
    torch.cuda.set_sync_debug_mode("error")
    try:
        closer.prepare()
        each(step(part))
        closer(part)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_that_cannot_be_captured_says_so() -> None:
    def refuse(work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphed = GraphedStep(step_of(FP32, 0), warmup=0, record=refuse)
    with pytest.raises(TrainingError, match=r"not permitted.*cuda_graph=false"):
        graphed(batch(0))


@pytest.mark.skipif(CUDA, reason="there is a GPU")
def test_without_a_gpu_graphs_are_refused() -> None:
    with pytest.raises(ConfigError, match="cuda_graph"):
        GraphedStep(step_of(FP32, 0))


def test_graphs_and_recomputation_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"'sqrt' runs parts again.*cuda_graph=false"):
        TrainingConfig(cuda_graph=True, activation_checkpoint="sqrt")
    with pytest.raises(ConfigError, match="selective, with compile=true"):
        TrainingConfig(cuda_graph=True, activation_checkpoint="selective")
    assert TrainingConfig(cuda_graph=True, activation_checkpoint="selective", compile=True).cuda_graph


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("micro_rows", [0, 2, 1])
@pytest.mark.parametrize("name", ["muon", "adamw", "adafactor"])
def test_graphed_steps_on_a_gpu_are_eager_ones(name: str, micro_rows: int) -> None:
    def moved(i: int) -> Batch:
        return batch(i, rows=4, length=128).to("cuda")

    eager, graphed = (step_of(BF16, micro_rows, name, "cuda") for _ in range(2))
    wrapped = GraphedStep(graphed, warmup=3)
    x, y = run(eager, range(8), moved), run(wrapped, range(8), moved)
    assert wrapped._captured is not None
    compare(eager, wrapped, x, y, {"rtol": 2e-2, "atol": 2e-3})


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_a_step_on_a_gpu_waits_for_nothing() -> None:
    step = step_of(BF16, 2, "muon", "cuda")
    parts = [batch(i, length=128).to("cuda") for i in range(3)]
    step(parts[0])
    step(parts[1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(parts[2])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not CUDA, reason="needs a GPU"))]
)
@pytest.mark.parametrize("micro_rows", [0, 2])
@pytest.mark.parametrize("policy", [FP32, BF16])
def test_a_replayed_step_that_is_not_finite_changes_nothing(
    policy: Policy, micro_rows: int, device: str
) -> None:
    def loss(net: Transformer, part: Batch) -> Loss:  # token 0 in the first place poisons the batch
        found = next_token_loss(net, part)
        poison = torch.where(part.tokens[0, 0] == 0, torch.nan, 0.0)
        return found._replace(total=found.total * (1 + poison))

    step = step_of(policy, micro_rows, "muon", device)
    step.loss_fn = loss
    graphed = GraphedStep(step, warmup=2, record=Rerun(step) if device == "cpu" else None)
    good, bad = batch(1, length=128), batch(2, length=128)
    good.tokens[0, 0], bad.tokens[0, 0] = 1, 0
    good, bad = good.to(device), bad.to(device)

    def everything() -> dict[str, Tensor]:
        return {k: v.clone() for k, v in (step.model.state_dict() | step.optimizer.state_dict()).items()}

    for _ in range(4):
        assert not graphed(good).skipped
    assert graphed._captured is not None
    before = everything()
    result = graphed(bad)
    assert result.skipped
    assert not result.grad_norm.isfinite()
    after = everything()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not graphed(good).skipped
    after = everything()
    assert any(not torch.equal(before[k], after[k]) for k in before)
    assert all(v.isfinite().all() for v in after.values())
