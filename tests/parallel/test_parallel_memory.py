"""Activation checkpointing against the same model without it: gradients, statistics, bytes, FLOPs."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import deepseek as ds
from deepseek.batch import Batch
from deepseek.errors import ConfigError, TrainingError
from deepseek.models.config import tiny
from deepseek.parallel.checkpointing import Checkpointed, attach, attached
from deepseek.parallel.flops import flop_counter
from deepseek.parallel.memory import activation_checkpoint, find_blocks, measure, parse_mode
from deepseek.parallel.saved import SavedBytes
from deepseek.parallel.segments import Chain, Plan, Recompute, Save, cost, every_block, optimal, save_all
from deepseek.train import next_token_loss
from deepseek.train.losses import Loss

# Dynamo looks at `.grad` of what it is given.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

MODES = ("none", "sqrt", "blocks", "selective", "budget=0.5", "optimal")


class MLP(nn.Module):
    """A residual block with a random part."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.down(F.gelu(self.up(self.norm(x)))), 0.1)


def chain(n: int = 64, width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(MLP(width, 4 * width) for _ in range(n)))


def model_and_batch(**changes: Any) -> tuple[ds.Transformer, Batch]:
    """A small model none of whose matrices is zero, and rows with two documents each."""
    torch.manual_seed(0)
    model = ds.Transformer(tiny(vocab_size=64, hidden=32, **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    tokens = torch.randint(0, 64, (4, 49))
    documents = (torch.arange(48) > 30).int().expand(4, 48).contiguous()
    positions = torch.where(documents > 0, torch.arange(48) - 31, torch.arange(48)).int()
    return model, replace(Batch.from_rows(tokens), documents=documents, positions=positions)


def gradients(module: nn.Module, step: Callable[[], Tensor]) -> list[Tensor]:
    module.zero_grad()
    torch.manual_seed(3)
    step().backward()
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def largest(a: list[Tensor], b: list[Tensor]) -> float:
    assert len(a) == len(b) > 0
    return max(float((x - y).abs().max()) for x, y in zip(a, b))


@pytest.mark.parametrize("offload", [False, True], ids=["kept", "offload"])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_a_chain_with_dropout(mode: str, offload: bool) -> None:
    model, x = chain(9), torch.randn(8, 16, requires_grad=True)
    expected = gradients(model, lambda: model(x).square().mean())
    assert x.grad is not None
    at_x = x.grad.clone()
    activation_checkpoint(model, mode, offload=offload)
    if offload:
        attached(model).offloader.smallest = 1  # type: ignore[union-attr]
    for _ in range(3):  # the first pass of some modes measures, the others follow the plan
        x.grad = None
        assert largest(gradients(model, lambda: model(x).square().mean()), expected) <= 1e-6
        assert float((x.grad - at_x).abs().max()) <= 1e-6


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("pattern", ["LLH", "F"])
def test_gradients_and_statistics_of_our_models(pattern: str, mode: str) -> None:
    """Experts and hybrid attention, micro-batches: gradients equal, routing counted once."""
    model, batch = model_and_batch(layers=4, pattern=pattern)
    model.train()

    def step(found: list[Loss]) -> None:
        model.zero_grad()
        for part in batch.split(2):
            found.append(next_token_loss(model, part))
            found[-1].total.backward()

    plain: list[Loss] = []
    step(plain)
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    activation_checkpoint(model, mode)
    for _ in range(2):
        found: list[Loss] = []
        step(found)
        assert largest([p.grad for p in model.parameters() if p.grad is not None], expected) <= 1e-6
        for a, b in zip(plain, found):
            for before, now in zip(a.layers, b.layers):
                assert before.routing is not None
                assert now.routing is not None
                for x, y in zip(before.routing, now.routing):
                    torch.testing.assert_close(x, y)


@pytest.mark.parametrize("mode", MODES[1:])
def test_gradients_under_autocast(mode: str) -> None:
    """Recomputation in backward runs outside of autocast's region, and yet in its format."""
    model, batch = model_and_batch(layers=3)

    def step() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return next_token_loss(model, batch).total

    expected = gradients(model, step)
    activation_checkpoint(model, mode)
    for _ in range(2):
        assert largest(gradients(model, step), expected) <= 1e-6


@pytest.mark.parametrize("mode", ["sqrt", "selective", "budget=0.5", "optimal"])
def test_compiled_blocks(mode: str) -> None:
    """Hooks work on compiled blocks; the selective rule goes inside. All layers share one compilation."""
    from torch._dynamo.utils import counters

    from deepseek.ops.jit import compile_blocks

    model, batch = model_and_batch(layers=4, pattern="F", moe=ds.MoEConfig())
    expected = gradients(model, lambda: next_token_loss(model, batch).total)
    none = measure(lambda: next_token_loss(model, batch).total)
    torch._dynamo.reset()
    counters.clear()
    activation_checkpoint(model, mode)
    compile_blocks(model.blocks, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        assert largest(gradients(model, lambda: next_token_loss(model, batch).total), expected) <= 1e-6
    assert counters["stats"]["unique_graphs"] == 1
    found = measure(lambda: next_token_loss(model, batch).total, weights=model.parameters())
    assert 0 < found.saved_bytes < 0.7 * none.saved_bytes
    assert found.flops >= none.flops
    torch._dynamo.reset()


def test_square_root_of_64() -> None:
    """At most 30% of the bytes; 60% saved at no more than 1.34 × the FLOPs."""
    model, x = chain(64), torch.randn(32, 16)
    none = measure(lambda: model(x).square().mean())
    activation_checkpoint(model, "sqrt")
    found = measure(lambda: model(x).square().mean())
    assert found.saved_bytes <= 0.3 * none.saved_bytes
    assert none.flops < found.flops <= 1.34 * none.flops


def test_a_budget_is_kept() -> None:
    model, x = chain(16), torch.randn(32, 16)
    none = measure(lambda: model(x).square().mean())
    activation_checkpoint(model, "budget=0.4", sample=x)
    found = measure(lambda: model(x).square().mean())
    outside = x.numel() * 4  # the square's input
    assert found.saved_bytes - outside <= 0.4 * (none.saved_bytes - outside)
    assert none.flops < found.flops <= 1.34 * none.flops


@pytest.mark.parametrize("pattern", ["F", "LLH"])
def test_selective_spends_no_matrix_product_twice(pattern: str) -> None:
    model, batch = model_and_batch(layers=3, pattern=pattern)
    none = measure(lambda: next_token_loss(model, batch).total)
    activation_checkpoint(model, "selective")
    found = measure(lambda: next_token_loss(model, batch).total)
    assert found.flops == none.flops
    assert found.saved_bytes < 0.75 * none.saved_bytes


class Live(TorchDispatchMode):
    """Bytes of all storages made inside that are still alive, after every operation: an oracle without hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    @property
    def total(self) -> int:
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        return sum(size for _, size in self.alive.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {a.untyped_storage()._cdata for a in args if isinstance(a, Tensor)}
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in given:
                storage = t.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.total)
        return out


@pytest.mark.parametrize("mode", MODES)
def test_nothing_but_gradients_outlives_a_step(mode: str) -> None:
    """Not what a plan was measured by, either: softmax keeps its own output, which only backward lets go."""
    model, batch = model_and_batch(layers=3)
    activation_checkpoint(model, mode)
    with Live() as live:
        next_token_loss(model, batch).total.backward()
        model.zero_grad(set_to_none=True)
        gc.collect()
        kept = live.total
    assert kept < 0.02 * live.peak


@pytest.mark.parametrize("mode", ["none", "sqrt", "selective"])
def test_counted_bytes_are_those_that_stay_alive(mode: str) -> None:
    model, x = chain(9), torch.randn(64, 16)
    activation_checkpoint(model, mode)
    with SavedBytes() as saved:
        model(x).square().mean()
    with Live() as live:
        loss = model(x).square().mean()
        kept = live.total
    assert loss.requires_grad
    kept += x.numel() * 4  # the model's own input was not made inside
    assert kept == pytest.approx(saved.total, rel=0.02)


@pytest.mark.parametrize("mode", ["blocks", "optimal", "budget=0.2"])
def test_four_times_the_length_in_the_same_memory(mode: str) -> None:
    """Training on rows of 256 positions takes no more at its peak than rows of 64 take without checkpoints."""
    model, _ = model_and_batch(layers=12)

    def peak(length: int) -> int:
        batch = Batch.from_rows(torch.randint(0, 64, (2, length + 1)))
        for _ in range(2):  # gradients exist, and the plan is made
            with Live() as live:
                next_token_loss(model, batch).total.backward()
        return live.peak

    short, long = peak(64), peak(256)
    activation_checkpoint(model, mode)
    assert long > 3 * short  # the comparison means something
    assert peak(256) <= short


class Attend(nn.Module):
    """Attention over a long row: dear, and keeps little."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 1, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))


class Feed(nn.Module):
    """Feed-forward: cheap, and keeps much."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def half_blocks(width: int = 16) -> nn.Sequential:
    """Attention and feed-forward in turn, each a block of its own; wide feed-forwards first, as models with experts
    have them: three dense layers, then a few small experts a token."""
    torch.manual_seed(0)
    inner = [16 * width] * 3 + [2 * width] * 9
    return nn.Sequential(*(b for size in inner for b in (Attend(width), Feed(width, size))))


def follow(model: nn.Sequential, plan: Plan) -> None:
    activation_checkpoint(model, "none")
    attach(Checkpointed(list(model), plan))


def flops_and_peak(model: nn.Module, x: Tensor) -> tuple[int, int]:
    with flop_counter() as counter:
        model(x).square().mean().backward()
    with Live() as live:  # gradients exist by now
        model(x).square().mean().backward()
    return counter.get_total_flops(), live.peak


def measured_chain(model: nn.Sequential, x: Tensor) -> Chain:
    """The chain with FLOPs for seconds, so that the test is exact."""
    flops, inputs, saved = [], [], []
    for block in model:
        with flop_counter() as counter, SavedBytes([x]) as count:
            y = block(x)
        flops.append(float(counter.get_total_flops()))
        inputs.append(x.numel() * 4)
        saved.append(count.total)
        x = y.detach().requires_grad_()
    last = [
        2 * i // 4 * (b.out if isinstance(b, Attend) else b.down).in_features for b, i in zip(model, inputs)
    ]
    rerun = [f - x for f, x in zip(flops, last)]  # before the last product everything is saved
    return Chain(tuple(flops), tuple(rerun), tuple(inputs), tuple(saved))


def test_optimal_placement_recomputes_22_percent_less_at_the_same_peak() -> None:
    model, x = half_blocks(), torch.randn(1, 1024, 16)
    found = measured_chain(model, x)
    follow(model, save_all(24))
    none, _ = flops_and_peak(model, x)
    follow(model, every_block(24))
    blocks, peak = flops_and_peak(model, x)
    expected = cost(every_block(24), found)
    assert blocks - none == expected.recomputed
    plan = optimal(found, expected.peak)
    follow(model, plan)
    best, best_peak = flops_and_peak(model, x)
    assert best - none == cost(plan, found).recomputed
    assert best_peak <= 1.01 * peak
    assert best - none <= 0.78 * (blocks - none)


def test_nested_segments_and_a_second_backward() -> None:
    model, x = chain(6), torch.randn(8, 16)
    expected = gradients(model, lambda: model(x).square().mean())
    inner = Recompute((Recompute((Recompute((Save(0),)), Save(1))), Save(2)))
    follow(model, (Recompute((inner, Save(3))), Save(4), Recompute((Save(5),))))
    assert largest(gradients(model, lambda: model(x).square().mean()), expected) <= 1e-6
    torch.manual_seed(3)
    model.zero_grad()
    loss = model(x).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()
    twice = [p.grad / 2 for p in model.parameters() if p.grad is not None]
    assert largest(twice, expected) <= 1e-6


def test_blocks_called_in_another_order_twice_or_with_something_between() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(chain(4))

        def forward(self, x: Tensor) -> Tensor:
            first = self.blocks[0](x)
            y = self.blocks[1](first) * 2 + first
            for index in (2, 2, 1, 3, 0):
                y = self.blocks[index](y)
            return y

    model, x = Loop(), torch.randn(8, 16)
    expected = gradients(model, lambda: model(x).square().mean())
    for mode in MODES[1:]:
        activation_checkpoint(model, mode)
        assert largest(gradients(model, lambda: model(x).square().mean()), expected) <= 1e-6


def test_a_block_that_changes_between_its_runs_is_found_out() -> None:
    class Fickle(MLP):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) if self.calls == 1 else x * 1.5

    model = nn.Sequential(MLP(16, 32), Fickle(16, 32), MLP(16, 32))
    activation_checkpoint(model, "blocks")
    loss = model(torch.randn(4, 16)).sum()
    with pytest.raises(TrainingError, match=r"block 1 saved .* in the forward pass and"):
        loss.backward()


def test_selective_notices_a_result_changed_in_place() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).mul_(2).exp()

    model = nn.Sequential(InPlace(), InPlace())
    activation_checkpoint(model, "selective")
    loss = model(torch.randn(4, 8)).sum()
    with pytest.raises(TrainingError, match="changed in place"):
        loss.backward()


def test_without_gradients_nothing_happens() -> None:
    model, x = chain(4), torch.randn(8, 16)
    activation_checkpoint(model, "optimal")
    with torch.no_grad():
        model(x)
    assert attached(model).chain is None  # type: ignore[union-attr]


def test_names_classes_and_copies_stay() -> None:
    model, batch = model_and_batch(layers=4)
    names = list(model.state_dict())
    kind = type(model.blocks[0])
    activation_checkpoint(model, "selective", offload=True)
    assert list(model.state_dict()) == names
    assert isinstance(model.blocks[0], kind)
    twin = copy.deepcopy(model)
    expected = gradients(model, lambda: next_token_loss(model, batch).total)
    assert largest(gradients(twin, lambda: next_token_loss(twin, batch).total), expected) == 0
    assert attached(twin) is not attached(model)
    assert attached(twin).blocks[0] is twin.blocks[0]  # type: ignore[union-attr]
    activation_checkpoint(model, "none")
    assert type(model.blocks[0]) is kind
    assert attached(model) is None


def test_nothing_is_left_after_backward() -> None:
    """No cycle through a graph keeps activations alive until the garbage collector comes."""
    import gc

    model, x = chain(9), torch.randn(64, 16)
    gc.disable()
    try:
        for mode in ("sqrt", "selective", "optimal"):
            activation_checkpoint(model, mode, sample=x)
            model(x).sum().backward()
            with Live() as live:
                loss = model(x).square().mean()
                loss.backward()
                del loss
                model.zero_grad()
                assert live.total == 0, mode
                model(x).square().mean()  # a forward pass without backward, too
                assert live.total == 0, mode
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("selektive", "did you mean 'selective'"),
        ("budget", "none of"),
        ("sqrt=2", "none of"),
        ("budget=0", "above 0"),
        ("budget=1.5", "at most 1"),
        ("budget=x", "number"),
    ],
)
def test_unknown_modes(mode: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_mode(mode)
    with pytest.raises(ConfigError, match=message):
        ds.TrainingConfig(activation_checkpoint=mode)


def test_blocks_are_found_or_asked_for() -> None:
    model, _ = model_and_batch(layers=4)
    assert find_blocks(model) == list(model.blocks)
    bare = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="blocks="):
        activation_checkpoint(bare, "sqrt")
    activation_checkpoint(bare, "sqrt", blocks=[bare])
    assert attached(bare) is not None


def test_too_little_memory_names_what_is_needed() -> None:
    model, x = chain(4), torch.randn(8, 16)
    with pytest.raises(ConfigError, match=r"keeping 0.0 MiB.*they need"):
        activation_checkpoint(model, "optimal", memory=100, sample=x)
