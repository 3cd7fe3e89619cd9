"""The fast lane of tokenisation: cut ASCII text with ``re``, look pieces up in a table, let the library do
the rest.

``tokenizers`` spends nearly all its time in a general Unicode regex engine. For ASCII text the same pattern
is a much simpler one, and BPE of a piece does not depend on its neighbours, so each distinct piece is encoded
once and then looked up. Text with other characters goes to the library; where the pattern always cuts between
a line end and a non-blank character (ours does), only the lines that need it do.

The lane is taken only when it is certain to agree: a plain BPE over bytes, one ``Split`` pattern made of
letters, numbers and blanks, no normaliser but NFC, no added tokens that text could contain.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import pre_tokenizers

from deepseek.errors import DataError

PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How our own tokenizers cut text; a cut always falls between a line end and a character that is not
blank.
"""

TABLE_LIMIT = 1_000_000  #: distinct pieces kept; beyond, the table starts afresh
WARM = 50_000  #: distinct pieces up to which each text's new ones are looked for before it is encoded

_BLANK = r"\t-\r "  # ASCII blanks as Oniguruma's \s has them; Python's \s would add 0x1c-0x1f
_CLASSES = {r"\p{L}": "A-Za-z", r"\p{N}": "0-9", r"\s": _BLANK}
_LINES = re.compile(r"(?<=\n)(?=[^\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000])")


class _Table(dict[str, bytes]):
    """Piece -> its ids as int32 bytes; missing pieces are encoded by the library, each as one piece."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self._whole = tokenizers.Tokenizer.from_str(inner.to_str())
        self._whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._whole.encode_special_tokens = True

    def __missing__(self, piece: str) -> bytes:
        if len(self) >= TABLE_LIMIT:
            self.clear()
        found = np.array(self._whole.encode(piece, add_special_tokens=False).ids, np.int32).tobytes()
        if len(piece) <= 64:
            self[piece] = found
        return found

    def learn(self, pieces: Iterable[str]) -> None:
        """Encode the pieces that are missing all at once: several threads, one call."""
        new = [p for p in set(pieces) if p not in self and len(p) <= 64]
        for piece, found in zip(new, self._whole.encode_batch_fast(new, add_special_tokens=False)):
            self[piece] = np.array(found.ids, np.int32).tobytes()


class FastLane:
    """Encodes texts to the ids ``inner`` would give, faster. Build one with ``FastLane.of``."""

    def __init__(self, inner: tokenizers.Tokenizer, pattern: re.Pattern[str], by_line: bool) -> None:
        self._inner, self._pattern, self._by_line = inner, pattern, by_line
        self._table = _Table(inner)

    @classmethod
    def of(cls, inner: tokenizers.Tokenizer) -> FastLane | None:
        """The lane for ``inner``, or ``None`` when it could not be certain to agree."""
        spec = json.loads(inner.to_str())
        if not _plain_bpe(spec):
            return None
        source = _split_pattern(spec.get("pre_tokenizer"))
        pattern = ascii_pattern(source) if source is not None else None
        return cls(inner, pattern, source == PATTERN) if pattern is not None else None

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """Ids of each text, int32. Raises ``DataError`` for text with lone surrogates."""
        found: list[npt.NDArray[np.int32] | None] = [None] * len(texts)
        slow: list[int] = []
        for i, text in enumerate(texts):
            if text.isascii():
                found[i] = np.frombuffer(self._ascii(text), np.int32).copy()
            elif self._by_line:
                found[i] = self._mixed(text)
            else:
                slow.append(i)
        for i, ids in zip(slow, self._library([texts[i] for i in slow])):
            found[i] = ids
        return [ids for ids in found if ids is not None]

    def _ascii(self, text: str) -> bytes:
        pieces = self._pattern.findall(text)
        if len(self._table) < WARM:
            self._table.learn(pieces)
        return b"".join(map(self._table.__getitem__, pieces))

    def _mixed(self, text: str) -> npt.NDArray[np.int32]:
        runs: list[list[str]] = []
        plain: list[bool] = []
        for line in _LINES.split(text):
            if plain and plain[-1] == line.isascii():
                runs[-1].append(line)
            else:
                runs.append([line])
                plain.append(line.isascii())
        joined = ["".join(run) for run in runs]
        slow = iter(self._library([t for t, fast in zip(joined, plain) if not fast]))
        parts = [self._ascii(t) if fast else next(slow).tobytes() for t, fast in zip(joined, plain)]
        return np.frombuffer(b"".join(parts), np.int32).copy()

    def _library(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        if not texts:
            return []
        try:
            found = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):
            raise DataError("text holds lone surrogates; UTF-8 has none") from None
        return [np.array(e.ids, np.int32) for e in found]


def ascii_pattern(pattern: str) -> re.Pattern[str] | None:
    """``pattern`` (letters, numbers, blanks) as a Python pattern equal to it on ASCII text, or ``None``."""
    out, inside, i = [], False, 0
    while i < len(pattern):
        name = next((c for c in _CLASSES if pattern.startswith(c, i)), None)
        if name is not None:
            out.append(_CLASSES[name] if inside else f"[{_CLASSES[name]}]")
            i += len(name)
        elif pattern.startswith(r"\S", i):
            if inside:
                return None
            out.append(f"[^{_BLANK}]")
            i += 2
        elif pattern[i] == "\\":
            if pattern[i + 1 : i + 2] not in ("r", "n", "t", "'", "-", "/"):
                return None
            out.append(pattern[i : i + 2])
            i += 2
        else:
            inside = (inside or pattern[i] == "[") and pattern[i] != "]"
            out.append(pattern[i])
            i += 1
    try:
        compiled = re.compile("".join(out), re.ASCII)
    except re.error:
        return None
    return compiled if compiled.groups == 0 else None


def _split_pattern(spec: Any) -> str | None:
    """The pattern of ``Sequence[Split(isolated), ByteLevel(no regex, no prefix space)]``, else ``None``."""
    steps = (spec or {}).get("pretokenizers", [])
    if [s.get("type") for s in steps] != ["Split", "ByteLevel"]:
        return None
    split, level = steps
    plain = split.get("behavior") == "Isolated" and not split.get("invert")
    if not plain or level.get("add_prefix_space") or level.get("use_regex"):
        return None
    found = split.get("pattern", {}).get("Regex")
    return found if isinstance(found, str) else None


def _plain_bpe(spec: dict[str, Any]) -> bool:
    model, normalizer = spec.get("model", {}), spec.get("normalizer")
    return (
        model.get("type", "BPE") == "BPE"
        and not model.get("dropout")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and (normalizer is None or normalizer.get("type") == "NFC")
        and all(token.get("special") for token in spec.get("added_tokens", []))
    )
