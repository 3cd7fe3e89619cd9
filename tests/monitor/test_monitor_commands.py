"""The queue of actions: each is taken once, whoever else is at the database."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from deepseek.errors import RunError
from deepseek.monitor.commands import Commands, answering
from deepseek.monitor.store import RunStore


def together(*work: Callable[[], None]) -> list[Exception]:
    """What went wrong in functions that run at the same moment."""
    barrier, problems = threading.Barrier(len(work)), list[Exception]()

    def do(function: Callable[[], None]) -> None:
        barrier.wait()
        try:
            function()
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=do, args=(function,)) for function in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return problems


def test_a_new_database_may_be_made_by_several_at_once(tmp_path: Path) -> None:
    for trial in range(25):
        run = tmp_path / str(trial)

        def ask(run: Path = run) -> None:
            with Commands(run) as commands:
                commands.enqueue("pause", {})

        def note(run: Path = run) -> None:
            with RunStore(run) as store:
                store.add_note("x")

        assert together(ask, note, ask, note) == []
        with Commands(run) as commands:
            assert len(commands.commands("queued")) == 2


def test_each_command_is_taken_once(tmp_path: Path) -> None:
    with Commands(tmp_path) as commands:
        asked = [commands.enqueue("replay", {"step": i}, by="me") for i in range(40)]
    taken: list[int] = []

    def take() -> None:
        with Commands(tmp_path) as commands:
            while (command := commands.take_command()) is not None:
                taken.append(command.id)

    assert together(take, take, take) == []
    assert sorted(taken) == asked


def test_changes_by_others_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepseek.monitor.commands.SURE", 3600.0)
    with Commands(tmp_path) as mine, Commands(tmp_path) as other:
        assert mine.changed()
        assert not mine.changed()
        other.enqueue("pause", {})
        assert mine.changed()
        assert mine.take_command() is not None


def test_an_answer_or_the_error_in_its_place(tmp_path: Path) -> None:
    with Commands(tmp_path) as commands:
        good, bad = (commands.enqueue("replay", {}, status="running") for _ in range(2))
        with answering(tmp_path, good) as answer:
            answer["loss"] = 2.0
        with pytest.raises(RunError, match="no checkpoint"), answering(tmp_path, bad):
            raise RunError("no checkpoint")
        told = [(c.status, c.result) for c in commands.commands()]
    assert told == [("done", {"loss": 2.0}), ("failed", {"error": "no checkpoint"})]
