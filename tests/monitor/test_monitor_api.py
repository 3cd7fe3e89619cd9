"""The dashboard's interface: right answers from runs with known series, and an error of 4xx for everything else."""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import shutil
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from monitor_runs import events, write_run
from monitor_web import ACT, client, expected, make_run
from starlette.requests import Request
from starlette.testclient import TestClient

from deepseek.errors import RunError
from deepseek.monitor.dashboard import application
from deepseek.monitor.series import SeriesWriter
from deepseek.monitor.store import RunStore
from deepseek.monitor.wire import BadRequest, body


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    make_run(root / "mine", spike=1777)
    make_run(root / "sweep" / "low", steps=50)
    return root


@pytest.fixture(scope="module")
def web(root: Path) -> Any:
    with client(root) as web:
        yield web


def get(web: TestClient, path: str, status: int = 200) -> Any:
    answer = web.get(path)
    assert answer.status_code == status, answer.text
    return answer.json()


def test_the_list_of_runs(web: TestClient) -> None:
    found = {run["id"]: run for run in get(web, "/api/runs")}
    assert set(found) == {"mine", "sweep~low"}
    mine = found["mine"]
    assert found["sweep~low"]["name"] == "sweep/low"
    assert (mine["status"], mine["step"], mine["total_steps"], mine["parameters"]) == (
        "finished",
        3000,
        3000,
        1234,
    )
    assert mine["loss"] == pytest.approx(float(expected("train/loss", 3000, 3000)[0]), rel=1e-6)
    assert mine["updated"] == 1.7e9 + 3000
    assert 20 < len(mine["spark"]) <= 48


def test_a_run_in_detail(web: TestClient) -> None:
    found = get(web, "/api/runs/mine")
    assert found["facts"]["device"] == "cpu"
    assert "preset" in found["config"]
    assert [c["step"] for c in found["checkpoints"]] == [100]
    assert {"experts", "inspect"} <= set(found["pages"])
    assert "precision" not in found["pages"]


def test_series_have_newest_values(web: TestClient) -> None:
    found = {s["name"]: s for s in get(web, "/api/runs/mine/series")}
    assert len(found) == 11
    assert found["layer/2/grad_norm"]["last"] == pytest.approx(6.0)
    assert found["layer/2/grad_norm"]["step"] == 3000
    assert found["train/loss"]["group"] == "train"


def test_a_raw_window_is_the_series(web: TestClient) -> None:
    found = get(web, "/api/runs/mine/data?name=train/grad_norm&start=1001&stop=1100")["train/grad_norm"]
    assert found["raw"]
    assert found["step"] == list(range(1001, 1101))
    assert np.array_equal(np.float32(found["mean"]), expected("train/grad_norm", 1001, 1100))
    assert found["low"] == found["high"] == found["mean"]


@pytest.mark.parametrize("points", [3, 20, 100, 1500])
def test_a_spike_of_one_step_is_in_every_window(web: TestClient, points: int) -> None:
    found = get(web, f"/api/runs/mine/data?name=train/loss&points={points}")["train/loss"]
    assert len(found["step"]) <= points
    assert max(found["high"]) == 8.0
    at = int(np.argmax(found["high"]))
    assert found["step"][at] <= 1777 < (found["step"] + [9999])[at + 1]


def test_patterns_choose_many_series(web: TestClient) -> None:
    assert set(get(web, "/api/runs/mine/data?name=layer/*/grad_norm&points=10")) == {
        f"layer/{i}/grad_norm" for i in range(3)
    }
    assert get(web, "/api/runs/mine/data?name=nothing/*") == {}


def test_compare_ranks_experts_events(web: TestClient) -> None:
    both = get(web, "/api/compare?run=mine&run=sweep~low&name=train/loss&points=50")
    assert [max(w["step"]) for w in both.values()] == [2945, 50] or max(both["sweep~low"]["step"]) == 50
    ranks = get(web, "/api/runs/mine/ranks?points=10")
    assert ranks["ranks"] == [0, 1]
    assert np.allclose(ranks["seconds"], [[0.1] * len(ranks["steps"]), [0.2] * len(ranks["steps"])])
    (layer,) = get(web, "/api/runs/mine/experts?points=10")["layers"]
    assert layer["index"] == 1
    assert layer["load"] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert len(layer["history"]["load"]) == 4
    assert [e["event"] for e in get(web, "/api/runs/mine/events?name=evaluate&name=done")] == [
        "evaluate",
        "done",
    ]


