"""Learning rates against transformers' schedules and closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from deepseek.errors import ConfigError
from deepseek.train import Schedule, ScheduleConfig


def rates(config: ScheduleConfig, steps: int, base: float = 0.5) -> list[float]:
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=base)
    optimizer.param_groups[0]["base_lr"] = base
    schedule = Schedule(config, steps)
    found = []
    for step in range(steps):
        assert schedule.apply(optimizer, step) == optimizer.param_groups[0]["lr"]
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.25])
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_cosine_after_warm_up_is_transformers(warmup: float, floor: float) -> None:
    transformers = pytest.importorskip("transformers")
    steps = 40
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=0.5)
    reference = transformers.get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, num_warmup_steps=int(warmup * steps), num_training_steps=steps, min_lr_rate=floor
    )
    theirs = []
    for _ in range(steps):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    ours = rates(ScheduleConfig(kind="cosine", warmup=warmup, floor=floor), steps)
    start = int(warmup * steps)
    assert ours[start:] == pytest.approx(theirs[start:])
    assert ours[:start] == pytest.approx([0.5 * (i + 1) / start for i in range(start)])  # theirs begins at 0


def test_cosine_is_torchs_cosine_annealing() -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=0.5)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30, eta_min=0.05)
    theirs = []
    for _ in range(30):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert rates(ScheduleConfig(warmup=0, floor=0.1), 30) == pytest.approx(theirs)


def test_warmup_stable_decay_has_three_straight_parts() -> None:
    found = rates(ScheduleConfig(kind="wsd", warmup=0.1, decay=0.3, floor=0.2), 100, base=1.0)
    assert found[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert found[10:71] == [1.0] * 61
    assert found[70:] == pytest.approx([1 - 0.8 * i / 30 for i in range(30)])


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 101])
@pytest.mark.parametrize("warmup", [0.0, 0.02, 0.5, 0.8, 1.0])
def test_a_rate_is_a_share_of_the_peak_and_never_zero_and_rises_then_falls(
    kind: Any, steps: int, warmup: float
) -> None:
    config = ScheduleConfig(kind=kind, warmup=warmup, decay=min(0.2, 1 - warmup), floor=0.1)
    found = rates(config, steps, base=1.0)
    top = found.index(max(found))
    assert 0 < min(found) <= max(found) <= 1
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
    if steps > 1 and warmup < 1:
        assert max(found) == 1.0


def test_beyond_the_last_step_the_floor_stays() -> None:
    for kind in ("cosine", "wsd"):
        schedule = Schedule(ScheduleConfig(kind=kind, floor=0.1), 50)  # type: ignore[arg-type]
        assert schedule.factor(50) == pytest.approx(0.1)
        assert schedule.factor(500) == pytest.approx(0.1)


def test_a_step_is_a_function_of_its_number_alone_and_of_each_groups_base() -> None:
    """So a run resumed at any step has the rate of an uninterrupted one."""
    config = ScheduleConfig(kind="wsd", warmup=0.1, decay=0.5)
    straight = rates(config, 60)
    for start in range(60):
        p = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
        optimizer = torch.optim.SGD(
            [{"params": [p[0]], "base_lr": 0.5}, {"params": [p[1]], "base_lr": 2.0}], lr=9.0
        )
        assert Schedule(config, 60).apply(optimizer, start) == straight[start]
        assert optimizer.param_groups[1]["lr"] == pytest.approx(4 * straight[start])
        assert not math.isnan(straight[start])


@pytest.mark.parametrize(
    "wrong", [{"warmup": -0.1}, {"decay": 1.5}, {"floor": 2.0}, {"kind": "wsd", "warmup": 0.6, "decay": 0.6}]
)
def test_shares_that_cannot_be_used_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="schedule"):
        ScheduleConfig(**wrong)
