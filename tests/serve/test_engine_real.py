"""A real model, SmolLM2-135M-Instruct, and exports of ours: the engine's greedy text against `transformers`."""

import sys
from pathlib import Path

import pytest
import torch
import transformers
from test_engine import WAYS, made, serve, texts, tokens_of

from deepseek.assemble import load
from deepseek.config import replace
from deepseek.models import Transformer
from deepseek.serve.engine import Engine
from deepseek.serve.engine_config import EngineConfig
from deepseek.serve.request import Request
from deepseek.serve.sampler import SamplingConfig
from deepseek.weights.convert import save_hf

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village by the sea,",
    "Q: What is 17 + 25?\nA:",
    "Translate to French: 'The weather is nice today.' ->",
)


def answers(model: torch.nn.Module, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """What ``transformers`` answers, one prompt at a time."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        found.append(out[0, len(prompt) :].tolist())
    return found


@pytest.mark.slow
def test_smollm2_answers_as_transformers_does_whatever_is_going_on() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "weights"))
    from gguf_models import smollm2
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = smollm2()
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.load_state_dict(
        load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=theirs)["tensors"], strict=False
    )
    loaded = load(path)
    assert loaded.tokenizer is not None
    prompts = [loaded.tokenizer.prompt(text) for text in PROMPTS]
    wanted = answers(theirs, prompts, 16)
    sampling = SamplingConfig(temperature=0, max_tokens=16, ignore_eos=True)
    for way in ("together", "small chunks", "speculation"):
        config_ = {"memory_gib": 0.2, "max_length": 128, **WAYS[way]}
        found, _ = serve(loaded, prompts, sampling, **config_)
        assert [tokens_of(o) for o in found] == wanted, way


@pytest.mark.parametrize("shape", ["full", "window"])
def test_exports_answer_as_transformers_does(shape: str, tmp_path: Path) -> None:
    """A window in every layer exports as Mistral's family, full attention as Llama's."""
    loaded = made(shape)
    exported = save_hf(loaded.model, tmp_path / "hf")
    assert exported.model_type in ("llama", "mistral")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    prompts = texts(5, seed=6)
    found, _ = serve(
        load(tmp_path / "hf"), prompts, SamplingConfig(temperature=0, max_tokens=16, ignore_eos=True)
    )
    assert [tokens_of(o) for o in found] == answers(theirs, prompts, 16)


def test_experts_export_and_answer_as_transformers_does(tmp_path: Path) -> None:
    mixed = made("mixed").model.config
    torch.manual_seed(3)
    model = Transformer(replace(mixed, pattern="F"))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    assert save_hf(model, tmp_path / "hf").model_type in ("qwen3_moe", "mixtral")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    prompts = texts(5, seed=6)
    engine = Engine.load(tmp_path / "hf", EngineConfig(precision="fp32", memory_gib=0.01))
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), tuple(prompt), SamplingConfig(temperature=0, max_tokens=16)))
    found: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    while engine.has_work:
        for output in engine.step():
            found[output.id] += output.tokens
    assert list(found.values()) == answers(theirs, prompts, 16)