def test_nan_is_null_and_told_apart(tmp_path: Path) -> None:
    with SeriesWriter(tmp_path / "r" / "monitor") as writer:
        for step, value in enumerate([1.0, float("nan"), float("inf"), 4.0, float("-inf")]):
            writer.log(step, {"x": value})
    with client(tmp_path) as web:
        found = get(web, "/api/runs/r/data?name=x")["x"]
        assert found["mean"] == [1.0, None, None, 4.0, None]
        assert found["nonfinite"] == [[1, "nan"], [2, "inf"], [4, "-inf"]]
        coarse = get(web, "/api/runs/r/data?name=x&points=1")["x"]
        assert (coarse["low"], coarse["high"]) == ([1.0], [4.0])
        assert coarse["nonfinite"] == found["nonfinite"]


def test_answers_are_compressed(web: TestClient) -> None:
    answer = web.get("/api/runs/mine/data?name=train/loss", headers={"accept-encoding": "gzip"})
    assert answer.headers["content-encoding"] == "gzip"
    assert len(answer.json()["train/loss"]["step"]) > 1000


def test_one_run_as_the_root(root: Path) -> None:
    with client(root / "mine") as web:
        assert [run["id"] for run in get(web, "/api/runs")] == ["mine"]
        assert get(web, "/api/runs/mine")["step"] == 3000


def test_the_root_may_be_empty_or_appear_later(tmp_path: Path) -> None:
    with client(tmp_path / "later") as web:
        assert get(web, "/api/runs") == []
        make_run(tmp_path / "later" / "new", steps=5)
        assert get(web, "/api/runs/new")["step"] == 5  # asked for by name, it is looked for at once
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        application(tmp_path / "file")


# --- what people write --------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> Path:
    run = make_run(tmp_path / "runs" / "mine", steps=20)
    incident = {"id": "a1", "step": 12, "kind": "loss_spike", "verdict": "DATA", "title": "Spike",
                "samples": [{"text": "secret"}], "gradient_map": {"values": [[1.0]]}}  # fmt: skip
    with RunStore(run) as store:
        store.put_incident(incident)
        store.add_lineage("run", 0, corpus="abc")
    return run


def test_incidents_are_listed_opened_and_marked(written: Path) -> None:
    with client(written.parent) as web:
        (listed,) = get(web, "/api/runs/mine/incidents")
        assert listed["verdict"] == "DATA"
        assert "samples" not in listed
        assert get(web, "/api/runs/mine/incidents/a1")["samples"] == [{"text": "secret"}]
        assert get(web, "/api/runs")[0]["incidents_open"] == 1
        answer = web.patch("/api/runs/mine/incidents/a1", json={"status": "acknowledged"}, headers=ACT)
        assert answer.status_code == 200
        assert get(web, "/api/runs")[0]["incidents_open"] == 0
        assert (
            web.patch("/api/runs/mine/incidents/a1", json={"status": "gone"}, headers=ACT).status_code == 400
        )
        assert (
            web.patch("/api/runs/mine/incidents/zz", json={"status": "open"}, headers=ACT).status_code == 404
        )
        assert web.patch("/api/runs/mine/incidents/a1", json={"status": "open"}).status_code == 403
    with RunStore(written) as store:
        assert store.incident("a1")["status"] == "acknowledged"
        assert store.incident("a1")["samples"] == [{"text": "secret"}]


def test_notes_and_lineage(written: Path) -> None:
    with client(written.parent) as web:
        answer = web.post(
            "/api/runs/mine/notes", json={"text": "lr halved", "step": 7, "by": "Ada"}, headers=ACT
        )
        assert answer.status_code == 201
        (note,) = get(web, "/api/runs/mine/notes")
        assert (note["text"], note["step"], note["by"]) == ("lr halved", 7, "Ada")
        for wrong in (
            {},
            {"text": ""},
            {"text": 3},
            {"text": "x", "step": "7"},
            {"text": "x", "step": -1},
            {"text": "x" * 20000},
        ):
            assert web.post("/api/runs/mine/notes", json=wrong, headers=ACT).status_code == 400
        found = get(web, "/api/runs/mine/lineage")
        assert found["lines"][0]["data"] == {"corpus": "abc"}
        assert [e["event"] for e in found["events"]] == ["run", "done"]


def test_actions_on_a_run_that_is_over_say_what_to_do(written: Path) -> None:
    with client(written.parent) as web:
        url = "/api/runs/mine/actions"
        answer = web.post(url, json={"action": "rollback_skip", "arguments": {"skip": [10, 12]}}, headers=ACT)
        assert answer.status_code == 409
        assert "deepseek resume" in answer.json()["error"]
        for wrong in (
            {"action": "explode"},
            {},
            {"action": "pause", "arguments": {"x": 1}},
            {"action": "pause", "arguments": [1]},
        ):
            assert web.post(url, json=wrong, headers=ACT).status_code == 400
        assert web.post(url, content=b"{not json", headers=ACT).status_code == 400
        assert web.post(url, content=b"[]", headers=ACT).status_code == 400
        assert web.post(url, content=b"x" * (1 << 20), headers=ACT).status_code == 413
        assert web.post(url, json={"action": "pause"}).status_code == 403
        assert get(web, url) == []


