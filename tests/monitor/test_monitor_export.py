"""What leaves for other programs, read by them: promtool, TensorBoard, Arrow, and a strict reader of our own."""

from __future__ import annotations

import csv
import math
import re
import shutil
import struct
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from monitor_runs import events, write_run
from monitor_web import client, expected, make_run, values

from deepseek.errors import ConfigError, RunError
from deepseek.monitor.catalogue import METRICS, describe
from deepseek.monitor.export.board import BoardThread
from deepseek.monitor.export.formats import FORMATS, export_series
from deepseek.monitor.export.prometheus import Exposition
from deepseek.monitor.export.tensorboard import TensorBoardWriter, crc32c, scalars
from deepseek.monitor.series import SeriesReader, SeriesWriter

SAMPLE = re.compile(r'^([a-z_][a-z0-9_]*)\{((?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)*)\} (\S+)$')


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "mine", steps=500)


def parse(text: str) -> dict[tuple[str, str], float]:
    """A page of Prometheus as ``{(name, labels): value}``; every line must be of its form."""
    found: dict[tuple[str, str], float] = {}
    typed: set[str] = set()
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            name = line.split()[2]
            assert name not in typed, f"{name} stands in two places"
            typed.add(name)
        elif not line.startswith("#"):
            match = SAMPLE.match(line)
            assert match, line
            assert match[1] in typed
            assert (match[1], match[2]) not in found, line
            found[match[1], match[2]] = float(match[3].replace("Inf", "inf"))
    return found


def everything() -> dict[str, float]:
    """A value for every pattern of the catalogue, and names that users may think of."""
    places = {"{layer}": "3", "{head}": "2", "{expert}": "17", "{rank}": "1", "{source}": 'web/a"b\\c'}
    row: dict[str, float] = {}
    for number, metric in enumerate(METRICS):
        name = metric.pattern
        for place, value in places.items():
            name = name.replace(place, value)
        row[name] = float(number)
    mine = [
        "loss",
        "Loss",
        "val/Loss",
        "val.loss",
        "é中",
        "a b",
        "a_b",
        "x/y",
        "x_y",
        "0start",
        "n_total",
        "n_count",
        "le",
        "__x",
        "_",
    ]
    return (
        row
        | dict.fromkeys(mine, math.nan)
        | {"up": math.inf, "down": -math.inf, "big": 1e300, "tiny": 5e-324}
    )


def test_names_become_labels() -> None:
    page = Exposition()
    page.series("r", {"expert/3/17/load": 0.25, "layer/embedding/grad_norm": 1, "rank/2/step_seconds": 0.5,
                      "time/backward": 2, "memory/weights": 4096, "data/web/en/loss": 3, "mine/Odd name": 7,
                      "eval/bits_per_byte": 1.5})  # fmt: skip
    assert parse(page.text()) == {
        ("deepseek_expert_load", 'run="r",layer="3",expert="17"'): 0.25,
        ("deepseek_layer_grad_norm", 'run="r",layer="embedding"'): 1,
        ("deepseek_rank_step_seconds", 'run="r",rank="2"'): 0.5,
        ("deepseek_time_seconds", 'run="r",phase="backward"'): 2,
        ("deepseek_memory_bytes", 'run="r",kind="weights"'): 4096,
        ("deepseek_data_loss", 'run="r",source="web/en"'): 3,
        ("deepseek_eval_bpb", 'run="r"'): 1.5,
        ("deepseek_mine_odd_name", 'run="r",series="mine/Odd name"'): 7,
    }


def test_every_series_is_a_sample_of_its_own() -> None:
    page, row = Exposition(), everything()
    for run in ("a", 'odd "run"\\'):
        page.series(run, row)
    assert len(parse(page.text())) == 2 * len(row)


