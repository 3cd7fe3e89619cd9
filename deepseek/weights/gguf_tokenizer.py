"""The tokenizer in a GGUF file's metadata, rebuilt with the library ``tokenizers``.

    tokenizer.ggml.model        "gpt2": byte-level BPE; "llama": SentencePiece BPE with byte fallback
    tokenizer.ggml.pre          how a "gpt2" one cuts text before BPE
    tokenizer.ggml.tokens       token_type (1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte)
                  .merges       "left right", best first;  .scores: of SentencePiece tokens, best highest
    tokenizer.ggml.*_token_id   bos, eos, eot (end of turn), padding;  add_bos_token, add_space_prefix
    tokenizer.chat_template     Jinja; others are tokenizer.chat_template.NAME

``pre`` only names a rule; the rules are the patterns of the original tokenizers. A name that is unknown is refused:
a wrong cut would silently give other ids than the model was trained on.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from deepseek.data import Tokenizer
from deepseek.data.foreign_text import MOST_TEMPLATE, ForeignText
from deepseek.errors import WeightsError, did_you_mean
from deepseek.weights.gguf import GGUFFile
from deepseek.weights.gguf_parts import part_paths

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
SPACE = "\u2581"
MOST_TOKENS = 1 << 21
MOST_SPLIT = 128  #: characters from the beginning of a token up to which it is taken apart

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Cut(NamedTuple):
    """How text is cut before BPE.

    Attributes:
        patterns: regular expressions, one after the other; each match is a piece, and what lies between.
        whole: a piece that is a token is taken as it is, whatever the merges say.
        nfc: Unicode is composed first. add_bos: what is meant where the file does not say.
    """

    patterns: tuple[str, ...]
    whole: bool = False
    nfc: bool = False
    add_bos: bool = False


_SMOLLM, _GPT2 = Cut((r"\p{N}", GPT2)), Cut((GPT2,))
_LLAMA3 = Cut((LLAMA3,), whole=True, add_bos=True)
CUTS: dict[str, Cut] = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "gpt2": _GPT2,
    "smollm": _SMOLLM,
    "starcoder": _SMOLLM,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "smaug-bpe": Cut((LLAMA3,)),  # SmolLM3 and some Llama 3 have it
    "dbrx": Cut((LLAMA3,)),
    "qwen2": Cut((QWEN2,), nfc=True),
    "deepseek-r1-qwen": Cut((QWEN2,)),
    "tekken": Cut((TEKKEN,), whole=True, add_bos=True),
}


def gguf_tokenizer(file: GGUFFile) -> Tokenizer | None:
    """The tokenizer of a file; ``None`` when it has none.

    Raises:
        WeightsError: of a kind, or with a way of cutting text, that we do not know; or damaged.
    """
    meta = _Meta(file)
    kind = meta.get("model")
    if kind is None or kind == "none":
        return None
    if kind not in ("gpt2", "llama"):
        raise meta.error("model", "we know 'gpt2' and 'llama'")
    tokens = meta.texts("tokens")
    if len(tokens) > MOST_TOKENS:
        raise meta.error("tokens", f"it has {len(tokens)} tokens, and we read at most {MOST_TOKENS}")
    if len(set(tokens)) != len(tokens):
        raise WeightsError(
            f"{file.path}: tokenizer.ggml.tokens holds {len(tokens) - len(set(tokens))} tokens twice"
        )
    types = meta.numbers("token_type", len(tokens), 1)
    try:
        inner, add_bos = (_byte_level if kind == "gpt2" else _sentencepiece)(meta, tokens, types)
    except WeightsError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise WeightsError(f"{file.path}: its tokenizer cannot be built: {str(error)[:200]}") from None
    special = [
        AddedToken(t, special=k != USER_DEFINED, normalized=False)
        for t, k in zip(tokens, types)
        if k in (CONTROL, USER_DEFINED) and t
    ]
    inner.add_tokens(special)
    return _wrap(meta, inner, tokens, add_bos)


def _wrap(meta: _Meta, inner: tokenizers.Tokenizer, tokens: list[str], add_bos: bool) -> Tokenizer:
    ids = {name: meta.token(name, len(tokens)) for name in ("bos", "eos", "eot", "eom", "padding")}
    eos = next((i for i in (ids["eos"], ids["eot"], ids["bos"]) if i is not None), None)
    if eos is None:
        raise WeightsError(f"{meta.file.path}: the tokenizer has no end token (tokenizer.ggml.eos_token_id)")
    told = meta.get("add_bos_token")
    bos, pad = ids["bos"], ids["padding"]
    ends = tuple(dict.fromkeys(i for i in (eos, ids["eot"], ids["eom"]) if i is not None))
    add = (told if isinstance(told, bool) else add_bos) and bos is not None
    if add and bos is not None:
        start = tokens[bos]
        inner.post_processor = processors.TemplateProcessing(
            single=[f"{start}:0", "$A:0"],
            pair=[f"{start}:0", "$A:0", f"{start}:1", "$B:1"],
            special_tokens=[(start, bos)],
        )
    foreign = ForeignText(tokens[bos] if bos is not None else None, add, ends, _templates(meta.file))
    if meta.get("pre") == "qwen2":
        foreign = replace(foreign, tokenizer_class="Qwen2Tokenizer")  # AutoTokenizer takes it for this family
    return Tokenizer(inner, eos=tokens[eos], pad=tokens[pad] if pad is not None else None, foreign=foreign)


def _templates(file: GGUFFile) -> dict[str, str]:
    key = "tokenizer.chat_template"
    found = {
        name.removeprefix(key).lstrip(".") or "default": text
        for name, text in file.metadata.items()
        if (name == key or name.startswith(f"{key}.")) and isinstance(text, str)
    }
    for name, text in found.items():
        if len(text) > MOST_TEMPLATE:
            raise WeightsError(
                f"{file.path}: chat template {name!r} has {len(text)} characters, over {MOST_TEMPLATE}"
            )
    return found


class _Meta:
    """The keys ``tokenizer.ggml.*`` of a file."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file

    def get(self, key: str) -> Any:
        return self.file.metadata.get(f"tokenizer.ggml.{key}")

    def error(self, key: str, why: str) -> WeightsError:
        value = repr(self.get(key))
        value = value if len(value) < 80 else value[:77] + "…"
        return WeightsError(f"{self.file.path}: tokenizer.ggml.{key} is {value}; {why}")

    def texts(self, key: str) -> list[str]:
        value = self.get(key)
        if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
            raise self.error(key, "it must be a list of strings")
        return value

    def numbers(self, key: str, count: int, default: float) -> list[Any]:
        value = self.get(key)
        if value is None:
            return [default] * count
        if not isinstance(value, list) or len(value) != count or any(isinstance(v, str) for v in value):
            raise self.error(key, f"it must be a list of {count} numbers, one for each token")
        return value

    def token(self, name: str, count: int) -> int | None:
        """An id like ``eos_token_id``; ``None`` where the file has none, or all bits set, which means none."""
        key = f"{name}_token_id"
        value = self.get(key)
        if value is None or value in (-1, 0xFFFFFFFF):
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
            raise self.error(key, f"the tokenizer has {count} tokens")
        return value


