"""Quality rules for text: each has a name, a threshold in ``CleanConfig``, and a count of what it dropped.

The rules restate those of Gopher (Rae et al. 2021, appendix A), C4 (Raffel et al. 2020, section 2.2), FineWeb
(Penedo et al. 2024, section 3) and, for code, Codex and StarCoder (Chen et al. 2021; Li et al. 2023). A
threshold that is ``None`` takes the preset's value; a rule that the preset does not set is off. Rules that
count words treat each Chinese, Japanese or Korean character as a word, and rules about English are not
applied where such characters dominate.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from typing import Literal

from deepseek.config import configclass
from deepseek.errors import ConfigError, MissingExtraError, did_you_mean

Number = float


@configclass
class CleanConfig:
    """What is kept, and what is changed in what is kept.

    Attributes:
        preset: thresholds for ``web`` text or ``code``; ``none`` drops nothing by itself.
        skip: names of rules of the preset that are left out.
        normalize: ``newlines`` turns CR LF and CR into LF; ``nfc`` also composes Unicode; ``none`` changes
            nothing.
        languages: ISO codes to keep, told apart offline by py3langid; empty keeps all.
        scrub: replace e-mail addresses, IP addresses and telephone numbers by ``<email>``, ``<ip>``,
            ``<phone>``.
        min_words, max_words: words in the document.
        min_mean_word, max_mean_word: mean characters of a word.
        max_symbol_ratio: ``#`` and ellipses per word.
        max_bullet_lines, max_ellipsis_lines: share of lines that start with a bullet, end with an ellipsis.
        min_alphabetic_words: share of words with a letter.
        min_stop_words: of the, be, to, of, and, that, have, with: how many occur (English).
        max_duplicate_lines, max_duplicate_line_chars: share of lines, and of characters in lines, seen
            before.
        max_top_2gram .. max_top_4gram: share of characters in the most frequent word n-gram.
        max_duplicate_5grams: share of characters in 5-grams of words that occur more than once.
        min_punctuated_lines: share of lines that end a sentence.
        max_short_lines: share of lines of at most 30 characters.
        max_line, max_mean_line: characters in the longest line, and on average.
        min_alphanumeric: share of characters that are letters or digits.
        forbidden: phrases that drop a document, whatever their case.
        max_generated: whether a notice that the file is generated, in its first five lines, is allowed (0 or
            1).
    """

    preset: Literal["none", "code", "web"] = "none"
    skip: tuple[str, ...] = ()
    normalize: Literal["none", "newlines", "nfc"] = "newlines"
    languages: tuple[str, ...] = ()
    scrub: bool = False
    min_words: Number | None = None
    max_words: Number | None = None
    min_mean_word: Number | None = None
    max_mean_word: Number | None = None
    max_symbol_ratio: Number | None = None
    max_bullet_lines: Number | None = None
    max_ellipsis_lines: Number | None = None
    min_alphabetic_words: Number | None = None
    min_stop_words: Number | None = None
    max_duplicate_lines: Number | None = None
    max_duplicate_line_chars: Number | None = None
    max_top_2gram: Number | None = None
    max_top_3gram: Number | None = None
    max_top_4gram: Number | None = None
    max_duplicate_5grams: Number | None = None
    min_punctuated_lines: Number | None = None
    max_short_lines: Number | None = None
    max_line: Number | None = None
    max_mean_line: Number | None = None
    min_alphanumeric: Number | None = None
    max_generated: Number | None = None
    forbidden: tuple[str, ...] = ()

    def check(self) -> None:
        for name in self.skip:
            if name not in _MEASURES and name != "forbidden":
                raise ConfigError(f"no cleaning rule is called '{name}'{did_you_mean(name, _MEASURES)}")

    def thresholds(self) -> dict[str, float]:
        """The rules that are on, with their thresholds."""
        own = {name: value for name in _MEASURES if (value := getattr(self, name)) is not None}
        return {n: v for n, v in {**PRESETS[self.preset], **own}.items() if n not in self.skip}


PRESETS: dict[str, dict[str, float]] = {
    "none": {},
    "web": {
        "min_words": 50,
        "max_words": 100_000,
        "min_mean_word": 3,
        "max_mean_word": 10,
        "max_symbol_ratio": 0.1,
        "max_bullet_lines": 0.9,
        "max_ellipsis_lines": 0.3,
        "min_alphabetic_words": 0.8,
        "min_stop_words": 2,
        "max_duplicate_lines": 0.3,
        "max_duplicate_line_chars": 0.2,
        "max_top_2gram": 0.2,
        "max_top_3gram": 0.18,
        "max_top_4gram": 0.16,
        "max_duplicate_5grams": 0.15,
        "min_punctuated_lines": 0.12,
        "max_short_lines": 0.67,
    },
    "code": {
        "min_words": 10,
        "max_line": 1000,
        "max_mean_line": 100,
        "min_alphanumeric": 0.25,
        "max_duplicate_line_chars": 0.8,
        "max_generated": 0,
    },
}

_IDEOGRAPHS = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\s{_IDEOGRAPHS}]+")
_CJK = re.compile(rf"[{_IDEOGRAPHS}]")
_STOP = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
_GENERATED = re.compile(
    r"(auto-?generated|automatically generated|generated (by|from|automatically)|do not edit)", re.IGNORECASE
)
_ENDS = (".", "!", "?", '"', "'", "\u201d", "\u2019", ":", ";", "\u3002", "\uff01", "\uff1f", "\u2026")


class Measured:
    """A text with the counts that several rules share, each computed once and only when asked for."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        return WORD.findall(self.text)

    @cached_property
    def lines(self) -> list[str]:
        return [line.strip() for line in self.text.split("\n") if line.strip()]

    @cached_property
    def english_like(self) -> bool:
        """Whether words are separated by blanks, as a rule."""
        return len(_CJK.findall(self.text)) < 0.3 * max(1, len(self.words))

    @cached_property
    def word_chars(self) -> int:
        return max(1, sum(map(len, self.words)))

    def line_share(self, test: Callable[[str], bool]) -> float:
        return sum(map(test, self.lines)) / max(1, len(self.lines))

    def duplicate_lines(self, *, characters: bool) -> float:
        size = len if characters else (lambda _: 1)
        seen: set[str] = set()
        total = repeated = 0
        for line in self.lines:
            total += size(line)
            repeated += size(line) if line in seen else 0
            seen.add(line)
        return repeated / max(1, total)

    def grams(self, n: int) -> Counter[tuple[str, ...]]:
        return Counter(zip(*(self.words[i:] for i in range(n))))

    def top_gram(self, n: int) -> float:
        gram, times = max(self.grams(n).items(), key=lambda item: item[1], default=((), 0))
        return times * sum(map(len, gram)) / self.word_chars if times > 1 else 0.0

    def duplicate_grams(self, n: int) -> float:
        counts = self.grams(n)
        covered = bytearray(len(self.words))
        for i, gram in enumerate(zip(*(self.words[j:] for j in range(n)))):
            if counts[gram] > 1:
                covered[i : i + n] = b"\x01" * n
        return sum(len(w) for w, hit in zip(self.words, covered) if hit) / self.word_chars


