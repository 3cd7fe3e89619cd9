"""One step's tokens for many requests at once, each with options of its own.

``sample`` sorts the rows of a step into three groups: greedy ones cost one maximum for all of them, random ones
without top-k and top-p one running sum, the others a bounded ``topk`` (and a full sort for the few rows whose
nucleus is larger). Penalties, biases and grammars change a few numbers of the rows that have them. Everything a
step yields crosses to the host in one transfer, and once more for each wider look. A ``Drawing`` is queued when it is
made and read later, so that the device can go on meanwhile.

A token depends on the request's seed, its place in the answer (``SamplingState.uniform``) and the row's logits, not
on batching, preemption or speculation; ``sample_drafts`` keeps a drafted token where ``sample`` would have drawn the
very same one, which makes answers with and without speculation equal, random ones too.

Shape letters: R rows, N rows of several requests' drafts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deepseek.serve.distribution import BAD, GOOD, SHORT, draw_all, draw_best, likeliest
from deepseek.serve.request import TokenLogprobs
from deepseek.serve.sampling_state import Numbers, SamplingState, Updates
from deepseek.serve.token_logprobs import packed_logprobs, read_logprobs
from deepseek.serve.transfer import put
from deepseek.serve.ways import Ways

__all__ = ["Drawing", "Sampled", "SamplingState", "sample", "sample_drafts"]

#: Begins to bring a tensor to the host; what it returns waits for it, and gives it.
Fetch = Callable[[Tensor], Callable[[], npt.NDArray[Any]]]

TOGETHER = 16  #: places whose random numbers are sent at once, where steps follow each other


class Sampled(NamedTuple):
    """What one row gave.

    Attributes:
        token: -1 where there is none, and then ``error`` says why: the request has to end with it.
    """

    token: int
    logprobs: TokenLogprobs | None = None
    error: str = ""


class _Row(NamedTuple):
    """One row of logits, and all that decides its token."""

    state: SamplingState
    place: int
    penalties: Updates | None = None
    banned: Numbers | None = None
    mask: npt.NDArray[np.int32] | None = None
    error: str = ""


_new, _BARE = tuple.__new__, (None, None, None, "")  # a row without the call of Python that ``_Row(…)`` is


def sample(
    logits_RV: Tensor, rows: Sequence[SamplingState], places: Sequence[int] | None = None
) -> list[Sampled]:
    """The next token of each row. Changes no state: ``accept`` what becomes part of an answer.

    Args:
        logits_RV: ``[R, V]``, any floating-point type and device, the columns of real tokens only.
        rows: the request of each row; one request at most once.
        places: how many tokens of its answer come before each row's (``len(state.tokens)`` if not given).
    """
    if places is None:
        places = [len(state.tokens) for state in rows]
    drawn = _Draw.of(logits_RV, [_row(state, place) for state, place in zip(rows, places, strict=True)])
    return drawn.read()


def sample_drafts(
    logits_NV: Tensor, requests: Sequence[tuple[SamplingState, Sequence[int]]]
) -> list[list[Sampled]]:
    """The tokens that several requests' drafts earn: ``Drawing``, read at once."""
    states, drafts = [state for state, _ in requests], [draft for _, draft in requests]
    return Drawing.of(logits_NV, states, drafts).read()


