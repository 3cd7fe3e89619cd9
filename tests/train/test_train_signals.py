"""Signals ask once; a second interrupt is meant."""

from __future__ import annotations

import signal
import threading

import pytest

from deepseek.train import Stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_and_handlers_are_put_back(number: signal.Signals) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with Stop().on_signals() as stop:
        assert not stop.reason
        signal.raise_signal(number)
        assert stop.reason == number.name
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_interrupt_does_not_wait() -> None:
    with Stop().on_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # a scheduler that repeats itself is not in a hurry
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.reason == "SIGTERM"


def test_in_another_thread_signals_are_left_alone() -> None:
    entered = []

    def inside() -> None:
        with Stop().on_signals() as stop:
            entered.append(stop)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert len(entered) == 1
    assert signal.getsignal(signal.SIGTERM) is before
