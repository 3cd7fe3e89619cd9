"""The tokenizer files of a Hugging Face directory, from a ``tokenizer.json``.

``tokenizer.json`` is the whole tokenizer in the format of the library ``tokenizers``; the files beside it
only name its special tokens and the chat template, so that ``AutoTokenizer`` gives the same ids. Unlike our
own ``encode``, it reads special tokens written in the text: a template has to.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

from deepseek.data.foreign_text import MORE_TEMPLATES, end_ids
from deepseek.errors import WeightsError
from deepseek.models import ModelConfig
from deepseek.weights.hf_files import read_json, write_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
TEXT_END, PAD, TURN_END = "<|endoftext|>", "<|pad|>", "<|end|>"
ROLES = ("user", "assistant", "system")

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class TokenIds(NamedTuple):
    """Special ids; ``None`` where the tokenizer has no such token. ``ends``: more that end an answer."""

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    turn_end: int | None = None
    ends: tuple[int, ...] = ()

    def config(self) -> dict[str, Any]:
        """Keys of ``config.json``: written even when null, because families have defaults of their own."""
        return {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}

    def generation(self) -> dict[str, Any]:
        """Keys of ``generation_config.json``: greedy; generation ends with the text or the turn."""
        ends = list(dict.fromkeys(i for i in (self.eos, self.turn_end, *self.ends) if i is not None))
        values = {**self.config(), "eos_token_id": ends[0] if len(ends) == 1 else ends or None}
        return {key: value for key, value in values.items() if value is not None} | {"do_sample": False}


def write_tokenizer(
    source: Path, target: Path, config: ModelConfig, chat_template: str | None = None
) -> TokenIds:
    """Copy ``source/tokenizer.json`` and write what ``AutoTokenizer`` needs beside it.

    Raises:
        WeightsError: no tokenizer there, or more tokens than the model has embeddings.
    """
    read = read_json(source / "tokenizer.json")
    try:
        added = {str(t["content"]): int(t["id"]) for t in read.get("added_tokens", [])}
        ids = {
            *(read["model"]["vocab"].values() if isinstance(read["model"]["vocab"], dict) else ()),
            *added.values(),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{source / 'tokenizer.json'} is not a tokenizer: {error!r}") from None
    if ids and max(ids) >= config.vocab_size:
        raise WeightsError(
            f"{source / 'tokenizer.json'} has token id {max(ids)}, "
            f"but the model's vocab_size is {config.vocab_size}"
        )
    settings = _settings(source, added, config)
    names = {key: _content(settings.get(key)) for key in ("bos_token", "eos_token", "pad_token")}
    shutil.copyfile(source / "tokenizer.json", target / "tokenizer.json")
    write_json(target / "tokenizer_config.json", settings)
    write_json(target / "special_tokens_map.json", {key: name for key, name in names.items() if name})
    if (source / "chat_template.jinja").is_file() and chat_template is None:
        shutil.copyfile(source / "chat_template.jinja", target / "chat_template.jinja")
    elif chat_template or (_speaks(added) and "chat_template" not in settings):
        (target / "chat_template.jinja").write_text(chat_template or CHAT_TEMPLATE, encoding="utf-8")
    for path in (source / MORE_TEMPLATES).glob("*.jinja"):
        (target / MORE_TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(path, target / MORE_TEMPLATES / path.name)
    bos, eos, pad = (added.get(name or "") for name in names.values())
    ends = end_ids(source)
    return TokenIds(bos, eos, pad, added.get(TURN_END) if _speaks(added) else None, ends)


def _settings(source: Path, added: dict[str, int], config: ModelConfig) -> dict[str, Any]:
    """``tokenizer_config.json``: the one beside ``tokenizer.json`` if there is one, completed."""
    path = source / "tokenizer_config.json"
    given = read_json(path) if path.is_file() else {}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    if TEXT_END in added:
        settings |= {"bos_token": TEXT_END, "eos_token": TEXT_END}
    if PAD in added:
        settings["pad_token"] = PAD
    longest = given.get("model_max_length")
    known = isinstance(longest, int) and longest < config.max_length
    return {**settings, **given, "model_max_length": longest if known else config.max_length}


def _content(token: Any) -> str | None:
    """The text of a special token, which files write as a string or as a table."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _speaks(added: dict[str, int]) -> bool:
    """Whether the tokenizer has the tokens of our chat template."""
    return {TEXT_END, TURN_END, *(f"<|{role}|>" for role in ROLES)} <= added.keys()
