"""The paged kernels, in Triton's interpreter on a CPU, against the model's own modules over whole rows."""

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
from deepseek.ops.triton.paged_attention import HALF, Tiles, Tuning, forced_tuning, share_out

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPLITTING = Tuning(Tiles(16, 16, 4, 1), Tiles(32, 16, 4, 1), waves=16, least=16)
WHOLE = Tuning(Tiles(16, 32, 4, 1), Tiles(16, 32, 4, 1), waves=0, least=1)

SHAPES = [
    AttentionConfig(heads=6, kv_heads=2, head_dim=64, window=20, block=8, stride=4, pooling="learned"),
    AttentionConfig(heads=2, kv_heads=2, head_dim=96, window=50, block=24, stride=8, full_rope=False),
    AttentionConfig(heads=4, kv_heads=1, head_dim=128, window=1, block=1, stride=1, gate="static"),
    AttentionConfig(heads=4, kv_heads=2, head_dim=8, window=8, block=8, stride=4),
    AttentionConfig(heads=2, kv_heads=1, head_dim=80, window=24, block=8, stride=8),
]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "backend_for", lambda *_: "triton")


def near(y: Tensor, want: Tensor, tolerance: float) -> None:
    assert y.isfinite().all()
    assert (y.double() - want).norm() <= tolerance * want.norm()


def compare(
    kind: str, config: AttentionConfig, dtype: torch.dtype, tuning: Tuning, tolerance: float, page: int
) -> None:
    """Decodes, speculation, chunks that begin and end anywhere, and all of them in one step."""
    lengths = [37, 4, 18, 25]
    want = make_case(kind, config, lengths).to(DEVICE, dtype).to(DEVICE, torch.float64)
    pages = Pages(make_case(kind, config, lengths).to(DEVICE, dtype), page=page)
    parts: list[list[Tensor]] = [[] for _ in lengths]
    steps = [
        [(0, 33), (2, 3)],
        [(0, 1), (1, 2), (2, 5), (3, 6)],
        [(0, 1), (1, 1), (3, 18)],
        [(0, 2), (2, 9), (3, 1)],
        [(1, 1), (2, 1)],
    ]
    with forced_tuning(tuning):
        for step in steps:
            for s, y in pages.step(step, padding=len(step) % 2).items():
                parts[s].append(y)
    for s, part in enumerate(parts):
        y = torch.cat(part)
        near(y, want.whole(s)[: len(y)], tolerance)


@pytest.mark.parametrize(
    ("kind", "shape", "tuning"),
    [
        ("F", 0, SPLITTING), ("F", 1, WHOLE), ("L", 0, SPLITTING), ("L", 2, WHOLE),
        ("H", 0, SPLITTING), ("H", 1, WHOLE), ("H", 2, SPLITTING), ("F", 3, SPLITTING), ("H", 3, SPLITTING),
        ("L", 4, SPLITTING), ("H", 4, WHOLE),
    ],
)  # fmt: skip
def test_any_steps_give_what_the_whole_row_gives(kind: str, shape: int, tuning: Tuning) -> None:
    compare(kind, SHAPES[shape], torch.float32, tuning, 1e-5, 16)


@pytest.mark.parametrize(("kind", "page", "tuning"), [("H", 32, WHOLE), ("L", 64, SPLITTING)])
def test_half_precision_and_larger_pages(kind: str, page: int, tuning: Tuning) -> None:
    compare(kind, SHAPES[0], torch.float16, tuning, 4e-3, page)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device: the interpreter multiplies bf16 wrongly")
@pytest.mark.parametrize("page", [16, 32, 64])
@pytest.mark.parametrize("config", SHAPES, ids=range(len(SHAPES)))
@pytest.mark.parametrize("kind", ["F", "L", "H"])
def test_default_sizes_in_bf16(kind: str, config: AttentionConfig, page: int) -> None:
    default = HALF[64 if config.head_dim <= 64 else 128][kind]
    compare(kind, config, torch.bfloat16, default, 2e-2, page)
    compare(kind, config, torch.bfloat16, replace(default, least=16), 2e-2, page)


def test_exact_rows_are_the_same_to_the_last_bit_in_any_steps() -> None:
    case = make_case("H", SHAPES[0], [37, 20]).to(DEVICE, torch.float32)
    whole, cut = Pages(case, page=16), Pages(case, page=16, seed=1)
    with forced_tuning(SPLITTING):
        want = whole.step([(0, 37), (1, 20)], exact=True)
        cut.step([(0, 18)], exact=True)
        cut.step([(0, 18), (1, 19)], exact=True)
        got = cut.step([(0, 1), (1, 1)], exact=True)
    assert all(torch.equal(got[s][0], want[s][-1]) for s in (0, 1))


def test_the_same_bits_every_time() -> None:
    runs = []
    for _ in range(2):
        pages = Pages(make_case("H", SHAPES[0], [60]).to(DEVICE, torch.float32), page=16)
        with forced_tuning(SPLITTING):
            runs.append([pages.step([(0, 30)])[0], pages.step([(0, 1)])[0]])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("tuning", [SPLITTING, replace(SPLITTING, many=WHOLE), replace(SPLITTING, waves=2.5)])
