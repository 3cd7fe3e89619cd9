"""How a token is to be chosen, as a request says it. No torch here: front ends read this without loading it."""

from __future__ import annotations

import json
from dataclasses import field
from typing import Literal

from deepseek.config import configclass
from deepseek.errors import ConfigError

MOST_LOGPROBS = 64  #: tokens whose log-probability can be asked for at one place
MOST_STOPS, LONGEST_STOPS = 64, 16_384  #: stop texts of one request, and their characters in all
LONGEST_GRAMMAR = 1 << 17  #: characters of a grammar's text
_RANGES = (  # options that are one number, the least and the largest that means something
    ("temperature", 0.0, 1e6),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("top_k", 0, 1 << 31),
    ("repetition_penalty", 1e-2, 100.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
)


@configclass
class Grammar:
    """What an answer must match, by llguidance; ``text`` is a JSON schema, a regular expression, or a Lark grammar."""

    kind: Literal["json", "json_schema", "regex", "lark", "choice"] = "json"  # json: any JSON object
    text: str = ""  # of a choice: a JSON list of the texts allowed

    def check(self) -> None:
        if len(self.text) > LONGEST_GRAMMAR:
            raise ConfigError(f"grammar: {len(self.text)} characters, at most {LONGEST_GRAMMAR} are read")
        if self.kind == "json":
            if self.text:
                raise ConfigError("grammar: kind 'json' takes no text; a schema is kind 'json_schema'")
        elif not self.text:
            raise ConfigError(f"grammar: kind '{self.kind}' needs a text")
        elif self.kind in ("json_schema", "choice"):
            try:
                found = json.loads(self.text)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"grammar: the text of '{self.kind}' is not JSON: {error}") from None
            if self.kind == "json_schema" and not isinstance(found, dict | bool):
                raise ConfigError("grammar: a JSON schema is an object (or true or false)")
            if self.kind == "choice" and not (
                isinstance(found, list) and found and all(isinstance(x, str) and x for x in found)
            ):
                raise ConfigError("grammar: a choice is a JSON list of texts that are not empty")


@configclass
class SamplingConfig:
    """How the next token is chosen, and when to stop.

    Attributes:
        min_p: drop tokens less likely than ``min_p`` times the most likely one (arXiv 2407.01082); 0: off.
        repetition_penalty: divides positive and multiplies negative logits of every token seen, in the prompt
            too (arXiv 1909.05858); 1: off.
        presence_penalty, frequency_penalty: subtracted from the logit of a generated token once, and once per
            occurrence, as the OpenAI API defines them.
        logit_bias: added to the logits of these token ids; -100 bans, 100 forces.
        logprobs: with every generated token its log-probability and those of this many most likely tokens
            (0: its own only), of the model's own distribution, before temperature and penalties. ``None``: none.
        prompt_logprobs: the same for the tokens of the prompt.
        min_tokens: end tokens and stop texts are ignored before this many.
        stop_token_ids: end the answer like the end token; ignore_eos: the model's end tokens do not.
        grammar: what the text must match; None: anything.
        shown_ids: special tokens whose names are part of the text, such as those that begin a call of a function.
    """

    temperature: float = 0.8  # 0: greedy
    top_k: int = 0  # keep the k most likely; 0: all
    top_p: float = 0.95  # keep the smallest set of tokens with this much probability
    min_p: float = 0.0
    seed: int | None = None  # None: a new one every time
    max_tokens: int = 128
    min_tokens: int = 0
    stop: tuple[str, ...] = ()  # texts that end the answer; they are not part of it
    include_stop: bool = False  # unless this is on
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    shown_ids: tuple[int, ...] = ()

    def check(self) -> None:
        for name, low, high in _RANGES:
            if not low <= getattr(self, name) <= high:  # not a number is in no range
                raise ConfigError(f"{name}={getattr(self, name)} must lie between {low:g} and {high:g}")
        if self.top_p == 0:
            raise ConfigError("top_p=0.0 would keep no token: it must be above 0; temperature=0 is greedy")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed={self.seed} must lie between 0 and 2^63 - 1")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens={self.max_tokens} must be at least 1")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ConfigError(
                f"min_tokens={self.min_tokens} must lie between 0 and max_tokens={self.max_tokens}"
            )
        for name in ("logprobs", "prompt_logprobs"):
            if (asked := getattr(self, name)) is not None and not 0 <= asked <= MOST_LOGPROBS:
                raise ConfigError(f"{name}={asked} must lie between 0 and {MOST_LOGPROBS}")
        for token, bias in self.logit_bias.items():
            if token < 0 or not -100 <= bias <= 100:
                raise ConfigError(f"logit_bias={{{token}: {bias}}}: ids start at 0, biases lie in -100 … 100")
        if wrong := [token for token in self.stop_token_ids if token < 0]:
            raise ConfigError(f"stop_token_ids: {wrong[0]} is no token id, they start at 0")
        self._check_stop()

    def _check_stop(self) -> None:
        stop: object = self.stop
        if isinstance(stop, str):
            raise ConfigError(f"stop is a list of texts: stop=({stop!r},), not {stop!r}")
        if "" in self.stop:
            raise ConfigError("an empty stop text would stop before the first token")
        if len(self.stop) > MOST_STOPS or sum(map(len, self.stop)) > LONGEST_STOPS:
            size = sum(map(len, self.stop))
            raise ConfigError(
                f"stop has {len(self.stop)} texts of {size} characters; "
                f"at most {MOST_STOPS} texts of {LONGEST_STOPS} characters in all can be watched for"
            )
