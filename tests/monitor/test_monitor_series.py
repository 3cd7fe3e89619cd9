"""The run store against a naive one: a dictionary of every value that was logged."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek.errors import DeepseekError, RunError
from deepseek.monitor.series import SeriesReader, SeriesWriter, Window

FINITE = st.floats(-(2.0**100), 2.0**100, width=32)
VALUES = FINITE | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0])
ROWS = st.lists(
    st.tuples(st.integers(0, 120), st.dictionaries(st.sampled_from("abcd"), VALUES | st.none(), max_size=4)),
    max_size=150,
)
#: A session of a run: where it goes back to at its start, its rows, where it goes back to in between, and more rows.
SESSIONS = st.tuples(st.none() | st.integers(0, 120), ROWS, st.none() | st.integers(0, 120), ROWS)
quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def naive(rows: list[tuple[int, dict[str, float | None] | None]]) -> dict[str, dict[int, np.float32]]:
    """The last value of each step of each series; a row that is ``None`` takes back what is after its step."""
    found: dict[str, dict[int, np.float32]] = {}
    for step, row in rows:
        if row is None:
            found = {name: {s: v for s, v in series.items() if s <= step} for name, series in found.items()}
            continue
        for name, value in row.items():
            series = found.setdefault(name, {})
            if value is not None:
                series[step] = np.float32(value)
    return found


def check_window(window: Window, steps: np.ndarray, values: np.ndarray, points: int) -> None:
    """Every value lies in its point, and every bound of a point is a value."""
    assert len(window) <= points
    assert window.raw == (len(steps) <= points)
    if not len(steps):
        return
    assert window.step[0] == steps[0]
    assert np.all(np.diff(window.step) > 0)
    if window.raw:
        np.testing.assert_array_equal(window.low, values)
        np.testing.assert_array_equal(window.high, values)
        return
    held = np.diff(np.append(np.searchsorted(steps, window.step), len(steps)))
    for i, first in enumerate(window.step):
        last = window.step[i + 1] if i + 1 < len(window) else np.inf
        inside = values[(steps >= first) & (steps < last)]
        inside = inside[np.isfinite(inside)]
        if len(inside):
            assert window.low[i] == inside.min()
            assert window.high[i] == inside.max()
            mean, largest = inside.astype(np.float64).mean(), float(np.abs(inside).max())
            whole = (
                len(inside) == held[i]
            )  # a mean over a mean of cells weighs cells with a NaN as if they had none
            assert not whole or window.mean[i] == pytest.approx(mean, rel=1e-4, abs=1e-5 * largest)
        else:
            assert np.isnan(window.high[i])
            assert np.isnan(window.low[i])
    bad = ~np.isfinite(values)
    assert window.bad == bad.sum()
    np.testing.assert_array_equal(window.bad_steps, steps[bad])
    np.testing.assert_array_equal(window.bad_values, values[bad])


def check_all(
    reader: SeriesReader,
    expected: dict[str, dict[int, np.float32]],
    ranges: list[tuple[int | None, int | None, int]],
) -> None:
    assert set(reader.names()) == set(expected)
    newest = {name: (max(series), series[max(series)]) for name, series in expected.items() if series}
    np.testing.assert_equal({k: (v.step, np.float32(v.value)) for k, v in reader.latest().items()}, newest)
    rows: dict[int, dict[str, np.float32]] = {}
    for name, series in expected.items():
        for step, value in series.items():
            rows.setdefault(step, {})[name] = value
    for start, _, limit in ranges:
        recent = [
            (r.step, {k: np.float32(v) for k, v in r.values.items()}) for r in reader.rows(start or 0, limit)
        ]
        wanted = [(step, rows[step]) for step in sorted(rows) if step >= (start or 0)]
        np.testing.assert_equal(recent, wanted[-limit:])
    for name, series in expected.items():
        steps = np.array(sorted(series), np.int64)
        values = np.array([series[s] for s in steps.tolist()], np.float32)
        for start, stop, points in ranges:
            keep = np.ones(len(steps), bool)
            if start is not None:
                keep &= steps >= start
            if stop is not None:
                keep &= steps <= stop
            got_steps, got_values = reader.raw(name, start, stop)
            np.testing.assert_array_equal(got_steps, steps[keep])
            np.testing.assert_array_equal(got_values, values[keep])
            check_window(reader.read(name, start, stop, points), steps[keep], values[keep], points)


@quick
@given(
    sessions=st.lists(SESSIONS, min_size=1, max_size=3),
    block=st.integers(2, 40),
    ranges=st.lists(
        st.tuples(st.none() | st.integers(-5, 130), st.none() | st.integers(-5, 130), st.integers(1, 70)),
        min_size=1, max_size=3,
    ),
    closed=st.booleans(),
)  # fmt: skip
def test_reader_equals_a_dictionary(tmp_path_factory, sessions, block, ranges, closed) -> None:
    directory = tmp_path_factory.mktemp("store") / "monitor"
    early = SeriesReader(directory)
    clock = 1.0
    everything: list[tuple[int, dict[str, float | None] | None]] = []
    for first, rows, second, more in sessions:
        writer = SeriesWriter(directory, rows=block)
        for step, row in [(first, None), *rows, (second, None), *more]:
            if step is None:
                continue
            clock += 1.0
            everything.append((step, row))
            if row is None:
                writer.rewind(step, time=clock)
            else:
                writer.log(step, row, time=clock)
        if closed:
            writer.close()
        else:
            early.refresh()
    everything = naive(everything)
    early.refresh()
    check_all(early, everything, ranges)
    check_all(SeriesReader(directory), everything, ranges)
    assert early.damaged == 0


@quick
@given(
    count=st.integers(1, 3000), at=st.integers(0, 10**9), spike=st.sampled_from([8.0, -8.0]),
    points=st.integers(1, 400), block=st.sampled_from([16, 64, 100, 256, 1000]), every=st.integers(1, 7),
)  # fmt: skip
def test_one_step_spike_is_visible_at_every_zoom(
    tmp_path_factory, count, at, spike, points, block, every
) -> None:
    directory = tmp_path_factory.mktemp("spike")
    where = at % count * every
    with SeriesWriter(directory, rows=block) as writer:
        for step in range(0, count * every, every):
            writer.log(step, {"loss": spike if step == where else 2.0, "x": 1.0})
    reader = SeriesReader(directory)
    for start, stop in [(None, None), (where, where), (where - 100, where + 3), (where, None), (None, where)]:
        window = reader.read("loss", start, stop, points)
        extreme = window.high.max() if spike > 0 else window.low.min()
        assert extreme == spike
        point = int(np.searchsorted(window.step, where, "right")) - 1
        assert (window.high if spike > 0 else window.low)[point] == spike


def test_missing_nan_and_infinities_are_told_apart(tmp_path: Path) -> None:
    with SeriesWriter(tmp_path) as writer:
        rows = [1.0, math.nan, None, math.inf, -math.inf, -math.nan, 0.0]
        for step, value in enumerate(rows):
            writer.log(step, {"x": value, "always": 1.0})
        live = SeriesReader(tmp_path)
    for reader in (live, SeriesReader(tmp_path)):
        steps, values = reader.raw("x")
        assert steps.tolist() == [0, 1, 3, 4, 5, 6]
        np.testing.assert_array_equal(
            values, np.array([1, math.nan, math.inf, -math.inf, math.nan, 0], np.float32)
        )
        window = reader.read("x", points=2)
        assert window.bad == 4
        assert (window.high.max(), window.low.min()) == (1.0, 0.0)


def test_none_takes_nothing_back(tmp_path: Path) -> None:
    with SeriesWriter(tmp_path) as writer:
        writer.log(1, {"a": 1.0, "b": 2.0})
        writer.log(1, {"a": None, "b": 3.0})
    assert SeriesReader(tmp_path).last() == {"a": 1.0, "b": 3.0}


def test_late_series_and_many_columns(tmp_path: Path) -> None:
    with SeriesWriter(tmp_path, rows=64) as writer:
        for step in range(300):
            row = {f"s/{i}": float(step * i) for i in range(3 + step)}
            writer.log(step, row)
        live = SeriesReader(tmp_path)
    for reader in (live, SeriesReader(tmp_path)):
        assert len(reader.names()) == 302
        for i in (0, 2, 100, 301):
            steps, values = reader.raw(f"s/{i}")
            assert steps.tolist() == list(range(max(i - 2, 0), 300))
            np.testing.assert_array_equal(values, np.float32(steps * i))


def test_the_newest_of_thousands_of_series(tmp_path: Path) -> None:
    """Many columns of one block are read at once."""
    with SeriesWriter(tmp_path, rows=64) as writer:
        for step in range(150):
            row = {f"s/{i}": float(step * 10_000 + i) for i in range(0 if step % 7 else 1500)}
            writer.log(
                step, {**row, **{f"t/{i}": float(step) for i in range(1500 if step < 100 else 0)}, "u": 1.0}
            )
        live = SeriesReader(tmp_path).latest()
    for latest in (live, SeriesReader(tmp_path).latest()):
        assert {name: (x.step, x.value) for name, x in latest.items()} == {
            **{f"s/{i}": (147, float(np.float32(1_470_000 + i))) for i in range(1500)},
            **{f"t/{i}": (99, 99.0) for i in range(1500)}, "u": (149, 1.0),
        }  # fmt: skip


def test_a_run_that_went_back_hides_what_it_took_back(tmp_path: Path) -> None:
    first = SeriesWriter(tmp_path, rows=16)
    for step in range(100):
        first.log(step, {"loss": 1.0, "eval": 5.0} if step % 10 == 0 else {"loss": 1.0})
    second = SeriesWriter(tmp_path, rows=16)
    second.rewind(49)
    reader = SeriesReader(tmp_path)
    assert reader.steps() == (0, 49)
    for step in range(50, 60):
        second.log(step, {"loss": 2.0})
    reader.refresh()
    assert reader.raw("loss")[0].tolist() == list(range(60))
    assert reader.raw("loss")[1].tolist() == [1.0] * 50 + [2.0] * 10
    assert reader.raw("eval")[0].tolist() == [0, 10, 20, 30, 40]
    second.rewind(54)  # within one process, too
    second.log(55, {"loss": 3.0})
    reader.refresh()
    assert reader.raw("loss")[1][-2:].tolist() == [2.0, 3.0]
    assert reader.last() == {"loss": 3.0, "eval": 5.0}
    check = SeriesReader(tmp_path)
    assert check.read("loss", points=5).high.max() == 3.0


def test_a_writer_of_another_process_that_goes_on_is_cut_at_the_moment(tmp_path: Path) -> None:
    other, mine = SeriesWriter(tmp_path), SeriesWriter(tmp_path)
    for step in range(20):
        other.log(step, {"rank/1/step_seconds": 1.0})
    mine.rewind(9)
    time.sleep(0.01)
    for step in range(10, 15):
        other.log(step, {"rank/1/step_seconds": 2.0})
    reader = SeriesReader(tmp_path)
    assert reader.steps() == (0, 14)
    assert reader.latest()["rank/1/step_seconds"][::2] == (14, 2.0)
    steps, values = reader.raw("rank/1/step_seconds")
    assert steps.tolist() == list(range(15))
    assert values.tolist() == [1.0] * 10 + [2.0] * 5


def test_many_writers_at_once(tmp_path: Path) -> None:
    writers = [SeriesWriter(tmp_path, label=f"rank{r}", rows=32) for r in range(4)]

    def work(rank: int) -> None:
        for step in range(200):
            writers[rank].log(step, {f"rank/{rank}/step_seconds": float(rank), "shared": float(step)})
        writers[rank].close()

    threads = [threading.Thread(target=work, args=(r,)) for r in range(4)]
    for thread in threads:
        thread.start()
    reader = SeriesReader(tmp_path)
    while any(thread.is_alive() for thread in threads):
        reader.refresh()
        for name in reader.names():
            steps, _ = reader.raw(name)
            assert np.all(np.diff(steps) > 0)
    for thread in threads:
        thread.join()
    reader.refresh()
    for rank in range(4):
        assert len(reader.raw(f"rank/{rank}/step_seconds")[0]) == 200
    np.testing.assert_array_equal(reader.raw("shared")[1], np.arange(200, dtype=np.float32))
    assert sorted(w["label"] for w in reader.writers()) == [f"rank{r}" for r in range(4)]
    assert not list(tmp_path.glob("*.tail-*"))


def test_threads_share_a_writer(tmp_path: Path) -> None:
    with SeriesWriter(tmp_path, rows=16) as writer:
        threads = [
            threading.Thread(target=lambda r=r: [writer.log(s, {f"t/{r}": float(s)}) for s in range(300)])
            for r in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    reader = SeriesReader(tmp_path)
    for r in range(3):
        np.testing.assert_array_equal(reader.raw(f"t/{r}")[1], np.arange(300, dtype=np.float32))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_writes_a_segment_of_its_own(tmp_path: Path) -> None:
    code = f"""
    import os
    from deepseek.monitor.series import SeriesWriter
    writer = SeriesWriter({str(tmp_path)!r})
    writer.log(1, {{"parent": 1.0}})
    child = os.fork()
    writer.log(2, {{"child" if child == 0 else "parent": 2.0}})
    if child:
        os.waitpid(child, 0)
        writer.close()
    os._exit(0)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)
    reader = SeriesReader(tmp_path)
    assert reader.raw("parent")[0].tolist() == [1, 2]
    assert reader.raw("child")[0].tolist() == [2]
    assert len(reader.writers()) == 2


