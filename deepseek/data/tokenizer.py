"""Byte-level BPE: trained, saved and run by the library ``tokenizers``, with a fast lane for ASCII text.

The pattern that cuts text into pieces before BPE is GPT-4's, less its rule for English contractions (which
cuts ``'self'`` into ``'s`` and ``elf'``): a word with the character before it, digits in groups of at most
three, runs of punctuation, runs of blanks. Runs of blanks stay together, so indentation costs one token.

BPE looks at one piece at a time, so a piece always becomes the same tokens. The fast lane (``FastLane``)
therefore cuts ASCII text itself and looks pieces up in a table filled by the library: equal tokens, several
times the speed. Text is never parsed for special tokens unless asked: a document that *says*
``<|endoftext|>`` does not end there.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from deepseek.data.fast_lane import PATTERN, FastLane
from deepseek.data.foreign_text import BEGINS, ForeignText, special_names
from deepseek.errors import ConfigError, DataError, did_you_mean
from deepseek.files import write_atomic

EOS, PAD = "<|endoftext|>", "<|pad|>"
CHAT = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
SPECIAL = (EOS, PAD, *CHAT)  #: ids 0..5 of a tokenizer trained here
#: How models write the end of a turn or of a text.
END_NAMES = (
    EOS, "<|end|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<end_of_turn>",
)  # fmt: skip
MIN_VOCAB = 256 + len(SPECIAL)

Ids = npt.NDArray[np.int32]


def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte (GPT-2's table), inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


class Tokenizer:
    """Text to token ids and back. ``decode(encode(x)) == x`` for every string that UTF-8 can hold.

    Attributes:
        vocab_size: number of ids, added tokens included.
        eos_id: id that ends every document (and begins it, in what is trained here).
        bos_id: the start token; ``None`` when there is none. Here that is ``eos_id``.
        prefix: ids in front of a plain text, as the model was trained: the start token, or nothing.
        end_ids: ids after which an answer is over: ``eos_id``, the ends of a turn, and what the model's own
            ``generation_config.json`` names.
        chat_templates: Jinja text by name (``default``, ``tool_use``), as the model brings it; empty for ours.
        pad_id: id that fills padding (``eos_id`` when the tokenizer has none of its own).
        token_bytes: ``[vocab_size]`` int32, bytes of text each token stands for; 0 for special tokens. The
            sum over a document's tokens is its length in UTF-8 bytes.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        eos: str = EOS,
        pad: str | None = PAD,
        foreign: ForeignText | None = None,
    ) -> None:
        self._inner = inner
        inner.encode_special_tokens = True
        inner.no_padding()
        inner.no_truncation()
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        self.eos_id = self.token_id(eos)
        found = inner.token_to_id(pad) if pad else None
        self.pad_id: int = self.eos_id if found is None else found
        self.foreign = foreign
        self.bos_id: int | None = inner.token_to_id(foreign.bos) if foreign and foreign.bos else None
        if foreign is None:
            self.bos_id = self.eos_id
        begins = foreign is None or foreign.add_bos
        self.prefix: tuple[int, ...] = (self.bos_id,) if begins and self.bos_id is not None else ()
        self.chat_templates: dict[str, str] = foreign.chat_templates if foreign else {}
        self._fast = FastLane.of(inner)

    @property
    def add_bos(self) -> bool:
        """Whether a plain text begins with the start token."""
        return bool(self.prefix)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        named = {i for t in END_NAMES if (i := self._inner.token_to_id(t)) in self.special_ids}
        more = self.foreign.ends if self.foreign else ()
        return frozenset({self.eos_id, *named, *(i for i in more if 0 <= i < self.vocab_size)})

    def text_of(self, token: int | None) -> str:
        """How a token is written, e.g. ``<|user|>``; empty for ``None``."""
        return (self._inner.id_to_token(token) or "") if token is not None else ""

    def prompt(self, text: str) -> list[int]:
        """Ids of a plain text to be continued: ``prefix``, then the text; never empty."""
        ids = [*self.prefix, *self.encode(text)]
        return ids or [self.eos_id if self.bos_id is None else self.bos_id]

    def token_id(self, token: str) -> int:
        """The id of a token given as it is written, e.g. ``<|user|>``. Raises ``DataError`` for an unknown
        one.
        """
        found = self._inner.token_to_id(token)
        if found is None:
            near = did_you_mean(token, [t.content for t in self._inner.get_added_tokens_decoder().values()])
            raise DataError(f"the tokenizer has no token '{token}'{near}")
        return int(found)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of tokens that stand for no text."""
        return frozenset(i for i, t in self._inner.get_added_tokens_decoder().items() if t.special)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of ``text``; with ``special``, special tokens written out in the text become their ids."""
        if special:
            return list(self._parsing.encode(_encodable(text), add_special_tokens=False).ids)
        ids: list[int] = self.encode_batch([text])[0].tolist()
        return ids

    @cached_property
    def _parsing(self) -> tokenizers.Tokenizer:
        """One that reads special tokens in a text: a second one, so that no thread meets a changed flag."""
        return tokenizers.Tokenizer.from_str(self._inner.to_str())

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text as an int32 array. Raises ``DataError`` for text with lone surrogates."""
        if self._fast is not None:
            return self._fast.encode_batch(texts)
        found = self._inner.encode_batch_fast([_encodable(t) for t in texts], add_special_tokens=False)
        return [np.array(e.ids, np.int32) for e in found]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of ``ids``; bytes that are no UTF-8 become U+FFFD."""
        ids = [int(i) for i in ids]
        if not self._byte_level:
            return self._inner.decode(ids, skip_special_tokens=skip_special)
        return b"".join(self.piece(i, skip_special=skip_special) for i in ids).decode("utf-8", "replace")

    def piece(self, token: int, *, skip_special: bool = True) -> bytes:
        """The bytes one token stands for; special tokens give none, or their name without
        ``skip_special``.
        """
        if token in self.special_ids:
            return b"" if skip_special else (self._inner.id_to_token(token) or "").encode()
        if not 0 <= token < self.vocab_size:
            raise DataError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
        return self._pieces[token]

    @cached_property
    def _byte_level(self) -> bool:
        decoder = json.loads(self._inner.to_str()).get("decoder") or {}
        return "ByteLevel" in [d.get("type") for d in decoder.get("decoders", [decoder])]

    @cached_property
    def _pieces(self) -> list[bytes]:
        pieces = [b""] * self.vocab_size
        added = self._inner.get_added_tokens_decoder()
        alphabet = _byte_alphabet()
        for token, index in self._inner.get_vocab(with_added_tokens=True).items():
            if index in added:
                pieces[index] = added[index].content.encode()
            elif self._byte_level:
                pieces[index] = bytes(alphabet[c] for c in token)
            elif len(token) == 6 and token.startswith("<0x"):
                pieces[index] = bytes([int(token[3:5], 16)])
            else:
                pieces[index] = token.replace("\u2581", " ").encode()
        return pieces

    @cached_property
    def token_bytes(self) -> Ids:
        sizes = [0 if i in self.special_ids else len(p) for i, p in enumerate(self._pieces)]
        return np.array(sizes, np.int32)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides the ids of a text."""
        text = json.dumps(json.loads(self._inner.to_str()), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def stream(self) -> IncrementalDecoder:
        """A decoder for one growing sequence."""
        return IncrementalDecoder(self)

    def save(self, directory: Path | str) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, as Hugging Face libraries read them;
        atomically.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.text_of(self.bos_id) or None,
            "eos_token": self.text_of(self.eos_id),
            "pad_token": self.text_of(self.pad_id),
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1_000_000_000,
        }
        if self.foreign is None:
            config[BEGINS] = True  # not add_bos_token: Hugging Face would put it in front of every text
        else:
            self.foreign.save(directory, config)
        write_atomic(directory / "tokenizer.json", self._inner.to_str(pretty=True))
        write_atomic(directory / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path | str) -> Tokenizer:
        """The tokenizer of a directory (or of a ``tokenizer.json``), ours or any Hugging Face one.

        Raises:
            DataError: there is no ``tokenizer.json``, it is damaged, or no token ends a document.
        """
        path = Path(directory)
        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            inner = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"no tokenizer at {path}") from None
        except Exception as error:  # the library raises plain Exception for damaged files
            raise DataError(f"{path} is not a tokenizer: {str(error)[:200]}") from None
        names = special_names(path.parent)
        known = [t for t in (names.get("eos_token"), names.get("bos_token"), *_EOS_NAMES) if t]
        eos = next((t for t in known if inner.token_to_id(t) is not None), None)
        if eos is None:
            raise DataError(
                f"{path} has no end-of-text token; name one as eos_token in tokenizer_config.json"
            )
        ours = all(inner.token_to_id(t) == i for i, t in enumerate(SPECIAL))
        foreign: ForeignText | None = ForeignText.read(path.parent, inner, names)
        if ours and foreign is not None:
            foreign = replace(foreign, bos=eos, add_bos=True) if foreign.chat_templates else None
        return cls(inner, eos=eos, pad=names.get("pad_token") or PAD, foreign=foreign)


_EOS_NAMES = (EOS, "</s>", "<|end_of_text|>", "<eos>", "[SEP]")


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"text holds a lone surrogate at character {error.start}; UTF-8 has none") from None
    return text


class IncrementalDecoder:
    """Decodes tokens as they come; holds back bytes until they make a whole character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that ``token`` completes, perhaps none."""
        return self._utf8.decode(self._tokenizer.piece(token))

    def finish(self) -> str:
        """What is left: U+FFFD for an unfinished character, or the empty string."""
        return self._utf8.decode(b"", final=True)


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, special: Sequence[str] = SPECIAL) -> Tokenizer:
    """A byte-level BPE of ``vocab_size`` ids, ``special`` first (the first of them ends documents).

    Every byte is in the vocabulary, so nothing is ever unknown. With too little text there may be fewer
    merges, and fewer ids, than asked for. Deterministic in the order and content of ``texts``.

    Raises:
        ConfigError: ``vocab_size`` cannot hold the 256 bytes and the special tokens.
        DataError: there is no text.
    """
    if vocab_size < 256 + len(special):
        raise ConfigError(
            f"vocab_size={vocab_size} is too small: 256 bytes and {len(special)} special tokens need "
            f"{256 + len(special)}"
        )
    inner = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, _byte_level()])
    inner.decoder = decoders.ByteLevel()
    seen = _Counted(texts)
    trainer: Any = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(seen, trainer)
    if not seen.count:
        raise DataError("no text to train a tokenizer on")
    return Tokenizer(inner, eos=special[0])


def _byte_level() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


class _Counted:
    """Texts with a count of those that are not empty."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts, self.count = texts, 0

    def __iter__(self) -> Any:
        for text in self._texts:
            self.count += bool(text)
            yield _encodable(text)
