"""Answers that match a grammar (JSON, JSON schema, regular expression, Lark, a choice of texts), by llguidance.

A grammar is compiled once and kept while it is among the newest ``KEPT``; each request gets a matcher of its own
from it. Before a token is drawn the matcher says which tokens may come next, one bit each; the end token is among
them only where the answer may end, so an answer that ends by itself matches. Compiling and every step run under
limits of size and work, and in another process first (``grammar_trial``): a grammar that needs more is refused,
or ends its own request, and nobody else's.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections import OrderedDict
from collections.abc import Collection
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from deepseek.data import Tokenizer
from deepseek.errors import MissingExtraError, RequestError
from deepseek.serve.grammar_trial import Trial
from deepseek.serve.sampler import Grammar

KEPT = 64  #: compiled grammars, and refusals, that are kept
PARAM = "grammar"
_LIMITS = {  # of llguidance; in brackets what one unit costs
    "initial_lexer_fuel": 1_000_000,  # to compile the regular expressions (50,000 a ms)
    "step_lexer_fuel": 200_000,  # for one mask (14,000 a ms)
    "step_max_items": 50_000,  # for one mask (20,000 a ms)
    "max_items_in_row": 2_000,
    "max_lexer_states": 50_000,  # of one grammar (1 to 2 KiB each)
    "max_grammar_size": 20_000,  # symbols in productions: an object of 1,000 properties has 8,000
    "verbose_errors": False,
}
#: Between the parts of a JSON answer: enough for indentation, not enough to go on for ever.
_BLANKS = r"[\x20\x0A\x0D\x09]{1,64}"


class Grammars:
    """Compiles grammars for one tokenizer. ``state`` may be asked in one thread while another compiles.

    Args:
        vocabulary: columns of the logits.
        end_ids: the tokens that end an answer (the tokenizer's, if not given).

    Raises:
        MissingExtraError: at the first grammar, if llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, end_ids: Collection[int] | None = None) -> None:
        self._tokenizer, self._vocabulary, self._end_ids = tokenizer, vocabulary, end_ids
        self._known: OrderedDict[Grammar, Any] = (
            OrderedDict()
        )  # a matcher at its beginning, or an error's text
        self._tokens: Any = None
        self._trial, self._one = Trial(), Lock()

    def knows(self, grammar: Grammar) -> bool:
        """Whether ``state`` answers at once: compiling may take a second."""
        return grammar in self._known

    def close(self) -> None:
        """End the process in which grammars are tried."""
        self._trial.close()

    def state(self, grammar: Grammar) -> GrammarState:
        """A new answer's place in ``grammar``: its beginning.

        Raises:
            RequestError: the grammar is wrong, cannot be matched, or is larger than the limits.
        """
        found = self._known.get(grammar)
        if found is None:
            with self._one:
                found = self._known.get(grammar) or self._compile(grammar)
                self._known[grammar] = found
                if len(self._known) > KEPT:
                    self._known.popitem(last=False)
        with contextlib.suppress(KeyError):  # the other thread may just have dropped it
            self._known.move_to_end(grammar)
        if isinstance(found, str):
            raise RequestError(found, PARAM)
        return GrammarState(found.deep_copy(), self._vocabulary)

    def _compile(self, grammar: Grammar) -> Any:
        llguidance = _llguidance()
        try:
            source = _source(llguidance.LLMatcher, grammar)
        except (ValueError, RecursionError, OverflowError) as wrong:  # UnicodeEncodeError is a ValueError
            return _refusal(grammar, str(wrong))
        if error := self._trial.error(source, _LIMITS):
            return _refusal(grammar, error)
        if self._tokens is None:
            self._tokens = self._token_table(llguidance)
        limits = llguidance.LLParserLimits(**_LIMITS)
        matcher = llguidance.LLMatcher(self._tokens, source, log_level=0, limits=limits)
        if matcher.is_error():
            return _refusal(grammar, matcher.get_error())
        return matcher

    def _token_table(self, llguidance: Any) -> Any:
        ends = list(self._tokenizer.end_ids if self._end_ids is None else self._end_ids)
        return llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Words(self._tokenizer, self._vocabulary, ends)), eos_token=ends
        )


