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
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deepseek.serve.distribution import Filters, best_tokens, draw_all, draw_best, likeliest, parts
from deepseek.serve.request import TokenLogprobs
from deepseek.serve.sampling_config import SamplingConfig
from deepseek.serve.sampling_state import Numbers, SamplingState, Updates
from deepseek.serve.transfer import put

__all__ = ["Drawing", "Sampled", "SamplingState", "prompt_logprobs", "sample", "sample_drafts"]

#: Begins to bring a tensor to the host; what it returns waits for it, and gives it.
Fetch = Callable[[Tensor], Callable[[], Tensor]]

#: How many of the most likely tokens are looked at first, and next, before a row is sorted in full. A second look
#: costs a CPU what the work is, a GPU a wait: it looks at more at once.
CANDIDATES, WIDER = 128, 2048


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
    drawn = _Draw(logits_RV, [_row(state, place) for state, place in zip(rows, places, strict=True)])
    return drawn.read()


def sample_drafts(
    logits_NV: Tensor, requests: Sequence[tuple[SamplingState, Sequence[int]]]
) -> list[list[Sampled]]:
    """The tokens that several requests' drafts earn: ``Drawing``, read at once."""
    return Drawing(logits_NV, requests).read()


class Drawing:
    """The tokens that several requests' drafts earn: those ``sample`` would have given, one after the other.

    Everything is queued on the device when a drawing is made; ``read`` waits.

    Args:
        logits_NV: each request's ``1 + len(draft)`` rows, one request after the other: the logits after its
            answer so far, then after each token of its draft.
        requests: states (left as they are) and drafts, which may be empty.
        ahead: tokens of each answer that have been drawn and that its state does not know yet; above 0 for
            ``foreseeable`` states only.
        fetch: how the result comes to the host.
        like: the drawing of the step before: what their options say is not worked out again for the same requests.
        best: what ``likeliest`` says of these logits, if it is known; may be overwritten once this drawing is queued.

    Attributes:
        redrawn: after ``read``, the rows whose token is not the one that the device had first.
    """

    def __init__(
        self,
        logits_NV: Tensor,
        requests: Sequence[tuple[SamplingState, Sequence[int]]],
        *,
        ahead: int = 0,
        fetch: Fetch = lambda x: x.cpu,
        like: Drawing | None = None,
        best: Tensor | None = None,
    ) -> None:
        rows: list[_Row] = []
        used: list[
            int
        ] = []  # rows of the logits; those after a token that the grammar forbids are not needed
        first = 0
        self._requests, self._lengths = requests, list[int]()
        for state, draft in requests:
            planned = _draft_rows(state, draft) if draft else [_row(state, len(state.tokens) + ahead)]
            rows += planned
            used += range(first, first + len(planned))
            self._lengths.append(len(planned))
            first += 1 + len(draft)
        assert first == logits_NV.shape[0], f"{first} rows of drafts, {logits_NV.shape[0]} rows of logits"
        if len(used) < first:
            logits_NV, best = logits_NV[put(used, logits_NV.device)], None
        self._drawn: _Draw = _Draw(logits_NV, rows, fetch, None if like is None else like._drawn, best)

    @property
    def token_N(self) -> Tensor:
        """What the device has drawn, int64, to go on from; a row may still be drawn anew by ``read``."""
        return self._drawn.packed[:, 0]

    @property
    def redrawn(self) -> list[int]:
        return self._drawn.redrawn

    def keep(self) -> None:
        """The logits will be overwritten before ``read``: keep of them what it may need."""
        self._drawn.keep()

    def read(self) -> list[list[Sampled]]:
        """For each request its drafted tokens as far as they are right, then one more token that is not of the draft.

        An end token, or a row without a token (``Sampled.error``), comes last.
        """
        found, at, answers = self._drawn.read(), 0, list[list[Sampled]]()
        for (state, draft), length in zip(self._requests, self._lengths):
            answer: list[Sampled] = []
            for here, sampled in enumerate(found[at : at + length]):
                answer.append(sampled)
                wrong = here >= len(draft) or sampled.token != draft[here]
                if wrong or sampled.token in state.ends:
                    break
            answers.append(answer)
            at += length
        return answers


