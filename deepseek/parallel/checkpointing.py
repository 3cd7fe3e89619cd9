"""Activation checkpointing of a chain of blocks: a plan of ``parallel.segments``, carried out.

The blocks stay where they are and keep their names; only their class changes, to one whose ``__call__`` passes through
here. In a region that is to be recomputed, saved-tensor hooks put a placeholder for everything autograd would keep.
The first placeholder that backward asks for runs the region again, from its input, with the random numbers and the
autocast state of the first time; what the second run saves answers all of the region's placeholders. Outputs come from
the first run, so statistics that a block returns are counted once.

Blocks may be compiled (``block.compile()``): hooks work on what a compiled block saves, too.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from deepseek.dist import comm
from deepseek.errors import TrainingError
from deepseek.parallel.offload import Offloader
from deepseek.parallel.saved import SavedBytes, is_weight, note
from deepseek.parallel.segments import Chain, Item, Plan, Recompute, Save, every_block
from deepseek.parallel.selective import Results, mapped, selective_when_compiled

Planner = Callable[[Chain], Plan]


class Checkpointed:
    """The blocks of a model and the plan by which they are called.

    Args:
        plan: what to do; or a function that makes it from the measured chain: the first forward pass with gradients
            measures, and checkpoints every block meanwhile.
        selective: keep the dear results of recomputed blocks (``parallel.selective``).
        budget: share of the activations a compiled block may keep; ``None`` leaves that to the plan.
        offloader: what is kept waits on the host.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        plan: Plan | Planner,
        *,
        selective: bool = False,
        budget: float | None = None,
        offloader: Offloader | None = None,
    ) -> None:
        self.blocks, self.selective, self.budget, self.offloader = blocks, selective, budget, offloader
        self.planner = plan if callable(plan) else None
        self.chain: Chain | None = None
        self._measured: list[tuple[float, float, int, int]] = []
        self._region: _Region | None = None
        self._follow(every_block(len(blocks)) if callable(plan) else plan)

    def _follow(self, plan: Plan) -> None:
        self.plan = plan
        self._items = [item for item in plan for _ in item.blocks]

    def call(self, index: int, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What block ``index`` answers; ``run`` is the block without checkpointing."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return run(*args, **kwargs)
        if index == 0 and self.offloader is not None:
            self.offloader.begin()
        compiled = self.blocks[index]._compiled_call_impl is not None
        if compiled and (self.selective or self.budget is not None):
            with _memory_budget(self.budget), self._offloading():
                return run(*args, **kwargs)
        if self.planner is not None and self.chain is None:
            self._measure(index, run, args, kwargs)
        item = self._items[index]
        if isinstance(item, Save):
            self._region = None
            with self._offloading():
                out = run(*args, **kwargs)
        else:
            out = self._enter(index, item).first(run, args, kwargs)
        if index == item.blocks[-1]:
            self._region = None
        if index == len(self.blocks) - 1:
            self._plan_now()
        return out

    def _enter(self, index: int, item: Recompute) -> _Region:
        """The open region, or a new one: at an item's start, and where blocks are not called in their order."""
        region = self._region
        if region is None or region.item is not item or index != region.start + len(region.calls):
            region = self._region = _Region(index, item, self.selective, self.offloader)
        return region

    def _offloading(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.offloader is None else self.offloader.hooks()

    def _measure(self, index: int, run: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Run a block twice for its bytes and its time; nothing is kept and no random number is used up."""
        if index != len(self._measured):
            self._measured.clear()
        if index != len(self._measured):
            return
        given, device = _tensors(args)[:1], _device(args)
        held = [*self.blocks[index].parameters(), *given]
        with torch.random.fork_rng(_devices(device), device_type=_fork_type(device)):
            with SavedBytes(held, keep=False) as saved:
                run(*args, **kwargs)
            clock = _Clock(device)
            with saved_tensors_hooks(clock.lap, _never):
                run(*args, **kwargs)
            seconds, rerun = clock.stop()
        size = sum(tensor.numel() * tensor.element_size() for tensor in given)
        self._measured.append((seconds, rerun, size, saved.total))

    def _plan_now(self) -> None:
        if self.planner is None or self.chain is not None or len(self._measured) != len(self.blocks):
            return
        seconds, rerun, inputs, saved = zip(*_agreed(self._measured))
        self.chain = Chain(seconds, rerun, tuple(map(int, inputs)), tuple(map(int, saved)))
        self._follow(self.planner(self.chain))


class _Previous:
    """In a recorded call: the ``leaf``-th tensor of what the call before returned."""

    def __init__(self, leaf: int, requires_grad: bool) -> None:
        self.leaf, self.requires_grad = leaf, requires_grad

    def tensor(self, previous: list[Tensor]) -> Tensor:
        return previous[self.leaf].detach().requires_grad_(self.requires_grad)


class _Kept:
    """In a recorded call: a tensor from elsewhere."""

    def __init__(self, tensor: Tensor, offloader: Offloader | None) -> None:
        self.requires_grad, self.offloader = tensor.requires_grad, offloader
        plain = tensor if is_weight(tensor) else tensor.detach()
        if offloader is not None:
            self.held = offloader.pack(plain)
        else:
            note(plain)
            self.held = plain

    def tensor(self, previous: list[Tensor]) -> Tensor:
        tensor = self.held if self.offloader is None else self.offloader.unpack(self.held)
        return tensor if is_weight(tensor) else tensor.detach().requires_grad_(self.requires_grad)


class _Call:
    """A block's call in a region: how to run it, with what, and how many tensors it saves."""

    def __init__(self, run: Callable[..., Any], args: Any, kwargs: Any, results: Results | None) -> None:
        self.run, self.args, self.kwargs, self.results = run, args, kwargs, results
        self.slots = 0

    def __call__(self, previous: list[Tensor]) -> list[Tensor]:
        def given(value: Any) -> Any:
            return value.tensor(previous) if isinstance(value, (_Previous, _Kept)) else value

        with self.results.recall() if self.results is not None else nullcontext():
            return _tensors(self.run(*mapped(self.args, given), **mapped(self.kwargs, given)))


class _Slot(NamedTuple):
    """The placeholder of a saved tensor: the ``place``-th that the ``call``-th call of a region saved."""

    region: _Region
    call: int
    place: int
    shape: torch.Size


class _Part(NamedTuple):
    """Items that wait for backward: where they start, what goes into the first call, under which conditions."""

    items: Plan
    entry: list[Tensor]
    state: _State


class _Enough(Exception):
    """Everything that the last block of a part saves is there; the rest of its forward pass is not needed."""


class _Region:
    """Calls of consecutive blocks that keep their input only."""

    def __init__(self, start: int, item: Recompute, selective: bool, offloader: Offloader | None) -> None:
        self.start, self.item, self.selective, self.offloader = start, item, selective, offloader
        self.calls: list[_Call] = []
        self.store: dict[tuple[int, int], Tensor] = {}
        self.parts: dict[int, _Part] = {}
        self._last: list[weakref.ref[Tensor]] = []

    def first(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block for the first time and leave placeholders."""
        number = len(self.calls)
        if number == 0:
            self.whole = _Part(_from(self.item.items, self.start), [], _State(_device((args, kwargs))))
            self.parts = dict.fromkeys(range(self.item.blocks.stop - self.start), self.whole)
        results = self._results()
        call = _Call(run, mapped(args, self._record), mapped(kwargs, self._record), results)
        self.calls.append(call)

        def pack(tensor: Tensor) -> Tensor | _Slot:
            if is_weight(tensor):
                return tensor
            call.slots += 1
            return _Slot(self, number, call.slots - 1, tensor.shape)

        with saved_tensors_hooks(pack, _unpack), results.remember() if results else nullcontext():
            out = run(*args, **kwargs)
        self._last = [weakref.ref(tensor) for tensor in _tensors(out)]
        return out

    def _results(self) -> Results | None:
        if not self.selective:
            return None
        if self.offloader is not None:
            return Results(self.offloader.pack, self.offloader.unpack)
        return Results(_noted, lambda held: held)

    def _record(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        for leaf, last in enumerate(self._last):
            if last() is value:
                return _Previous(leaf, value.requires_grad)
        return _Kept(value, self.offloader)

    def take(self, slot: _Slot) -> Tensor:
        """The tensor of a placeholder; runs again what it takes."""
        key = slot.call, slot.place
        while key not in self.store:
            self._again(self.parts[slot.call])
        tensor = self.store.pop(key)
        if tensor.shape != slot.shape:
            raise TrainingError(
                f"block {self.start + slot.call} saved a tensor of shape {list(slot.shape)} in the forward pass and "
                f"{list(tensor.shape)} when run again: its forward pass depends on something that changed between"
            )
        return tensor

    def _again(self, part: _Part) -> None:
        """Carry out the items of a part. What was saved by it and is asked for twice starts from the whole region."""
        previous = part.entry
        with torch.enable_grad(), part.state.restored():
            for item in part.items:
                waiting = self.whole
                if isinstance(item, Recompute):
                    waiting = _Part(item.items, previous, _State(part.state.device))
                for number in range(item.blocks.start - self.start, item.blocks.stop - self.start):
                    self.parts[number] = waiting
                    if number < len(self.calls):
                        keep = isinstance(item, Save)
                        previous = self._run(number, previous, keep, last=keep and item is part.items[-1])

    def _run(self, number: int, previous: list[Tensor], keep: bool, last: bool) -> list[Tensor]:
        """Run one call again. ``keep``: answer its placeholders; ``last``: and stop once all are answered."""
        call, count = self.calls[number], 0

        def pack(tensor: Tensor) -> Tensor | None:
            nonlocal count
            if is_weight(tensor):
                return tensor
            if keep:
                self.store[number, count] = tensor.detach()
            count += 1
            if last and count == call.slots:
                raise _Enough
            return None

        try:
            with saved_tensors_hooks(pack, _never):
                previous = call(previous)
        except _Enough:
            return previous
        if count != call.slots:
            raise self._differs(number, str(count))
        return previous

    def _differs(self, number: int, count: str) -> TrainingError:
        return TrainingError(
            f"block {self.start + number} saved {self.calls[number].slots} tensors in the forward pass and {count} "
            "when run again: its forward pass depends on something that changed between"
        )


class _State:
    """Random numbers and autocast as they are now, to run something again as it ran."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        kinds = dict.fromkeys(("cpu", device.type))
        self.autocast = [
            (k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k), torch.is_autocast_cache_enabled())
            for k in kinds
            if torch.amp.is_autocast_available(k)
        ]
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None

    @contextmanager
    def restored(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(
                torch.random.fork_rng(_devices(self.device), device_type=_fork_type(self.device))
            )
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            for kind, enabled, dtype, cache in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache))
            yield


def _unpack(held: Any) -> Tensor:
    return held.region.take(held) if isinstance(held, _Slot) else held


def _never(held: Any) -> Tensor:
    raise AssertionError("the graph of a recomputed block has no backward")


def _noted(tensor: Tensor) -> Tensor:
    note(tensor)
    return tensor


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in a structure, in order."""
    found: list[Tensor] = []
    mapped(value, lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None)
    return found


def _device(value: Any) -> torch.device:
    """Where the first tensor in a structure is."""
    tensors = _tensors(value)
    return tensors[0].device if tensors else torch.device("cpu")


def _from(items: Plan, start: int) -> Plan:
    """What is left of ``items`` from block ``start`` on."""
    kept: list[Item] = []
    for item in items:
        if item.blocks.start >= start:
            kept.append(item)
        elif item.blocks.stop > start:
            kept.append(Recompute(_from(cast(Recompute, item).items, start)))
    return tuple(kept)


def _devices(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []


def _fork_type(device: torch.device) -> str:
    return device.type if device.type != "cpu" else "cuda"


class _Clock:
    """Seconds from its making to the last ``lap``, and to ``stop``, on the device's own time."""

    def __init__(self, device: torch.device) -> None:
        self.events: list[torch.cuda.Event] = []
        if device.type == "cuda":
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
            torch.cuda.synchronize(device)
            self.events[0].record()
            self.events[1].record()
        self.began = self.last = time.perf_counter()

    def lap(self, tensor: Tensor) -> None:
        self.last = time.perf_counter()
        if self.events:
            self.events[1].record()

    def stop(self) -> tuple[float, float]:
        """Seconds of everything, and to the last lap."""
        ended = time.perf_counter()
        if not self.events:
            return ended - self.began, self.last - self.began
        began, last, end = self.events
        end.record()
        end.synchronize()
        return began.elapsed_time(end) / 1000, began.elapsed_time(last) / 1000


def _agreed(measured: list[tuple[float, float, int, int]]) -> list[list[float]]:
    """The mean over the ranks, so that all make the same plan."""
    table = torch.tensor(measured, dtype=torch.float64)
    if comm.world() > 1:
        comm.sum_in_place([table])
        table /= comm.world()
    return table.tolist()


@contextmanager
def _memory_budget(budget: float | None) -> Iterator[None]:
    """The share of activations that a block compiled inside may keep. The one place that touches this private knob."""
    if budget is None:
        yield
        return
    from torch._functorch import config

    with config.patch(activation_memory_budget=budget):
        yield


_classes: dict[tuple[type[nn.Module], bool], type[nn.Module]] = {}
_HOOK = "_checkpointed"  #: where an instance holds its ``(Checkpointed, index)``


def attach(checkpointed: Checkpointed) -> None:
    """Make the blocks' calls pass through ``checkpointed``."""
    for index, block in enumerate(checkpointed.blocks):
        detach(block)
        block.__dict__[_HOOK] = (checkpointed, index)
        block.__class__ = _class_of(type(block), checkpointed.selective)


def detach(block: nn.Module) -> None:
    """Undo ``attach``."""
    if block.__dict__.pop(_HOOK, None) is not None:
        block.__class__ = type(block).__mro__[1]


def attached(model: nn.Module) -> Checkpointed | None:
    """What the blocks of ``model`` are called through, if they are."""
    found = (m.__dict__[_HOOK][0] for m in model.modules() if _HOOK in m.__dict__)
    return next(found, None)


def _class_of(base: type[nn.Module], selective: bool) -> type[nn.Module]:
    """A subclass of ``base`` that differs in how it is called only. (FSDP2 does the same to a module.)"""
    if (base, selective) not in _classes:

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            owner, index = self.__dict__[_HOOK]
            return owner.call(index, partial(base.__call__, self), args, kwargs)

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return selective_when_compiled(partial(base.forward, self), *args, **kwargs)

        own = {"__call__": call, "__module__": base.__module__, **({"forward": forward} if selective else {})}
        _classes[base, selective] = type(base.__name__, (base,), own)
    return _classes[base, selective]
