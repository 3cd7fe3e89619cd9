"""Paged attention in any composition of steps against the model's own modules over whole rows, in float64."""

from __future__ import annotations

import pytest
import torch
from paged_sequences import Pages, make_case
from torch import Tensor

from deepseek.nn.attention import AttentionConfig
from deepseek.ops import paged_gathered as gathered

SIZES = {"heads": 6, "kv_heads": 2, "head_dim": 16}
SHAPES = [
    AttentionConfig(**SIZES, window=12, block=4, stride=4),
    AttentionConfig(**SIZES, window=7, block=6, stride=2, pooling="learned", gate="static"),
    AttentionConfig(
        **SIZES, window=5, block=24, stride=8, pooling="learned"
    ),  # the block reaches further back
    AttentionConfig(heads=3, kv_heads=3, head_dim=8, window=33, block=8, stride=4, full_rope=False),
    AttentionConfig(heads=4, kv_heads=1, head_dim=8, window=1, block=1, stride=1),
    AttentionConfig(**SIZES, window=500, block=16, stride=16),  # longer than everything
]
LENGTHS = [1, 5, 70, 33, 129, 200, 64]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("config", SHAPES, ids=range(len(SHAPES)))
@pytest.mark.parametrize("kind", ["F", "L", "H"])
def test_any_steps_give_what_the_whole_row_gives(kind: str, config: AttentionConfig, seed: int) -> None:
    case = make_case(kind, config, LENGTHS, seed).to("cpu", torch.float64)
    pages = Pages(case, page=(16, 32, 16)[seed], seed=seed)
    for s, y in enumerate(pages.run(seed, most=(40, 90, 20)[seed], padding=seed)):
        torch.testing.assert_close(y, case.whole(s), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["F", "L", "H"])
def test_equals_decoding_with_the_models_own_cache(kind: str) -> None:
    case = make_case(kind, SHAPES[1], [50, 90]).to("cpu", torch.float64)
    pages = Pages(case, page=16)
    pages.step([(0, 20), (1, 20)])
    parts = [pages.step([(0, 1), (1, 1)]) for _ in range(30)]
    for s in (0, 1):
        y = torch.cat([part[s] for part in parts])
        torch.testing.assert_close(y, case.decoded(s, 20)[20:50], rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["F", "L", "H"])
def test_small_parts_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered, "BUDGET", 20_000)
    monkeypatch.setattr(gathered, "PIECE", 24)
    case = make_case(kind, SHAPES[1], LENGTHS, 5).to("cpu", torch.float64)
    for s, y in enumerate(Pages(case, page=16).run(5)):
        torch.testing.assert_close(y, case.whole(s), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["F", "L", "H"])
def test_half_precision_is_near_the_whole_row(kind: str) -> None:
    case = make_case(kind, SHAPES[0], [70, 33]).to("cpu", torch.bfloat16)
    want = make_case(kind, SHAPES[0], [70, 33]).to("cpu", torch.bfloat16).to("cpu", torch.float64)
    for s, y in enumerate(Pages(case, page=16).run(1)):
        assert y.dtype == torch.bfloat16
        assert (y.double() - want.whole(s)).norm() < 1e-2 * want.whole(s).norm()


def test_plans_are_made_once_a_step() -> None:
    case = make_case("F", SHAPES[0], [40, 9])
    rows = Pages(case, page=16).rows([(0, 30), (1, 1)])
    made = []
    for _ in range(2):
        rows.once("key", lambda: made.append(1))
    assert made == [1]


def test_very_different_lengths_are_kept_apart() -> None:
    lengths, sizes = (4000, 3900, 100, 90, 80, 110), gathered.Sizes(8, 64, 2, torch.float32)

    def cut(members: list[int]) -> list[list[int]]:
        return gathered._alike(members, lengths, lambda length: length, sizes)

    assert cut([]) == []
    assert cut([2, 3, 4, 5]) == [[2, 3, 4, 5]]
    assert cut([2, 3, 1]) == [[1], [2, 3]]
    assert cut([2, 0, 3, 1]) == [[0], [1], [2, 3]]  # the two long ones together would exceed the budget


@pytest.mark.parametrize("config", SHAPES, ids=range(len(SHAPES)))
@pytest.mark.parametrize("kind", ["F", "L", "H"])
def test_exact_equals_the_whole_row(kind: str, config: AttentionConfig) -> None:
    case = make_case(kind, config, LENGTHS).to("cpu", torch.float64)
    for s, y in enumerate(Pages(case, page=16).run(1, exact=True, padding=2)):
        torch.testing.assert_close(y, case.whole(s), rtol=0, atol=1e-10)


def compare_bits(kind: str, config: AttentionConfig, lengths: list[int], seeds: range) -> None:
    """Whatever the steps, the pages and the threads are, every row comes out as in the first run."""
    case = make_case(kind, config, lengths)
    want: list[Tensor] = []
    threads = torch.get_num_threads()
    try:
        for seed in seeds:
            torch.set_num_threads(1 + seed % 2)
            pages = Pages(case, page=(16, 32)[seed // 2 % 2], seed=seed)
            got = pages.run(seed, most=(20, 200, 64)[seed % 3], exact=True, padding=seed % 4)
            want = want or got
            same = [torch.equal(a, b) for a, b in zip(got, want)]
            assert all(same), (seed, same)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("config", SHAPES, ids=range(len(SHAPES)))
@pytest.mark.parametrize("kind", ["F", "L", "H"])
def test_exact_rows_are_the_same_to_the_last_bit_in_any_steps(kind: str, config: AttentionConfig) -> None:
    compare_bits(kind, config, [1, 70, 100], range(3))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["F", "L", "H"])
def test_exact_rows_of_a_real_size(kind: str) -> None:
    config = AttentionConfig(heads=8, kv_heads=2, head_dim=64, window=128, block=32, stride=16)
    compare_bits(kind, config, [400, 150], range(3))
