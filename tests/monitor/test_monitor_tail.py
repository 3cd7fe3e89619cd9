"""The newest rows of a run: records against a plain dictionary, damage, files that are cut, writers inside writers."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from deepseek.monitor.series import SeriesReader, SeriesWriter
from deepseek.monitor.tail import START, Tail, room


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("rows", [4, 64, 4096])
def test_rows_of_any_names_in_any_order(tmp_path: Path, mapped: bool, rows: int) -> None:
    """Names come and go, steps are told in parts, values are missing, refused, or too large for float32."""
    rng, step = random.Random(rows), 0
    names = [f"s/{i}" for i in range(30)]
    told: dict[str, dict[int, np.float32]] = {}
    writer, reader = SeriesWriter(tmp_path, rows=rows, mapped=mapped), SeriesReader(tmp_path)
    for _ in range(300):
        step += rng.random() < 0.7
        some = names[:20] if rng.random() < 0.5 else rng.sample(names, rng.randint(1, 30))
        values = (rng.random(), 1e300, math.nan, 3, True, None)
        row = {name: rng.choice(values) for name in some}
        if rng.random() < 0.1:
            with pytest.raises((TypeError, ValueError)):
                writer.log(step, dict.fromkeys(some, 1.0) | {some[-1]: [1.0]})
        writer.log(step, row)
        with np.errstate(over="ignore"):
            for name, value in row.items():
                if value is not None:
                    told.setdefault(name, {})[step] = np.float32(value)
        if rng.random() < 0.05:
            reader.refresh()
            reader.rows(0, 5)
    for after in (False, True):
        if after:
            writer.close()
        reader.refresh()
        for seen in (reader, SeriesReader(tmp_path)):
            for name, values_of in told.items():
                steps, values = seen.raw(name)
                assert steps.tolist() == sorted(values_of)
                np.testing.assert_array_equal(values, [values_of[s] for s in sorted(values_of)])
            assert (seen.damaged, seen.verify()) == (0, 0)
    assert writer.failures == 0


def test_a_damaged_record_costs_only_itself(tmp_path: Path) -> None:
    writer = SeriesWriter(tmp_path)
    for step in range(20):
        writer.log(step, {"a": float(step), "b": 1.0, "c": 2.0})
    (path,) = tmp_path.glob("*.tail-*")
    whole, size = path.read_bytes(), room(3)
    first = START + room(3, 24)
    for at, lost in (
        (first + 5 * size, 5),
        (first + 7 * size - 8, 6),
    ):  # a record's first word, and one's last
        data = bytearray(whole)
        data[at] ^= 255
        path.write_bytes(data)
        reader = SeriesReader(tmp_path)
        assert reader.raw("a")[0].tolist() == [s for s in range(20) if s != lost]
        assert reader.damaged == 1


def test_a_file_that_is_cut_ends_no_process_that_writes_without_a_mapping(tmp_path: Path) -> None:
    writer = SeriesWriter(tmp_path, mapped=False)
    row = {f"s/{i}": float(i) for i in range(300)}
    writer.log(0, row)
    (path,) = tmp_path.glob("*.tail-*")
    os.truncate(path, 0)
    for step in range(1, 200):
        writer.log(step, row)
    writer.close()
    assert writer.failures == 1  # what was in it is gone, and said to be
    steps = SeriesReader(tmp_path).raw("s/0")[0]
    assert steps[-1] == 199
    assert len(steps) > 150


class Late:
    """A number that logs a row of its own when it is read, as a signal's handler may in the middle of ``log``."""

    def __init__(self, writer: SeriesWriter | None, good: bool) -> None:
        self.writer, self.good = writer, good

    def __float__(self) -> float:
        writer, self.writer = self.writer, None
        if writer is not None:
            writer.log(5, {"inner": 5.0})
        if not self.good:
            raise ValueError("no number")
        return 1.0


@pytest.mark.parametrize("good", [True, False])
def test_a_row_inside_a_row(tmp_path: Path, good: bool) -> None:
    writer = SeriesWriter(tmp_path)
    for step in range(3):
        writer.log(step, {"a": 0.0, "b": 0.0})
        writer.log(step, {"inner": 0.0})
    writer.log(3, {"a": 0.0, "b": 0.0})
    if good:
        writer.log(4, {"a": 0.0, "b": Late(writer, good)})
    else:
        with pytest.raises(ValueError, match="no number"):
            writer.log(4, {"a": 0.0, "b": Late(writer, good)})
    writer.log(6, {"a": 0.0, "b": 0.0})
    for _ in range(2):
        reader = SeriesReader(tmp_path)
        assert reader.raw("b")[0].tolist() == [0, 1, 2, 3, *([4] if good else []), 6]
        assert reader.raw("inner")[0].tolist() == [0, 1, 2, 5]
        assert reader.damaged == 0
        writer.close()


def test_steps_and_times_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    writer = SeriesWriter(tmp_path)
    writer.log(1, {"a": 1.0})
    with pytest.raises(ValueError, match="64 bits"):
        writer.log(2**70, {"a": 1.0})
    with pytest.raises((TypeError, ValueError)):
        writer.log(2, {"a": 1.0}, time="now")  # type: ignore[arg-type]
    writer.log(np.int64(3), {"a": 3.0})  # type: ignore[arg-type]
    assert SeriesReader(tmp_path).raw("a")[0].tolist() == [1, 3]


def test_a_writer_that_a_thread_holds_while_the_process_forks(tmp_path: Path) -> None:
    code = f"""
    import os, threading
    from deepseek.monitor.series import SeriesWriter
    writer = SeriesWriter({str(tmp_path)!r})
    writer.log(1, {{"a": 1.0}})
    held, go = threading.Event(), threading.Event()
    def hold():
        with writer.lock:
            held.set()
            go.wait()
    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        writer.log(2, {{"a": 2.0}})
        os._exit(0)
    go.set()
    thread.join()
    os.waitpid(child, 0)
    os._exit(0)
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], check=True, timeout=60)
    assert SeriesReader(tmp_path).raw("a")[0].tolist() == [1, 2]


def test_a_tail_has_room_only_for_what_fits(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "x.tail-000000", 0, START + room(3, 24) + 2 * room(3), 100)
    assert tail.define(np.arange(3)) == 1
    assert tail.reach(tail.at + 2 * room(3))
    assert not tail.reach(tail.at + 3 * room(3))
    assert tail.view().rows == 0
    tail.remove()
    assert not list(tmp_path.iterdir())
