"""A run's series as TensorBoard files: of what there is (``write_board``), and of what comes (``BoardThread``)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepseek.monitor.export.tensorboard import TensorBoardWriter
from deepseek.monitor.follow import RowFollower
from deepseek.monitor.series import SeriesReader

MOST = 100_000  #: rows of one look
INTERVAL = 1.0  #: seconds between two looks at a live run

log = logging.getLogger(__name__)


def write_board(reader: Any, names: Sequence[str], directory: Path) -> int:
    """Write every point of ``names`` into one new event file; returns the number of points."""
    points = 0
    with TensorBoardWriter(directory) as board:
        for name in names:
            steps, values = reader.raw(name)
            board.series(name, steps, values, reader.times(name)[1])
            points += len(steps)
    return points


class BoardThread:
    """Writes the rows of a live run to TensorBoard files, from a thread that reads the run's store.

    Training does not know of it: it costs what reading files costs. A step that a resumed run does again is written
    again, which TensorBoard understands as a restart.
    """

    def __init__(self, store: Path, directory: Path, *, interval: float = INTERVAL) -> None:
        self.store, self.directory, self.interval = store, directory, interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="deepseek-tensorboard", daemon=True)

    def __enter__(self) -> BoardThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)

    def _run(self) -> None:
        try:
            with TensorBoardWriter(self.directory) as board:
                follower = RowFollower(SeriesReader(self.store), most=MOST)
                follower.look()
                while not self._stop.wait(self.interval):
                    self._take(board, follower)
                self._take(board, follower)
        except Exception as error:  # a full disk must not end a training run
            log.warning("TensorBoard files in %s end here: %s", self.directory, error)

    def _take(self, board: TensorBoardWriter, follower: RowFollower) -> None:
        news = follower.look()
        for row in news.rows:
            board.row(row.step, row.values, row.time)
        if news.rows:
            board.flush()
