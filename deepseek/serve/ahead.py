"""Running ahead: a step that was launched and not read, from whose tokens the device begins the next one itself.

    device   … step n ……… | step n+1 …… | step n+2 …
    host     launch n+1 · read n: text, ends · launch n+2 · read n+1: …

The host launches step n+1 as if every sequence of step n went on, and only then waits for step n's tokens. A sequence
that turns out to have ended has a row too many in flight, whose result is dropped (``InFlight.drop``). One step at most
is in flight while the host works, two for the moment between a launch and the read. Why nothing is read or overwritten
before its time: ``docs/serving-internals.md``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from deepseek.serve.decoder import Traced
from deepseek.serve.sampling import Drawing, Sampled
from deepseek.serve.scheduler import Scheduled, Work
from deepseek.serve.transfer import put


class DrawnTokens(NamedTuple):
    """Tokens that only the device knows: rows ``row_S`` of ``token_R``, int64."""

    token_R: Tensor
    row_S: list[int]

    def gather(self) -> Tensor:
        """``[S]``, on the device."""
        return self.token_R[put(self.row_S, self.token_R.device)]


class InFlight:
    """A step that was launched.

    Args:
        samples: for each work, whether it draws a token (more with drafts); the tokens come in this order.
        hidden: ``[N, C]``, of all rows; traced: what the layers did, if asked.
        began: when it was begun, seconds of ``time.perf_counter``.

    Attributes:
        drawing: the tokens, if any.
        follows: the next step can be launched without the host: every running sequence has drawn one token here, whose
            successor is ``foreseeable``.
    """

    def __init__(
        self, work: list[Work], samples: list[bool], hidden: Tensor, traced: Traced | None, began: float
    ) -> None:
        self.work, self.samples, self.hidden, self.traced, self.began = work, samples, hidden, traced, began
        self.sampling = [w for w, draws in zip(work, samples) if draws]
        self.drawing: Drawing | None = None
        self.follows = False
        self._counting = {id(w.sequence) for w in work}

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
        self._counting.discard(id(sequence))

    def counts(self, work: Work) -> bool:
        return id(work.sequence) in self._counting

    @property
    def alive(self) -> bool:
        """Whether anything counts; if not, nobody need read it."""
        return bool(self._counting)

    def going(self) -> list[Work]:
        """The work that counts, if it can be followed; else nothing."""
        if not self.follows:
            return []
        return [w for w in self.work if id(w.sequence) in self._counting]

    def hand_on(self, sequences: Iterable[Scheduled]) -> DrawnTokens:
        """The tokens of some of its sequences for the next step, which overwrites what this one has left."""
        assert self.drawing is not None
        self.drawing.keep()
        row = {id(w.sequence): i for i, w in enumerate(self.sampling)}
        return DrawnTokens(self.drawing.token_N, [row[id(s)] for s in sequences])

    @property
    def redrawn(self) -> list[Scheduled]:
        """After ``read``: the sequences whose token is not the one that a following step went on from."""
        if not self.follows or self.drawing is None:
            return []
        return [self.sampling[row].sequence for row in self.drawing.redrawn]

    def read(self) -> list[list[Sampled]]:
        """Wait for the tokens; one list for each work that ``samples``."""
        return self.drawing.read() if self.drawing is not None else []


Tokens = Sequence[int] | DrawnTokens