class Drawing:
    """The tokens that several requests' drafts earn: those ``sample`` would have given, one after the other.

    Everything is queued on the device when a drawing is made (``of``, ``following``); ``tokens`` and ``read`` wait.

    Attributes:
        ways: how the requests' options want their tokens drawn.
        redrawn: after a wait, the rows whose token is not the one that the device had first.
    """

    def __init__(
        self, drawn: _Draw, states: Sequence[SamplingState], drafts: Sequence[Sequence[int]] = (),
        lengths: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self._drawn, self._states, self._drafts, self._lengths = drawn, states, drafts, lengths

    @classmethod
    def of(
        cls,
        logits_NV: Tensor,
        states: Sequence[SamplingState],
        drafts: Sequence[Sequence[int]] = (),
        *,
        ahead: int = 0,
        fetch: Fetch | None = None,
        like: Ways | None = None,
        best: Tensor | None = None,
    ) -> Drawing:
        """The next tokens of some requests.

        Args:
            logits_NV: each request's ``1 + len(draft)`` rows, one request after the other: the logits after its
                answer so far, then after each token of its draft.
            states: of the requests; left as they are. drafts: of each, or of none.
            ahead: tokens of each answer that have been drawn and that its state does not know yet; above 0 for
                ``foreseeable`` states only.
            fetch: how the result comes to the host.
            like: the ``ways`` of an earlier drawing, which hold for the same requests.
            best: what ``likeliest`` says of these logits, if it is known; may be overwritten once this is queued.
        """
        lengths, first = list[int](), len(states)
        if ahead or not any(drafts):
            rows = [
                _new(_Row, (s, len(s.tokens) + ahead, *_BARE)) if s.plain else _row(s, len(s.tokens) + ahead)
                for s in states
            ]
        else:
            # Rows after a token that the grammar forbids are not needed.
            rows, used, first = [], list[int](), 0
            for state, draft in zip(states, drafts, strict=True):
                planned = _draft_rows(state, draft)
                rows += planned
                used += range(first, first + len(planned))
                lengths.append(len(planned))
                first += 1 + len(draft)
            if len(used) < first:
                logits_NV, best = logits_NV[put(used, logits_NV.device)], None
        assert first >= len(rows) == len(logits_NV), (
            f"{first} rows of drafts, {len(logits_NV)} rows of logits"
        )
        drawn = _Draw.of(logits_NV, rows, fetch, like, best)
        return cls(drawn, states, drafts if lengths else (), lengths)

    def following(self, logits_RV: Tensor, fetch: Fetch, best: Tensor | None) -> Drawing:
        """The same requests' next tokens, before these are known here; without drafts, for ``foreseeable`` states."""
        return Drawing(self._drawn.following(logits_RV, fetch, best), self._states)

    @property
    def ways(self) -> Ways:
        return self._drawn.ways

    @property
    def token_N(self) -> Tensor:
        """What the device has drawn, int64, to go on from; a row may still be drawn anew by ``read``."""
        return self._drawn.token_R

    @property
    def redrawn(self) -> list[int]:
        return self._drawn.redrawn

    def keep(self) -> None:
        """The logits will be overwritten before ``read``: keep of them what it may need."""
        self._drawn.keep()

    def tokens(self) -> list[int] | None:
        """One token for each request; ``None`` where one has none, or there were drafts: then ``read``."""
        return None if self._lengths else self._drawn.tokens()

    def logprobs(self) -> list[TokenLogprobs | None] | None:
        """With ``tokens``: of each, as far as they were asked for; ``None`` if none were."""
        return None if self.ways.asked is None else self._drawn.logprobs()

    def read(self) -> list[list[Sampled]]:
        """For each request its drafted tokens as far as they are right, then one more token that is not of the draft.

        An end token, or a row without a token (``Sampled.error``), comes last.
        """
        found, at, answers = self._drawn.read(), 0, list[list[Sampled]]()
        if not self._lengths:
            return [[sampled] for sampled in found]
        for state, draft, length in zip(self._states, self._drafts, self._lengths):
            answer: list[Sampled] = []
            for here, sampled in enumerate(found[at : at + length]):
                answer.append(sampled)
                wrong = here >= len(draft) or sampled.token != draft[here]
                if wrong or sampled.token in state.ends:
                    break
            answers.append(answer)
            at += length
        return answers


def _row(state: SamplingState, place: int) -> _Row:
    """``state`` as it is now, as a row."""
    if state.plain:
        return _Row(state, place)
    mask, error, over = None, "", False
    if state.grammar is not None:
        mask, error, over = state.grammar.mask(), state.grammar.error, state.grammar.over
    early = place < state.config.min_tokens and not over
    return _Row(
        state,
        place,
        state.counts.updates() if state.counts.on else None,
        state.banned if early and len(state.banned) else None,
        mask,
        error,
    )


def _draft_rows(state: SamplingState, draft: Sequence[int]) -> list[_Row]:
    """A row after every beginning of ``draft``; fewer where the grammar forbids a token of it."""
    begin, grammar, counts = len(state.tokens), state.grammar, state.counts
    if state.plain:
        return [_Row(state, begin + i) for i in range(1 + len(draft))]
    rows, mark, taken = [_kept(_row(state, begin))], counts.mark(), 0
    for token in draft:
        if rows[-1].error or token in state.ends or (grammar and not grammar.try_accept(token)):
            break
        counts.add(token)
        taken += 1
        rows.append(_kept(_row(state, begin + taken)))
    counts.remove(draft[:taken], mark)
    if grammar:
        grammar.retract(taken)
    return rows


def _kept(row: _Row) -> _Row:
    """``row``, whose state will change before it is used."""
    if row.penalties is None:
        return row
    return row._replace(penalties=Updates(row.penalties.ids.copy(), row.penalties.amounts.copy()))


class _Uniforms:
    """The random numbers of a step's rows and, where steps follow each other, of later places, sent together."""

    def __init__(self, rows: Sequence[_Row], device: torch.device) -> None:
        self._rows, self._device = rows, device
        self._sent: dict[int, tuple[int, int, Tensor]] = {}  # by a group's first row: from where on, how many

    def of(self, group: Sequence[int], further: int) -> Tensor:
        """fp64, of some rows, ``further`` places after the rows' own."""
        first, count, table_KR = self._sent.get(group[0], (0, 0, None))
        if table_KR is None or not 0 <= further - first < count:
            first, count = further, TOGETHER if further else 1
            rows = [self._rows[i] for i in group]
            table = np.array([row.state.uniforms(row.place + further, count) for row in rows])
            table_KR = put(np.ascontiguousarray(table.T), self._device)
            self._sent[group[0]] = first, count, table_KR
        return table_KR[further - first]


def _fetch(x: Tensor) -> Callable[[], npt.NDArray[Any]]:
    return lambda: x.cpu().numpy()


class _Draw:
    """One token for each row: queued at once, read later.

    Args:
        rows: places and, where they are not ``plain``, what changes their scores.
        further: how many steps it comes after the drawing that ``uniforms`` was made for.
    """

    def __init__(
        self, logits_RV: Tensor, rows: Sequence[_Row], ways: Ways, uniforms: _Uniforms, further: int,
        fetch: Fetch, best: Tensor | None,
    ) -> None:  # fmt: skip
        self._logits, self._rows, self.ways, self._uniforms = logits_RV, rows, ways, uniforms
        self._further = further
        self.redrawn: list[int] = []
        self._found: npt.NDArray[Any] | None = None
        if rows:
            self.packed = _launch(logits_RV, rows, ways.top, ways.looks[0], ways, best, (uniforms, further))
            self._wait = fetch(self.packed)
        self._token_R: Tensor | None = None

    @classmethod
    def of(
        cls, logits_RV: Tensor, rows: Sequence[_Row], fetch: Fetch | None = None, like: Ways | None = None,
        best: Tensor | None = None,
    ) -> _Draw:  # fmt: skip
        states = [row.state for row in rows]
        if like is not None and like.states == states:
            ways = like
        else:
            ways = Ways(states, logits_RV.shape[-1], logits_RV.device)
        return cls(logits_RV, rows, ways, _Uniforms(rows, logits_RV.device), 0, fetch or _fetch, best)

    def following(self, logits_RV: Tensor, fetch: Fetch, best: Tensor | None) -> _Draw:
        """The same at the next place of every row."""
        rows = self._rows if self.ways.plain else [_row(row.state, row.place + 1) for row in self._rows]
        drawn = _Draw(logits_RV, rows, self.ways, self._uniforms, self._further + 1, fetch, best)
        if drawn.packed is self.packed:  # what a captured step has left lies where it lay before
            drawn._token_R = self._token_R
        return drawn

    @property
    def token_R(self) -> Tensor:
        """The tokens on the device."""
        if self._token_R is None:
            self._token_R = self.packed[:, 0]
        return self._token_R

    def keep(self) -> None:
        """A later ``read`` looks at a copy of the logits, if it may have to look again."""
        if self.ways.again and 2 * self.ways.looks[0] < self._logits.shape[-1]:  # else it looks at all
            self._logits = self._logits.clone()

    def tokens(self) -> list[int] | None:
        """Wait; the tokens, if each row has one."""
        found_R = self._look()
        if found_R[:, 1].any() or (not self.ways.plain and any(row.error for row in self._rows)):
            return None
        tokens: list[int] = found_R[:, 0].tolist()
        return tokens

    def logprobs(self) -> list[TokenLogprobs | None]:
        """After a wait: what was asked for, row by row."""
        found_R, asked = self._look(), [row.state.config.logprobs for row in self._rows]
        some = [i for i, top in enumerate(asked) if top is not None]
        read = read_logprobs(found_R[some, 0].tolist(), found_R[some, 1:], [asked[i] or 0 for i in some])
        by_row = dict(zip(some, read))
        return [by_row.get(i) for i in range(len(asked))]

    def read(self) -> list[Sampled]:
        if not self._rows:
            return []
        found_R, none = self._look(), [None] * len(self._rows)
        logprobs = none if self.ways.asked is None else self.logprobs()
        return list(map(_read, self._rows, found_R[:, 0].tolist(), found_R[:, 1].tolist(), logprobs))

    def _look(self) -> npt.NDArray[Any]:
        """Wait, and look again at the rows that need it."""
        if self._found is not None:
            return self._found
        found_R = self._found = self._wait()
        logits, top = self._logits, self.ways.top
        for candidates in self.ways.looks[1:] if self.ways.again else ():
            again = np.flatnonzero(found_R[:, 1] == SHORT)
            if not len(again):
                break
            rows = [self._rows[i] for i in again.tolist()]
            if self.ways.plain:
                rows = [row._replace(place=row.place + self._further) for row in rows]
            wider = _launch(logits[put(again, logits.device)], rows, top, candidates).cpu().numpy()
            self.redrawn += again[found_R[again, 0] != wider[:, 0]].tolist()
            found_R[again, : wider.shape[1]] = wider
        return found_R


def _launch(
    logits_RV: Tensor,
    rows: Sequence[_Row],
    top: int,
    candidates: int,
    ways: Ways | None = None,
    best_R2: Tensor | None = None,
    random: tuple[_Uniforms, int] | None = None,
) -> Tensor:
    """Queue all of a step's work; ``[R, 2 or more]`` int64 on the device: token, health, log-probabilities."""
    device = logits_RV.device
    if ways is None:
        ways = Ways([row.state for row in rows], logits_RV.shape[-1], device)
    if ways.likeliest:
        return likeliest(logits_RV) if best_R2 is None else best_R2
    edited = not ways.plain and not all(map(_bare, rows))
    scores_RV = _edited(logits_RV, rows) if edited else logits_RV
    if edited:
        best_R2 = None  # of other scores
    if best_R2 is not None:
        token_R, health_R = best_R2.unbind(1)
    else:
        if ways.greedy:
            best_R, token_R = scores_RV.max(-1)
        else:
            best_R, token_R = scores_RV.amax(-1), torch.zeros(len(rows), dtype=torch.int64, device=device)
        health_R = torch.where(torch.isfinite(best_R), GOOD, BAD)
    if edited:
        health_R |= torch.where(torch.isfinite(logits_RV.amax(-1)), GOOD, BAD)
    uniforms, further = random or (_Uniforms(rows, device), 0)
    for group in ways.groups:
        at = group.at
        scores = scores_RV if at is None else scores_RV[at]
        uniform = uniforms.of(group.rows, further)
        if group.sorts:
            enough = max(candidates, group.enough)
            token, short = draw_best(scores, group.filters, uniform, enough, totals=group.totals)
            few = torch.where(short, SHORT, GOOD)
            health_R = health_R | few if at is None else health_R.index_add(0, at, few)
        else:
            first = None if best_R2 is None else token_R if at is None else token_R[at]
            token = draw_all(scores, group.filters, uniform, first)
        token_R = token if at is None else token_R.index_copy(0, at, token)
    head = torch.stack([token_R, health_R], 1)
    if (asked := ways.asked) is None:
        return head
    found = packed_logprobs(logits_RV[asked], token_R[asked], top, max(candidates, top))
    packed = head.new_zeros(len(rows), 1 + found.shape[1])
    packed[:, 0], packed[:, 1] = token_R, health_R
    packed[asked, 1] |= found[:, 0]
    packed[asked, 2:] = found[:, 1:]
    return packed


def _bare(row: _Row) -> bool:
    """Whether this row's scores are its logits, this time."""
    return row.penalties is None and row.banned is None and row.mask is None and not len(row.state.bias.ids)


def _edited(logits_RV: Tensor, rows: Sequence[_Row]) -> Tensor:
    """Logits in fp32 after repetition, presence and frequency penalties, bias, min_tokens, grammar; a copy."""
    scores_RV = logits_RV.to(torch.float32, copy=True)
    device = scores_RV.device
    touched = [(i, row.penalties) for i, row in enumerate(rows) if row.penalties is not None]
    if touched:
        at, ids = _places([(i, u.ids) for i, u in touched], device)
        factors = np.array([rows[i].state.config.repetition_penalty for i, _ in touched], np.float32)
        factor = put(factors.repeat([len(u.ids) for _, u in touched]), device)
        amount = put(np.concatenate([u.amounts for _, u in touched]), device)
        old = scores_RV[at, ids]
        scores_RV[at, ids] = torch.where(old > 0, old / factor, old * factor) - amount
    biased = [(i, row.state.bias) for i, row in enumerate(rows) if len(row.state.bias.ids)]
    if biased:
        at, ids = _places([(i, u.ids) for i, u in biased], device)
        amount = put(np.concatenate([u.amounts for _, u in biased]), device)
        scores_RV[at, ids] = scores_RV[at, ids] + amount
    banned = [(i, row.banned) for i, row in enumerate(rows) if row.banned is not None]
    if banned:
        scores_RV[_places(banned, device)] = -torch.inf
    masked = [(i, row.mask) for i, row in enumerate(rows) if row.mask is not None]
    if masked:
        index = put([i for i, _ in masked], device)
        bits = put(np.stack([mask for _, mask in masked]), device)
        scores_RV[index] = scores_RV[index].masked_fill_(~allowed(bits, scores_RV.shape[-1]), -torch.inf)
    return scores_RV


def allowed(bits: Tensor, vocabulary: int) -> Tensor:
    """Bit masks int32 ``[R, ceil(V / 32)]`` as bool ``[R, V]``."""
    shifts = torch.arange(32, dtype=torch.int32, device=bits.device)
    return ((bits[:, :, None] >> shifts) & 1).bool().flatten(1)[:, :vocabulary]


def _places(updates: Sequence[tuple[int, Numbers]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of every update, in one transfer."""
    at = np.repeat([i for i, _ in updates], [len(ids) for _, ids in updates])
    both = np.stack([at, np.concatenate([ids for _, ids in updates])])
    rows, columns = put(both, device)
    return rows, columns


def _read(row: _Row, token: int, health: int, logprobs: TokenLogprobs | None) -> Sampled:
    if row.error:
        return Sampled(-1, None, row.error)
    if health & BAD:
        return Sampled(
            -1, None, "no token can be drawn: the logits are not finite, or every token is forbidden"
        )
    return Sampled(token, logprobs)