def _byte_level(meta: _Meta, tokens: list[str], types: list[int]) -> tuple[tokenizers.Tokenizer, bool]:
    pre = meta.get("pre") or "default"
    if pre not in CUTS:
        raise meta.error("pre", f"we know {', '.join(CUTS)}{did_you_mean(str(pre), CUTS)}")
    cut = CUTS[pre]
    pairs = [pair.partition(" ") for pair in meta.texts("merges")]
    merges = [(left, right) for left, _, right in pairs]
    if any(not left or not right or " " in right for left, right in merges):
        raise meta.error("merges", "each is two tokens and a space between them")
    vocab = {token: i for i, token in enumerate(tokens)}
    known = vocab.keys()
    lost = [a + b for a, b in merges if not {a, b, a + b} <= known]
    if lost:
        raise WeightsError(
            f"{meta.file.path}: tokenizer.ggml.merges makes {len(lost)} tokens that are not in the vocabulary, "
            f"e.g. {lost[0]!r}"
        )
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=cut.whole))
    if cut.nfc:
        inner.normalizer = normalizers.NFC()
    splits: list[Any] = [pre_tokenizers.Split(Regex(p), "isolated") for p in cut.patterns]
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    return inner, cut.add_bos


def _sentencepiece(meta: _Meta, tokens: list[str], types: list[int]) -> tuple[tokenizers.Tokenizer, bool]:
    """Two neighbours join into the token of the highest score: merges in order of falling score say the same."""
    scores = meta.numbers("scores", len(tokens), 0.0)
    vocab = {token: i for i, token in enumerate(tokens)}
    made: list[tuple[float, int, int, str, str]] = []
    for i, token in enumerate(tokens):
        if types[i] in (CONTROL, UNKNOWN):
            continue
        for at in range(1, min(len(token), MOST_SPLIT)):
            left, right = token[:at], token[at:]
            if left in vocab and right in vocab:
                made.append((-scores[i], vocab[left], vocab[right], left, right))
    made.sort(key=lambda entry: entry[:3])
    unknown = next((tokens[i] for i, kind in enumerate(types) if kind == UNKNOWN), None)
    inner = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(left, right) for *_, left, right in made],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback="<0x00>" in vocab,
        )
    )
    front = meta.get("add_space_prefix") is not False
    replace: list[Any] = [normalizers.Replace(" ", SPACE)]
    inner.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), *replace] if front else replace)
    after: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*after, decoders.Strip(" ", 1, 0)] if front else after)
    return inner, True


def load_gguf_tokenizer(path: Path | str) -> Tokenizer | None:
    """``gguf_tokenizer`` of a file that is not open, or of the first part where the model is in several."""
    with GGUFFile(part_paths(Path(path))[0]) as file:
        return gguf_tokenizer(file)
