"""Drawing one token from a row of scores so that nothing but the row and one random number decides it.

Floating-point sums depend on the order in which a device adds, and that order on the size of the batch. Here a
token's probability is a whole number, ``2^40 exp((score - best) / temperature)``: sums of whole numbers are exact
in every order, so a row draws the same token alone or among a thousand, and however many candidates were sorted.

Tokens are ordered by score, equal scores by id. ``topk`` does not say which of equal scores it takes, so of its
answer only those above its last score are used; a row that may need more is told to be short, and sorted in full.

Shape letters: R rows, V vocabulary, K candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deepseek.ops.exact import exact_map
from deepseek.ops.triton import kernels, runs_on

COLDEST = 1e-6  #: below this temperature the most likely token has all the probability that fp32 can tell
CACHED = 1 << 18  #: scores worked on at once by a CPU: 2 MiB in int64
#: How many of the most likely tokens are looked at first, and next, before a row is sorted in full. A second look
#: costs a CPU what the work is, a GPU a wait: it looks at more at once.
CANDIDATES, WIDER = 128, 2048
GOOD, BAD, SHORT = 0, 1, 2  #: what is said of a row: well, no token can be drawn, it must be looked at again
ONE = 1 << 40  #: the weight of the most likely token; 2^22 tokens of it still fit 63 bits


class Filters(NamedTuple):
    """One number per row; fp32 but ``top_k`` (int64, V: all) and ``top_p`` (fp64, 2: all)."""

    temperature_R: Tensor
    top_k_R: Tensor
    top_p_R: Tensor
    min_p_R: Tensor | None  #: None: no row has one

    def rows(self, part: slice) -> Filters:
        heat, k, p, least = self
        return Filters(heat[part], k[part], p[part], None if least is None else least[part])


class Best(NamedTuple):
    """The likeliest tokens of each row in order, of which the first ``sure_R`` are certain; ``[R, K]``."""

    scores_RK: Tensor
    ids_RK: Tensor
    sure_R: Tensor


def likeliest(logits_RV: Tensor) -> Tensor:
    """int64 ``[R, 2]``: the first of each row's largest logits; 0, or 1 if that one is not finite."""
    if runs_on(logits_RV.device) and logits_RV.dtype != torch.float64:
        found: Tensor = kernels("rows").likeliest(logits_RV)
        return found
    best_R, token_R = logits_RV.max(-1)
    return torch.stack([token_R, (~torch.isfinite(best_R)).long()], 1)


def best_tokens(scores_RV: Tensor, count: int) -> Best:
    """At least ``count`` candidates of each row, all tokens where there are not many more; fp32 ``[R, V]``."""
    rows, size = scores_RV.shape
    if 2 * count >= size:
        values, ids = (scores_RV + 0.0).sort(
            dim=-1, descending=True, stable=True
        )  # -0 becomes 0: they are equal
        return Best(values, ids, torch.full((rows,), size, device=ids.device))
    scores_RK, ids_RK = scores_RV.topk(count + 1, sorted=False)
    sure_R = (scores_RK > scores_RK.amin(-1, keepdim=True)).sum(-1)
    bits = (scores_RK + 0.0).view(torch.int32)  # as whole numbers they rise with the score, once the negative
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # ones' are turned round; below them the id, smaller first
    keys = ((rising.long() << 32) | (size - 1 - ids_RK)).sort(-1, descending=True).values
    ids_RK = size - 1 - (keys & 0xFFFFFFFF)
    return Best(scores_RV.gather(-1, ids_RK), ids_RK, sure_R)


def weights(scores: Tensor, best_R: Tensor, temperature_R: Tensor) -> Tensor:
    """Probabilities relative to the most likely token's, in fp32 like ``scores``: ``exp((s - best) / T)``."""
    x = (scores - best_R[:, None]).div_(temperature_R[:, None])
    if x.device.type == "cpu" and not torch.backends.mkl.is_available():
        return exact_map(torch.exp, x)
    return x.exp_()  # MKL's gives equal numbers equal results, wherever they lie


def draw_all(
    scores_RV: Tensor, filters: Filters, uniform_R: Tensor, likeliest_R: Tensor | None = None
) -> Tensor:
    """A token of each row out of all (``top_k`` and ``top_p`` are not looked at), without sorting; int64 ``[R]``.

    Args:
        scores_RV: any floating-point type.
        uniform_R: fp64 in [0, 1), one per row.
        likeliest_R: a token of each row's best score, if it is known.
    """
    slices = parts(scores_RV)
    if len(slices) == 1:
        return _draw_all(scores_RV.float(), filters, uniform_R, likeliest_R)
    return torch.cat(
        [_draw_all(scores_RV[part].float(), filters.rows(part), uniform_R[part]) for part in slices]
    )