KILLED = """
import sys
from deepseek.monitor.series import SeriesWriter
writer = SeriesWriter(sys.argv[1], rows=64)
start = int(sys.argv[2])
for step in range(start, start + 10**6):
    writer.log(step, {f"s/{i}": float(step + i) for i in range(40 + step // 500)})
    sys.stdout.write(f"{step}\\n")
    sys.stdout.flush()
"""


def test_kill_9_loses_nothing(tmp_path: Path) -> None:
    """Every step a killed process had logged is there, whole; the next process goes on in the same run."""
    start, rng = 0, np.random.default_rng(0)
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path), str(start)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(float(rng.uniform(0.02, 0.25)))
        process.send_signal(signal.SIGKILL)
        said = process.stdout.read().split("\n")[:-1]
        process.wait()
        process.stdout.close()
        reader = SeriesReader(tmp_path)
        last = int(said[-1]) if said else start
        steps, values = reader.raw("s/3")
        assert steps[-1] >= last
        np.testing.assert_array_equal(steps, np.arange(steps[-1] + 1))
        np.testing.assert_array_equal(values, np.float32(steps + 3))
        assert reader.damaged == 0
        assert len(list(tmp_path.glob("*.tail-*"))) <= 2  # the tails of those killed before are sealed
        start = int(steps[-1]) + 1
    with SeriesWriter(tmp_path, rows=64) as writer:
        writer.log(start, {"s/3": start + 3.0})
    assert not list(tmp_path.glob("*.tail-*"))
    reader = SeriesReader(tmp_path)
    np.testing.assert_array_equal(reader.raw("s/3")[1], np.float32(np.arange(start + 1) + 3))
    assert (reader.damaged, reader.verify()) == (0, 0)


