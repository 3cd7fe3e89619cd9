"""Commands that use a model: continue a text, talk, hand it to others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tyro.conf import Positional

from deepseek.cli.terminal import ask, print_json, read_stdin
from deepseek.errors import ConfigError


@dataclass(frozen=True)
class _Sampling:
    max_tokens: int = 128
    temperature: float = 0.8  # 0: always the most likely token
    top_k: int = 0  # 0: all
    top_p: float = 0.95
    seed: int | None = None
    stop: tuple[str, ...] = ()  # texts that end the answer
    device: str = "auto"

    def sampling(self) -> dict[str, Any]:
        names = ("max_tokens", "temperature", "top_k", "top_p", "seed", "stop")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Generate(_Sampling):
    """Continue a prompt with a run, a checkpoint, a Hugging Face directory or a GGUF file; '-' reads it from stdin."""

    model: Positional[str] = ""
    prompt: Positional[str] = "-"
    json: bool = False

    def go(self, rest: Sequence[str]) -> int:
        from deepseek.serve import SamplingConfig, load

        prompt = read_stdin() if self.prompt == "-" else self.prompt
        model, sampling = load(self.model, self.device), SamplingConfig(**self.sampling())
        if self.json:
            done = model.complete(prompt, sampling)
            print_json({"text": done.text, "tokens": done.tokens, "finish_reason": done.finish_reason,
                         "seconds": done.seconds})  # fmt: skip
            return 0
        model.prompt_ids(prompt)  # what cannot be continued is refused before it is shown
        print(prompt, end="", flush=True)
        for piece in model.stream(prompt, sampling):
            print(piece, end="", flush=True)
        print()
        return 0


@dataclass(frozen=True)
class Chat(_Sampling):
    """Talk to a model, turn by turn; an empty line or Ctrl-D ends. (A pretrained model only continues text.)"""

    model: Positional[str] = ""
    system: str = ""

    def go(self, rest: Sequence[str]) -> int:
        from deepseek.serve import Message, SamplingConfig, load

        model, sampling = load(self.model, self.device), SamplingConfig(**self.sampling())
        messages = [Message("system", self.system)] if self.system else []
        while question := ask("you> "):
            messages.append(Message("user", question))
            answer = ""
            print("model> ", end="", flush=True)
            for piece in model.stream(model.chat_prompt(messages), sampling):
                answer += piece
                print(piece, end="", flush=True)
            print()
            messages.append(Message("assistant", answer))
        return 0


@dataclass(frozen=True)
class Import:
    """Make a run of a model from elsewhere: a Hugging Face directory, or a GGUF file, quantised or not.

    Llama, Mistral, Qwen 2 and 3, Mixtral, Qwen3-MoE, SmolLM2; with their tokenizer and chat template.
    """

    model: Positional[str]  # a directory, or a .gguf file
    run: str = ""  # where to keep it: a path, or a NAME in runs/; the model's name unless told
    dtype: str = "kept"  # of the weights: kept (quantised ones become fp32), fp32, bf16 or fp16
    json: bool = False

    def go(self, rest: Sequence[str]) -> int:
        from dataclasses import asdict
        from pathlib import Path

        from deepseek.recipes.import_model import import_model

        path = Path(self.run) if Path(self.run).name != self.run else Path("runs") / self.run
        done = import_model(self.model, path if self.run else "", dtype=self.dtype)
        if self.json:
            print_json({**asdict(done), "run": str(done.run)})
            return 0
        print(
            f"{done.run}: {done.parameters:,} parameters, {done.bytes / 2**20:,.0f} MiB, {done.seconds:.1f} s"
        )
        print(f"talk to it with: deepseek chat {done.run}")
        return 0


@dataclass(frozen=True)
class Export:
    """Write a run as a Hugging Face directory, read it back and compare logits."""

    run: Positional[str]
    format: str = "hf"
    to: str = ""  # the directory; RUN/export unless told
    dtype: str = "fp32"  # fp32, bf16 or fp16
    family: str = "auto"  # 'auto', 'llama', 'qwen3', 'qwen3_moe', 'mixtral', … or 'deepseek_hybrid'
    json: bool = False

    def go(self, rest: Sequence[str]) -> int:
        from dataclasses import asdict

        from deepseek.recipes.export import export

        if self.format != "hf":
            raise ConfigError(f"--format {self.format!r} is not known; this version writes 'hf'")
        done = export(self.run, self.to or None, dtype=self.dtype, family=self.family)
        if self.json:
            print_json({**asdict(done), "path": str(done.path)})
        else:
            print(f"{done.path}: {done.model_type}, read back by {done.loaded_with}, "
                  f"largest logit difference {done.max_logit_difference:.2g}")  # fmt: skip
            if done.reason:
                print(
                    f"not a family of plain transformers: {done.reason}; use `import deepseek.transformers`"
                )
        return 0
