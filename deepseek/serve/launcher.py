"""The launcher: queues a step on the device, from the rows to the copy of the tokens, and waits for nothing.

Shape letters: N rows, C hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from deepseek.serve.adapters import AdapterBank
from deepseek.serve.ahead import DrawnTokens, InFlight, Tokens
from deepseek.serve.decoder import Decoder, RowAdapters, Traced
from deepseek.serve.graphs import DecodeGraphs
from deepseek.serve.sampling import Drawing
from deepseek.serve.scheduler import Work
from deepseek.serve.tables import HostRows
from deepseek.serve.transfer import Readback, put
from deepseek.serve.ways import Ways


class Launcher:
    """Runs the model over a step's rows, and draws a token for every sequence that is at its end.

    Args:
        vocabulary: tokens there are; further logits are padding.
        graphs: captured steps; ``None``: nothing is captured.
        bank: the adapters that requests may name.
    """

    def __init__(
        self, decoder: Decoder, vocabulary: int, graphs: DecodeGraphs | None, bank: AdapterBank
    ) -> None:
        self.decoder, self.vocabulary, self.graphs, self.bank = decoder, vocabulary, graphs, bank
        self.readback = Readback(decoder.device)
        self._ways: Ways | None = None  #: of the last drawing

    def start(self, work: list[Work], began: float) -> InFlight:
        """A step of which all is known; single rows come first in ``work``."""
        drafts: list[list[int]] = []
        if work[-1].rows == 1:
            tokens = [sequence.tokens[start] for sequence, start, *_ in work]
            samples = [
                start + 1 == len(sequence.tokens) and not sequence.request.embed
                for sequence, start, *_ in work
            ]
        else:
            tokens = [token for w in work for token in _row_tokens(w)]
            samples = [w.samples and not w.sequence.request.embed for w in work]
            drafts = [w.sequence.draft[: w.drafts] for w, draws in zip(work, samples) if draws]
        traced = Traced({}, {}) if any(w.sequence.request.trace for w in work) else None
        host = self.decoder.tables.host_rows(work)
        hidden, logits, best = self._run(work, host, tokens, traced)
        flight = InFlight(work, samples, host, hidden, traced, began)
        flight.simple = traced is None and all(w.sequence.engine.simple(w) for w in work)
        if flight.sampling:
            if logits is None or len(flight.sampling) < len(work):
                logits, best = self.logits(_some(hidden, flight.rows())), None
            flight.drawing = self._draw(flight.sampling, drafts, logits, best)
        return flight

    def follow(self, work: list[Work], before: InFlight, began: float) -> InFlight:
        """The step after ``before``, one row more for some of its sequences, from tokens that nobody has seen."""
        same = len(work) == len(before.work)
        tokens = before.hand_on(work)
        host = self.decoder.tables.host_rows(work, before.host if same else None)
        hidden, logits, best = self._run(work, host, tokens, None)
        flight = InFlight(work, [True] * len(work), host, hidden, None, began)
        flight.simple = flight.follows = True
        if logits is None:
            logits = self.logits(hidden)
        if same and before.drawing is not None:
            flight.drawing = before.drawing.following(logits, self.readback, best)
        else:
            flight.drawing = self._draw(work, (), logits, best, ahead=1)
        return flight

    def logits(self, hidden_NC: Tensor) -> Tensor:
        """``[N, V]``."""
        return self.decoder.logits(hidden_NC)[:, : self.vocabulary]

    def _run(
        self, work: list[Work], host: HostRows, tokens: Tokens, traced: Traced | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Hidden states of all rows; when the step was captured their logits and likeliest tokens too."""
        adapters = self._adapters(work)
        if self.graphs is not None and adapters is None and traced is None:
            found = self.graphs.run(tokens, host)
            if found is not None:
                return found
        token_N = tokens.gather() if isinstance(tokens, DrawnTokens) else put(tokens, self.decoder.device)
        return self.decoder.hidden(token_N, self.decoder.rows(host), adapters, traced), None, None

    def _draw(
        self, work: list[Work], drafts: Sequence[Sequence[int]], logits_NV: Tensor, best: Tensor | None, ahead: int = 0
    ) -> Drawing:  # fmt: skip
        states = [w.sequence.engine.state for w in work]
        drawing = Drawing.of(
            logits_NV, states, drafts, ahead=ahead, fetch=self.readback, like=self._ways, best=best
        )
        self._ways = drawing.ways
        return drawing

    def _adapters(self, work: list[Work]) -> RowAdapters | None:
        if not len(self.bank) or all(w.sequence.engine.adapter < 0 for w in work):
            return None
        return RowAdapters(
            self.bank, self.bank.rows(w.sequence.engine.adapter for w in work for _ in range(w.rows))
        )


def _some(hidden_NC: Tensor, rows: list[int]) -> Tensor:
    """Some rows, without a copy if they are all."""
    return hidden_NC[put(rows, hidden_NC.device)] if len(rows) < len(hidden_NC) else hidden_NC


def _row_tokens(work: Work) -> list[int]:
    sequence, end = work.sequence, work.start + work.rows - work.drafts
    return sequence.tokens[work.start : end] + sequence.draft[: work.drafts]