def test_promtool_accepts_the_page(run: Path) -> None:
    """With every metric of the catalogue; users' names are left out, as the linter has a taste in names."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool (Debian package prometheus) is not installed")
    page = Exposition()
    page.run(
        {"id": "mine", "status": "running", "step": 5, "total_steps": 9, "updated": 1.0, "incidents_open": 0},
        {},
    )
    page.series("mine", {name: value for name, value in everything().items() if describe(name)})
    with client(run.parent) as web:
        served = web.get("/metrics?run=mine").text
    for text in (page.text(), served):
        done = subprocess.run(
            ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_openmetrics_is_what_the_reference_reader_reads() -> None:
    parser = pytest.importorskip("prometheus_client.openmetrics.parser")
    page, row = Exposition(), everything()
    page.series("mine", row)
    families = list(parser.text_string_to_metric_families(page.text(open_metrics=True)))
    assert sum(len(family.samples) for family in families) == len(row)
    assert {f.unit for f in families} == {"", "seconds", "bytes"}


def test_the_metrics_page(run: Path) -> None:
    with client(run.parent) as web:
        found = parse(web.get("/metrics?run=mine").text)
        assert found["deepseek_train_loss", 'run="mine"'] == pytest.approx(
            values(500)["train/loss"], rel=1e-6
        )
        assert found["deepseek_run_up", 'run="mine"'] == 0
        assert ("deepseek_train_loss", 'run="other"') not in found
        answer = web.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
        assert answer.headers["content-type"].startswith("application/openmetrics-text")
        assert answer.text.endswith("# EOF\n")
        old = parse(web.get("/metrics").text)
    assert ("deepseek_run_step", 'run="mine"') in old


def test_a_run_that_ended_long_ago_has_no_series_among_others(run: Path) -> None:
    make_run(run.parent / "live", steps=5, status="running")
    try:
        with client(run.parent) as web:
            found = parse(web.get("/metrics").text)
    finally:
        shutil.rmtree(run.parent / "live")
    assert ("deepseek_train_loss", 'run="live"') in found
    assert ("deepseek_train_loss", 'run="mine"') not in found


# --- TensorBoard --------------------------------------------------------------------------------------------------


def records(path: Path) -> list[bytes]:
    """The messages of an event file; lengths and checksums are verified with a bitwise CRC, not with tables."""
    data, found, at = path.read_bytes(), [], 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        assert struct.unpack_from("<I", data, at + 8)[0] == slow_masked_crc(data[at : at + 8])
        message = data[at + 12 : at + 12 + length]
        assert struct.unpack_from("<I", data, at + 12 + length)[0] == slow_masked_crc(message)
        found.append(message)
        at += 16 + length
    return found


def slow_masked_crc(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (b"123456789", 0xE3069283),
    ],
)
def test_checksums_of_rfc_3720(data: bytes, crc: int) -> None:
    rows = np.frombuffer(data * 3, np.uint8).reshape(3, -1)
    assert crc32c(rows).tolist() == [crc] * 3


def test_both_ways_to_write_give_the_same_bytes(tmp_path: Path) -> None:
    steps = np.array([0, 1, 127, 128, 16383, 16384, 2**31, 2**53 - 1])
    written = scalars("train/loss", steps, np.arange(8, dtype=np.float32), np.full(8, 1.5e9))
    with TensorBoardWriter(tmp_path) as board:
        for value, step in enumerate(steps.tolist()):
            board.row(step, {"train/loss": float(value)}, 1.5e9)
    assert board.path.read_bytes().endswith(written)
    assert len(records(board.path)) == 9


def read_board(directory: Path) -> dict[str, list[tuple[int, float, float]]]:
    """Every point of an event file, by TensorBoard's own reader: step, value, time."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    found: dict[str, list[tuple[int, float, float]]] = {}
    for path in sorted(directory.glob("events.out.tfevents.*")):
        for event in loader.EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(
                    (event.step, value.tensor.float_val[0], event.wall_time)
                )
    return found


def test_tensorboard_reads_the_export(run: Path, tmp_path: Path) -> None:
    done = export_series(run, "tensorboard", tmp_path / "board")
    assert (done.series, done.rows) == (11, 11 * 500)
    found = read_board(tmp_path / "board")
    assert set(found) == set(values(1))
    steps, losses, times = zip(*found["train/loss"])
    assert list(steps) == list(range(1, 501))
    assert np.array_equal(np.float32(losses), expected("train/loss", 1, 500))
    assert times[7] == 1.7e9 + 8


