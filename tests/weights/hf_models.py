"""Small random `transformers` models for tests of the import, and our answers to hold against theirs."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import Tensor

from deepseek.assemble import load
from deepseek.serve.engine import Engine
from deepseek.serve.engine_config import EngineConfig
from deepseek.serve.request import Request
from deepseek.serve.sampler import SamplingConfig

transformers.utils.logging.disable_progress_bar()

SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 96,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
MIXTRAL = {"num_experts_per_tok": 2, "num_local_experts": 4}
QWEN_MOE = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 16}


def make(model_type: str, **options):
    """Weights large enough that no part is idle; ``save_pretrained`` warns of no token ids."""
    torch.manual_seed(sum(map(ord, model_type)))
    config = transformers.AutoConfig.for_model(model_type, **{**SHAPE, **options})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(0, SHAPE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def compare(path: Path, reference, length: int = 80, rows: int = 2, generated: int = 12) -> None:
    """Logits to 1e-5 of the largest, and greedy tokens of the serving engine, after a prompt of ``length``."""
    ours, ids = load(path).model, tokens(rows, length)
    theirs = reference(ids).logits
    scale = max(1.0, float(theirs.abs().max()))
    torch.testing.assert_close(ours.logits(ours(ids).hidden), theirs, rtol=0, atol=1e-5 * scale)
    if generated:
        wanted = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=generated,
            do_sample=False,
            pad_token_id=0,
        )
        assert served(path, ids.tolist(), generated) == wanted[:, length:].tolist()


def served(path: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy answers of the engine to all prompts at once."""
    engine = Engine(load(path), EngineConfig(precision="fp32", memory_gib=0.01, device="cpu"))
    found: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), tuple(prompt), SamplingConfig(temperature=0, max_tokens=count)))
    for _ in range(1000):
        if not engine.has_work:
            break
        for output in engine.step():
            found[output.id] += output.tokens
    return list(found.values())