def test_a_tail_that_a_dead_writer_was_still_making_goes(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from deepseek.monitor.series import SeriesWriter\n"
        "w = SeriesWriter(Path(sys.argv[1]), rows=64); w.log(0, {'s': 1.0})\n"
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    (tail,) = tmp_path.glob("[!.]*.tail-*")
    half = tmp_path / f".{tail.name[:-1]}9"
    half.write_bytes(b"")
    with SeriesWriter(tmp_path, rows=64) as writer:
        writer.log(1, {"s": 2.0})
    assert not half.exists()
    assert SeriesReader(tmp_path).raw("s")[1].tolist() == [1.0, 2.0]


def stored(directory: Path) -> Path:
    """A store with sealed blocks and a tail."""
    writer = SeriesWriter(directory, rows=32)
    for step in range(200):
        writer.log(
            step, {"a": float(step), "b": math.nan if step % 50 == 0 else 1.0, "c": None if step % 3 else 2.0}
        )
    writer._sealing.join()
    return directory


def exercise(directory: Path) -> SeriesReader:
    """Use everything a reader has."""
    reader = SeriesReader(directory)
    reader.steps(), reader.latest(), reader.verify(), reader.rows(0), reader.writers()
    for name in reader.names():
        reader.read(name, points=7), reader.raw(name, 10, 100), reader.times(name)
    return reader


def test_truncated_files_are_skipped_and_counted(tmp_path: Path) -> None:
    whole = stored(tmp_path / "whole")
    files = {p.name: p.read_bytes() for p in whole.iterdir()}
    assert {p.suffix[:5] for p in whole.iterdir()} == {".jour", ".bloc", ".tail"}
    for name, data in files.items():
        for cut in np.unique(np.linspace(0, len(data) - 1, 12).astype(int)).tolist():
            directory = tmp_path / f"{name}-{cut}"
            directory.mkdir()
            for other, content in files.items():
                (directory / other).write_bytes(content[:cut] if other == name else content)
            reader = exercise(directory)
            if ".journal" in name:
                continue  # names that were cut off take their series with them
            steps, values = reader.raw("a")
            np.testing.assert_array_equal(values, np.float32(steps))  # what is left is right
            assert len(steps) < 200
            if ".tail" in name:
                assert reader.damaged > 0


@quick
@given(data=st.data())
def test_garbled_files_never_crash(tmp_path_factory, data) -> None:
    directory = stored(tmp_path_factory.mktemp("garbled") / "m")
    path = data.draw(st.sampled_from(sorted(directory.iterdir())))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 30))):
        content[data.draw(st.integers(0, 4000)) % len(content)] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(DeepseekError):
        exercise(directory)