def draw_best(
    scores_RV: Tensor, filters: Filters, uniform_R: Tensor, candidates: int, *, totals: bool = True
) -> tuple[Tensor, Tensor]:
    """A token of each row out of those that the filters keep, looking at the best ``candidates`` only.

    Temperature first, then top-k, top-p of what is left, min-p. All three keep a beginning of the order, so
    that ``candidates`` changes nothing where they suffice.

    Args:
        scores_RV: any floating-point type.
        totals: some rows have no ``top_k``; then their top-p needs the sum over the vocabulary.

    Returns:
        The tokens, int64 ``[R]``, and whether more must be looked at, bool ``[R]``: those rows' tokens mean
        nothing.
    """
    slices = parts(scores_RV)
    if len(slices) == 1:
        return _draw_best(scores_RV.float(), filters, uniform_R, candidates, totals)
    drawn = [
        _draw_best(scores_RV[part].float(), filters.rows(part), uniform_R[part], candidates, totals)
        for part in slices
    ]
    tokens, short = zip(*drawn)
    return torch.cat(tokens), torch.cat(short)


def probabilities(scores_RV: Tensor, filters: Filters) -> Tensor:
    """What ``draw_all`` and ``draw_best`` draw from: fp32 ``[R, V]``, rows sum to one."""
    best = best_tokens(scores_RV, scores_RV.shape[-1])
    kept_RK = _kept(scores_RV, scores_RV.shape[-1], best, filters)[1]
    kept_RV = torch.zeros_like(kept_RK).scatter_(-1, best.ids_RK, kept_RK)
    share_RV = weights(scores_RV, best.scores_RK[:, 0], filters.temperature_R) * kept_RV
    return share_RV / share_RV.sum(-1, keepdim=True)


def whole(share: Tensor) -> Tensor:
    """fp32 in [0, 1] as whole numbers of ``ONE``; int64."""
    return (share * ONE).long()


def parts(scores_RV: Tensor) -> list[slice]:
    """All rows; on a CPU a few at a time, which stay in its cache."""
    rows, size = scores_RV.shape
    some = max(1, CACHED // size) if scores_RV.device.type == "cpu" else rows
    return [slice(first, first + some) for first in range(0, rows, some)]


def _draw_all(
    scores_RV: Tensor, filters: Filters, uniform_R: Tensor, likeliest_R: Tensor | None = None
) -> Tensor:
    if likeliest_R is None:
        best_R = scores_RV.amax(-1)
    else:
        best_R = scores_RV.gather(-1, likeliest_R[:, None])[:, 0]
    share = weights(scores_RV, best_R, filters.temperature_R)
    if filters.min_p_R is not None:
        share *= share >= filters.min_p_R[:, None]
    upto = whole(share).cumsum(-1)
    return _place(upto, upto[:, -1], uniform_R)


def _draw_best(
    scores_RV: Tensor, filters: Filters, uniform_R: Tensor, candidates: int, totals: bool
) -> tuple[Tensor, Tensor]:
    size = scores_RV.shape[-1]
    best = best_tokens(scores_RV, candidates)
    upto_RK, kept_RK = _kept(scores_RV if totals else None, size, best, filters)
    last = (best.sure_R - 1).clamp(min=0)[:, None]
    more = kept_RK.gather(-1, last)[:, 0] | (filters.top_k_R < size) | (best.sure_R == 0)
    short_R = more & (filters.top_k_R > best.sure_R)
    total_R = (kept_RK * upto_RK).amax(-1)
    at = _place(upto_RK, total_R, uniform_R)
    return best.ids_RK.gather(-1, at[:, None])[:, 0], short_R


def _kept(scores_RV: Tensor | None, size: int, best: Best, filters: Filters) -> tuple[Tensor, Tensor]:
    """Running sums of the candidates' weights, and whether the filters keep them; ``[R, K]``."""
    first_R = best.scores_RK[:, 0]
    share_RK = weights(best.scores_RK, first_R, filters.temperature_R)
    weight_RK = whole(share_RK)
    upto_RK = weight_RK.cumsum(-1)
    some = upto_RK.shape[-1]
    total_R = upto_RK.gather(-1, (filters.top_k_R - 1).clamp(0, some - 1)[:, None])[:, 0]
    if scores_RV is not None and some < size:
        all_R = whole(weights(scores_RV, first_R, filters.temperature_R)).sum(-1)
        total_R = torch.where(filters.top_k_R < size, total_R, all_R)
    place_K = torch.arange(some, device=upto_RK.device)
    kept = (upto_RK - weight_RK).double() < (filters.top_p_R * total_R.double())[:, None]
    kept &= place_K < torch.minimum(filters.top_k_R, best.sure_R)[:, None]
    if filters.min_p_R is not None:
        kept &= share_RK >= filters.min_p_R[:, None]
    return upto_RK, kept & (weight_RK > 0)


def _place(upto: Tensor, total: Tensor, uniform: Tensor) -> Tensor:
    """Where the running sum first exceeds ``uniform * total``."""
    target = (uniform * total.double()).long()
    target = torch.minimum(target, total - 1).clamp_(min=0)
    return torch.searchsorted(upto, target[:, None], right=True)[:, 0].clamp_(max=upto.shape[-1] - 1)