def test_lengths_on_the_host_may_be_upper_bounds(tuning: Tuning) -> None:
    """As in a CUDA graph, which is captured once for many lengths."""
    config = SHAPES[0]
    case = make_case("H", config, [70, 14]).to(DEVICE, torch.float32)
    pages, step = Pages(case, page=16), [(0, 1), (1, 1)]
    with forced_tuning(tuning):
        pages.step([(0, 69), (1, 13)])
        rows = pages.rows(step)
        q, k, v = pages.inputs(rows, step)
        paged.write_pages(pages.k, pages.v, k, v, rows.window_slot_N)
        tables = [torch.nn.functional.pad(x, (0, 5)) for x in (rows.global_SP, rows.window_SP)]
        bounds = type(rows)(
            rows.position_N, rows.ends_S, rows.length_S, *tables, rows.global_slot_N, rows.window_slot_N,
            rows.page, rows.rows, (160, 160), 2,
        )  # fmt: skip
        gate, sink = torch.rand(2, 6, device=DEVICE), torch.randn(2, 2, 64, device=DEVICE)
        pooled = paged.Pooled(q, gate, pages.pool_k, pages.pool_v, sink, config.block, config.stride)
        for window, some in ((None, "global_SP"), (config.window, "window_SP")):
            source = (q, pages.k.nan_to_num(), pages.v.nan_to_num())
            ours = paged.paged_attention(*source, getattr(bounds, some), bounds, window)
            near(ours, paged.paged_attention(*source, getattr(rows, some), rows, window).double(), 1e-6)
        ours = paged.paged_hybrid_attention(q, pages.k, pages.v, pooled, bounds, config.window)
        near(
            ours,
            paged.paged_hybrid_attention(q, pages.k, pages.v, pooled, rows, config.window).double(),
            1e-6,
        )


def test_splits_are_shared_out_by_what_there_is_room_for() -> None:
    device = torch.device("cpu")  # counts as four multiprocessors
    tuning = Tuning(Tiles(16, 32, 4, 1), Tiles(16, 32, 4, 1), waves=8, least=100)
    assert share_out(tuning, 32, 4, 1000, 0, device) == (0, 8, 128)  # 32 programs, 4 without splits
    assert share_out(tuning, 32, 4, 500, 0, device) == (0, 4, 128)  # 128 keys each
    assert share_out(tuning, 32, 32, 1000, 0, device) == (0, 1, 128)
    assert share_out(tuning, 32, 4, 130, 1000, device) == (6, 8, 128)  # branches apart
    assert share_out(tuning, 32, 4, 1000, 130, device) == (2, 8, 128)
    assert share_out(tuning, 32, 32, 1000, 1000, device) == (1, 1, 128)  # and in one program
    assert share_out(tuning, 32, 4, 130, 1000, device, decodes=False) == (8, 16, 128)
    assert share_out(tuning, 32, 32, 130, 1000, device, decodes=False) == (0, 1, 128)


@pytest.mark.parametrize("learned", [False, True])
def test_appending_is_rotating_writing_and_pooling(learned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = AttentionConfig(heads=6, kv_heads=2, head_dim=96, window=20, block=12, stride=4)
    case = make_case("H", config, [50, 33, 9]).to(DEVICE, torch.float32)
    pooling = torch.rand(2, 2, 12, device=DEVICE) if learned else None
    results = []
    for backend in ("triton", "gathered"):
        monkeypatch.setattr(paged, "backend_for", lambda *_, name=backend: name)
        pages, queries = Pages(case, page=16), []
        for step in ([(0, 21), (1, 1)], [(0, 1), (1, 30), (2, 9)], [(0, 28), (1, 1)]):
            rows = pages.rows(step, padding=2)
            q, k, v = pages.inputs(rows, step)
            table = rope_table(rows.position_N, 96, 1e4)
            queries.append(
                paged.append_rows(
                    q, k, v, table, (pages.k, pages.v), rows, rows.window_slot_N, pages.raw,
                    (pages.pool_k, pages.pool_v), 12, 4, pooling,
                )[: sum(rows.rows)]
            )  # fmt: skip
            pages._give_back()
        results.append(
            [*queries, *(x[1:] for x in (pages.k, pages.v, pages.raw, pages.pool_k, pages.pool_v))]
        )
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6, equal_nan=True)


def test_appending_without_rotation_only_writes() -> None:
    case = make_case("F", SHAPES[1], [20]).to(DEVICE, torch.float32)
    pages = Pages(case, page=16)
    rows = pages.rows([(0, 20)])
    q, k, v = pages.inputs(rows, [(0, 20)])
    assert paged.append_rows(q, k, v, None, (pages.k, pages.v), rows, rows.global_slot_N) is q
    assert torch.equal(pages.k.flatten(0, 1)[rows.global_slot_N], k)
    assert torch.equal(pages.v.flatten(0, 1)[rows.global_slot_N], v)
