"""The catalogue: complete, unambiguous, and known to whoever emits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deepseek.monitor.catalogue import GROUPS, METRICS, catalogue, describe, group_of, markdown, page


@pytest.mark.parametrize(
    ("name", "pattern", "labels"),
    [
        ("train/loss", "train/loss", {}),
        ("layer/3/grad_norm", "layer/{layer}/grad_norm", {"layer": "3"}),
        ("layer/embedding/weight_norm", "layer/{layer}/weight_norm", {"layer": "embedding"}),
        ("expert/3/17/load", "expert/{layer}/{expert}/load", {"layer": "3", "expert": "17"}),
        ("attention/0/11/max_logit", "attention/{layer}/{head}/max_logit", {"layer": "0", "head": "11"}),
        ("data/web/c4.v2/loss", "data/{source}/loss", {"source": "web/c4.v2"}),
        ("rank/63/memory", "rank/{rank}/memory", {"rank": "63"}),
    ],
)
def test_a_series_finds_its_entry(name: str, pattern: str, labels: dict[str, str]) -> None:
    metric = describe(name)
    assert metric is not None
    assert metric.pattern == pattern
    assert metric.labels(name) == labels


@pytest.mark.parametrize(
    "name",
    ["loss", "train/mine", "layer/x/grad_norm", "expert/1/load", "train/loss2", "xtrain/loss", "rank/1"],
)
def test_what_a_user_named_has_none(name: str) -> None:
    assert describe(name) is None


def test_groups_of_any_name() -> None:
    assert [group_of(n) for n in ("expert/1/2/load", "mine/x", "loss")] == ["expert", "mine", "other"]


def test_every_entry_is_complete_and_fits_no_other() -> None:
    filled = [re.sub(r"\{\w+\}", "0", metric.pattern) for metric in METRICS]
    assert len(set(filled)) == len(METRICS)
    for metric, name in zip(METRICS, filled):
        assert metric.group in GROUPS
        assert [m for m in METRICS if m.expression.fullmatch(name)] == [metric]
        assert metric.en.endswith(".")
        assert metric.zh.endswith("。")
        assert re.search("[一-鿿]", metric.zh)
    assert {metric.group for metric in METRICS} == set(GROUPS)


def test_the_docs_are_those_of_the_code() -> None:
    """Write them anew with ``python -m deepseek.monitor.catalogue > docs/metrics.md``."""
    assert (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8") == page()


def test_page_and_docs_have_all_of_it() -> None:
    found = catalogue()
    assert [m["pattern"] for m in found["metrics"]] == [m.pattern for m in METRICS]
    assert [g["name"] for g in found["groups"]] == list(GROUPS)
    for language in ("en", "zh"):
        text = markdown(language)
        assert text.count("\n| `") == len(METRICS)
