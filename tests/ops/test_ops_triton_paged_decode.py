"""A decoding step's attention by one kernel, in Triton's interpreter on a CPU: what the model's own module gives."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from paged_sequences import Pages, make_case

from deepseek.nn.attention import AttentionConfig
from deepseek.nn.rope import rope_table
from deepseek.ops import paged_attention as paged
from deepseek.ops.triton import paged_decode
from deepseek.ops.triton.paged_attention import HALF, Tiles, Tuning, forced_tuning

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPLITTING = Tuning(Tiles(16, 16, 4, 1), Tiles(32, 16, 4, 1), waves=64, least=16)
MANY = replace(
    SPLITTING, least=1, short=Tiles(16, 16, 4, 1), waves=128
)  # more splits than are read at a time
WHOLE = Tuning(Tiles(16, 32, 4, 1), Tiles(16, 32, 4, 1), waves=0, least=1)
SHAPES = [
    AttentionConfig(heads=6, kv_heads=2, head_dim=64, window=20),
    AttentionConfig(heads=2, kv_heads=2, head_dim=96, window=50, full_rope=False),
    AttentionConfig(heads=4, kv_heads=1, head_dim=128, window=1),
    AttentionConfig(heads=4, kv_heads=2, head_dim=80, window=8),
]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "backend_for", lambda *_: "triton")


def decode(pages: Pages, step: list[tuple[int, int]], beyond: int = 0) -> tuple[Tensor, paged.StepRows]:
    """The next position of some sequences; ``beyond``: how many more the host allows for, as a graph does."""
    rows = pages.rows(step)
    config, kind = pages.case.config, pages.case.kind
    if beyond:
        tables = (torch.nn.functional.pad(x, (0, 3)) for x in (rows.global_SP, rows.window_SP))
        some = tuple(length + beyond for length in rows.lengths)
        rows = replace(rows, **dict(zip(("global_SP", "window_SP"), tables)), lengths=some)
    q, k, v = pages.inputs(replace(rows, lengths=tuple(rows.length_S.tolist())), step)
    table = rope_table(rows.position_N, config.head_dim, config.rope_theta)
    if kind == "F" and not config.full_rope:
        table = None
    slot = rows.global_slot_N if kind == "F" else rows.window_slot_N
    window = None if kind == "F" else config.window
    y = paged.append_and_attend(q, k, v, table, (pages.k, pages.v), rows, slot, window)
    pages._give_back()
    return y, rows


@pytest.mark.parametrize(
    ("kind", "shape", "tuning", "beyond"),
    [
        ("F", 0, SPLITTING, 0), ("F", 0, MANY, 200), ("F", 1, SPLITTING, 200), ("F", 2, WHOLE, 0), ("F", 3, MANY, 0),
        ("L", 0, SPLITTING, 200), ("L", 1, MANY, 0), ("L", 2, SPLITTING, 0), ("L", 3, WHOLE, 200),
    ],
)  # fmt: skip
def test_decodes_give_what_the_whole_row_gives(kind: str, shape: int, tuning: Tuning, beyond: int) -> None:
    lengths = [90, 1, 33]
    want = make_case(kind, SHAPES[shape], lengths).to(DEVICE, torch.float64)
    pages = Pages(make_case(kind, SHAPES[shape], lengths).to(DEVICE, torch.float32), page=16)
    pages.step([(0, 87), (2, 30)])
    with forced_tuning(tuning):
        for step in ([(0, 1), (1, 1), (2, 1)], [(2, 1), (0, 1)], [(0, 1)]):
            y, rows = decode(pages, step, beyond)
            for i, (s, _) in enumerate(step):
                exact = want.whole(s)[pages.lengths[s] - 1]
                assert (y[i].double() - exact).norm() <= 1e-5 * exact.norm()
            if "arrived" in rows._made:  # ready for the next layer, and the next replay of a graph
                assert not rows._made["arrived"].any()


def test_it_writes_what_appending_writes() -> None:
    written = []
    for fused in (True, False):
        case = make_case("F", SHAPES[0], [40, 9]).to(DEVICE, torch.float32)
        pages = Pages(case, page=16)
        pages.step([(0, 39), (1, 8)])
        rows = pages.rows([(0, 1), (1, 1)])
        q, k, v = pages.inputs(rows, [(0, 1), (1, 1)])
        table = rope_table(rows.position_N, 64, 1e4)
        inputs = q, k, v, table, (pages.k, pages.v), rows, rows.global_slot_N
        if fused:
            paged.append_and_attend(*inputs)
        else:
            paged.append_rows(*inputs)
        written.append((pages.k, pages.v))
    for ours, theirs in zip(*written):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6, equal_nan=True)


def test_the_same_bits_every_time() -> None:
    runs = []
    for _ in range(2):
        pages = Pages(make_case("F", SHAPES[0], [90]).to(DEVICE, torch.float32), page=16)
        pages.step([(0, 89)])
        with forced_tuning(SPLITTING):
            runs.append(decode(pages, [(0, 1)])[0])
    assert torch.equal(*runs)


def test_other_steps_are_left_to_the_general_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = Pages(make_case("F", SHAPES[0], [40, 9]).to(DEVICE, torch.float32), page=16)
    step = [(0, 1), (1, 5)]
    for exact, padding, which in ((False, 0, step), (False, 1, step[:1]), (True, 0, step[:1])):
        assert not paged_decode.takes(pages.rows(which, exact, padding))
    assert paged_decode.takes(pages.rows(step[:1]))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device: the interpreter multiplies bf16 wrongly")
@pytest.mark.parametrize("streams", [1, 3, 64])
@pytest.mark.parametrize("kind", ["F", "L"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_default_sizes_in_bf16_many_times(head_dim: int, kind: str, streams: int) -> None:
    """Many times: whoever comes last must have seen everybody's part."""
    config = AttentionConfig(heads=8, kv_heads=2, head_dim=head_dim, window=300)
    default = HALF[head_dim][kind]
    want = make_case(kind, config, [700] * streams).to(DEVICE, torch.bfloat16).to(DEVICE, torch.float64)
    pages = Pages(make_case(kind, config, [700] * streams).to(DEVICE, torch.bfloat16), page=16)
    pages.step([(s, 650) for s in range(streams)])
    whole = [want.whole(s) for s in range(streams)]
    with forced_tuning(default):
        for place in range(650, 700):
            y, _ = decode(pages, [(s, 1) for s in range(streams)], beyond=500)
            exact = torch.stack([x[place] for x in whole])
            assert (y.double() - exact).norm() <= 2e-2 * exact.norm()