def _symbols(m: Measured) -> float:
    return sum(m.text.count(s) for s in ("#", "...", "\u2026")) / max(1, len(m.words))


def _alphabetic(m: Measured) -> float:
    return sum(any(c.isalpha() for c in w) for w in m.words) / max(1, len(m.words))


def _stop_words(m: Measured) -> float:
    return len(_STOP & {w.lower() for w in m.words}) if m.english_like else len(_STOP)


def _mean_word(m: Measured) -> float:
    return m.word_chars / max(1, len(m.words)) if m.english_like else 5.0


_MEASURES: dict[str, Callable[[Measured], float]] = {
    "min_words": lambda m: len(m.words),
    "max_words": lambda m: len(m.words),
    "min_mean_word": _mean_word,
    "max_mean_word": _mean_word,
    "max_symbol_ratio": _symbols,
    "max_bullet_lines": lambda m: m.line_share(
        lambda x: x.startswith(("\u2022", "\u25cf", "-", "*", "\u00b7"))
    ),
    "max_ellipsis_lines": lambda m: m.line_share(lambda x: x.endswith(("...", "\u2026"))),
    "min_alphabetic_words": _alphabetic,
    "min_stop_words": _stop_words,
    "max_duplicate_lines": lambda m: m.duplicate_lines(characters=False),
    "max_duplicate_line_chars": lambda m: m.duplicate_lines(characters=True),
    "max_top_2gram": lambda m: m.top_gram(2),
    "max_top_3gram": lambda m: m.top_gram(3),
    "max_top_4gram": lambda m: m.top_gram(4),
    "max_duplicate_5grams": lambda m: m.duplicate_grams(5),
    "min_punctuated_lines": lambda m: m.line_share(lambda x: x.endswith(_ENDS)),
    "max_short_lines": lambda m: m.line_share(lambda x: len(x) <= 30),
    "max_line": lambda m: max(map(len, m.text.split("\n"))),
    "max_mean_line": lambda m: len(m.text) / max(1, len(m.lines)),
    "min_alphanumeric": lambda m: sum(c.isalnum() for c in m.text) / max(1, len(m.text)),
    "max_generated": lambda m: float(bool(_GENERATED.search("\n".join(m.lines[:5])))),
}


