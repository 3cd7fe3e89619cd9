"""From logits to a token: greedy, temperature, top-k, top-p, with a seed of its own.

Shape letters: B rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import field
from typing import Literal

import torch
from torch import Tensor

from deepseek.config import configclass
from deepseek.errors import ConfigError

COLDEST = 1e-6  #: below this temperature the most likely token has all the probability that fp32 can tell


@configclass
class Grammar:
    """What an answer must match, by llguidance; ``text`` is a JSON schema, a regular expression, or a Lark grammar."""

    kind: Literal["json", "json_schema", "regex", "lark", "choice"] = "json"  # json: any JSON object
    text: str = ""  # of a choice: a JSON list of the texts allowed


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

    def check(self) -> None:
        if not self.temperature >= 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ConfigError(
                f"temperature={self.temperature} must be at least 0, top_p={self.top_p} in (0, 1], "
                f"top_k={self.top_k} at least 0"
            )
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed={self.seed} must lie between 0 and 2^63 - 1")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens={self.max_tokens} must be at least 1")
        stop: object = self.stop
        if isinstance(stop, str):
            raise ConfigError(f"stop is a list of texts: stop=({stop!r},), not {stop!r}")
        if "" in self.stop:
            raise ConfigError("an empty stop text would stop before the first token")


class Sampler:
    """Draws tokens for one request; equal seeds and logits draw equal tokens on every device."""

    def __init__(self, config: SamplingConfig) -> None:
        self.config = config
        self._random = torch.Generator("cpu")
        if config.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(config.seed)

    def __call__(self, logits_BV: Tensor) -> Tensor:
        """The next token of each row: ``[B, V]`` → int64 ``[B]``."""
        if self.config.temperature < COLDEST:
            return logits_BV.argmax(-1)
        probs = self.probabilities(logits_BV).cpu()
        return torch.multinomial(probs, 1, generator=self._random)[:, 0].to(logits_BV.device)

    def probabilities(self, logits_BV: Tensor) -> Tensor:
        """What tokens are drawn from: temperature, then top-k, then top-p; fp32 ``[B, V]``, rows sum to one."""
        c = self.config
        logits = logits_BV.float()
        logits = (logits - logits.amax(-1, keepdim=True)) / c.temperature  # no overflow, however cold
        if 0 < c.top_k < logits.shape[-1]:
            least = logits.topk(c.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        probs = logits.softmax(-1)
        if c.top_p < 1:
            ordered, order = probs.sort(-1, descending=True)
            beyond = ordered.cumsum(-1) - ordered >= c.top_p
            beyond[..., 0] = False  # the most likely token always stays
            probs = probs.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0)
        return probs / probs.sum(-1, keepdim=True)
