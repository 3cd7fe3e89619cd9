"""Attention layers: compiled blocks, kernels inside them, learned pooling, full layers without rotation."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from deepseek.config import replace
from deepseek.models import ModelConfig, Transformer
from deepseek.models.count import parameters
from deepseek.nn import AttentionConfig
from deepseek.nn import attention as layers
from deepseek.ops.triton import kernels

#: Dynamo looks at the gradient of every input, and hides this warning with a filter that pytest overrides.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

LENGTH = 40


def model(pattern: str, head_dim: int = 8, **attention: object) -> Transformer:
    torch.manual_seed(0)
    c = AttentionConfig(heads=4, kv_heads=2, head_dim=head_dim, window=6, block=6, stride=3, gate_init=-0.5)
    made = Transformer(
        ModelConfig(
            vocab_size=61,
            hidden=24,
            layers=len(pattern),
            ffn=32,
            pattern=pattern,
            attention=replace(c, **attention),
        )
    )
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return made


def tokens(rows: int = 2) -> Tensor:
    return torch.randint(0, 61, (rows, LENGTH), generator=torch.Generator().manual_seed(2))


def documents() -> tuple[Tensor, Tensor]:
    """Ids and positions of rows cut at 13 and 29, the last 3 positions padding."""
    t = torch.arange(LENGTH)
    ids = (t >= 13).int() + (t >= 29).int()
    ids[-3:] = -1
    start = torch.tensor([0, 13, 29, 37])[ids.long() % 4]
    return ids.expand(2, -1).contiguous(), (t - start).int().expand(2, -1).contiguous()


def results(made: Transformer, packed: bool) -> list[Tensor]:
    """Hidden states, then every parameter's gradient."""
    ids, positions = documents() if packed else (None, None)
    made.zero_grad()
    y = made(tokens(), ids, positions).hidden
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y.detach(), *(p.grad if p.grad is not None else torch.zeros_like(p) for p in made.parameters())]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pattern", ["F", "L", "H"])
def test_a_block_compiles_as_one_graph(pattern: str, packed: bool) -> None:
    made = model(pattern, pooling="learned")
    want = results(made, packed)
    torch._dynamo.reset()
    for block in made.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(made, packed), want, rtol=1e-5, atol=1e-5)


def test_layers_of_a_kind_share_their_compiled_graph() -> None:
    made = model("LLLH" * 2)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    for block in made.blocks:
        block.compile(fullgraph=True, backend=counter)
    with torch.no_grad():
        for _ in range(2):
            made(tokens())
    assert counter.frame_count <= 2


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton's interpreter")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_model_with_kernels_is_the_model_without(
    packed: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = model("FLH", head_dim=64)
    want = results(made, packed)
    monkeypatch.setattr(layers, "pick_backend", lambda *_: "triton")
    if compiled:
        torch._dynamo.reset()
        for block in made.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
    triton = kernels("hybrid_attention")
    tiles = triton.Tiles(32, 32, 4, 1)
    with triton.forced_tuning(triton.Tuning(tiles, tiles, tiles, programs=4)):
        got = results(made, packed)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def test_equal_pooling_weights_are_the_mean() -> None:
    mean, learned = model("LH"), model("LH", pooling="learned")
    learned.load_state_dict(mean.state_dict(), strict=False)
    torch.nn.init.constant_(learned.blocks[1].attention.pool, 0.3)
    for packed in (False, True):
        torch.testing.assert_close(results(learned, packed)[0], results(mean, packed)[0])
    assert sum(p.numel() for p in learned.parameters()) == parameters(learned.config).total
    assert learned.blocks[1].attention.pool.grad is not None


def test_learned_pooling_decodes_as_it_trains() -> None:
    made = model("LH", pooling="learned").double()
    with torch.no_grad():
        whole = made(tokens()).hidden
        cache, parts = made.new_cache(), []
        for part in tokens().split([17, 1, 1, 9, 12], dim=1):
            parts.append(made(part, cache=cache).hidden)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)


def test_learned_pooling_stays_inside_its_document() -> None:
    made = model("LH", pooling="learned").double()
    ids, positions = documents()
    with torch.no_grad():
        packed = made(tokens(), ids, positions).hidden
        alone = [made(part).hidden for part in tokens().split([13, 16, 11], dim=1)[:2]]
    torch.testing.assert_close(packed[:, :29], torch.cat(alone, 1), rtol=0, atol=1e-10)


def test_a_full_layer_without_rotation_does_not_know_the_order() -> None:
    """One layer, no window: swapping two earlier tokens changes nothing at the last position."""
    swapped = tokens()[:, torch.tensor([3, 1, 2, 0, *range(4, LENGTH)])]
    for full_rope in (False, True):
        made = model("F", full_rope=full_rope).double()
        with torch.no_grad():
            a, b = made(tokens()).hidden[:, -1], made(swapped).hidden[:, -1]
        assert torch.allclose(a, b, rtol=0, atol=1e-10) != full_rope
