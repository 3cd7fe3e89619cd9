"""Answers that match a grammar (JSON, JSON schema, regular expression, Lark, a choice of texts), by llguidance."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt


class GrammarState(Protocol):
    """Where one answer stands in its grammar."""

    @property
    def error(self) -> str:
        """Why it cannot go on; empty as long as it can."""

    @property
    def over(self) -> bool:
        """Whether the answer is complete and nothing but an end token may follow."""

    def mask(self) -> npt.NDArray[np.int32]:
        """The tokens that may come next, a bit each: int32 ``[ceil(V / 32)]``."""

    def accept(self, token: int) -> None:
        """The answer goes on with ``token``."""

    def try_accept(self, token: int) -> bool:
        """``accept`` it if it is allowed."""

    def retract(self, count: int) -> None:
        """Undo the last ``count`` tokens accepted."""
