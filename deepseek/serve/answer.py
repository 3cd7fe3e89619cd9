"""What the engine keeps of a request while it is answered, and what it tells of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepseek.serve.decoder import Traced
from deepseek.serve.generate import Completion
from deepseek.serve.request import Output, TokenLogprobs, TokenTrace
from deepseek.serve.sampling import Sampled, SamplingState
from deepseek.serve.scheduler import Work
from deepseek.serve.speculative import Proposer
from deepseek.serve.text import TextStream
from deepseek.serve.token_logprobs import prompt_logprobs

LOGIT_ROWS = 256  #: rows of a prompt whose logits exist at once


@dataclass(eq=False)
class Answer:
    """What the engine keeps of a request beside its place in the schedule."""

    state: SamplingState
    text: TextStream
    room: int  #: tokens the answer may have
    proposer: Proposer | None = None
    adapter: int = -1
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    embedding: Tensor | None = None
    said: dict[str, Any] | None = None  #: what every output says; ``None`` before the first, which says more
    more: bool = False  #: every output says more than that, and its text and tokens

    def reads(self, work: Work) -> bool:
        """Whether the log-probabilities of the prompt are asked for, and ``work`` is of the prompt."""
        return self.prompt_logprobs is not None and work.start < work.sequence.prompt_length

    def simple(self, work: Work) -> bool:
        """Whether all that is made of ``work`` is one token, or none."""
        return self.proposer is None and not (work.sequence.request.embed or self.reads(work))

    def read_prompt(self, work: Work, hidden_NC: Tensor, logits: Callable[[Tensor], Tensor]) -> None:
        """Log-probabilities of the prompt's tokens after each of the chunk's rows, some rows' logits at a time."""
        request, found = work.sequence.request, self.prompt_logprobs
        following = request.prompt[work.start + 1 : work.start + work.rows + 1]
        if work.start == 0 or found is None:
            found = self.prompt_logprobs = [None]
        if work.start + 1 < len(found):  # a preempted prompt is read twice
            return
        top = request.sampling.prompt_logprobs or 0
        for at in range(0, len(following), LOGIT_ROWS):
            some = following[at : at + LOGIT_ROWS]
            found += prompt_logprobs(logits(hidden_NC[at : at + len(some)]), some, top)

    def embed(self, work: Work, hidden_NC: Tensor) -> Tensor | None:
        """Add up a chunk's hidden states; at the end of the prompt, their mean at length one."""
        total, length = hidden_NC.double().sum(0), work.sequence.prompt_length
        # A preempted prompt begins again at its first row.
        self.embedding = self.embedding + total if work.start and self.embedding is not None else total
        if work.start + work.rows < length:
            return None
        return torch.nn.functional.normalize(self.embedding / length, dim=0)

    def extend(self, sampled: Sequence[Sampled]) -> tuple[list[int], str]:
        """Take what was sampled as far as the answer goes on; the tokens taken, and the text they make showable."""
        kept, text, stream = list[int](), "", self.text
        for token, _, _ in sampled:
            if token < 0:
                break
            kept.append(token)
            self.state.accept(token)
            text += stream.push(token)
            if stream.finish:
                break
        return kept, text


class Wordless:
    """Stands in for the tokenizer of a model that has none: no token has text."""

    special_ids: frozenset[int] = frozenset()
    vocab_size = 0

    def piece(self, token: int, skip_special: bool = True) -> bytes:
        return b""


class Traces:
    """The step's routing, brought to the host once."""

    def __init__(self, traced: Traced) -> None:
        self._experts = {layer: (e.tolist(), g.tolist()) for layer, (e, g) in traced.experts.items()}
        self._gates = {layer: share.tolist() for layer, share in traced.gates.items()}

    def at(self, row: int) -> TokenTrace:
        experts = []
        for layer, (chosen, gates) in self._experts.items():
            pairs = sorted(zip(chosen[row], gates[row]), key=lambda pair: -pair[1])
            experts.append((layer, tuple((int(e), float(g)) for e, g in pairs)))
        return TokenTrace(tuple(experts), tuple((layer, share[row]) for layer, share in self._gates.items()))


def saying(output: Output) -> dict[str, Any]:
    """What ``output`` says, for ``output_of``."""
    return dict(output.__dict__)


_new = object.__new__


def output_of(said: dict[str, Any], text: str, tokens: tuple[int, ...]) -> Output:
    """``replace(output, text=text, tokens=tokens)``, of which ``said`` is ``saying``: a frozen dataclass's own
    constructor sets every field by a call, which in a step of many sequences takes a quarter of the host's time.
    """
    output = _new(Output)
    fields = output.__dict__
    fields.update(said)
    fields["text"], fields["tokens"] = text, tokens
    return output


def completion(outputs: Sequence[Output], seconds: float) -> Completion:
    """A whole answer; the token that ended it is no part of it."""
    tokens, last = [t for o in outputs for t in o.tokens], outputs[-1]
    if isinstance(last.stop, int):
        tokens.pop()
    return Completion("".join(o.text for o in outputs), tokens, last.finish or "", seconds)