def test_tensorboards_own_index_has_every_tag(run: Path, tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    export_series(run, "tensorboard", tmp_path, ["train/*"])
    board = accumulators.EventAccumulator(str(tmp_path), {accumulators.SCALARS: 0})  # 0: keep all
    board.Reload()
    assert set(board.Tags()["scalars"]) == {"train/loss", "train/grad_norm"}
    assert [point.step for point in board.Scalars("train/loss")] == list(range(1, 501))


def test_nan_and_infinities_reach_tensorboard(tmp_path: Path) -> None:
    with TensorBoardWriter(tmp_path) as board:
        board.row(1, {"x": math.nan, "y": math.inf, "é/ü": -2.5})
    found = read_board(tmp_path)
    assert math.isnan(found["x"][0][1])
    assert found["y"][0][1] == math.inf
    assert found["é/ü"][0][1] == -2.5


def test_a_live_run_is_written_as_it_goes(tmp_path: Path) -> None:
    with BoardThread(tmp_path / "run" / "monitor", tmp_path / "board", interval=0.02):
        time.sleep(0.1)
        with SeriesWriter(tmp_path / "run" / "monitor") as writer:
            for step in range(1, 301):
                writer.log(
                    step,
                    {"train/loss": step / 4, **({"eval/loss": 9.0} if step == 300 else {})},
                    1.7e9 + step,
                )
                if step % 50 == 0:
                    time.sleep(0.05)
    found = read_board(tmp_path / "board")
    assert sorted({step for step, _, _ in found["train/loss"]}) == list(range(1, 301))
    assert all(value == step / 4 and when == 1.7e9 + step for step, value, when in found["train/loss"])
    assert found["eval/loss"][-1][:2] == (300, 9.0)


# --- tables -------------------------------------------------------------------------------------------------------


@pytest.fixture
def holes(tmp_path: Path) -> Path:
    with SeriesWriter(tmp_path / "r" / "monitor") as writer:
        writer.log(1, {"a": 0.1, "b, c": 1.0}, 1.7e9)
        writer.log(5, {"a": math.nan}, 1.7e9 + 1)
        writer.log(9, {"b, c": math.inf}, 1.7e9 + 2)
    return tmp_path / "r"


def test_csv_tells_what_was_not_logged_from_nan(holes: Path) -> None:
    done = export_series(holes, "csv")
    assert done.path == holes / "series.csv"
    with done.path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["step", "time", "a", "b, c"], ["1", "1700000000.000", "0.1", "1.0"],
        ["5", "1700000001.000", "nan", ""], ["9", "1700000002.000", "", "inf"],
    ]  # fmt: skip


def test_parquet_tells_what_was_not_logged_from_nan(holes: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(export_series(holes, "parquet").path)
    assert table["step"].to_pylist() == [1, 5, 9]
    a = table["a"].to_pylist()
    assert a[0] == pytest.approx(0.1)
    assert math.isnan(a[1])
    assert a[2] is None
    assert table["b, c"].to_pylist() == [1.0, None, math.inf]
    assert table["time"][2].as_py().timestamp() == 1.7e9 + 2


def test_tables_are_written_in_pieces(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("deepseek.monitor.export.columns.CELLS", 11 * 64)
    done = export_series(run, "parquet", tmp_path / "x.parquet", ["train/*", "rank/*"])
    file = parquet.ParquetFile(done.path)
    assert (done.rows, file.num_row_groups) == (500, 3)
    assert np.array_equal(file.read()["train/loss"].to_numpy(), expected("train/loss", 1, 500))


def test_a_run_without_a_store_can_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = events(60)
    done = export_series(write_run(tmp_path / "old", rows), "csv", tmp_path / "old.csv", ["train/loss"])
    assert done.rows == len({e["step"] for e in rows if e["event"] == "train"})


def test_what_cannot_be_exported(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'parquet'"):
        export_series(run, "parket")
    with pytest.raises(ConfigError, match="it has train/loss"):
        export_series(run, "csv", patterns=["none/*"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="no series"):
        export_series(tmp_path / "empty", "csv")
    with SeriesWriter(tmp_path / "r" / "monitor") as writer:
        writer.log(1, {"step": 1.0})
    with pytest.raises(RunError, match="called 'step'"):
        export_series(tmp_path / "r", "parquet")


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_at_its_usual_place(run: Path, format: str) -> None:
    done = export_series(run, format)
    assert done.path.exists()
    assert SeriesReader(run / "monitor").steps() == (1, 500)
    shutil.rmtree(done.path) if done.path.is_dir() else done.path.unlink()
