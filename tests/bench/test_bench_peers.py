"""Peers do the work they are said to do: our parameters, our FLOPs, and plain torch computes our function."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from deepseek.batch import Batch
from deepseek.bench.peers import PEERS, LoopMoE, PlainLM, PlainMoE, Setup, full_attention, hf_model, liger
from deepseek.bench.train import quick_config
from deepseek.config import replace
from deepseek.errors import ConfigError
from deepseek.models import PRESETS, ModelConfig, Transformer, count

CPU = torch.device("cpu")
SHAPES = {name: quick_config(PRESETS[name]()) for name in ("dense_856m", "moe_64x2")}


def copy_weights(ours: Transformer, plain: PlainLM) -> None:
    """Our weights into the plain model."""
    state = ours.state_dict()
    plain.embedding.weight.data = state["embedding.weight"]
    plain.head.weight.data = ours.head_weight.data
    for number, block in enumerate(plain.blocks):
        at = f"blocks.{number}."
        block.attention.qkv.weight.data = torch.cat(
            [state[f"{at}attention.{n}.weight"] for n in ("query", "key", "value")]
        )
        block.attention.output.weight.data = state[f"{at}attention.output.weight"]
        if isinstance(block.ffn, PlainMoE):
            block.ffn.router.weight.data = state[f"{at}ffn.router.weight"]
            block.ffn.gate_up.data, block.ffn.down.data = state[f"{at}ffn.gate_up"], state[f"{at}ffn.down"]
        else:
            block.ffn.gate_up.weight.data = state[f"{at}ffn.gate_up.weight"]
            block.ffn.down.weight.data = state[f"{at}ffn.down.weight"]


@pytest.mark.parametrize("name", SHAPES)
def test_plain_torch_computes_our_function(name: str) -> None:
    torch.manual_seed(0)
    config = SHAPES[name]
    ours, plain = Transformer(config).eval(), PlainLM(config)
    for name_, p in ours.named_parameters():  # ways back into the residual stream start at zero
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(name_)))
    copy_weights(ours, plain)
    tokens = torch.randint(0, config.vocab_size, (2, 24))
    torch.testing.assert_close(plain(tokens), ours(tokens).hidden, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_peers_have_our_parameters(name: str) -> None:
    config = SHAPES[name]
    ours = count.parameters(config).total
    assert sum(p.numel() for p in PlainLM(config).parameters()) == ours
    pytest.importorskip("transformers")
    norms = (
        2 * config.attention.head_dim * config.layers if config.moe.experts else 0
    )  # Qwen3 normalises q and k
    assert sum(p.numel() for p in hf_model(config).parameters()) == ours + norms


@pytest.mark.parametrize("name", SHAPES)
def test_plain_torch_runs_the_counted_flops(name: str) -> None:
    config, length = SHAPES[name], 64
    model, tokens = PlainLM(config), torch.randint(0, config.vocab_size, (1, length))
    for block in model.blocks:
        if isinstance(block.ffn, PlainMoE):
            block.ffn.__class__ = LoopMoE  # the same products, in a form that the counter sees on a CPU
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        torch.nn.functional.linear(model(tokens), model.head.weight)
    plain = replace(config, moe=replace(config.moe, default_decay=0.0))
    assert counter.get_total_flops() == count.flops(plain, length, executed=True).forward_row


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("peer", ["plain-torch", "transformers"])
def test_a_step_accumulates_and_learns(name: str, peer: str) -> None:
    if peer == "transformers":
        pytest.importorskip("transformers")
    config = SHAPES[name]
    torch.manual_seed(0)
    step = PEERS[peer](Setup(config, CPU, micro_rows=2, compile=False, lr=3e-3))
    batch = Batch.from_rows(torch.arange(4 * 33).view(4, 33) % 16)
    losses = [float(step(batch)) for _ in range(8)]
    assert losses[0] == pytest.approx(math.log(config.vocab_size), rel=0.1)
    assert losses[-1] < 0.7 * losses[0]


def test_micro_batches_add_up_to_the_batch() -> None:
    config, batch = SHAPES["dense_856m"], Batch.from_rows(torch.randint(0, 256, (4, 33)))
    losses = []
    for rows in (4, 1):
        torch.manual_seed(0)
        step = PEERS["plain-torch"](Setup(config, CPU, micro_rows=rows, compile=False, lr=1e-2))
        losses.append([float(step(batch)) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_loop_over_experts_equals_grouped_matmuls() -> None:
    torch.manual_seed(0)
    grouped, loop = PlainMoE(16, 32, 4, 2), LoopMoE(16, 32, 4, 2)
    loop.load_state_dict(grouped.state_dict())
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(grouped(x), loop(x))


def test_patterns_that_peers_lack_become_full_attention() -> None:
    assert full_attention(ModelConfig(pattern="LLLH")).kinds == "FFFF"


def test_liger_says_what_it_lacks() -> None:
    with pytest.raises(ConfigError, match="dense Llama only"):
        liger(Setup(SHAPES["moe_64x2"], CPU, 1))
    try:
        import liger_kernel  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="pip install liger-kernel"):
            liger(Setup(SHAPES["dense_856m"], CPU, 1))
