"""``RowFollower``: the rows that other processes log, as they appear."""

from __future__ import annotations

import math
from typing import NamedTuple

from deepseek.monitor.series import Row, SeriesReader

MOST = 1000


class News(NamedTuple):
    """What is new: rows in the order of their steps, and whether older ones became void."""

    rows: list[Row]
    rewound: bool


class RowFollower:
    """Rows of ``reader`` that are new since the last ``look``; the first look only finds out where the run is.

    The newest row may still grow when it is seen, so it comes again, whole, if it did.

    Args:
        most: rows of one look; of more, the newest.
    """

    def __init__(self, reader: SeriesReader, *, most: int = MOST) -> None:
        self.reader, self.most = reader, most
        self._version = -1
        self._newest: Row | None = None
        self._since = -math.inf  #: Unix time of the newest row before the run last went back
        self._started = False

    def look(self) -> News:
        """Raises what reading the run's files raises."""
        self.reader.refresh()
        version = self.reader.version
        if version == self._version:
            return News([], False)
        self._version = version
        last = newest_step(self.reader)
        if last is None:  # nothing yet, so that all that comes is new
            self._started, self._newest = True, None
            return News([], False)
        before, self._newest = self._newest, None
        rewound = before is not None and last < before.step
        if rewound and before is not None:
            self._since = before.time
        rows = self.reader.rows(self._start(before, last, rewound), self.most)
        if before is None or rewound:  # what was logged since, wherever it went back to
            rows = [row for row in rows if row.time > self._since]
        self._newest = rows[-1] if rows else None if rewound else before
        fresh = [row for row in rows if row != before] if self._started else []
        self._started = True
        return News(fresh, rewound)

    def _start(self, before: Row | None, last: int, rewound: bool) -> int:
        """The first step that may have something new."""
        if not self._started:
            return last
        return self.reader.steps()[0] if before is None or rewound else before.step


def newest_step(reader: SeriesReader) -> int | None:
    """The last step of anything logged, ``None`` if nothing was: from what the reader keeps, not from its files."""
    return max((latest.step for latest in reader.latest().values()), default=None)