def test_a_garbled_block_costs_only_itself(tmp_path: Path) -> None:
    directory = stored(tmp_path / "m")
    path = next(directory.glob("*.blocks"))
    content = bytearray(path.read_bytes())
    second = content.find(b"DSBLOCK1", 8)
    content[second + 70] ^= 255
    path.write_bytes(content)
    reader = exercise(directory)
    assert reader.damaged == 1
    assert reader.raw("a")[0].tolist() == [*range(32), *range(64, 200)]


def test_a_block_its_writer_was_killed_in_is_taken_back(tmp_path: Path) -> None:
    directory = stored(tmp_path / "m")
    path = next(directory.glob("*.blocks"))
    journal = next(directory.glob("*.journal")).read_text()
    last = path.read_bytes().rfind(b"DSBLOCK1")
    torn = bytearray(path.read_bytes()[last : last + 500])
    struct.pack_into("<I", torn, 8, 6)  # the number of the tail that is there
    for add in (torn, torn[:20]):
        again = tmp_path / f"again-{len(add)}"
        again.mkdir()
        for file in directory.iterdir():
            (again / file.name).write_bytes(file.read_bytes() + (bytes(add) if file == path else b""))
        with SeriesWriter(again) as writer:
            writer.log(200, {"a": 200.0})
        assert not list(again.glob("*.tail-*"))
        reader = SeriesReader(again)
        np.testing.assert_array_equal(reader.raw("a")[1], np.arange(201, dtype=np.float32))
        assert (reader.damaged, reader.verify()) == (0, 0)
        if add is torn:  # on another machine its lock could not be seen: it is left alone
            other = tmp_path / "other"
            other.mkdir()
            for file in directory.iterdir():
                (other / file.name).write_bytes(file.read_bytes())
            (other / next(directory.glob("*.journal")).name).write_text(
                journal.replace(f'"host": "{socket.gethostname()}"', '"host": "elsewhere"')
            )
            with SeriesWriter(other) as writer:
                writer.log(200, {"a": 200.0})
            assert len(list(other.glob("*.tail-*"))) == 1
            assert len(SeriesReader(other).raw("a")[0]) == 201


