"""Plans against a machine that keeps buffers one by one, and the optimum against every plan there is."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest

from deepseek.errors import ConfigError
from deepseek.parallel.segments import (
    Chain,
    Cost,
    Plan,
    Recompute,
    Save,
    cost,
    every_block,
    least_memory,
    optimal,
    save_all,
    segments,
    sqrt_segments,
)


class Machine:
    """Carries a plan out, buffer by buffer."""

    def __init__(self, chain: Chain) -> None:
        self.chain, self.kept, self.peak, self.time = chain, dict[str, int](), 0, 0.0

    def keep(self, name: str, size: int) -> None:
        self.kept[name] = size
        self.peak = max(self.peak, sum(self.kept.values()))

    def run(self, plan: Plan) -> Cost:
        self.keep("input 0", self.chain.inputs[0])
        self.forward(plan)
        once, self.time = self.time, 0.0
        self.backward(plan)
        assert once == pytest.approx(sum(self.chain.seconds))
        assert not self.kept
        return Cost(self.time, self.peak)

    def forward(self, items: Plan, again: bool = False) -> None:
        for place, item in enumerate(items):
            self.keep(f"input {item.blocks[0]}", self.chain.inputs[item.blocks[0]])
            for block in item.blocks:
                stops = again and place == len(items) - 1 and isinstance(item, Save)
                self.time += (self.chain.rerun if stops else self.chain.seconds)[block]
            if isinstance(item, Save):
                self.keep(f"saved {item.block}", self.chain.saved[item.block])

    def backward(self, items: Plan) -> None:
        for item in reversed(items):
            if isinstance(item, Save):
                del self.kept[f"saved {item.block}"]
            else:
                self.forward(item.items, again=True)
                self.backward(item.items)
            self.kept.pop(f"input {item.blocks[0]}", None)


def every_plan(start: int, stop: int, inner: bool = False) -> Iterator[Plan]:
    """All plans of blocks ``start … stop − 1``; an inner one is not a single ``Recompute``, which changes nothing."""
    if start == stop:
        yield ()
    for end in range(start + 1, stop + 1):
        first: list[Save | Recompute] = [Save(start)] if end == start + 1 else []
        if not (inner and end == stop):
            first += map(Recompute, every_plan(start, end, inner=True))
        for item, rest in itertools.product(first, list(every_plan(end, stop))):
            yield (item, *rest)


def random_chain(n: int, seed: int) -> Chain:
    """Sizes are whole numbers of a limit of 1000, so that counting memory in thousandths is exact."""
    r = random.Random(seed)
    seconds = [r.randint(1, 30) for _ in range(n)]
    return Chain(
        tuple(map(float, seconds)),
        tuple(float(r.randint(0, s)) for s in seconds),
        tuple(r.randint(10, 150) for _ in range(n)),
        tuple(r.randint(50, 500) for _ in range(n)),
    )


@pytest.mark.parametrize("seed", range(6))
def test_cost_is_what_a_machine_counts(seed: int) -> None:
    chain = random_chain(4, seed)
    plans = list(every_plan(0, 4))
    assert len(plans) == len(set(plans)) > 50
    for plan in plans:
        assert cost(plan, chain) == Machine(chain).run(plan)


@pytest.mark.parametrize("seed", range(12))
def test_no_plan_beats_the_optimum(seed: int) -> None:
    chain = random_chain(2 + seed % 4, seed)
    costs = [Machine(chain).run(plan) for plan in every_plan(0, len(chain.seconds))]
    fitting = [c.recomputed for c in costs if c.peak <= 1000]
    if not fitting:
        with pytest.raises(ConfigError, match="cannot be trained"):
            optimal(chain, 1000)
        return
    best = cost(optimal(chain, 1000), chain)
    assert best.peak <= 1000
    assert best.recomputed == min(fitting)


def test_the_least_memory_is_the_least_of_all_plans() -> None:
    for seed in range(5):
        chain = random_chain(4, seed)
        least = min(Machine(chain).run(plan).peak for plan in every_plan(0, 4))
        assert least_memory(chain) == pytest.approx(least, rel=0.02)
        optimal(chain, round(1.02 * least))


def test_more_memory_never_costs_more() -> None:
    chain = random_chain(12, 1)
    everything = cost(save_all(12), chain).peak
    low = least_memory(chain)
    limits = [round(low + k * (everything - low) / 8) for k in range(1, 9)]
    recomputed = [cost(optimal(chain, m), chain).recomputed for m in limits]
    assert all(a >= b for a, b in itertools.pairwise(recomputed))
    assert recomputed[-1] == 0
    assert all(cost(optimal(chain, m), chain).peak <= m for m in limits)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 64, 65])
def test_segments_cover_the_blocks_once(n: int) -> None:
    for plan in (every_block(n), sqrt_segments(n), segments(n, 3), save_all(n)):
        assert [i for item in plan for i in item.blocks] == list(range(n))
    sizes = [len(item.blocks) for item in segments(n, 3)]
    assert max(sizes) - min(sizes) <= 1


def test_a_limit_that_just_fits() -> None:
    """Every block's checkpoint needs exactly this much, which the rounding of sizes must not deny."""
    chain = Chain((1.0, 2.0), (1.0, 2.0), (6144, 6144), (134784, 148821))
    limit = cost(every_block(2), chain).peak
    assert cost(optimal(chain, limit), chain).peak <= limit
    alike = Chain((1.0,) * 4, (0.9,) * 4, (1000,) * 4, (14000,) * 4)
    assert cost(optimal(alike, 18_000), alike) == Cost(pytest.approx(2.7), 18_000)  # the last block runs once


def test_square_root() -> None:
    """64 like blocks whose input is a tenth of what they save: 8 inputs and 8 blocks instead of 64 of both."""
    chain = Chain((1.0,) * 64, (1.0,) * 64, (1,) * 64, (10,) * 64)
    assert cost(segments(64, 8), chain) == Cost(64.0, 8 + 8 * 10 + 7)
    assert cost(sqrt_segments(64), chain) == Cost(56.0, 8 + 8 * 10 + 7)
    assert cost(every_block(64), chain) == Cost(64.0, 64 + 10)