# --- old runs -----------------------------------------------------------------------------------------------------


def test_a_run_that_has_only_events_is_rebuilt_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = events(200, stop=120)
    run = write_run(tmp_path / "runs" / "old", rows)
    before = sorted(p.name for p in run.iterdir())
    for _ in range(2):
        with client(tmp_path / "runs") as web:
            found = get(web, "/api/runs/old/data?name=train/loss")["train/loss"]
            by_step = {e["step"]: e["loss"] for e in rows if e["event"] == "train"}
            assert found["step"] == sorted(by_step)
            assert np.allclose(found["mean"], [by_step[s] for s in sorted(by_step)], rtol=1e-6)
            assert get(web, "/api/runs/old/experts")["layers"]
    assert sorted(p.name for p in run.iterdir()) == before
    assert len(list((tmp_path / "cache").rglob("*.journal"))) == 1  # the second time it was there


def test_a_live_run_without_a_store_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = events(100)
    run = write_run(tmp_path / "runs" / "old", rows[:40])
    with client(tmp_path / "runs") as web:
        first = get(web, "/api/runs/old/data?name=train/loss")["train/loss"]["step"]
        with (run / "events.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows[40:60])
            file.write('{"event": "train", "st')  # torn
        time.sleep(0.15)
        then = get(web, "/api/runs/old/data?name=train/loss")["train/loss"]["step"]
        assert len(then) == len(first) + 20
    write_run(run, rows[:10])  # begun anew: what the cache has is of another file
    with client(tmp_path / "runs") as web:
        found = get(web, "/api/runs/old/data?name=train/loss")["train/loss"]["step"]
        assert found == sorted(e["step"] for e in rows[:10] if e["event"] == "train")


# --- what can be wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/runs/none", 404),
        ("/api/runs/none/data?name=x", 404),
        ("/api/runs/mine/data", 400),
        ("/api/runs/mine/data?name=none", 404),
        ("/api/runs/mine/data?name=train/loss&points=0", 400),
        ("/api/runs/mine/data?name=train/loss&points=1e9", 400),
        ("/api/runs/mine/data?name=train/loss&start=abc", 400),
        ("/api/runs/mine/data?name=train/loss&start=nan", 400),
        ("/api/runs/mine/data?name=train/loss&stop=" + "9" * 400, 400),
        ("/api/compare", 400),
        ("/api/nothing", 404),
        ("/api/runs/mine/export?format=xml", 400),
        ("/api/runs/mine/export?name=none*", 404),
        ("/api/runs/mine/incidents/none", 404),
        ("/metrics?run=none", 404),
    ],
)
def test_wrong_requests(web: TestClient, path: str, status: int) -> None:
    assert get(web, path, status)["error"]


def test_methods_that_are_not_there(web: TestClient) -> None:
    for method, path in [
        ("DELETE", "/api/runs/mine"),
        ("POST", "/api/runs"),
        ("PUT", "/api/runs/mine/notes"),
    ]:
        answer = web.request(method, path, headers=ACT)
        assert answer.status_code == 405
        assert answer.json()["error"]


@pytest.mark.parametrize(
    "path",
    ["..", "../mine", "%2e%2e", "..%2f..%2fetc%2fpasswd", "%2e%2e%2fmine", "mine%00", "sweep/low", "sweep%2flow",
     "~", "/etc", "....//", "..\\..", "%5c..%5c", "mine~..~mine", "sweep~low~..", "C:", "con", "\u202e", "%ff%fe"],
)  # fmt: skip
def test_ids_lead_to_no_other_directory(web: TestClient, path: str) -> None:
    for rest in ("", "/series", "/events", "/export"):
        answer = web.get(f"/api/runs/{path}{rest}")
        page = answer.headers["content-type"].startswith(
            "text/html"
        )  # where the client has cut the path short
        assert answer.status_code == 404 or page, answer.text
        assert "root:" not in answer.text


