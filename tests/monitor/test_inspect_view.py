"""What the inspector says a head looks at, beside attention written out position by position in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deepseek.config import replace
from deepseek.errors import ConfigError
from deepseek.models import ModelConfig, Transformer
from deepseek.monitor.inspect.attention_map import attention_map
from deepseek.monitor.inspect.examine import attentions
from deepseek.monitor.inspect.heads import head_statistics, sampled_rows
from deepseek.monitor.inspect.view import AttentionView
from deepseek.nn.attention import Attention, AttentionConfig
from deepseek.nn.rope import RopeScaling

D, WINDOW, BLOCK, STRIDE = 8, 8, 8, 4
PIECES = (20, 15, 10, 3)  #: lengths of the documents of the first row; the last one is padding
T = sum(PIECES)


def shape(pattern: str = "FLH", **attention: object) -> ModelConfig:
    config = AttentionConfig(
        heads=4, kv_heads=2, head_dim=D, window=WINDOW, block=BLOCK, stride=STRIDE, pooling="learned"
    )
    return ModelConfig(
        vocab_size=64, hidden=32, layers=3, ffn=64, pattern=pattern, attention=replace(config, **attention)
    )


def packed() -> tuple[Tensor, Tensor]:
    """Documents and positions of two rows: four documents, the last of them padding, and one."""
    ids = torch.cat([torch.full((n,), i if i < 3 else -1) for i, n in enumerate(PIECES)])
    places = torch.cat([torch.arange(n) for n in PIECES])
    return torch.stack((ids, torch.zeros(T, dtype=torch.long))), torch.stack((places, torch.arange(T)))


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(config).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model


def run(
    model: Transformer, documents: Tensor | None, positions: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """The inputs of the attention layers and their heads' outputs."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    for attention in attentions(model):
        attention.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
        attention.output.register_forward_pre_hook(lambda module, args: outputs.append(args[0].detach()))
    with torch.no_grad():
        model(torch.randint(0, 64, (2, T), generator=torch.Generator().manual_seed(1)), documents, positions)
    return inputs, outputs


def turn(x: Tensor, position: int, theta: float) -> Tensor:
    """The rotary embedding of one vector ``[D]``, pair by pair."""
    y, half = x.clone(), len(x) // 2
    for i in range(half):
        # The model's table is fp32, like that of public checkpoints.
        angle = torch.tensor(float(position)) * (1.0 / theta ** (torch.tensor(2.0 * i) / len(x)))
        c, s = float(angle.cos()), float(angle.sin())
        y[i], y[i + half] = x[i] * c - x[i + half] * s, x[i + half] * c + x[i] * s
    return y


def softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    e = [math.exp(s - top) for s in scores]
    return [x / sum(e) for x in e]