class GrammarState:
    """Where one answer stands in its grammar.

    Attributes:
        error: why it cannot go on (a limit was hit, or a forbidden token accepted); empty as long as it can.
    """

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher, self._words = matcher, (vocabulary + 31) // 32
        self.error = ""

    @property
    def over(self) -> bool:
        """Whether the answer is complete and nothing but an end token may follow."""
        return bool(self._matcher.is_stopped())

    def mask(self) -> npt.NDArray[np.int32]:
        """The tokens that may come next, a bit each: int32 ``[ceil(V / 32)]``."""
        bits = np.zeros(self._words, np.int32)
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        self._look()
        return bits

    def accept(self, token: int) -> None:
        """The answer goes on with ``token``."""
        if not self._matcher.consume_token(token):
            self._look()

    def try_accept(self, token: int) -> bool:
        """``accept`` it if it is allowed."""
        return bool(self._matcher.try_consume_tokens([token]) == 1)

    def retract(self, count: int) -> None:
        """Undo the last ``count`` tokens accepted."""
        if count and not self._matcher.rollback(count):
            self._look()

    def forced(self) -> list[int]:
        """Tokens of the text that must come next, if the grammar leaves no choice: a good draft.

        Only a draft, for the text may be cut into other tokens, too.
        """
        return [] if self.error or self.over else list(self._matcher.compute_ff_tokens())

    def _look(self) -> None:
        if not self.error and self._matcher.is_error():
            self.error = f"the grammar cannot go on: {_short(self._matcher.get_error())}"


class _Words:
    """What llguidance needs to know of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, ends: list[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = ends[0], None
        self.special_token_ids = sorted({*tokenizer.special_ids, *ends})
        special = set(self.special_token_ids)
        self.tokens = [tokenizer.piece(i, skip_special=i not in special) for i in range(vocabulary)]

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer.encode(text.decode() if isinstance(text, bytes) else text)


def _source(matcher: Any, grammar: Grammar) -> str:
    """``grammar`` in llguidance's own form."""
    if grammar.kind in ("json", "json_schema"):
        schema = grammar.text if grammar.kind == "json_schema" else '{"type": "object"}'
        if re.search(r"\d{16}|\d[eE]|minProperties", schema):
            schema = json.dumps(_exact(json.loads(schema)))
        return str(matcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _BLANKS}))
    if grammar.kind == "regex":
        return str(matcher.grammar_from_regex(grammar.text))
    if grammar.kind == "choice":
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in json.loads(grammar.text))
        return str(matcher.grammar_from_lark(f"start: {texts}"))
    return str(matcher.grammar_from_lark(grammar.text))


def _exact(schema: Any) -> Any:
    """``schema`` with limits that fp64 can hold, in which llguidance computes: moved inwards to the next one.

    Raises ``ValueError`` for what llguidance would accept and answers could then miss: a value of ``enum`` or
    ``const`` that fp64 cannot hold, and ``minProperties``, which counts a name again when it is repeated.
    """
    if isinstance(schema, list):
        return [_exact(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    least, needed = schema.get("minProperties"), schema.get("required")
    if isinstance(least, int) and least > 1 + len(set(map(str, needed if isinstance(needed, list) else ()))):
        raise ValueError(f"minProperties={least} cannot be kept: list as many names as 'required'")
    for key, value in schema.items():
        if key in ("properties", "patternProperties", "$defs", "definitions") and isinstance(value, dict):
            found[key] = {name: _exact(part) for name, part in value.items()}
        elif key in ("enum", "const"):
            _check_exact(value)
            found[key] = value
        elif isinstance(value, int | float) and key.lower().endswith("imum"):
            found[key] = _inwards(value, -math.inf if key.lower().endswith("maximum") else math.inf)
        else:
            found[key] = _exact(value)
    return found


def _inwards(limit: float, direction: float) -> float:
    """The number of fp64 nearest to ``limit`` in a direction. Raises ``ValueError`` where 64 bits end before it."""
    if limit * direction > 0 and abs(limit) >= 2**63:
        raise ValueError(f"the limit {limit} is beyond 64 bits")
    near = float(limit)
    outside = near > limit if direction < 0 else near < limit
    whole = isinstance(limit, int)
    near = math.nextafter(near, direction) if outside else near
    return int(near) if whole else near


def _check_exact(value: Any) -> None:
    if isinstance(value, int) and (abs(value) >= 2**63 or int(float(value)) != value):
        raise ValueError(f"the value {value} has more digits than 64-bit numbers hold: use a string")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_exact(part)


def _refusal(grammar: Grammar, error: str) -> str:
    return f"the grammar ({grammar.kind}) cannot be used: {_short(error)}"


def _short(error: str) -> str:
    first = error.partition("<state>")[0].replace("<non-verbose/>", "").strip()
    return first if len(first) <= 300 else f"{first[:300]} …"


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise MissingExtraError("llguidance", "serve", "an answer that matches a grammar") from None
    return llguidance