@pytest.mark.parametrize(
    "path",
    [
        "/../pyproject.toml",
        "/assets/../../api.py",
        "/%2e%2e/%2e%2e/api.py",
        "/..%2f..%2fapi.py",
        "//etc/passwd",
        "/%00.js",
    ],
)
def test_the_page_serves_only_its_own_files(web: TestClient, path: str) -> None:
    answer = web.get(path)
    assert answer.status_code in (200, 404)
    assert "def " not in answer.text
    assert "root:" not in answer.text
    assert "[project]" not in answer.text


def test_garbage_is_never_our_fault(web: TestClient) -> None:
    """Three hundred requests of random parts: an answer below 500 with an error in JSON, every time."""
    rng = random.Random(4)
    paths = ["", "/series", "/data", "/stream2", "/ranks", "/experts", "/events", "/incidents", "/incidents/x",
             "/notes", "/lineage", "/actions", "/alerts", "/samples", "/traces", "/export"]  # fmt: skip
    keys = ["name", "start", "stop", "points", "limit", "run", "format", "step", "layer", "after", "by"]
    odd = ["", "0", "-1", "1e308", "NaN", "inf", "train/loss", "*", "[", "[!", "\x00", "💥", "a" * 3000, "../..",
           "%s%n", "1;--", "{}", "9" * 30, "-9" * 9, "0x10", "1_0", "٣", "true", "null"]  # fmt: skip
    for _ in range(300):
        path = (
            "/api/runs/mine" + rng.choice(paths)
            if rng.random() < 0.8
            else rng.choice(["/api/compare", "/metrics", "/api/runs/"])
        )
        query = [(rng.choice(keys), rng.choice(odd)) for _ in range(rng.randrange(4))]
        method = rng.choice(["GET", "GET", "GET", "POST", "PATCH"])
        content = rng.choice(
            [
                b"",
                b"{}",
                b"[" * 5000,
                b'{"text": 1e999}',
                b'{"action": null}',
                b"\xff",
                b'{"status": ["open"]}',
            ]
        )
        answer = web.request(
            method, path, params=query, headers=ACT, content=None if method == "GET" else content
        )
        assert answer.status_code < 500, (method, path, query, content, answer.text)
        if answer.status_code >= 400:
            assert isinstance(answer.json()["error"], str)


def test_a_run_that_vanishes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "gone", steps=20)
    make_run(tmp_path / "stays", steps=20)
    with client(tmp_path) as web:
        assert get(web, "/api/runs/gone/series")
        shutil.rmtree(run)
        for rest in (
            "",
            "/series",
            "/data?name=train/loss",
            "/events",
            "/notes",
            "/incidents",
            "/experts",
            "/export",
        ):
            assert web.get(f"/api/runs/gone{rest}").status_code in (404, 410)
        assert [r["id"] for r in get(web, "/api/runs")] == ["stays"]


def test_damaged_stores_are_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "bad", steps=5000)
    make_run(tmp_path / "good", steps=20)
    with RunStore(run) as store:
        store.add_note("x")
    for path in (run / "monitor").iterdir():
        data = bytearray(path.read_bytes())
        for i in random.Random(0).sample(range(len(data)), min(200, len(data))):
            data[i] ^= 0x5A
        path.write_bytes(data)
    with client(tmp_path) as web:
        for rest in (
            "",
            "/series",
            "/data?name=train/loss",
            "/notes",
            "/incidents",
            "/experts",
            "/lineage",
            "/actions",
        ):
            answer = web.get(f"/api/runs/bad{rest}")
            assert answer.status_code < 500, answer.text
        assert web.get("/api/runs/bad/notes").status_code == 422
        found = {r["id"]: r for r in get(web, "/api/runs")}
        assert found["bad"]["incidents_open"] is None
        assert "monitor.db" in found["bad"]["store_error"]
        assert found["good"]["incidents_open"] == 0
        assert get(web, "/api/runs/good")["step"] == 20


