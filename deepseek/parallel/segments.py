"""Which blocks keep their activations and which are run again: plans over a chain, and the best one for a memory.

A plan is a tuple of items in the order of the blocks. ``Save(i)`` keeps what block ``i`` needs for its backward.
``Recompute(items)`` keeps the input of its first block only and, when backward arrives, carries out ``items`` from
there: nested ones keep one input again and wait for their turn. √n segments, a checkpoint at every block and optimal
placement are all plans.

The optimum is the dynamic programme for chains of different blocks (rotor, arXiv 1911.13214): least time under a limit
on what is kept, over all plans whose kept inputs stay until they are used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from deepseek.errors import ConfigError

SLOTS = 1000  #: memory is counted in this many parts of the limit; sizes are rounded to them
#: Shares of the limit that are given up in turn, until what was planned with rounded sizes fits with exact ones.
MARGINS = (-0.01, -0.003, 0.0, 0.003, 0.01, 0.03)


@dataclass(frozen=True)
class Save:
    """Keep what block ``block`` saves for backward."""

    block: int

    @property
    def blocks(self) -> range:
        return range(self.block, self.block + 1)


@dataclass(frozen=True)
class Recompute:
    """Keep the input of the first block; carry out ``items`` once backward needs one of them."""

    items: Plan

    @property
    def blocks(self) -> range:
        return range(self.items[0].blocks.start, self.items[-1].blocks.stop)


Item: TypeAlias = "Save | Recompute"
Plan: TypeAlias = "tuple[Item, ...]"


class Chain(NamedTuple):
    """Blocks in a row: what each takes and keeps.

    Attributes:
        seconds: of the forward pass (or any other cost).
        rerun: of the part of it after which everything is saved: the last block of a segment stops there.
        inputs: bytes of the input. saved: bytes kept for backward beside the input.
    """

    seconds: tuple[float, ...]
    rerun: tuple[float, ...]
    inputs: tuple[int, ...]
    saved: tuple[int, ...]


class Cost(NamedTuple):
    """``recomputed``: cost of what runs again; ``peak``: most bytes kept at once (temporary ones not counted)."""

    recomputed: float
    peak: int


def save_all(n: int) -> Plan:
    """Nothing is run again."""
    return tuple(map(Save, range(n)))


def segments(n: int, count: int) -> Plan:
    """``count`` segments of as equal a length as possible, each run again as a unit."""
    ends = [round(n * k / count) for k in range(count + 1)]
    return tuple(Recompute(tuple(map(Save, range(a, b)))) for a, b in pairwise(ends) if a < b)


def every_block(n: int) -> Plan:
    """A checkpoint at every block."""
    return segments(n, n)


def sqrt_segments(n: int) -> Plan:
    """⌈√n⌉ segments: O(√n) inputs and one segment are kept at a time (arXiv 1604.06174).

    The last one is kept from the start: backward wants it first, when nothing else is there yet.
    """
    *before, last = segments(n, math.ceil(math.sqrt(n)))
    return (*before, *map(Save, last.blocks))


def cost(plan: Plan, chain: Chain) -> Cost:
    """What carrying out ``plan`` costs: forward through all, then backward from the last block to the first."""
    recomputed, peak = 0.0, 0

    def carry_out(items: Plan, kept: int) -> None:
        """Forward through ``items`` with ``kept`` bytes held already (their first input among them), then backward."""
        nonlocal recomputed, peak
        entered = [kept]
        for before, item in zip(items, [*items[1:], None]):
            kept += chain.saved[before.block] if isinstance(before, Save) else 0
            kept += chain.inputs[item.blocks.start] if item is not None else 0
            entered.append(kept)
            peak = max(peak, kept)
        for item, held in zip(reversed(items), reversed(entered[:-1])):
            if isinstance(item, Recompute):
                *through, last = item.blocks
                recomputed += sum(chain.seconds[i] for i in through)
                recomputed += (chain.rerun if isinstance(item.items[-1], Save) else chain.seconds)[last]
                carry_out(item.items, held)

    carry_out(plan, chain.inputs[0])
    return Cost(recomputed, peak)


def optimal(chain: Chain, memory: int) -> Plan:
    """The plan that runs the least again while keeping at most ``memory`` bytes, the chain's own input included.

    Raises:
        ConfigError: no plan fits; the message has the least that one needs.
    """
    n = len(chain.seconds)
    if cost(save_all(n), chain).peak <= memory:
        return save_all(n)
    fitting = [plan for plan in (every_block(n), sqrt_segments(n)) if cost(plan, chain).peak <= memory]
    for margin in MARGINS:
        table = _Table(chain, round(memory * (1 - margin)))
        plan = table.plan() if table.fits else ()
        if plan and cost(plan, chain).peak <= memory:
            fitting.append(plan)
            break
    if not fitting:
        needs = least_memory(chain)
        raise ConfigError(
            f"{n} blocks cannot be trained keeping {memory / 2**20:.1f} MiB; recomputing everything possible they "
            f"need {needs / 2**20:.1f} MiB, without recomputation {cost(save_all(n), chain).peak / 2**20:.1f} MiB: "
            "allow more, or use smaller micro-batches"
        )
    return min(fitting, key=lambda plan: cost(plan, chain).recomputed)


def least_memory(chain: Chain) -> int:
    """Bytes within which some plan fits, up to the rounding of sizes."""
    enough = cost(every_block(len(chain.seconds)), chain).peak
    limit = 2 * enough
    return min(enough, math.ceil(_Table(chain, limit).first_fit * limit / SLOTS))


class _Table:
    """``time[s, t][m]``: least forward time that backward through blocks ``s … t`` takes with ``m`` slots to spare.

    The input of ``s`` is kept outside of the ``m``. The choice is −1: keep what ``s`` saves and go on; or ``k > s``:
    forward to ``k``, keep its input, do ``k … t``, come back for ``s … k − 1``.
    """

    def __init__(self, chain: Chain, memory: int) -> None:
        self.n = n = len(chain.seconds)
        slot = max(memory, 1) / SLOTS
        self.inputs = [round(b / slot) for b in chain.inputs]
        self.saved = [round(b / slot) for b in chain.saved]
        # Blocks up to the last are run for the first time; a part that ends before it is run again, to its last save.
        self.final = [*chain.rerun[:-1], chain.seconds[-1]]
        self.elapsed = [0.0, *np.cumsum(chain.seconds).tolist()]
        self.room = SLOTS - self.inputs[0]
        self.time: dict[tuple[int, int], NDArray[np.float64]] = {}
        self.choice: dict[tuple[int, int], NDArray[np.int16]] = {}
        for length in range(n):
            for s in range(n - length):
                self._fill(s, s + length)

    def _fill(self, s: int, t: int) -> None:
        if s == t:
            best = _shifted(np.full(SLOTS + 1, self.final[s]), self.saved[s])
        else:
            seconds = self.elapsed[s + 1] - self.elapsed[s]
            best = seconds + _shifted(self.time[s + 1, t], self.saved[s] + self.inputs[s + 1])
        choice = np.full(SLOTS + 1, -1, np.int16)
        for k in range(s + 1, t + 1):
            late = _shifted(self.time[k, t], self.inputs[k])
            time = self.elapsed[k] - self.elapsed[s] + late + self.time[s, k - 1]
            better = time < best
            best, choice = np.where(better, time, best), np.where(better, np.int16(k), choice)
        self.time[s, t], self.choice[s, t] = best, choice

    @property
    def fits(self) -> bool:
        """Whether some plan of the whole chain fits the memory."""
        return self.room >= 0 and math.isfinite(self.time[0, self.n - 1][self.room])

    @property
    def first_fit(self) -> int:
        """The fewest slots, the chain's own input included, within which some plan fits."""
        return int(np.isfinite(self.time[0, self.n - 1]).argmax()) + self.inputs[0]

    def plan(self) -> Plan:
        return tuple(self._items(0, self.n - 1, self.room))

    def _items(self, s: int, t: int, room: int) -> Iterator[Item]:
        while True:
            k = int(self.choice[s, t][room])
            if k > s:
                yield Recompute(tuple(self._items(s, k - 1, room)))
                s, room = k, room - self.inputs[k]
                continue
            yield Save(s)
            if s == t:
                return
            room -= self.saved[s] + self.inputs[s + 1]
            s += 1


def _shifted(time: NDArray[np.float64], slots: int) -> NDArray[np.float64]:
    """``time`` when ``slots`` fewer are left; infinite where there are not so many."""
    out = np.full_like(time, np.inf)
    if slots < len(time):
        out[slots:] = time[: len(time) - slots]
    return out