def prompt_logprobs(logits_RV: Tensor, next_tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
    """For each row of logits the log-probability of the token that came next, and of the ``top`` best ones."""
    tokens_R = torch.tensor(next_tokens, dtype=torch.int64, device=logits_RV.device)
    packed = _logprobs(logits_RV, tokens_R, top, CANDIDATES).cpu()
    if again := torch.nonzero(packed[:, 0])[:, 0].tolist():
        index = torch.tensor(again, device=logits_RV.device)
        packed[again] = _logprobs(logits_RV[index], tokens_R[index], top, logits_RV.shape[-1]).cpu()
    return [_read_logprobs(token, row, top) for token, row in zip(next_tokens, packed.numpy())]


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
    rows, mark, taken = [_row(state, begin)], counts.mark(), 0
    for token in draft:
        if rows[-1].error or token in state.ends or (grammar and not grammar.try_accept(token)):
            break
        counts.add(token)
        taken += 1
        rows.append(_row(state, begin + taken))
    counts.remove(draft[:taken], mark)
    if grammar:
        grammar.retract(taken)
    return rows


_GOOD, _BAD, _SHORT = 0, 1, 2


class _Group(NamedTuple):
    """Rows that are drawn in one way; ``at``: the same on the device, ``None`` for all rows."""

    rows: list[int]
    at: Tensor | None
    filters: Filters
    sorts: bool  #: else one running sum
    enough: int  #: candidates that its ``top_k`` asks for
    totals: bool


class _Ways:
    """How a step's rows are drawn, as far as their requests' options say: the same step after step.

    Attributes:
        top: log-probabilities asked for at a place; asked: which rows want any.
        again: a row may need a second look.
        likeliest: every row wants its likeliest token, and nothing else.
    """

    def __init__(self, states: list[SamplingState], vocabulary: int, device: torch.device) -> None:
        self.states, configs = states, [state.config for state in states]
        self.plain = all(state.plain for state in states)
        self.greedy = [i for i, state in enumerate(states) if state.greedy]
        sorting = [c.top_k > 0 or c.top_p < 1 for c in configs]
        self.groups = []
        for sorts in (False, True):
            rows = [i for i, state in enumerate(states) if not state.greedy and sorting[i] == sorts]
            if rows:
                at = None if len(rows) == len(states) else put(rows, device)
                ks = [configs[i].top_k for i in rows]
                enough = max((k + CANDIDATES for k in ks if k), default=0)
                filters = _filters([configs[i] for i in rows], vocabulary, device)
                self.groups.append(_Group(rows, at, filters, sorts, enough, not all(ks)))
        asked = [i for i, c in enumerate(configs) if c.logprobs is not None]
        self.asked: Tensor | slice | None = None
        if asked:
            self.asked = slice(None) if len(asked) == len(states) else put(asked, device)
        self.top = max((c.logprobs or 0 for c in configs), default=0)
        self.again = self.top > 0 or any(group.sorts for group in self.groups)
        self.likeliest = self.plain and not self.groups and not asked


class _Draw:
    """One token for each row: queued at once, read later."""

    def __init__(
        self,
        logits_RV: Tensor,
        rows: Sequence[_Row],
        fetch: Fetch = lambda x: x.cpu,
        like: _Draw | None = None,
        best: Tensor | None = None,
    ) -> None:
        self._rows, self._logits = rows, logits_RV
        self.redrawn: list[int] = []
        self._looks = [CANDIDATES, WIDER, logits_RV.shape[-1]]
        if logits_RV.device.type != "cpu":
            del self._looks[0]
        states = [row.state for row in rows]
        if like is not None and like.ways.states == states:
            self.ways: _Ways = like.ways
        else:
            self.ways = _Ways(states, logits_RV.shape[-1], logits_RV.device)
        if rows:
            self.packed = _launch(logits_RV, rows, self.ways.top, self._looks[0], self.ways, best)
            self._wait = fetch(self.packed)

    def keep(self) -> None:
        """A later ``read`` looks at a copy of the logits, if it may have to look again."""
        if self.ways.again and 2 * self._looks[0] < self._logits.shape[-1]:  # else the first look is at all
            self._logits = self._logits.clone()

    def read(self) -> list[Sampled]:
        if not self._rows:
            return []
        found_R = self._wait().numpy()
        logits, top = self._logits, self.ways.top
        for candidates in self._looks[1:]:
            again = np.flatnonzero(found_R[:, 1] == _SHORT)
            if not len(again):
                break
            rows = [self._rows[i] for i in again.tolist()]
            wider = _launch(logits[put(again, logits.device)], rows, top, candidates).cpu().numpy()
            self.redrawn += again[found_R[again, 0] != wider[:, 0]].tolist()
            found_R[again, : wider.shape[1]] = wider
        if self.ways.asked is None and not found_R[:, 1].any() and self.ways.plain:
            return [Sampled(token) for token in found_R[:, 0].tolist()]
        return [_read(row, packed, top) for row, packed in zip(self._rows, found_R)]


def _launch(
    logits_RV: Tensor,
    rows: Sequence[_Row],
    top: int,
    candidates: int,
    ways: _Ways | None = None,
    best_R2: Tensor | None = None,
) -> Tensor:
    """Queue all of a step's work; ``[R, 2 or more]`` int64 on the device: token, health, log-probabilities."""
    device = logits_RV.device
    if ways is None:
        ways = _Ways([row.state for row in rows], logits_RV.shape[-1], device)
    if ways.likeliest:
        return likeliest(logits_RV) if best_R2 is None else best_R2
    edited = not ways.plain and not all(map(_bare, rows))
    scores_RV = _edited(logits_RV, rows) if edited else logits_RV
    if ways.greedy:
        best_R, token_R = scores_RV.max(-1)
    else:
        best_R, token_R = scores_RV.amax(-1), torch.zeros(len(rows), dtype=torch.int64, device=device)
    health_R = torch.where(torch.isfinite(best_R), _GOOD, _BAD)
    if edited:
        health_R |= torch.where(torch.isfinite(logits_RV.amax(-1)), _GOOD, _BAD)
    for group in ways.groups:
        at = group.at
        scores = scores_RV if at is None else scores_RV[at]
        uniform = put([rows[i].state.uniform(rows[i].place) for i in group.rows], device, np.float64)
        if group.sorts:
            enough = max(candidates, group.enough)
            token, short = draw_best(scores, group.filters, uniform, enough, totals=group.totals)
            few = torch.where(short, _SHORT, _GOOD)
            health_R = health_R | few if at is None else health_R.index_add(0, at, few)
        else:
            token = draw_all(scores, group.filters, uniform)
        token_R = token if at is None else token_R.index_copy(0, at, token)
    head = torch.stack([token_R, health_R], 1)
    if (asked := ways.asked) is None:
        return head
    found = _logprobs(logits_RV[asked], token_R[asked], top, max(candidates, top))
    packed = head.new_zeros(len(rows), 1 + found.shape[1])
    packed[:, 0], packed[:, 1] = token_R, health_R
    packed[asked, 1] |= found[:, 0]
    packed[asked, 2:] = found[:, 1:]
    return packed


def _bare(row: _Row) -> bool:
    """Whether this row's scores are its logits, this time."""
    return row.penalties is None and row.banned is None and row.mask is None and not len(row.state.bias.ids)


def _filters(configs: Sequence[SamplingConfig], vocabulary: int, device: torch.device) -> Filters:
    """Some rows' options as tensors, in one transfer."""
    table = [
        (
            c.temperature,
            c.top_k if 0 < c.top_k < vocabulary else vocabulary,
            c.top_p if c.top_p < 1 else 2.0,
            c.min_p,
        )
        for c in configs
    ]
    heat, k, p, least = put(np.array(table, np.float64).T.copy(), device).unbind()
    return Filters(heat.float(), k.long(), p, least.float() if any(c.min_p for c in configs) else None)


def _edited(logits_RV: Tensor, rows: Sequence[_Row]) -> Tensor:
    """Logits in fp32 after repetition, presence and frequency penalties, bias, min_tokens, grammar; a copy."""
    scores_RV = logits_RV.to(torch.float32, copy=True)
    device = scores_RV.device
    touched = [(i, row.penalties) for i, row in enumerate(rows) if row.penalties is not None]
    if touched:
        at, ids = _places([(i, u.ids) for i, u in touched], device)
        factors = [
            np.full(len(u.ids), rows[i].state.config.repetition_penalty, np.float32) for i, u in touched
        ]
        factor = put(np.concatenate(factors), device)
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


def _logprobs(logits_RV: Tensor, tokens_R: Tensor, top: int, candidates: int) -> Tensor:
    """Of the model's own distribution; int64 ``[R, 3 + 2 top]``: health, log-probability, rank, best ids, theirs."""
    top, packed = min(top, logits_RV.shape[-1]), []
    for part in parts(logits_RV):
        logits, token_R1 = logits_RV[part].float(), tokens_R[part, None]
        own, total = logits.gather(-1, token_R1), logits.logsumexp(-1, keepdim=True)
        rank = (logits > own).sum(-1, keepdim=True) + 1
        earlier = torch.arange(logits.shape[-1], device=own.device) < token_R1
        rank += ((logits == own) & earlier).sum(-1, keepdim=True)
        columns = [torch.zeros_like(rank), _bits(own - total), rank]
        if top:
            best = best_tokens(logits, candidates)
            columns[0] = torch.where(best.sure_R < top, _SHORT, _GOOD)[:, None]
            columns += [best.ids_RK[:, :top], _bits(best.scores_RK[:, :top] - total)]
        packed.append(torch.cat(columns, 1))
    return torch.cat(packed)


def _bits(x: Tensor) -> Tensor:
    """fp32 numbers, bit by bit, in int64."""
    return x.contiguous().view(torch.int32).long()


def _read_logprobs(token: int, packed: Numbers, top: int) -> TokenLogprobs:
    """From ``_logprobs``' row."""
    floats = packed.astype(np.int32).view(np.float32)
    n = (len(packed) - 3) // 2
    best = zip(packed[3 : 3 + n].tolist(), floats[3 + n :].tolist())
    return TokenLogprobs(token, float(floats[1]), int(packed[2]), tuple(best)[:top])


def _read(row: _Row, packed: Numbers, top: int) -> Sampled:
    token, health = int(packed[0]), int(packed[1])
    if row.error:
        return Sampled(-1, None, row.error)
    if health & _BAD:
        return Sampled(
            -1, None, "no token can be drawn: the logits are not finite, or every token is forbidden"
        )
    asked = row.state.config.logprobs
    if asked is None:
        return Sampled(token)
    return Sampled(token, _read_logprobs(token, packed[1:], asked))
