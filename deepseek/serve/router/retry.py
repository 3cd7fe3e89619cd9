"""``RetryBudget``: how many requests that lost their replica may be given to another one.

A request that is asked again costs its work twice. When one replica dies that is the price of an answer; when all of
them keep dying, asking again only makes it worse. So retries are paid from a bucket that answers fill, as in gRPC's
retry throttling (gRFC A6): what a single death takes is there at once, a lasting fault gets a small share and no storm.
"""

from __future__ import annotations


class RetryBudget:
    """A bucket of retries.

    Attributes:
        most: retries that it holds; full at first. share: of a retry, that every answer puts into it.
        left: retries in it now.
    """

    def __init__(self, most: int, share: float) -> None:
        self.most, self.share = most, share
        self.left = float(most)

    def answered(self) -> None:
        """A replica answered a request."""
        self.left = min(self.most, self.left + self.share)

    def take(self) -> bool:
        """Pay for one retry. False: there is none left."""
        if self.left < 1:
            return False
        self.left -= 1
        return True