def test_a_living_writers_tail_is_left_alone(tmp_path: Path) -> None:
    alive = SeriesWriter(tmp_path)
    alive.log(1, {"a": 1.0})
    with SeriesWriter(tmp_path) as other:
        other.log(1, {"b": 1.0})
    alive.log(2, {"a": 2.0})
    alive.close()
    assert SeriesReader(tmp_path).raw("a")[1].tolist() == [1.0, 2.0]


def test_a_file_cut_while_it_is_open_is_an_error(tmp_path: Path) -> None:
    directory = stored(tmp_path / "m")
    reader = SeriesReader(directory)
    os.truncate(next(directory.glob("*.blocks")), 3000)
    with pytest.raises(RunError, match="shorter"):
        reader.raw("a")


def test_verify_finds_a_changed_value(tmp_path: Path) -> None:
    directory = stored(tmp_path / "m")
    assert SeriesReader(directory).verify() == 0
    path = next(directory.glob("*.blocks"))
    content = bytearray(path.read_bytes())
    where = content.find(np.float32(7.0).tobytes())
    content[where + 1] ^= 1
    path.write_bytes(content)
    assert SeriesReader(directory).verify() == 1


def test_what_is_no_number_is_refused_and_nothing_is_logged(tmp_path: Path) -> None:
    writer = SeriesWriter(tmp_path)
    for bad in ("text", {}, [1.0, 2.0], object()):
        with pytest.raises((TypeError, ValueError)):
            writer.log(1, {"a": 1.0, "b": bad})
    with pytest.raises(ValueError, match="name"):
        writer.log(1, {"": 1.0})
    with pytest.raises(TypeError):
        writer.log(1.5, {"a": 1.0})
    assert SeriesReader(tmp_path).names() == []
    writer.log(1, {"huge": 1e300, "whole": 3, "true": True})
    assert SeriesReader(tmp_path).last() == {"huge": math.inf, "whole": 3.0, "true": 1.0}


