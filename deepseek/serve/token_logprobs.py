"""Log-probabilities of tokens under the model's own distribution, packed with what else a step brings to the host.

Shape letters: R rows, V vocabulary, X columns of a packed row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from deepseek.serve.distribution import CANDIDATES, GOOD, SHORT, best_tokens, parts
from deepseek.serve.request import TokenLogprobs
from deepseek.serve.sampling_state import Numbers


def prompt_logprobs(logits_RV: Tensor, next_tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
    """For each row of logits the log-probability of the token that came next, and of the ``top`` best ones."""
    tokens_R = torch.tensor(next_tokens, dtype=torch.int64, device=logits_RV.device)
    packed = packed_logprobs(logits_RV, tokens_R, top, CANDIDATES).cpu()
    if again := torch.nonzero(packed[:, 0])[:, 0].tolist():
        index = torch.tensor(again, device=logits_RV.device)
        packed[again] = packed_logprobs(logits_RV[index], tokens_R[index], top, logits_RV.shape[-1]).cpu()
    return read_logprobs(next_tokens, packed.numpy(), [top] * len(next_tokens))


def packed_logprobs(logits_RV: Tensor, tokens_R: Tensor, top: int, candidates: int) -> Tensor:
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
            columns[0] = torch.where(best.sure_R < top, SHORT, GOOD)[:, None]
            columns += [best.ids_RK[:, :top], _bits(best.scores_RK[:, :top] - total)]
        packed.append(torch.cat(columns, 1))
    return torch.cat(packed)


def _bits(x: Tensor) -> Tensor:
    """fp32 numbers, bit by bit, in int64."""
    return x.contiguous().view(torch.int32).long()


def read_logprobs(tokens: Sequence[int], packed_RX: Numbers, tops: Sequence[int]) -> list[TokenLogprobs]:
    """From ``packed_logprobs``' rows, and how many of the best each row wants."""
    floats_RX, n = packed_RX.astype(np.int32).view(np.float32), (packed_RX.shape[1] - 3) // 2
    own, rank = floats_RX[:, 1].tolist(), packed_RX[:, 2].tolist()
    ids, scores = packed_RX[:, 3 : 3 + n].tolist(), floats_RX[:, 3 + n :].tolist()
    return [
        TokenLogprobs(token, own[i], rank[i], tuple(zip(ids[i][:top], scores[i])))
        for i, (token, top) in enumerate(zip(tokens, tops))
    ]
