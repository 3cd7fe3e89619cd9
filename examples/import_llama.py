"""A Llama directory, written by `transformers`, on our layers: equal logits, and text. Seconds, no download.

The weights are random, so the text is, too; any directory of a supported family takes the place of the one
made here. Needs the extra [hf].

    python examples/import_llama.py [--directory path/to/llama]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

import deepseek as ds


def make_llama(directory: Path) -> None:
    """A small Llama with random weights and a byte-level tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = ds.train_tokenizer(["The quick brown fox jumps over the lazy dog. "] * 20, 300)
    tokenizer.save(directory)
    shape = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_id,
        bos_token_id=tokenizer.eos_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(shape).save_pretrained(directory)


def compare(directory: Path) -> float:
    """The largest difference of logits between `transformers` and us."""
    from transformers import AutoModelForCausalLM

    ours = ds.load(directory, device="cpu").model
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokens = torch.randint(0, ours.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return float((ours.logits(ours(tokens).hidden) - theirs(tokens).logits).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path)
    given = parser.parse_args().directory
    with tempfile.TemporaryDirectory() as folder:
        directory = given or Path(folder) / "llama"
        if given is None:
            directory.mkdir()
            make_llama(directory)
        print(f"largest logit difference to transformers: {compare(directory):.1e}")
        print(repr(ds.load(directory).generate("The quick ", temperature=0, max_tokens=8)))


if __name__ == "__main__":
    main()