def plain_local(
    attention: Attention, x: Tensor, ids: Tensor, places: Tensor, head: int, window: int | None
) -> Tensor:
    """``[T, T]`` probabilities of one head for one row, one query and one key at a time."""
    group = attention.config.heads // attention.config.kv_heads
    q = attention.query(x).view(T, -1, D)[:, head]
    k = attention.key(x).view(T, -1, D)[:, head // group]
    theta = attention.config.rope_theta
    q = torch.stack([turn(q[t], int(places[t]), theta) for t in range(T)])
    k = torch.stack([turn(k[t], int(places[t]), theta) for t in range(T)])
    p = torch.zeros(T, T, dtype=torch.float64)
    for t in range(T):
        seen = [s for s in range(t + 1) if ids[s] == ids[t] and (window is None or t - s < window)]
        for s, value in zip(seen, softmax([float(q[t] @ k[s]) / math.sqrt(D) for s in seen])):
            p[t, s] = value
    return p


def plain_pooled(attention: Attention, x: Tensor, ids: Tensor, head: int) -> tuple[Tensor, Tensor]:
    """Of one head and row: shares of positions ``[T, T]`` through the blocks, and of the sink ``[T]``."""
    group = attention.config.heads // attention.config.kv_heads
    q = attention.query(x).view(T, -1, D)[:, head]
    k = attention.key(x).view(T, -1, D)[:, head // group]
    for_k, for_v = attention.pool[:, head // group].softmax(-1)
    shares, sink = torch.zeros(T, T, dtype=torch.float64), torch.zeros(T, dtype=torch.float64)
    for t in range(T):
        start = next(s for s in range(T) if ids[s] == ids[t])
        blocks = list(range(start, t - BLOCK + 2, STRIDE))
        keys = [attention.sink[0, head // group]]
        keys += [sum(for_k[n] * k[s + n] for n in range(BLOCK)) for s in blocks]
        p = softmax([float(q[t] @ key) / math.sqrt(D) for key in keys])
        sink[t] = p[0]
        for value, s in zip(p[1:], blocks):
            for n in range(BLOCK):
                shares[t, s + n] += value * float(for_v[n])
    return shares, sink


@pytest.mark.parametrize("row", [0, 1])
@torch.no_grad()
def test_probabilities_are_those_of_attention_written_out(row: int) -> None:
    documents, positions = packed()
    model = random_model(shape())
    inputs, _ = run(model, documents, positions)
    for index, (attention, x) in enumerate(zip(attentions(model), inputs)):
        view = AttentionView(attention, x, documents, positions)
        for head in (3,):
            window = None if index == 0 else WINDOW
            wanted = plain_local(attention, x[row], documents[row], positions[row], head, window)
            found = view.probabilities(view.branches[0], heads=slice(head, head + 1))[row, 0]
            torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)  # the rotation's table is fp32
    gate = (attention.gate(x[row]) + attention.gate_bias).sigmoid()[:, 3]
    blocks, sink = plain_pooled(attention, x[row], documents[row], 3)
    shares, on_sink = view.over_positions(heads=slice(3, 4))
    torch.testing.assert_close(
        shares[row, 0], gate[:, None] * blocks + (1 - gate[:, None]) * wanted, rtol=0, atol=2e-6
    )
    torch.testing.assert_close(on_sink[row, 0], gate * sink, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scaling", [RopeScaling(), RopeScaling(type="yarn", factor=4.0, original_length=12)])
@pytest.mark.parametrize("rope_pattern", ["", "NRR"])
@pytest.mark.parametrize("packing", [True, False])
@torch.no_grad()
def test_shares_times_values_are_the_models_own_outputs(
    packing: bool, rope_pattern: str, scaling: RopeScaling
) -> None:
    documents, positions = packed() if packing else (None, None)
    model = random_model(replace(shape(rope_scaling=scaling), rope_pattern=rope_pattern))
    inputs, outputs = run(model, documents, positions)
    for attention, x, y in zip(attentions(model), inputs, outputs):
        view = AttentionView(attention, x, documents, positions)
        shares, sink = view.over_positions()
        value = attention.value(x).unflatten(-1, (-1, D)).transpose(1, 2).repeat_interleave(2, 1)
        made = shares @ value
        if len(view.branches) > 1:
            made = made + sink[..., None] * attention.sink[1].repeat_interleave(2, 0)[None, :, None]
        torch.testing.assert_close(made.transpose(1, 2).flatten(2), y, rtol=0, atol=1e-12)


@torch.no_grad()
def test_chosen_queries_are_rows_of_the_whole() -> None:
    documents, positions = packed()
    model = random_model(shape(qk_norm=True))
    inputs, _ = run(model, documents, positions)
    rows = torch.tensor([3, 17, 40])
    for attention, x in zip(attentions(model), inputs):
        whole, some = (AttentionView(attention, x, documents, positions, r) for r in (None, rows))
        for branch in whole.branches:
            torch.testing.assert_close(some.probabilities(branch), whole.probabilities(branch)[:, :, rows])


@torch.no_grad()
def test_figures_of_heads_are_those_of_the_probabilities() -> None:
    documents, positions = packed()
    model = random_model(shape())
    inputs, outputs = run(model, documents, positions)
    rows = sampled_rows(T, 12, torch.device("cpu"))
    valid = documents[:, rows] >= 0
    for index, attention in enumerate(attentions(model)):
        found = head_statistics(
            attention, inputs[index], outputs[index], documents=documents, positions=positions, queries=12
        )
        view = AttentionView(attention, inputs[index], documents, positions)
        for head in range(4):
            p = view.probabilities(view.branches[0])[:, head, rows]
            entropy = -(torch.xlogy(p, p)).sum(-1)
            if index == 2:
                gate = view.gate_BHR[:, head, rows]
                w = view.probabilities("pooled")[:, head, rows]
                assert float(found.gate[head]) == pytest.approx(float(gate[valid].mean()), rel=1e-5)
                entropy = (1 - gate) * entropy + gate * -(torch.xlogy(w, w)).sum(-1)
            assert float(found.entropy[head]) == pytest.approx(float(entropy[valid].mean()), rel=1e-5)
            columns = slice(head * D, (head + 1) * D)
            added = outputs[index][..., columns] @ attention.output.weight[:, columns].T
            size = added[:, rows][valid].square().mean().sqrt()
            assert float(found.output_norm[head]) == pytest.approx(float(size), rel=1e-5)
            if index == 1:
                starts = torch.tensor(
                    [[next(s for s in range(T) if ids[s] == ids[t]) for t in rows] for ids in documents]
                )
                sink = p.gather(-1, starts[..., None])[..., 0][valid].mean()
                assert float(found.sink[head]) == pytest.approx(float(sink), rel=1e-5)
                own = p.gather(-1, rows.expand(2, -1)[..., None])[..., 0][valid].mean()
                assert float(found.diagonal[head]) == pytest.approx(float(own), rel=1e-5)


@torch.no_grad()
def test_a_map_shows_every_cell_and_keeps_the_largest() -> None:
    model = random_model(shape())
    inputs, _ = run(model, None, None)
    for index, attention in enumerate(attentions(model)):
        view = AttentionView(attention, inputs[index])
        wanted = view.over_positions()[0][1, 2]
        full = attention_map(view, 2, row=1, pixels=512)
        assert full.cells.shape == (T, T)
        torch.testing.assert_close(full.cells, wanted.float())
        part = attention_map(view, 2, row=1, start=10, size=24, pixels=6)
        small = wanted[10:34, 10:34].view(6, 4, 6, 4).amax((1, 3))
        torch.testing.assert_close(part.cells, small.float())


def test_bytes_say_what_the_map_holds() -> None:
    import base64

    model = random_model(shape())
    inputs, _ = run(model, None, None)
    found = attention_map(AttentionView(attentions(model)[0], inputs[0]), 1)
    told = found.to_dict()
    raw = torch.frombuffer(bytearray(base64.b64decode(told["values"])), dtype=torch.uint8)
    back = told["scale"] * (raw.view(T, T) / 255) ** told["gamma"]
    assert float((back.sqrt() - found.cells.sqrt()).abs().max()) <= 1.01 / 255 * math.sqrt(told["scale"])
    assert bool((raw.view(T, T) > 0).eq(found.cells > 0).all())  # what is there is never black


@torch.no_grad()
def test_one_strong_entry_among_four_thousand_positions_stays_visible() -> None:
    config = shape("F")
    model = random_model(replace(config, layers=1, max_length=4096))
    attention = attentions(model)[0]
    x = 0.001 * torch.randn(1, 4096, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, k = attention.query.weight[:D], attention.key.weight[:D]
    wanted = torch.linalg.lstsq(
        torch.cat((q, k)), torch.cat((torch.zeros(D), torch.ones(D) * 30)).double()[:, None]
    )
    asked = torch.linalg.lstsq(
        torch.cat((q, k)), torch.cat((torch.ones(D) * 30, torch.zeros(D))).double()[:, None]
    )
    attention.config = replace(attention.config, full_rope=False)
    x[0, 1234], x[0, 3210] = wanted.solution[:, 0], asked.solution[:, 0]
    cells = attention_map(AttentionView(attention, x), 0, pixels=256).cells
    assert float(cells[3210 * 256 // 4096, 1234 * 256 // 4096]) > 0.99
    assert float(cells.flatten().kthvalue(cells.numel() - 400).values) < 0.5


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"head": 4}, "heads 0 to 3"),
        ({"head": 0, "row": 2}, "rows 0 to 1"),
        ({"head": 0, "start": 40, "size": 20}, "1 to 8"),
        ({"head": 0, "pixels": 0}, "at least 1"),
        ({"head": 0, "branch": "windows"}, "did you mean 'window'"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(options: dict[str, object], told: str) -> None:
    model = random_model(shape())
    inputs, _ = run(model, None, None)
    with pytest.raises(ConfigError, match=told):
        attention_map(AttentionView(attentions(model)[1], inputs[1]), **options)  # type: ignore[arg-type]
