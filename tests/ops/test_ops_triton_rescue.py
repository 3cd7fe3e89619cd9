"""Which tokens neglected experts get, against a sort in plain Python: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from deepseek.ops import expert_rows as reference
from deepseek.ops.triton import experts as kernel
from deepseek.ops.triton import rescue

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def sorted_out(expert_NK: Tensor, probs_NE: Tensor, valid_N: Tensor | None, floor: int) -> tuple[Tensor, ...]:
    """``dispatch``, one assignment at a time; rescued tokens by preference, then by their number, in their order."""
    (tokens, top_k), experts = expert_NK.shape, probs_NE.shape[1]
    real = [True] * tokens if valid_N is None else valid_N.bool().tolist()
    chosen, p = expert_NK.tolist(), probs_NE.double().tolist()
    slots = tokens * top_k + experts * floor
    row, rescued, token, assignment, ends, counts = [-1] * slots, [-1] * (experts * floor), [], [], [], []
    for e in range(experts):
        mine = [n * top_k + k for n in range(tokens) for k in range(top_k) if chosen[n][k] == e]
        others = sorted((not real[n], -p[n][e], n) for n in range(tokens) if e not in chosen[n])
        extra = sorted(n for _, _, n in others[: max(0, floor - len(mine))])
        for i, n in enumerate(extra):
            rescued[e * floor + i] = n
        new = [(a, a // top_k) for a in mine]
        new += [(tokens * top_k + e * floor + i, n) for i, n in enumerate(extra)]
        for a, n in new:
            row[a] = len(token)
            assignment.append(a)
            token.append(n)
        ends.append(len(token))
        counts.append(len(mine))
    lists = (row, token, assignment, ends, counts, rescued)
    return tuple(torch.tensor(numbers, dtype=torch.int32) for numbers in lists)


def check(expert: Tensor, probs: Tensor, valid: Tensor | None, floor: int) -> None:
    want = sorted_out(expert, probs, valid, floor)
    there = None if valid is None else valid.to(DEVICE)
    got = kernel.dispatch(expert.to(DEVICE), probs.to(DEVICE), there, floor)
    used = int(want[3][-1])
    for name, a, b in zip(
        ("row", "token", "assignment", "ends", "chosen", "rescued"), got, want, strict=True
    ):
        assert a.dtype == torch.int32
        assert a[: len(b)].cpu().equal(b), name
    assert len(got[0]) == len(got[1]) == len(got[2]) == expert.numel() + probs.shape[1] * floor
    assert not got[1][used:].any()  # unused rows point at a token that exists
    assert not got[2][used:].any()


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 150),
    experts=st.integers(1, 4),
    top_k=st.integers(1, 2),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    levels=st.sampled_from([1, 2, 7, None]),
    routing=st.sampled_from(["even", "all to one", "some empty"]),
    masked=st.sampled_from(["no", "some", "all", "the end"]),
    head=st.sampled_from([16, 64, 8192]),
    seed=st.integers(0, 999),
)
def test_the_choice_is_that_of_a_sort(
    tokens: int, experts: int, top_k: int, share: float, levels: int | None, routing: str, masked: str,
    head: int, seed: int,
) -> None:  # fmt: skip
    """Ties, padding, empty experts, floors from one token to all, and lists longer than what is held at once."""
    torch.manual_seed(seed)
    top_k, floor = min(top_k, experts), max(1, int(share * tokens))
    probs = (torch.randn(tokens, experts) * 3).softmax(-1)
    if levels:
        probs = (probs * (levels - 1)).round() / levels
    score = probs + torch.rand(tokens, experts)
    score[:, 0] += {"even": 0, "all to one": 9, "some empty": 0}[routing]
    if routing == "some empty":
        score[:, experts // 2 :] -= 9
    expert = score.topk(top_k).indices.int()
    valid = {
        "no": None,
        "some": torch.rand(tokens) < 0.5,
        "all": torch.zeros(tokens, dtype=torch.bool),
        "the end": torch.arange(tokens) < tokens // 2,
    }[masked]
    with mock.patch.multiple(rescue, HEAD=head, BLOCK=min(head, 32)):
        check(expert, probs, valid, floor)


@pytest.mark.parametrize("floor", [60, 4500])
def test_long_lists(floor: int) -> None:
    """Many blocks of tokens at the sizes that are used; with the greater floor more keys than registers hold."""
    torch.manual_seed(floor)
    tokens, experts = 9001, 3
    probs = torch.randn(tokens, experts).softmax(-1)
    expert = torch.where(torch.arange(tokens) < 50, 1, 0).int()[:, None]
    check(expert, probs, None, floor)
    want = reference.dispatch(expert, probs, None, floor)[5].view(experts, floor).sort().values
    got = kernel.dispatch(expert.to(DEVICE), probs.to(DEVICE), None, floor)[5]
    assert got.cpu().view(experts, floor).sort().values.equal(want)


def test_a_last_group_that_is_not_full_ends_where_the_tokens_end() -> None:
    """Behind the keys of expert 0 lie those of expert 1, which are greater."""
    probs = torch.full((21, 3), 0.1)
    probs[20, 0], probs[:3, 1] = 0.8, 0.9
    check(torch.full((21, 1), 2, dtype=torch.int32), probs, None, 1)


def test_the_best_lie_side_by_side() -> None:
    """A topic that one document has: all its tokens in a few groups."""
    torch.manual_seed(0)
    tokens = 3000
    probs = torch.rand(tokens, 2) * 0.1
    probs[1000:1100, 1] += 0.8
    check(torch.zeros(tokens, 1, dtype=torch.int32), probs, None, 90)


def test_more_experts_than_a_tile_is_wide_for() -> None:
    torch.manual_seed(0)
    expert = (torch.arange(140) % 128).view(70, 2).int()  # the last two of 130 get nothing
    check(expert, torch.rand(70, 130), torch.arange(70) < 60, 1)


def test_an_expert_with_enough_gets_nothing_more() -> None:
    expert = torch.tensor([[0, 1]]).repeat(5, 1).int()
    check(expert, torch.rand(5, 2), None, 5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter: NumPy says what it thinks of NaN
def test_probabilities_that_are_not_finite_still_give_tokens_that_exist() -> None:
    torch.manual_seed(0)
    tokens, floor = 40, 9
    probs = torch.rand(tokens, 2)
    probs[3], probs[7] = float("nan"), -float("nan")
    probs[20:, 1] = float("nan")
    expert = torch.zeros(tokens, 1, dtype=torch.int32)
    _, token, _, ends, _, rescued = kernel.dispatch(expert.to(DEVICE), probs.to(DEVICE), None, floor)
    assert rescued[floor:].tolist() == [3, 7, *range(20, 27)]  # as for topk, NaN is greater than any number
    assert token[tokens : int(ends[-1])].equal(rescued[floor:])
