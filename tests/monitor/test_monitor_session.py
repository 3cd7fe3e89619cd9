"""``import deepseek.monitor as wandb`` in loops of any shape."""

from __future__ import annotations

import argparse
import logging
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import deepseek.monitor as wandb
from deepseek.errors import RunError
from deepseek.monitor.runs import list_runs
from deepseek.monitor.series import SeriesReader
from deepseek.monitor.store import RunStore


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_RUNS", str(tmp_path / "runs"))


def test_the_usual_loop() -> None:
    run = wandb.init(project="mine", config={"lr": 3e-4, "steps": 5})
    assert run is wandb.run
    for step in range(5):
        wandb.log(
            {"loss": 1.0 / (step + 1), "layers": {"0": {"norm": torch.tensor(2.0)}}, "np": np.float32(3)}
        )
    assert wandb.config.lr == 3e-4
    wandb.config.update({"seed": 7})
    wandb.config["batch"] = 4
    assert wandb.summary["loss"] == pytest.approx(0.2)
    wandb.finish()
    assert wandb.run is None
    reader = SeriesReader(Path(run.dir) / "monitor")
    assert reader.raw("loss")[0].tolist() == [0, 1, 2, 3, 4]
    assert reader.raw("layers/0/norm")[1].tolist() == [2.0] * 5
    assert not list((Path(run.dir) / "monitor").glob("*.tail*"))
    text = (Path(run.dir) / "config.toml").read_text()
    assert "lr = 0.0003" in text
    assert "batch = 4" in text
    with RunStore(run.dir) as store:
        assert store.meta("summary")["np"] == 3.0
        assert store.meta("session")["project"] == "mine"
    listed = list_runs(Path(run.dir).parent)
    assert [(r.name, r.status) for r in listed] == [(run.id, "finished")]


def test_steps_and_commit_as_in_the_original() -> None:
    with wandb.init(name="a") as run:
        run.log({"x": 1}, commit=False)
        run.log({"y": 2})  # still step 0
        run.log({"x": 3})
        run.log({"x": 4}, step=10)
        run.log({"y": 5})  # goes with step 10
        run.log({"x": 6})
        run.log({"x": 7}, step=2)  # back
    reader = SeriesReader(Path(run.dir) / "monitor")
    assert [a.tolist() for a in reader.raw("x")] == [[0, 1, 2, 10, 11], [1, 3, 7, 4, 6]]
    assert [a.tolist() for a in reader.raw("y")] == [[0, 10], [2, 5]]


def test_what_is_no_number_is_left_out_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with wandb.init() as run, caplog.at_level(logging.WARNING):
        for _ in range(3):
            run.log(
                {
                    "loss": 1.0,
                    "text": "hello",
                    "many": torch.zeros(3),
                    "none": None,
                    "flag": True,
                    "bad": object(),
                }
            )
    assert set(SeriesReader(Path(run.dir) / "monitor").names()) == {"loss", "flag"}
    assert len(caplog.records) == 3


def test_summaries_that_were_asked_for() -> None:
    with wandb.init() as run:
        wandb.define_metric("loss", summary="min")
        wandb.define_metric("acc*", step_metric="epoch", summary="max", hidden=True)
        wandb.define_metric("quiet", summary="none")
        for x in (3.0, 1.0, 2.0):
            wandb.log({"loss": x, "accuracy": x, "quiet": x, "other": x})
        run.summary["best"] = "mine"
        assert dict(run.summary) == {"loss": 1.0, "accuracy": 3.0, "other": 2.0, "best": "mine"}
        with pytest.raises(RunError, match="none of"):
            run.define_metric("x", summary="median")


def test_many_runs_at_once_and_names_that_are_taken() -> None:
    first, second = wandb.init(name="same"), wandb.init(name="same")
    assert (first.id, second.id) == ("same", "same-2")
    wandb.log({"x": 1})  # the one started last
    first.log({"x": 2})
    wandb.finish()
    assert wandb.run is first
    wandb.finish()
    assert SeriesReader(Path(first.dir) / "monitor").last() == {"x": 2.0}
    assert SeriesReader(Path(second.dir) / "monitor").last() == {"x": 1.0}
    with pytest.raises(RunError, match="is finished"):
        first.log({"x": 3})
    with pytest.raises(RunError, match="init"):
        wandb.log({"x": 3})
    with pytest.raises(RunError, match="init"):
        wandb.config


def test_going_on_with_a_run() -> None:
    with wandb.init(name="a", config={"lr": 1}) as run:
        run.log({"x": 1})
        run.log({"x": 2})
    for again in ({"id": run.id}, {"name": "a", "resume": "allow"}, {"id": run.id, "resume": "must"}):
        with wandb.init(**again) as more:
            assert more.resumed
            assert more.dir == run.dir
            more.log({"x": 3})
    assert SeriesReader(Path(run.dir) / "monitor").raw("x")[0].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(RunError, match="no run"):
        wandb.init(id="other", resume="must")


