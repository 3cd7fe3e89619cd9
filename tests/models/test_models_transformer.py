"""The whole model: causality, documents, caches, initialisation. Every attention kind, dense and sparse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deepseek.config import replace
from deepseek.errors import ConfigError
from deepseek.models import ModelConfig, Transformer, model_config
from deepseek.nn.attention import AttentionConfig
from deepseek.nn.moe import MoEConfig

VOCAB = 50


def config(pattern: str, ffn_pattern: str = "D", gate: Any = "token", **attention: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"window": 6, "block": 4, "stride": 2, **attention}
    return ModelConfig(
        vocab_size=VOCAB, hidden=24, layers=2, ffn=32, pattern=pattern, ffn_pattern=ffn_pattern,
        attention=AttentionConfig(heads=4, kv_heads=2, head_dim=8, qk_norm=True, gate=gate, **sizes),
        moe=MoEConfig(experts=4, top_k=2, expert_ffn=16, shared_experts=1),
    )  # fmt: skip


def model(made: ModelConfig, seed: int = 0) -> Transformer:
    """Random everywhere, so that nothing hides behind a zero at initialisation; the gates near one half."""
    torch.manual_seed(seed)
    net = Transformer(made).double().eval()
    for p in net.parameters():
        nn.init.normal_(p, std=0.3 if p.dim() < 3 else 0.5)
    return net


def logits(net: Transformer, tokens: Tensor, **context: Any) -> Tensor:
    with torch.no_grad():
        return net.logits(net(tokens, **context).hidden)


def pack(lengths: list[int], padding: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens, document ids and positions of one row ``[1, T]``."""
    ids = [torch.full((n,), i) for i, n in enumerate(lengths)] + [torch.full((padding,), -1)]
    positions = [torch.arange(n) for n in [*lengths, padding]]
    tokens = torch.randint(0, VOCAB, (1, sum(lengths) + padding))
    return tokens, torch.cat(ids)[None].int(), torch.cat(positions)[None].int()


KINDS = [("F", "D", "token"), ("L", "D", "token"), ("H", "D", "token"), ("H", "D", "static")]
KINDS += [("LH", "E", "token"), ("FH", "DE", "static"), ("F", "E", "token")]
every_kind = pytest.mark.parametrize(("pattern", "ffn_pattern", "gate"), KINDS)


@every_kind
@pytest.mark.parametrize("packed", [False, True])
def test_a_token_changes_no_logit_before_it(pattern: str, ffn_pattern: str, gate: str, packed: bool) -> None:
    net = model(config(pattern, ffn_pattern, gate))
    tokens, documents, positions = pack([9, 14, 4])
    context = {"documents": documents, "positions": positions} if packed else {}
    before = logits(net, tokens, **context)
    for t in (0, 1, 5, 9, 13, 22, 26):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % VOCAB
        after = logits(net, changed, **context)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-12)
        assert not torch.allclose(after[:, t], before[:, t], atol=1e-6), "the change must show at t itself"


@every_kind
def test_documents_do_not_see_each_other(pattern: str, ffn_pattern: str, gate: str) -> None:
    net = model(config(pattern, ffn_pattern, gate))
    tokens, documents, positions = pack([7, 15, 3, 8], padding=4)
    before = logits(net, tokens, documents=documents, positions=positions)
    changed = tokens.clone()
    inside = documents == 1
    changed[inside] = (changed[inside] + 7) % VOCAB
    after = logits(net, changed, documents=documents, positions=positions)
    others = (documents >= 0) & ~inside
    # Not bit by bit with experts: other rows in an expert's group may change how its matmul rounds.
    tolerance = 1e-12 if "E" in ffn_pattern else 0.0
    torch.testing.assert_close(after[others], before[others], rtol=0, atol=tolerance)
    assert not torch.allclose(after[inside], before[inside])


@every_kind
@settings(max_examples=5, deadline=None)
@given(lengths=st.lists(st.integers(1, 17), min_size=1, max_size=5), padding=st.integers(0, 5))
def test_a_packed_document_gives_what_it_gives_alone(
    pattern: str, ffn_pattern: str, gate: str, lengths: list[int], padding: int
) -> None:
    net = model(config(pattern, ffn_pattern, gate))
    tokens, documents, positions = pack(lengths, padding)
    together = logits(net, tokens, documents=documents, positions=positions)
    assert together.isfinite().all()
    start = 0
    for n in lengths:
        alone = logits(net, tokens[:, start : start + n])
        torch.testing.assert_close(together[:, start : start + n], alone, rtol=0, atol=1e-9)
        start += n


@every_kind
@settings(max_examples=6, deadline=None)
@given(chunks=st.lists(st.integers(1, 9), min_size=1, max_size=7), one_by_one=st.integers(0, 8))
def test_decoding_with_a_cache_equals_the_forward_pass(
    pattern: str, ffn_pattern: str, gate: str, chunks: list[int], one_by_one: int
) -> None:
    net = model(config(pattern, ffn_pattern, gate))
    sizes = [*chunks, *[1] * one_by_one]
    tokens = torch.randint(0, VOCAB, (2, sum(sizes)))
    want = logits(net, tokens)
    cache = net.new_cache()
    parts = [logits(net, part, cache=cache) for part in tokens.split(sizes, 1)]
    assert cache.length == tokens.shape[1]
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("window", "block", "stride"), [(1, 1, 1), (2, 8, 3), (8, 4, 4), (5, 7, 7), (30, 2, 1)]
)
@pytest.mark.parametrize("prompt", [1, 3, 8, 17])
def test_decoding_across_window_and_block_borders(window: int, block: int, stride: int, prompt: int) -> None:
    net = model(config("HL", window=window, block=block, stride=stride))
    tokens = torch.randint(0, VOCAB, (1, 24))
    cache = net.new_cache()
    parts = [logits(net, part, cache=cache) for part in tokens.split([prompt, *[1] * (24 - prompt)], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), logits(net, tokens), rtol=0, atol=1e-9)


