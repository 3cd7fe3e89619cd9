"""What a foreign model says about text beside its ``tokenizer.json``: start token, ends, chat templates.

tokenizer_config.json      bos_token, eos_token, add_bos_token, chat_template
special_tokens_map.json    bos_token, eos_token (older directories)
generation_config.json     eos_token_id: one id, or all that end an answer; config.json where there is no such file
chat_template.jinja        the template named "default"; more in additional_chat_templates/NAME.jinja
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from deepseek.errors import DataError
from deepseek.files import write_atomic

BEGINS = "begins_documents"  #: our key of tokenizer_config.json: a text begins with the start token
TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
MOST_TEMPLATE = 1 << 20  #: characters of one chat template; known ones have up to 20,000


@dataclass(frozen=True)
class ForeignText:
    """Read from a directory, or taken from the metadata of a file.

    Attributes:
        bos: the start token as it is written, or ``None``. add_bos: plain texts begin with it.
        ends: token ids that end an answer. chat_templates: Jinja text by name.
        tokenizer_class: the one of ``transformers`` that the directory names.
    """

    bos: str | None = None
    add_bos: bool = False
    ends: tuple[int, ...] = ()
    chat_templates: dict[str, str] = field(default_factory=dict)
    tokenizer_class: str = "PreTrainedTokenizerFast"

    @classmethod
    def read(cls, directory: Path, inner: tokenizers.Tokenizer, names: dict[str, str]) -> ForeignText:
        """From the files beside a ``tokenizer.json``. Raises ``DataError`` for a damaged one."""
        config = read_object(directory / "tokenizer_config.json")
        bos, prefix = names.get("bos_token"), _prefix(inner)
        if bos is None and prefix:
            bos = inner.id_to_token(prefix[0])
        add = bool(prefix) or config.get(BEGINS) is True
        whole = end_ids(directory)
        named = config.get("tokenizer_class")
        kind = named if isinstance(named, str) else cls.tokenizer_class
        return cls(bos, add and bos is not None, whole, _templates(directory, config), kind)

    def save(self, directory: Path, config: dict[str, Any]) -> None:
        """Write the files that ``read`` reads; adds to ``config``, which becomes ``tokenizer_config.json``."""
        config["tokenizer_class"] = self.tokenizer_class
        if self.add_bos:
            config["add_bos_token"] = True  # for readers that do listen
        for name, text in self.chat_templates.items():
            path = directory / (TEMPLATE if name == "default" else f"{MORE_TEMPLATES}/{name}.jinja")
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, text)
        if self.ends:
            ends = {"eos_token_id": self.ends[0] if len(self.ends) == 1 else list(self.ends)}
            write_atomic(directory / "generation_config.json", json.dumps(ends) + "\n")


def end_ids(directory: Path) -> tuple[int, ...]:
    """``eos_token_id``, one or a list, of ``generation_config.json`` or, where there is none, of ``config.json``."""
    path = directory / "generation_config.json"
    ends = read_object(path if path.exists() else directory / "config.json").get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    return tuple(i for i in ends if isinstance(i, int) and not isinstance(i, bool))


def special_names(directory: Path) -> dict[str, str]:
    """``eos_token`` and friends from the two files Hugging Face keeps them in."""
    names: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        found = read_object(directory / name)
        for key in ("eos_token", "bos_token", "pad_token"):
            value = found.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                names[key] = value
    return names


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty when there is no such file, or when it holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    return found if isinstance(found, dict) else {}


def _prefix(inner: tokenizers.Tokenizer) -> list[int]:
    """The ids that the tokenizer's own post-processor puts in front of a text."""
    plain = inner.encode("a", add_special_tokens=False).ids
    whole = inner.encode("a", add_special_tokens=True).ids
    extra = len(whole) - len(plain)
    at = next((i for i in range(extra + 1) if whole[i : i + len(plain)] == plain), 0)
    return list(whole[:at])


def _templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """By name; files win over ``tokenizer_config.json``, which has one text, or a list of named ones."""
    given = config.get("chat_template")
    entries = given if isinstance(given, list) else [{"name": "default", "template": given}]
    named = {e.get("name"): e.get("template") for e in entries if isinstance(e, dict)}
    files = {"default": directory / TEMPLATE}
    files |= {path.stem: path for path in sorted((directory / MORE_TEMPLATES).glob("*.jinja"))}
    for name, path in files.items():
        try:
            if path.is_file() and path.stat().st_size <= 4 * MOST_TEMPLATE:
                named[name] = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is damaged: {error}") from None
    texts = {n: t for n, t in named.items() if isinstance(n, str) and isinstance(t, str)}
    for name, text in texts.items():
        if len(text) > MOST_TEMPLATE:
            raise DataError(
                f"{directory}: chat template {name!r} has {len(text)} characters, over {MOST_TEMPLATE}"
            )
    return texts