def test_configs_of_any_form() -> None:
    @dataclass
    class Options:
        lr: float = 0.1

    for config in ({"lr": 0.1}, argparse.Namespace(lr=0.1), Options()):
        with wandb.init(config=config) as run:
            assert run.config.lr == run.config["lr"] == 0.1
            assert dict(run.config) == {"lr": 0.1}
            with pytest.raises(AttributeError):
                run.config.missing
    with pytest.raises(RunError):
        wandb.init(config=3)
    with wandb.init(config={"none": None, "path": Path("x"), "nested": {"a": [1, None, 2]}}) as run:
        assert "[nested]" in (run.path / "config.toml").read_text()


def test_a_disabled_run_leaves_nothing(tmp_path: Path) -> None:
    with wandb.init(mode="disabled", config={"a": 1}) as run:
        wandb.log({"x": 1})
        wandb.alert("t", "x")
        assert run.config.a == 1
        assert dict(run.summary) == {}
    assert not (tmp_path / "runs").exists()


def test_alerts_login_and_names_that_are_not_there() -> None:
    assert wandb.login(key="x")
    with wandb.init() as run:
        wandb.alert("Loss", "too high", level="WARN")
    with RunStore(run.dir) as store:
        assert [(a["text"], a["severity"]) for a in store.alerts()] == [("Loss: too high", "warning")]
    with pytest.raises(AttributeError, match="did you mean 'finish'"):
        wandb.finsh


def test_the_submodule_config_does_not_hide_the_runs_config() -> None:
    from deepseek.monitor.config import MonitorConfig

    with wandb.init(config={"lr": 1}):
        assert wandb.config.lr == 1
    assert MonitorConfig().enabled


def script(text: str, *arguments: str, **options: object) -> subprocess.Popen[str]:
    code = "import sys, deepseek.monitor as wandb\n" + textwrap.dedent(text)
    return subprocess.Popen([sys.executable, "-c", code, *arguments], text=True, **options)  # type: ignore[call-overload]


def test_a_script_that_forgets_to_finish_and_one_that_fails(tmp_path: Path) -> None:
    ends = script("wandb.init(name='ends'); wandb.log({'x': 1})")
    fails = script("wandb.init(name='fails'); wandb.log({'x': 1}); 1 / 0", stderr=subprocess.PIPE)
    assert ends.wait(60) == 0
    assert "ZeroDivisionError" in fails.communicate(timeout=60)[1]
    found = {r.name: r.status for r in list_runs(tmp_path / "runs")}
    assert found == {"ends": "finished", "fails": "interrupted"}
    for name in found:
        assert SeriesReader(tmp_path / "runs" / name / "monitor").last() == {"x": 1.0}


def test_a_killed_script_loses_nothing(tmp_path: Path) -> None:
    process = script(
        """
        wandb.init(name='killed')
        for step in range(10**9):
            wandb.log({'x': step})
            print(step, flush=True)
        """,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    last = int(process.stdout.read().split("\n")[-2])
    process.stdout.close()
    process.wait()
    assert SeriesReader(tmp_path / "runs" / "killed" / "monitor").last()["x"] >= last
    assert [r.status for r in list_runs(tmp_path / "runs")] == ["crashed"]


def test_processes_that_share_an_id_write_one_run(tmp_path: Path) -> None:
    text = """
    wandb.init(id='shared')
    for step in range(50):
        wandb.log({f'rank/{sys.argv[1]}/x': step}, step=step)
    """
    processes = [script(text, str(rank)) for rank in range(2)]
    assert [p.wait(60) for p in processes] == [0, 0]
    reader = SeriesReader(tmp_path / "runs" / "shared" / "monitor")
    assert sorted(reader.names()) == ["rank/0/x", "rank/1/x"]
    assert all(len(reader.raw(name)[0]) == 50 for name in reader.names())


def test_threads_log_into_one_run() -> None:
    with wandb.init() as run:
        threads = [threading.Thread(target=lambda: [run.log({"x": 1}) for _ in range(100)]) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert SeriesReader(run.path / "monitor").raw("x")[0].tolist() == list(range(300))


def test_importing_it_is_cheap() -> None:
    code = "import sys, deepseek.monitor; sys.exit('torch' in sys.modules or 'rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_names_that_no_directory_can_have_stay_below_the_root(tmp_path: Path) -> None:
    made = [wandb.init(name=name, config={"odd": "\ud800"}).path for name in ("🔥", "...", "𝒜" * 90)]
    made.append(wandb.init(id="..").path)
    for path in made:
        assert path.resolve().parent == (tmp_path / "runs").resolve()
        wandb.finish()


def test_one_odd_value_does_not_lose_the_others_or_end_the_loop() -> None:
    run = wandb.init(name="odd")
    run.log({"large": 10**400, "a": 1})
    run.log({"": 1, "x" * 501: 2, "a": 2})
    run.log({"meta": torch.ones((), device="meta"), "a": 3})
    run.finish()
    assert SeriesReader(run.path / "monitor").raw("a")[1].tolist() == [1, 2, 3]


def test_a_run_of_many_series_is_summed_up_at_once_and_not_once_for_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks, last = [], SeriesReader.last
    monkeypatch.setattr(SeriesReader, "last", lambda self: looks.append(self) or last(self))
    run = wandb.init(name="many")
    run.log({f"g{i % 50}/s{i}": i for i in range(5000)})
    assert len(dict(run.summary)) == 5000
    run.finish()
    assert 1 <= len(looks) <= 3