def test_events_that_are_nonsense(tmp_path: Path) -> None:
    run = make_run(tmp_path / "odd", steps=10)
    with (run / "events.jsonl").open("ab") as file:
        file.write(
            b'\xff\xfe\n[1,2]\n{"event": 3}\n{"event": "run", "pid": "x", "total_steps": "many", "step": null}\n'
        )
        file.write(
            b'\n{"event": "run", "time": "yesterday", "pid": 1e40, "device": {"a": [1]}}\n'
            + b"[" * 100_000
            + b"\n"
        )
    with client(tmp_path) as web:
        assert get(web, "/api/runs/odd")["step"] == 10
        assert web.get("/metrics").status_code == 200


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="needs a user whom permissions stop")
def test_a_run_that_may_only_be_read(written: Path) -> None:
    for path in [written, *written.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        with client(written.parent) as web:
            assert get(web, "/api/runs/mine")["step"] == 20
            assert get(web, "/api/runs/mine/incidents")
    finally:
        for path in [written, *written.rglob("*")]:
            path.chmod(0o755)


# --- for other programs -------------------------------------------------------------------------------------------


def test_csv_and_parquet(web: TestClient) -> None:
    answer = web.get("/api/runs/mine/export?format=csv&name=train/*")
    lines = answer.text.splitlines()
    assert lines[0] == "step,time,train/loss,train/grad_norm"
    assert len(lines) == 3001
    table = np.loadtxt(io.StringIO(answer.text), delimiter=",", skiprows=1)
    assert np.array_equal(table[:, 3].astype(np.float32), expected("train/grad_norm", 1, 3000))
    assert table[0, 1] == 1.7e9 + 1
    parquet = pytest.importorskip("pyarrow.parquet")
    answer = web.get("/api/runs/mine/export?format=parquet")
    found = parquet.read_table(io.BytesIO(answer.content))
    assert found.num_rows == 3000
    assert np.array_equal(found["train/grad_norm"].to_numpy(), expected("train/grad_norm", 1, 3000))
    assert not list(Path("/tmp").glob("deepseek-*.parquet"))


def test_a_database_of_another_program_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", steps=3)
    with sqlite3.connect(run / "monitor" / "monitor.db") as database:
        database.execute("CREATE TABLE notes (other TEXT)")
    database.close()
    with client(tmp_path) as web:
        answer = web.get("/api/runs/r/notes")
        assert answer.status_code == 422
        assert "monitor.db" in answer.json()["error"]


# --- what became of a run -----------------------------------------------------------------------------------------


def test_a_run_on_another_machine_is_judged_by_its_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "far", steps=5, status="running")
    lines = (run / "events.jsonl").read_text().splitlines()
    (run / "events.jsonl").write_text(
        "\n".join([lines[0].replace(f'"pid": {os.getpid()}', '"pid": 99999999'), *lines[1:], ""])
    )
    with client(tmp_path) as web:
        assert (
            get(web, "/api/runs")[0]["status"] == "crashed"
        )  # it was this machine, and no such process is here
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    with client(tmp_path) as web:
        assert get(web, "/api/runs")[0]["status"] == "running"
    monkeypatch.setattr("deepseek.monitor.openrun.SILENT", 0.0)
    with client(tmp_path) as web:
        assert get(web, "/api/runs")[0]["status"] == "crashed"


def test_a_store_without_events(tmp_path: Path) -> None:
    with SeriesWriter(tmp_path / "own" / "monitor") as writer:
        writer.log(3, {"loss": 1.0})
        with client(tmp_path) as web:
            assert get(web, "/api/runs")[0]["status"] == "running"


@pytest.mark.skipif(sys.platform != "linux", reason="names that are bytes")
@pytest.mark.parametrize(
    "name",
    ["中文 é", "a b&c=d?e#f", "<img src=x onerror=alert(1)>", "\udcff\udcfe", 'it\'s "quoted"', "-rf"],
)
def test_runs_of_any_name(tmp_path: Path, name: str) -> None:
    make_run(tmp_path / "runs" / name, steps=5)
    with client(tmp_path / "runs") as web:
        (listed,) = get(web, "/api/runs")
        url = "/api/runs/" + quote(listed["id"], safe="")
        assert get(web, url)["step"] == 5
        assert get(web, f"{url}/data?name=train/loss")["train/loss"]["step"] == [1, 2, 3, 4, 5]
        for kind in ("csv", "parquet"):
            answer = web.get(f"{url}/export?format={kind}")
            assert answer.status_code == 200
            assert "attachment" in answer.headers["content-disposition"]
        assert 'deepseek_run_step{run="' in web.get("/metrics").text


def test_numbers_and_texts_that_json_lacks(tmp_path: Path) -> None:
    run = make_run(tmp_path / "odd", steps=3)
    with (run / "events.jsonl").open("a") as file:
        file.write(
            '{"event": "run", "step": 0, "parameters": '
            + "9" * 40
            + ', "device": "\\ud800", "x": [1e999, NaN]}\n'
        )
    with client(tmp_path) as web:
        assert get(web, "/api/runs/odd")["facts"]["parameters"] == "9" * 40
        assert get(web, "/api/runs")[0]["device"] == "?"
        assert web.get("/metrics").status_code == 200


def test_a_client_that_goes_away_in_the_middle_of_its_request_is_no_fault() -> None:
    async def gone() -> dict[str, str]:
        return {"type": "http.disconnect"}

    with pytest.raises(BadRequest, match="went away"):
        asyncio.run(body(Request({"type": "http", "method": "POST", "headers": []}, gone)))