def test_a_full_disk_is_an_error_and_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = SeriesWriter(tmp_path, rows=16)
    for step in range(16):
        writer.log(step, {"a": float(step)})

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        patch.setattr("deepseek.monitor.tail._claim", full)
        with pytest.raises(RunError, match="No space left"):
            writer.log(16, {"a": 16.0})
        writer._sealing.join()
    assert SeriesReader(tmp_path).raw("a")[0].tolist() == list(range(16))
    writer.log(17, {"a": 17.0})
    writer.close()
    reader = SeriesReader(tmp_path)
    assert reader.raw("a")[0].tolist() == [*range(16), 17]
    assert (writer.failures, reader.damaged) == (1, 0)


def test_a_reader_of_nothing(tmp_path: Path) -> None:
    reader = SeriesReader(tmp_path / "none")
    assert (reader.names(), reader.last(), reader.steps()) == ([], {}, (0, -1))
    with pytest.raises(RunError, match="no series 'x'"):
        reader.read("x")
    SeriesWriter(tmp_path / "unused").close()
    assert not (tmp_path / "unused").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError):
        SeriesReader(tmp_path / "file")


def test_rows_for_who_follows(tmp_path: Path) -> None:
    writer = SeriesWriter(tmp_path, rows=8)
    for step in range(20):
        writer.log(step, {"a": float(step)}, time=100.0 + step)
    reader = SeriesReader(tmp_path)
    assert [r.step for r in reader.rows(15)] == [15, 16, 17, 18, 19]
    writer.log(19, {"b": 1.0})
    writer.log(20, {"a": 20.0}, time=120.0)
    reader.refresh()
    rows = reader.rows(19)
    assert rows[0].values == {"a": 19.0, "b": 1.0}
    assert rows[1] == (20, 120.0, {"a": 20.0})
    assert [r.step for r in reader.rows(0, limit=3)] == [18, 19, 20]