class Cleaner:
    """Applies a ``CleanConfig``: ``clean(text)`` gives the text to keep, or ``None``; ``dropped`` counts per
    rule.
    """

    def __init__(self, config: CleanConfig) -> None:
        self._config, self._rules = config, config.thresholds()
        self.dropped: Counter[str] = Counter()
        self.scrubbed: Counter[str] = Counter()
        self._identify = language_identifier() if config.languages else None

    def clean(self, text: str) -> str | None:
        """The normalised (and scrubbed) text, or ``None`` when a rule drops it."""
        text = normalize(text, self._config.normalize)
        rule = self.broken(text)
        if rule is not None:
            self.dropped[rule] += 1
            return None
        return self._scrub(text) if self._config.scrub else text

    def broken(self, text: str) -> str | None:
        """The first rule that ``text`` breaks."""
        measured = Measured(text)
        for name, threshold in self._rules.items():
            value = _MEASURES[name](measured)
            if value < threshold if name.startswith("min_") else value > threshold:
                return name
        lower = text.lower() if self._config.forbidden else ""
        if any(phrase.lower() in lower for phrase in self._config.forbidden):
            return "forbidden"
        if self._identify is not None and self._identify(text) not in self._config.languages:
            return "language"
        return None

    def _scrub(self, text: str) -> str:
        for name, pattern in _PERSONAL.items():
            text, count = pattern.subn(f"<{name}>", text)
            self.scrubbed[name] += count
        return text


_PERSONAL = {
    "email": re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])"),
    "ip": re.compile(r"(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\d.])"),
    "phone": re.compile(
        r"(?<![\w.])(?:\+\d{1,3}[ .-]?)?(?:\(\d{2,4}\)[ .-]?|\d{2,4}[ .-])\d{3,4}[ .-]\d{4}(?!\w|\.\d)"
    ),
}


def normalize(text: str, how: str) -> str:
    """``text`` with line ends as LF (``newlines``), and composed (``nfc``); unchanged under ``none``."""
    if how == "none":
        return text
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return unicodedata.normalize("NFC", text) if how == "nfc" else text


def language_identifier() -> Callable[[str], str]:
    """A function from text to ISO 639-1 code, offline (py3langid; Lui and Baldwin 2012). Looks at 4,096
    characters.

    Raises:
        MissingExtraError: py3langid is not installed.
    """
    try:
        import py3langid
    except ImportError:
        raise MissingExtraError("py3langid", "data", "telling languages apart") from None
    return lambda text: str(py3langid.classify(text[:4096])[0])
