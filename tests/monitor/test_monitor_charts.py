"""The arithmetic under the charts."""

from __future__ import annotations

import base64
import math
import random
import struct
import zlib

import pytest

from deepseek.monitor.charts import HeatMap, linear_ticks, log_ticks, png, smooth, thin, tick_text


def test_thin_keeps_every_bucket_s_extremes() -> None:
    rng = random.Random(0)
    points = [(float(i), rng.gauss(0, 1)) for i in range(10_000)]
    kept = thin(points, 100)
    assert len(kept) <= 202
    assert kept == sorted(kept)
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    for start in range(
        0, 9_900, 100
    ):  # buckets of 99.99 steps: every full hundred holds its own extremes nearby
        around = points[max(start - 100, 0) : start + 200]
        inside = [p for p in kept if start - 100 <= p[0] < start + 200]
        assert max(y for _, y in inside) == pytest.approx(max(y for _, y in around), abs=0.9)
    assert max(kept, key=lambda p: p[1]) == max(points, key=lambda p: p[1])
    assert min(kept, key=lambda p: p[1]) == min(points, key=lambda p: p[1])


def test_thin_leaves_short_series_alone_and_takes_equal_steps() -> None:
    points = [(1.0, 2.0), (2.0, 3.0)]
    assert thin(points, 10) == points
    assert thin([(5.0, float(i)) for i in range(100)], 4)[-1] == (5.0, 99.0)


def test_smooth_has_no_lag_and_no_bias() -> None:
    line = [(float(i), 3.0 * i) for i in range(200)]
    middle = smooth(line, 20)[20:-20]
    assert all(y == pytest.approx(3 * x) for x, y in middle)
    assert smooth(line, 20)[0][1] == 0.0
    assert smooth([(0.0, math.nan), (1.0, 2.0)]) == [(1.0, 2.0)]
    logs = smooth([(float(i), 10.0**i) for i in range(30)], 4, log=True)
    assert logs[10][1] == pytest.approx(1e10)
    assert smooth([]) == []


def test_ticks_are_round_and_inside() -> None:
    assert linear_ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert linear_ticks(1.91, 2.43, 5) == [2.0, 2.2, 2.4]
    assert linear_ticks(3, 3, 5) == [3]
    assert log_ticks(0.3, 31, 5) == pytest.approx([0.5, 1, 2, 5, 10, 20])
    assert log_ticks(1e-9, 1e9, 5) == pytest.approx([1e-9, 1e-6, 1e-3, 1, 1e3, 1e6, 1e9])
    assert [tick_text(v) for v in (0, 20_000, 1.5e6, 0.05, 3e-5, 250)] == [
        "0",
        "20k",
        "1.5M",
        "0.05",
        "3e-5",
        "250",
    ]


def test_heat_map_image_holds_the_ratios() -> None:
    raw = base64.b64decode(png([[1.0, 0.0], [3.0, 1.0], [1.0, 1 / 3]]).split(",")[1])
    assert struct.unpack(">II", raw[16:24]) == (3, 2)
    length = struct.unpack(">I", raw[33:37])[0]
    pixels = zlib.decompress(raw[41 : 41 + length])
    rows = [pixels[1:13], pixels[14:26]]
    assert rows[0] == bytes((213, 94, 0, 0, 213, 94, 0, 255, 213, 94, 0, 0))
    assert rows[1][:4] == bytes((0, 114, 178, 255))
    assert rows[1][7] == 0
    assert rows[1][8:] == bytes((0, 114, 178, 255))


def test_heat_map_of_one_step_and_of_none() -> None:
    figure = HeatMap("k", "Load", [(5.0, [0.5, 0.25, 0.25])]).figure()
    assert figure is not None
    assert "0.75 to 1.50 times the mean share" in figure
    assert HeatMap("k", "Load", []).figure() is None
    assert HeatMap("k", "Load", [(1.0, [0.0, 0.0])]).figure() is not None
