"""Actions that act on a run: afterwards it is, bit for bit, the run that was asked for."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from action_runs import Asks, with_actions
from recipe_runs import checkpointed, events, identical, losses, smallest, tensors, write_corpus

from deepseek.config import replace
from deepseek.errors import ConfigError, RunError
from deepseek.events import Event
from deepseek.monitor.commands import Commands
from deepseek.monitor.control import request, trainer, validate, wait
from deepseek.monitor.history import History
from deepseek.monitor.narrator import ASCII
from deepseek.monitor.panel import message
from deepseek.monitor.store import RunStore
from deepseek.recipes import control
from deepseek.recipes.pretrain import PretrainConfig, pretrain, resume_run
from deepseek.recipes.replay import replay_run
from deepseek.recipes.rollback import FILE as SKIPS
from deepseek.recipes.rollback import read_rewinds
from deepseek.train import Stop
from deepseek.weights import checkpoint

STEPS = 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("control") / "corpus")


@pytest.fixture(scope="module")
def config(corpus: Path) -> PretrainConfig:
    config = smallest(corpus, data={"cache": str(corpus.parent / "cache")}, train={"steps": STEPS})
    return checkpointed(config, 3)


@pytest.fixture(scope="module")
def straight(config: PretrainConfig, corpus: Path) -> Path:
    run = corpus.parent / "straight"
    assert pretrain(config, run).finished
    return run


@pytest.fixture(autouse=True)
def _look_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "EVERY", 0.0)


def test_rollback_and_skip_is_the_run_resumed_from_that_checkpoint_without_those_batches(
    config: PretrainConfig, straight: Path, tmp_path: Path
) -> None:
    sink = with_actions(
        config, tmp_path / "live", {10: [("rollback_skip", {"skip": [8, 9], "incident": "i7"})]}
    )
    (answer,) = sink.answers()
    assert answer.status == "done", answer.result
    assert answer.result["to_step"] == 6
    assert answer.result["batches"] == [[7, 8]]

    shutil.copytree(straight, tmp_path / "offline")
    assert resume_run(tmp_path / "offline", skip=(8, 9)).finished
    live, offline = tensors(tmp_path / "live"), tensors(tmp_path / "offline")
    assert any("router.bias" in k for k in live)
    assert any(k.startswith("optimizer/") for k in live)
    assert identical(live, offline)
    assert not identical(live, tensors(straight))
    assert losses(tmp_path / "live") == losses(tmp_path / "offline")
    for run in (
        tmp_path / "live",
        tmp_path / "offline",
    ):  # the same up to the checkpoint and the step after it
        assert [losses(run)[s] for s in range(1, 8)] == [losses(straight)[s] for s in range(1, 8)]
        assert losses(run)[8] != losses(straight)[8]
        assert {p.name for p in (run / "abandoned").iterdir()} >= {"step-000009"}
        assert checkpoint.load(run).state["loader"]["batch"] == STEPS + 2
        assert [p.name for p in checkpoint.list_checkpoints(run)] == [f"step-{s:06d}" for s in (3, 6, 9, 12)]
        (rewind,) = read_rewinds(run)
        assert (rewind.to_step, rewind.steps, rewind.batches, rewind.settled) == (6, (8, 9), ((7, 8),), True)
    told = [e for e in events(tmp_path / "live") if e["event"] == "rollback"]
    assert [(e["step"], e["from_step"], e["steps"], e["incident"]) for e in told] == [(6, 10, [8, 9], "i7")]
    answered = [e for e in events(tmp_path / "live") if e["event"] == "action"]
    assert [e["status"] for e in answered] == ["started", "done"]
    assert checkpoint.load(tmp_path / "live" / "step-000009").manifest.parent == 6
    (stop,) = History.read(tmp_path / "live").breaks()
    assert (stop.stopped, stop.resumed, stop.reason) == (10, 6, "rolled back")
    with RunStore(tmp_path / "live") as store:
        assert [line["data"]["from_step"] for line in store.lineage() if line["kind"] == "rollback"] == [10]
        steps, values = store.series.raw("train/loss", 1, STEPS + 1)
    assert dict(zip(steps.tolist(), values.tolist())) == pytest.approx(losses(tmp_path / "live"))
    lines = [message(e["event"], e["step"], e, ASCII)[0] for e in [*told, *answered]]
    assert lines[0] == "rolled back from step 10 to step 6, without the batches of steps 8 to 9"
    assert lines[-1].startswith("rollback_skip by test: back at step 6, from 10")


def test_batch_ten_is_trained_on_where_step_eight_would_have_been(
    config: PretrainConfig, straight: Path, tmp_path: Path
) -> None:
    """An independent check of what is skipped: the same documents in the same places, by hand."""
    with_actions(config, tmp_path / "run", {10: [("rollback_skip", {"skip": [8, 9]})]})
    from deepseek.recipes.provenance import samples_of

    for step, old in ((7, 7), (8, 10), (9, 11), (10, 12)):
        assert samples_of(tmp_path / "run", step) == samples_of(straight, old)
    assert samples_of(tmp_path / "run", 8) != samples_of(straight, 8)


def test_a_rolled_back_run_resumes_exactly_from_anywhere(config: PretrainConfig, tmp_path: Path) -> None:
    ask = {10: [("rollback_skip", {"skip": [8, 9]})]}
    whole = tmp_path / "whole"
    with_actions(config, whole, ask)
    for case, (at, told, back) in enumerate([(8, 2, None), (11, 1, None), (11, 1, 3)]):
        run, stop = tmp_path / f"stopped-{case}", Stop()

        class StopAt(Asks):
            def write(self, event: Event, at: int = at, told: int = told, stop: Stop = stop) -> None:
                super().write(event)
                if event.name == "train" and event.step == at and self.told.count(at) == told:
                    stop.request("test")

        result = pretrain(config, run, sinks=[StopAt(run, {(10, 1): ask[10]})], stop=stop)
        assert (result.step, result.finished) == (at, False)
        assert resume_run(run, step=back).finished
        assert identical(tensors(run), tensors(whole))
        assert losses(run) == losses(whole)


def test_two_incidents_one_after_the_other(config: PretrainConfig, straight: Path, tmp_path: Path) -> None:
    """The second names steps as the run went after the first."""
    run = tmp_path / "run"
    sink = with_actions(
        config,
        run,
        {(10, 1): [("rollback_skip", {"skip": [8, 9]})], (9, 2): [("rollback_skip", {"skip": [8, 8]})]},
    )
    assert [a.result["batches"] for a in sink.answers()] == [[[7, 8]], [[9, 9]]]
    assert checkpoint.load(run).state["loader"]["skips"] == [[7, 9]]
    shutil.copytree(straight, tmp_path / "offline")
    assert resume_run(tmp_path / "offline", skip=(8, 10)).finished
    assert identical(tensors(run), tensors(tmp_path / "offline"))


def test_a_rollback_at_the_very_last_step_with_a_request_behind_it(
    config: PretrainConfig, straight: Path, tmp_path: Path
) -> None:
    """What was asked for after the rollback waits for the run to stand there."""
    sink = with_actions(
        config, tmp_path / "run", {STEPS: [("rollback_skip", {"skip": [11, 11]}), ("checkpoint", {})]}
    )
    answers = sink.answers()
    assert [a.status for a in answers] == ["done", "done"]
    assert answers[1].result["step"] == 10
    assert sink.told == [*range(1, STEPS + 1), 10, 11, 12]
    shutil.copytree(straight, tmp_path / "offline")
    assert resume_run(tmp_path / "offline", skip=(11, 11)).finished
    assert identical(tensors(tmp_path / "run"), tensors(tmp_path / "offline"))


def test_rollback_without_skip_repeats_history(
    config: PretrainConfig, straight: Path, tmp_path: Path
) -> None:
    sink = with_actions(config, tmp_path / "run", {8: [("rollback_skip", {"to_step": 3})]})
    assert sink.told == [*range(1, 9), *range(4, STEPS + 1)]
    assert identical(tensors(tmp_path / "run"), tensors(straight))
    assert losses(tmp_path / "run") == losses(straight)


def test_what_cannot_be_done_is_answered_and_the_run_goes_on_untouched(
    config: PretrainConfig, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    sink = with_actions(
        config,
        run,
        {
            2: [("rollback_skip", {"skip": [2, 2]})],
            5: [("rollback_skip", {"skip": [3, 4]}), ("rollback_skip", {"skip": [5, 5], "to_step": 2})],
            6: [("rollback_skip", {"skip": [11, 12]})],
            7: [("quarantine", {"documents": [{"source": "corpus", "path": "none.txt", "offset": 0}]})],
            8: [("replay", {"step": 2}), ("replay", {"step": 400})],
        },
    )
    answers = sink.answers()
    assert {a.status for a in answers} == {"failed"}
    told = [a.result["error"] for a in answers]
    assert "no checkpoint before step 2; it has none" in told[0]
    assert "no checkpoint before step 3; it has: 3" in told[1]
    assert "no checkpoint of step 2; it has: 3" in told[2]
    assert "steps from 11 on have not been done yet" in told[3]
    assert "no training document 'none.txt'" in told[4]
    assert "no checkpoint before step 2" in told[5]
    assert "beyond the run's 12" in told[6]
    assert identical(tensors(run), tensors(straight))
    assert not (run / SKIPS).exists()


def test_quarantined_documents_are_not_trained_on_from_the_next_step(
    config: PretrainConfig, straight: Path, tmp_path: Path
) -> None:
    from deepseek.recipes.provenance import samples_of

    run, at = tmp_path / "run", 5
    banned = {(s.path, s.offset) for s in samples_of(straight, 6)[:4]}
    documents = [{"source": "corpus", "path": p, "offset": o} for p, o in banned]
    sink = with_actions(config, run, {at: [("quarantine", {"documents": documents, "reason": "noise"})]})
    (answer,) = sink.answers()
    assert (answer.status, answer.result["added"], answer.result["from_step"]) == (
        "done",
        len(banned),
        at + 1,
    )
    held = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert {(h["path"], h["offset"], h["reason"], h["from_step"]) for h in held} == {
        (*b, "noise", 6) for b in banned
    }
    before = {s for s in range(1, STEPS + 1) if losses(run)[s] == losses(straight)[s]}
    assert before >= set(range(1, at + 1))
    assert at + 1 not in before
    for step in range(1, STEPS + 1):
        mine, theirs = samples_of(run, step), samples_of(straight, step)
        kept = [s for s in theirs if step <= at or (s.path, s.offset) not in banned]
        assert [(s.path, s.offset, s.start, s.length) for s in mine] == [
            (s.path, s.offset, s.start, s.length) for s in kept
        ]
        told = next(e["tokens"] for e in events(run) if e["event"] == "train" and e["step"] == step)
        assert told == sum(s.length for s in mine)

    # Resumed from before, they are left out from there on; a later run of the same corpus may leave them out too.
    assert resume_run(run, step=3).finished
    assert not {(s.path, s.offset) for step in (4, 5) for s in samples_of(run, step)} & banned
    other = replace(config, data=replace(config.data, quarantine=(str(run / "quarantine.jsonl"),)))
    pretrain(other, tmp_path / "other")
    for step in range(1, STEPS + 1):
        assert not {(s.path, s.offset) for s in samples_of(tmp_path / "other", step)} & banned


def test_pause_continue_checkpoint_and_stop(config: PretrainConfig, straight: Path, tmp_path: Path) -> None:
    run, paused = tmp_path / "run", threading.Event()
    seen: dict[str, Any] = {}

    def person() -> None:
        paused.wait(120)
        seen["checkpoint"] = wait(run, request(run, "checkpoint"), 120)
        seen["told"] = len(sink.told)
        seen["continue"] = wait(run, request(run, "continue"), 120)

    class Paused(Asks):
        def write(self, event: Event) -> None:
            super().write(event)
            if event.name == "action" and event.values["action"] == "pause":
                paused.set()

    sink = Paused(run, {(4, 1): [("pause", {})], (10, 1): [("stop", {})]})
    someone = threading.Thread(target=person)
    someone.start()
    result = pretrain(config, run, sinks=[sink])
    someone.join()
    assert (result.step, result.finished) == (10, False)
    assert seen["checkpoint"].result["step"] == 4
    assert seen["told"] == 4
    assert seen["continue"].status == "done"
    assert [a.status for a in sink.answers()] == ["done", "done"]
    assert f"deepseek resume {run}" in sink.answers()[1].result["text"]
    names = [p.name for p in checkpoint.list_checkpoints(run)]
    assert names == [f"step-{s:06d}" for s in (3, 4, 6, 9, 10)]
    assert identical(tensors(run, 6), tensors(straight, 6))
    assert resume_run(run).finished
    assert identical(tensors(run), tensors(straight))


def test_a_trace_is_answered_when_it_is_written(
    config: PretrainConfig, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (answer,) = with_actions(config, run, {4: [("capture", {"steps": 2})]}).answers()
    assert answer.status == "done", answer.result
    assert Path(answer.result["path"], "speedscope.json").is_file()
    told = [(e["status"], e["step"]) for e in events(run) if e["event"] == "action"]
    assert told[0] == ("started", 4)
    assert told[1][0] == "done"
    assert identical(tensors(run), tensors(straight))


def test_a_stop_request_ends_a_pause(config: PretrainConfig, tmp_path: Path) -> None:
    stop = Stop()

    class Impatient(Asks):
        def write(self, event: Event) -> None:
            super().write(event)
            if event.name == "action":
                threading.Timer(0.3, stop.request, ["SIGTERM"]).start()

    result = pretrain(
        config, tmp_path / "run", sinks=[Impatient(tmp_path / "run", {(4, 1): [("pause", {})]})], stop=stop
    )
    assert (result.step, result.finished) == (4, False)


def test_a_run_that_has_ended_says_so_with_the_way_out(straight: Path, tmp_path: Path) -> None:
    assert trainer(straight) is None
    way_out = {
        "pause": f"deepseek resume {straight}",
        "rollback_skip": f"deepseek resume {straight} --skip 5:6",
    }
    for action, command in way_out.items():
        with pytest.raises(RunError, match=r"is not training \(finished at step 12\)") as refused:
            request(straight, action, {"skip": [5, 6]} if action == "rollback_skip" else {})
        assert command in str(refused.value)
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    number = request(run, "quarantine", {"documents": [{"source": "corpus", "path": "000.txt"}]}, by="me")
    assert wait(run, number).result["from_step"] == STEPS + 1
    assert json.loads((run / "quarantine.jsonl").read_text())["by"] == "me"


@pytest.mark.slow
def test_a_replay_of_a_run_that_has_ended_is_done_all_the_same(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    answer = wait(run, request(run, "replay", {"step": 8}, by="me"), 120)
    assert answer.status == "done", answer.result
    assert answer.result["loss"] == pytest.approx(replay_run(run, 8, device="cpu").loss, rel=1e-6)
    failed = wait(run, request(run, "replay", {"step": 2}), 120)
    assert "no checkpoint before step 2" in failed.result["error"]


def test_commands_left_by_a_dead_trainer_are_answered(
    config: PretrainConfig, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    longer = replace(config, train=replace(config.train, steps=STEPS + 2))
    with Commands(run) as commands:
        number = commands.enqueue("checkpoint", {}, "someone")
        assert commands.take_command() is not None  # and died
        late = commands.enqueue("checkpoint", {}, "someone")
    resume_run(run, longer)
    assert "the process ended" in wait(run, number).result["error"]
    assert wait(run, late).status == "done"  # asked while nobody trained, done by the one who came
    with Commands(run) as commands:
        assert commands.commands("queued") == commands.commands("running") == []


@pytest.mark.parametrize(
    ("action", "arguments", "told"),
    [
        ("rollback", {}, "did you mean 'rollback_skip'"),
        ("pause", {"step": 3}, "pause has no argument 'step'"),
        ("rollback_skip", {}, "needs skip"),
        ("rollback_skip", {"skip": [4]}, "\\[first step, last step\\]"),
        ("rollback_skip", {"skip": [4, 3]}, "last is not before first"),
        ("rollback_skip", {"skip": [4, 5], "to_step": 4}, "does not lie before the first step to skip"),
        ("rollback_skip", {"skip": [True, 5]}, "\\[first step, last step\\]"),
        ("rollback_skip", {"skip": [1, 10**15]}, "at most 100,000 steps"),
        ("replay", {}, "needs the step"),
        ("replay", {"step": 0}, "1 or more"),
        ("replay", {"step": 3, "at": "after"}, "1 or more"),
        ("quarantine", {"documents": []}, "a list of 1 to"),
        ("quarantine", {"documents": [{"path": "x"}]}, "source and a path"),
        ("capture", {"steps": 1000}, "at most 20"),
    ],
)
def test_requests_are_checked_before_they_are_sent(action: str, arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        validate(action, arguments)


@pytest.mark.parametrize("damage", ["arguments", "incident", "database"])
def test_a_store_that_is_damaged_while_it_trains_ends_nothing(
    config: PretrainConfig, straight: Path, tmp_path: Path, damage: str
) -> None:
    run = tmp_path / "run"

    class Damages(Asks):
        def write(self, event: Event) -> None:
            super().write(event)
            if event.name != "train" or event.step != 4:
                return
            if damage == "database":
                (run / "monitor" / "monitor.db").write_bytes(b"no database" * 1000)
                return
            with RunStore(run) as store:
                store.set_meta("a", 1)
                if damage == "arguments":
                    for status in ("queued", "running"):
                        store._run(
                            "INSERT INTO commands (action, arguments, by, status, result, created) "
                            "VALUES ('pause', '{', '', ?, '{}', 0)", status, write=True,
                        )  # fmt: skip
                else:
                    store._run(
                        "INSERT INTO incidents (id, time, step, status, data) VALUES ('a', 0, 1, 'open', '{')",
                        write=True,
                    )
            if damage == "incident":
                request(run, "checkpoint", {"incident": "b"})

    pretrain(config, run, sinks=[Damages(run, {})])
    assert events(run)[-1]["event"] in ("done", "warning")
    assert identical(tensors(run), tensors(straight))
