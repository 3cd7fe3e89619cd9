"""Drawing one token from a row of scores so that nothing but the row and one random number decides it.

Floating-point sums depend on the order in which a device adds, and that order on the size of the batch. Here a
token's probability is a whole number, ``2^40 exp((score - best) / temperature)``: sums of whole numbers are exact
in every order, so a row draws the same token alone or among a thousand, and however many candidates were sorted.

Tokens are ordered by score, equal scores by id: the order of ``order_keys``, which no two tokens share.

Shape letters: R rows, V vocabulary, K candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

COLDEST = 1e-6  #: below this temperature the most likely token has all the probability that fp32 can tell
ONE = 1 << 40  #: the weight of the most likely token; 2^22 tokens of it still fit 63 bits


class Filters(NamedTuple):
    """One number per row; fp32 but ``top_k`` (int64, V: all) and ``top_p`` (fp64, 2: all)."""

    temperature_R: Tensor
    top_k_R: Tensor
    top_p_R: Tensor
    min_p_R: Tensor


def order_keys(scores_RV: Tensor) -> Tensor:
    """int64 numbers that order as (score, then smaller id first) does; ``[R, V]`` fp32 without NaN."""
    bits = (scores_RV + 0.0).view(torch.int32)  # -0 becomes 0, so that they tie
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    size = scores_RV.shape[-1]
    back = torch.arange(size - 1, -1, -1, device=scores_RV.device)
    return (rising.long() << 32) | back


def ids_of(keys: Tensor, vocabulary: int) -> Tensor:
    """The token ids of ``order_keys``."""
    return vocabulary - 1 - (keys & 0xFFFFFFFF)


def weights(scores_RV: Tensor, temperature_R: Tensor) -> Tensor:
    """Probabilities relative to the most likely token's, in fp32 ``[R, V]``: ``exp((s - max s) / T)``."""
    best = scores_RV.amax(-1, keepdim=True)
    return ((scores_RV - best) / temperature_R[:, None]).exp()


def draw_all(scores_RV: Tensor, filters: Filters, uniform_R: Tensor) -> Tensor:
    """A token of each row out of all (``top_k`` and ``top_p`` are not looked at), without sorting; int64 ``[R]``.

    Args:
        uniform_R: fp64 in [0, 1), one per row.
    """
    share = weights(scores_RV, filters.temperature_R)
    share = share.masked_fill_(share < filters.min_p_R[:, None], 0.0)
    upto = whole(share).cumsum(-1)
    return _place(upto, upto[:, -1], uniform_R)


def draw_best(
    scores_RV: Tensor, filters: Filters, uniform_R: Tensor, candidates: int
) -> tuple[Tensor, Tensor]:
    """A token of each row out of those that the filters keep, looking at the best ``candidates`` only.

    Temperature first, then top-k, top-p of what is left, min-p. All three keep a beginning of the order, so
    that ``candidates`` changes nothing where they suffice.

    Args:
        candidates: at least the ``top_k`` of every row that has one.

    Returns:
        The tokens, int64 ``[R]``, and whether the filters may keep more than was looked at, bool ``[R]``: those
        rows' tokens mean nothing.
    """
    share_RV = weights(scores_RV, filters.temperature_R)
    ids_RK, upto_RK, kept_RK = _kept(scores_RV, share_RV, filters, candidates)
    short = kept_RK[:, -1] & (filters.top_k_R > candidates)
    total = (kept_RK * upto_RK).amax(-1)
    at = _place(upto_RK, total, uniform_R)
    return ids_RK.gather(-1, at[:, None])[:, 0], short


def probabilities(scores_RV: Tensor, filters: Filters) -> Tensor:
    """What ``draw_all`` and ``draw_best`` draw from: fp32 ``[R, V]``, rows sum to one."""
    share_RV = weights(scores_RV, filters.temperature_R)
    ids_RK, _, kept_RK = _kept(scores_RV, share_RV, filters, scores_RV.shape[-1])
    kept_RV = torch.zeros_like(kept_RK).scatter_(-1, ids_RK, kept_RK)
    share_RV = share_RV.masked_fill(~kept_RV, 0.0)
    return share_RV / share_RV.sum(-1, keepdim=True)


def whole(share: Tensor) -> Tensor:
    """fp32 in [0, 1] as whole numbers of ``ONE``; int64."""
    return (share * ONE).long()


def _kept(
    scores_RV: Tensor, share_RV: Tensor, filters: Filters, candidates: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best candidates' ids, their weights' running sums, and whether the filters keep them; ``[R, K]``."""
    size = scores_RV.shape[-1]
    some = min(candidates, size)
    keys = order_keys(scores_RV)
    best = keys.topk(some).values if some < size else keys.sort(-1, descending=True).values
    ids_RK = ids_of(best, size)
    share_RK = share_RV.gather(-1, ids_RK)
    weight_RK = whole(share_RK)
    upto_RK = weight_RK.cumsum(-1)
    last = (filters.top_k_R - 1).clamp(0, some - 1)[:, None]
    all_R = torch.where(filters.top_k_R < size, upto_RK.gather(-1, last)[:, 0], whole(share_RV).sum(-1))
    before = (upto_RK - weight_RK).double()
    kept = before < (filters.top_p_R * all_R.double())[:, None]
    kept &= torch.arange(some, device=ids_RK.device) < filters.top_k_R[:, None]
    kept &= (share_RK >= filters.min_p_R[:, None]) & (weight_RK > 0)
    return ids_RK, upto_RK, kept


def _place(upto: Tensor, total: Tensor, uniform: Tensor) -> Tensor:
    """Where the running sum first exceeds ``uniform * total``."""
    target = (uniform * total.double()).long()
    target = torch.minimum(target, total - 1).clamp_(min=0)
    return torch.searchsorted(upto, target[:, None], right=True)[:, 0].clamp_(max=upto.shape[-1] - 1)