def test_the_gate_is_reported_and_chooses_the_branch() -> None:
    made = config("H", gate="static")
    local = model(replace(made, pattern="L"))
    net = model(made)
    net.load_state_dict(local.state_dict(), strict=False)
    for block in net.blocks:
        nn.init.constant_(block.attention.gate_bias, -40.0)
    tokens = torch.randint(0, VOCAB, (1, 20))
    torch.testing.assert_close(logits(net, tokens), logits(local, tokens), rtol=0, atol=1e-9)
    for block in net.blocks:
        nn.init.constant_(block.attention.gate_bias, 1.0)
    for stats in net(tokens).layers:
        torch.testing.assert_close(stats.gate_H, torch.full((4,), 0.7310586), check_dtype=False)


def test_every_parameter_of_every_kind_gets_a_gradient() -> None:
    net = model(replace(config("FLH", "DEE"), layers=3, tie_embeddings=False)).train()
    output = net(torch.randint(0, VOCAB, (2, 30)))
    loss = net.logits(output.hidden).square().mean()
    (loss + sum(s.routing.balance_loss for s in output.layers if s.routing)).backward()
    missing = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing


def test_a_model_from_the_meta_device_is_complete_after_reset() -> None:
    made = replace(config("LH", "DE"), tie_embeddings=False)
    with torch.device("meta"):
        net = Transformer(made)
    net.to_empty(device="cpu")
    for x in [*net.parameters(), *net.buffers()]:
        x.data.fill_(float("nan"))
    net.reset_parameters()
    fresh = Transformer(made)
    for name, x in net.state_dict().items():
        assert x.isfinite().all(), name
        want = fresh.state_dict()[name]
        assert x.equal(want) or (x.std() - want.std()).abs() < 0.2 * want.std(), name


def test_blocks_start_as_the_identity() -> None:
    made = config("FLH", "DE")
    net, tokens = Transformer(made), torch.randint(0, VOCAB, (1, 12))
    torch.testing.assert_close(net(tokens).hidden, net.norm(net.embedding(tokens)))


def test_bf16_autocast_trains() -> None:
    net = Transformer(config("LH", "E"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = net(torch.randint(0, VOCAB, (2, 30)))
        loss = net.logits(output.hidden).float().square().mean()
    loss.backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in net.parameters())
    assert loss.isfinite()


def test_documents_and_a_cache_do_not_mix() -> None:
    net = model(config("F"))
    tokens, documents, _ = pack([4])
    with pytest.raises(ConfigError, match="not both"):
        net(tokens, documents=documents, cache=net.new_cache())


def test_bad_shapes_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="pattern='FX' may hold the letters F, L, H only"):
        ModelConfig(pattern="FX")
    with pytest.raises(ConfigError, match=r"moe\.experts is 0"):
        ModelConfig(ffn_pattern="DE")
    with pytest.raises(ConfigError, match=r"did you mean 'tiny'"):
        model_config({"preset": "tiney"})
    with pytest.raises(ConfigError, match="try 1, 2, 3, 6"):
        AttentionConfig(heads=6, kv_heads=4)


def test_a_preset_changes_in_part() -> None:
    made = model_config({"preset": "tiny", "layers": 6, "moe": {"experts": 8}})
    assert (made.layers, made.moe.experts, made.moe.expert_ffn) == (6, 8, 64)
    assert made.kinds == "LLHLLH"


def test_rope_pattern_is_a_letter_a_layer():
    """'N' layers compute what they compute with ``full_rope = false``; the others what they always did."""
    heads = AttentionConfig(heads=2, kv_heads=1, head_dim=16, window=5)
    base = ModelConfig(vocab_size=31, hidden=32, layers=3, ffn=48, pattern="F", attention=heads)
    torch.manual_seed(0)
    model = Transformer(replace(base, rope_pattern="RN")).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert model.config.rope_kinds == "RNR"
    assert [block.attention.config.full_rope for block in model.blocks] == [True, False, True]

    def hidden(config):
        other = Transformer(config).eval()
        other.load_state_dict(model.state_dict())
        return other

    plain, none = hidden(base), hidden(replace(base, attention=replace(heads, full_rope=False)))
    assert (plain.config.rope_kinds, none.config.rope_kinds) == ("RRR", "NNN")
    ids = torch.randint(31, (1, 12))
    with torch.no_grad():
        assert torch.equal(hidden(replace(base, rope_pattern="R"))(ids).hidden, plain(ids).hidden)
        assert torch.equal(hidden(replace(base, rope_pattern="N"))(ids).hidden, none(ids).hidden)
        plain.blocks[1], cache = none.blocks[1], model.new_cache()
        assert torch.equal(plain(ids).hidden, model(ids).hidden)
        steps = torch.cat([model(ids[:, i : i + 1], cache=cache).hidden for i in range(12)], 1)
        torch.testing.assert_close(steps, model(ids).hidden, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rope_pattern": "RX"}, "rope_pattern='RX' may hold the letters R, N only"),
        (
            {"rope_pattern": "RN", "pattern": "FL"},
            "gives layer 1 no rotary embedding, but pattern='FL' makes it 'L'",
        ),
        ({"rope_pattern": "R", "attention": AttentionConfig(full_rope=False)}, "leave one of them out"),
    ],
)
def test_rope_patterns_that_cannot_be(options, words):
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**{"pattern": "F", **options})
    assert words in str(caught.value)
