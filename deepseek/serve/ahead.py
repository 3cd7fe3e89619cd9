"""Running ahead: a step that was launched and not read, from whose tokens the device begins the next one itself.

    device   … step n ……… | step n+1 …… | step n+2 …
    host     launch n+1 · read n: text, ends · launch n+2 · read n+1: …

The host launches step n+1 as if every sequence of step n went on, and only then waits for step n's tokens. A sequence
that turns out to have ended has a row too many in flight, whose result is dropped (``InFlight.drop``). One step at most
is in flight while the host works, two for the moment between a launch and the read. Why nothing is read or overwritten
before its time: ``docs/serving-internals.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from deepseek.serve.decoder import Traced
from deepseek.serve.request import TokenLogprobs
from deepseek.serve.sampling import Drawing, Sampled
from deepseek.serve.scheduler import Scheduled, Work
from deepseek.serve.tables import HostRows
from deepseek.serve.transfer import put


class DrawnTokens(NamedTuple):
    """Tokens that only the device knows: rows ``row_S`` of ``token_R``, int64; ``None``: all, in their order."""

    token_R: Tensor
    row_S: list[int] | None = None

    def gather(self) -> Tensor:
        """``[S]``, on the device."""
        if self.row_S is None:
            return self.token_R.contiguous()
        return self.token_R[put(self.row_S, self.token_R.device)]


class InFlight:
    """A step that was launched.

    Args:
        samples: for each work, whether it draws a token (more with drafts); the tokens come in this order.
        host: its rows. hidden: ``[N, C]``, of all of them; traced: what the layers did, if asked.
        began: when it was begun, seconds of ``time.perf_counter``.

    Attributes:
        drawing: the tokens, if any.
        simple: a sequence draws one token here or none, and nothing but its log-probabilities is read besides.
        follows: and the next step can be launched without the host: all that run draw one here, and their next tokens
            are ``foreseeable``.
    """

    def __init__(
        self, work: list[Work], samples: list[bool], host: HostRows, hidden: Tensor, traced: Traced | None,
        began: float,
    ) -> None:  # fmt: skip
        self.work, self.samples, self.host, self.hidden = work, samples, host, hidden
        self.traced, self.began = traced, began
        self.sampling = work if all(samples) else [w for w, draws in zip(work, samples) if draws]
        self.drawing: Drawing | None = None
        self.simple = self.follows = False
        self._dropped: set[Scheduled] = set()

    def rows(self) -> list[int]:
        """The rows whose logits are needed."""
        rows, end = list[int](), 0
        for w, draws in zip(self.work, self.samples):
            end += w.rows
            if draws:
                rows += range(end - w.drafts - 1, end)
        return rows

    def drop(self, sequence: Scheduled) -> None:
        """What this step finds for ``sequence`` counts for nothing: it has ended, or went on from a wrong token."""
        self._dropped.add(sequence)

    def counts(self, work: Work) -> bool:
        return work.sequence not in self._dropped

    @property
    def counting(self) -> list[Work]:
        """The work that counts."""
        return [w for w in self.work if w.sequence not in self._dropped] if self._dropped else self.work

    @property
    def alive(self) -> bool:
        """Whether anything counts; if not, nobody need read it."""
        return bool(self.counting)

    def going(self) -> list[Work]:
        """The work that goes on with another row, as far as can be seen, if it can be followed; else nothing."""
        if not self.follows:
            return []
        return [w for w in self.counting if w.start + w.rows + 1 < w.sequence.most]

    def hand_on(self, work: Sequence[Work]) -> DrawnTokens:
        """The tokens that ``work`` goes on from, if it follows; it overwrites what this step has left."""
        assert self.drawing is not None
        self.drawing.keep()
        if len(work) == len(self.sampling):
            return DrawnTokens(self.drawing.token_N)
        row = {w.sequence: i for i, w in enumerate(self.sampling)}
        return DrawnTokens(self.drawing.token_N, [row[w.sequence] for w in work])

    @property
    def redrawn(self) -> list[Scheduled]:
        """After ``read``: the sequences whose token is not the one that a following step went on from."""
        if not self.follows or self.drawing is None:
            return []
        return [self.sampling[row].sequence for row in self.drawing.redrawn]

    def read(self) -> list[list[Sampled]]:
        """Wait for the tokens; one list for each work that ``samples``."""
        return self.drawing.read() if self.drawing is not None else []

    def tokens(self) -> list[int] | None:
        """Wait for the tokens; one for each work that ``samples``, or ``None`` where it takes ``read``."""
        return self.drawing.tokens() if self.drawing is not None and self.simple else None

    def logprobs(self) -> list[TokenLogprobs | None] | None:
        """After ``tokens``: of each, as far as they were asked for; ``None`` if none were."""
        return self.drawing.logprobs() if self.drawing is not None else None


Tokens = Sequence[int] | DrawnTokens
