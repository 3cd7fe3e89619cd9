"""``Room``: how much of something all requests of a process may hold together, so that they never fill its memory.

Limits of one request are not enough: thousands at once may each be within theirs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from deepseek.serve.server.errors import ApiError


class Room:
    """Room for ``most`` of ``what`` (in the plural, for messages).

    Attributes:
        held: of it, now.
    """

    def __init__(self, most: int, what: str) -> None:
        self.most, self.what, self.held = most, what, 0

    @contextlib.contextmanager
    def hold(self) -> Iterator[Callable[[int], None]]:
        """Gives what is called with the size of each piece that one request holds; all of it is free afterwards.

        It raises ``ApiError``: 429 while others hold too much, 400 for what would never fit.
        """
        mine = 0

        def more(size: int) -> None:
            nonlocal mine
            if mine + size > self.most:
                raise ApiError(
                    f"this request needs more than {self.most:,} {self.what}, which is all that can be held"
                )
            if self.held + size > self.most:
                raise ApiError(
                    f"{self.held:,} {self.what} are held, and there is room for {self.most:,}; try again in 1 s",
                    429, code="queue_full", headers={"retry-after": "1", "connection": "close"},
                )  # fmt: skip
            mine, self.held = mine + size, self.held + size

        try:
            yield more
        finally:
            self.held -= mine
