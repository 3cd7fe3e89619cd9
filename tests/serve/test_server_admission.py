"""The bounded queue's own arithmetic, with a clock of the test's."""

from __future__ import annotations

import pytest

from deepseek.serve.server.admission import LONGEST_WAIT, MEMORY, Admission
from deepseek.serve.server.errors import ApiError


def test_the_wait_is_from_what_finished_lately_and_nothing_older_is_kept() -> None:
    now = [0.0]
    admission = Admission(2, 2, lambda: now[0])
    assert admission.retry_after() == 5  # nothing has finished yet
    for _ in range(1000):  # one a second, nobody refused
        admission.enter()
        now[0] += 1
        admission.leave(1)
    assert len(admission._finished) <= MEMORY + 1
    admission.enter(4)
    assert admission.retry_after() == 2  # two ahead, at one a second
    with pytest.raises(ApiError) as refused:
        admission.enter()
    assert refused.value.headers["retry-after"] == "2"
    now[0] += MEMORY / 2
    admission.leave(3)
    admission.enter(3)
    counted = sum(n for _, n in admission._finished)
    assert counted == admission._lately > 3
    now[0] += 2 * MEMORY
    assert admission.retry_after() == 5  # all that is too long ago
    assert admission._lately == 0
    assert LONGEST_WAIT >= 5
