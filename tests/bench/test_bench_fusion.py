"""``bench fusion`` runs, compares like with like, and counts what touches data."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepseek.bench import fusion
from deepseek.bench.fusion import Options, launches

# Dynamo looks at `.grad` of what it is given.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


def test_operators_that_touch_data_are_counted_once() -> None:
    x, w, b, norm = torch.randn(4, 8), torch.randn(8, 8), torch.randn(8), nn.LayerNorm(8)
    cpu = torch.device("cpu")
    assert launches(lambda: x + 1, cpu) == 1
    assert launches(lambda: x.view(8, 4).t()[1:].unsqueeze(0), cpu) == 0
    assert (
        launches(lambda: F.gelu(F.linear(norm(x), w, b)) + x, cpu) == 4
    )  # norm, product with bias, gelu, sum
    assert launches(lambda: x.double().float(), cpu) == 2


@pytest.mark.slow
def test_every_table() -> None:
    pytest.importorskip("transformers")
    report = fusion.run(Options(quick=True, device="cpu"))
    assert not report.notes
    names = [title.split(",")[0].split(" at ")[0] for title in report.tables]
    assert names == ["BERT-base", "layer", "block of ours", "first step of small"]
    for title, rows in report.tables.items():
        if "forward and backward" in title:
            assert {row["way"] for row in rows} == {"compile_blocks", "one graph"}
            continue
        assert rows[0]["by"] == "eager"
        assert all(row["error"] < 1e-5 and row["launches"] > 0 and row["ms"] > 0 for row in rows)


def test_nothing_is_started_late() -> None:
    options = Options(quick=True, device="cpu", seconds=1e-9)
    report = fusion.run(options)
    assert report.tables == {}
    assert all("left out" in note for note in report.notes)
