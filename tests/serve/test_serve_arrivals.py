"""Traces have the rates and clumps they say, survive the disk, and the forecast follows a rate that changes."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import pytest

from deepseek.errors import ConfigError, DataError
from deepseek.serve.arrivals import (
    BLOCK,
    Arrival,
    Forecast,
    TraceConfig,
    forecast_error,
    read_trace,
    synthetic,
    write_trace,
)


def gaps(trace: list[Arrival]) -> list[float]:
    return [b.time - a.time for a, b in itertools.pairwise(trace)]


@pytest.mark.parametrize("kind", ["poisson", "bursty", "gamma"])
def test_a_trace_has_its_rate_and_its_lengths(kind: str) -> None:
    config = TraceConfig(kind=kind, rate=5.0, requests=20_000, prompt=256, output=64)
    trace = synthetic(config, seed=1)
    assert trace == synthetic(config, seed=1) != synthetic(config, seed=2)
    assert len(trace) == 20_000
    assert [a.time for a in trace] == sorted(a.time for a in trace)
    assert len(trace) / trace[-1].time == pytest.approx(5.0, rel=0.12)
    assert statistics.median(a.prompt for a in trace) == pytest.approx(256, rel=0.05)
    assert statistics.median(a.output for a in trace) == pytest.approx(64, rel=0.05)
    assert max(a.prompt for a in trace) == 2048
    assert min(a.output for a in trace) >= 1


def test_clumps_are_as_told() -> None:
    found = {}
    for kind, options in [("poisson", {}), ("gamma", {"variation": 4.0}), ("bursty", {})]:
        trace = synthetic(TraceConfig(kind=kind, rate=5.0, requests=20_000, **options), seed=3)
        found[kind] = statistics.stdev(gaps(trace)) / statistics.fmean(gaps(trace))
    assert found["poisson"] == pytest.approx(1.0, abs=0.05)
    assert found["gamma"] == pytest.approx(4.0, rel=0.15)
    assert found["bursty"] > 1.3


def test_a_trace_survives_the_disk(tmp_path: Path) -> None:
    trace = [Arrival(0.5, 1000, 7, (3, 9)), Arrival(0.25, 3, 1), Arrival(2.0, 513, 2, (3, 4))]
    write_trace(tmp_path / "t.jsonl", trace)
    assert read_trace(tmp_path / "t.jsonl") == sorted(trace, key=lambda a: a.time)
    assert [a.time for a in read_trace(tmp_path / "t.jsonl", scale=2.0, limit=2)] == [0.125, 0.25]


def test_equal_hash_ids_are_equal_beginnings() -> None:
    a, b = Arrival(0, 1000, 7, (3, 9)).tokens(70_000), Arrival(0, 700, 2, (3, 4)).tokens(70_001)
    assert (len(a), len(b)) == (1000, 700)
    assert a[:BLOCK] == b[:BLOCK]
    assert a[BLOCK] != b[BLOCK]
    assert Arrival(0, 600, 1, (3,)).tokens(70_000)[BLOCK:] == (70_000,) * 88


@pytest.mark.parametrize(
    ("text", "told"),
    [("", "no requests"), ("{}\n", r":1: not a request \(KeyError"), ("[1]\n", "not a request"),
     ('{"timestamp": 0, "input_length": 0, "output_length": 1}\n', "must be above 0"),
     ('{"timestamp": 1e999, "input_length": 1, "output_length": 1}\n', "must be above 0"),
     ('{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [-1]}\n', "32-bit"),
     ('{"timestamp": 0, "input_length": 1, "output_length": 1}\nx\n', ":2: not a request")],
)  # fmt: skip
def test_a_line_that_is_no_request_is_named(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(DataError, match=told):
        read_trace(tmp_path / "t.jsonl")


def test_a_trace_that_is_not_there_and_options_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the trace"):
        read_trace(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match=r"rate=0\.0 must be above 0"):
        TraceConfig(rate=0.0)


def test_a_forecast_follows_a_constant_a_ramp_and_silence() -> None:
    flat, ramp = Forecast(), Forecast(trend=0.3)
    for i in range(300):
        flat.add(i * 0.1, 10.0)
        ramp.add(i * 0.1, float(i))
    assert flat.rate(30.0) == pytest.approx(100.0, rel=0.01)
    assert flat.rate(30.0, ahead=5.0) == pytest.approx(100.0, rel=0.05)
    assert ramp.rate(30.0, ahead=5.0) > 1.1 * ramp.rate(30.0) > 2000
    assert flat.rate(60.0) < 1.0
    assert flat.rate(1e9) == 0.0
    assert Forecast().rate(5.0) == 0.0


def test_a_forecast_beats_the_mean_where_bursts_last_and_only_there() -> None:
    def error(kind: str, **options: float) -> tuple[float, float]:
        trace = synthetic(TraceConfig(kind=kind, rate=5.0, requests=5000, **options), seed=2)
        return forecast_error(trace, Forecast(), ahead=2.0)

    ours, mean = error("bursty", busy=20.0, calm=60.0)
    assert ours < 0.8 * mean
    ours, mean = error("poisson")
    assert ours > 0.95 * mean
