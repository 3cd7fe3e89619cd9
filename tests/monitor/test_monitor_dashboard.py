"""The dashboard as a process: what a user types, sees and interrupts; and the page it serves."""

from __future__ import annotations

import builtins
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from monitor_web import client, make_run

from deepseek.errors import ConfigError, MissingExtraError
from deepseek.events import Event
from deepseek.monitor.access import Access
from deepseek.monitor.background import BackgroundDashboard
from deepseek.monitor.dashboard import NO_PAGE, Page, application, bind, url
from deepseek.monitor.terminal import TerminalSink

PATIENCE = 120.0  #: seconds; a process that imports torch needs some on a busy machine


def start(*args: str, cwd: Path, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, "-m", "deepseek", *args], cwd=cwd, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)  # fmt: skip


def address(process: subprocess.Popen[str]) -> str:
    """The address that a process prints."""
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"http://\S+", line):
            return found[0]
    raise AssertionError("no address: " + (process.stderr.read() if process.stderr else ""))


def fetch(address: str, **headers: str) -> Any:
    request = urllib.request.Request(address, headers=headers)
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        return json.loads(answer.read())


def gone(address: str) -> bool:
    """Whether nobody listens there any more."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(address, timeout=PATIENCE).close()
        except urllib.error.HTTPError:
            pass
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    make_run(place / "runs" / "mine", steps=50)
    return place


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_interrupted(root: Path, number: signal.Signals) -> None:
    process = start("monitor", "--port", "0", cwd=root)
    try:
        found = address(process)
        assert re.fullmatch(r"http://localhost:\d+/", found)
        assert [run["id"] for run in fetch(f"{found}api/runs")] == ["mine"]
        stream = urllib.request.urlopen(f"{found}api/runs/mine/stream", timeout=PATIENCE)
        assert stream.readline().startswith(b"retry")
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE)
        assert errors == ""
        stream.close()
    finally:
        process.kill()
        process.communicate()


def test_a_name_in_runs_and_a_token(root: Path) -> None:
    process = start("monitor", "mine", "--port", "0", "--token", "auto", "--host", "127.0.0.1", cwd=root)
    try:
        base, _, token = address(process).partition("?token=")
        assert len(token) >= 32
        with pytest.raises(urllib.error.HTTPError, match="401"):
            fetch(f"{base}api/runs")
        assert fetch(f"{base}api/runs", Authorization=f"Bearer {token}")[0]["id"] == "mine"
    finally:
        process.kill()
        process.communicate()


def test_other_machines_need_a_token(root: Path) -> None:
    done = start("monitor", "--host", "0.0.0.0", cwd=root)
    output, errors = done.communicate(timeout=PATIENCE)
    assert done.returncode == 2
    assert "--token auto" in errors
    assert output == ""


def test_the_dashboard_of_a_run_ends_with_it(root: Path) -> None:
    told: list[str] = []
    with BackgroundDashboard(root / "runs" / "mine", told.append) as dashboard:
        end = time.monotonic() + PATIENCE
        while not told and time.monotonic() < end:
            time.sleep(0.02)
        found = re.search(r"http://\S+", told[0])
        assert found is not None
        assert fetch(f"{found[0]}api/runs")[0]["id"] == "mine"
        process = dashboard._process
    assert process is not None
    assert process.poll() == 0
    assert gone(found[0])


OWNER = """
import sys, time
from pathlib import Path
from deepseek.monitor.background import BackgroundDashboard
with BackgroundDashboard(Path(sys.argv[1]), lambda text: print(text, flush=True)):
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
def test_the_dashboard_of_a_run_that_is_killed_ends_too(root: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(root / "runs" / "mine")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        found = address(process)
        assert fetch(f"{found}api/runs")
    finally:
        process.kill()
        process.communicate()
    assert gone(found)


def test_a_run_says_how_to_watch_it(capsys: pytest.CaptureFixture[str]) -> None:
    sink = TerminalSink()
    for _ in range(2):
        sink.write(Event("run", 0, {"run": "mine", "directory": "runs/my run", "total_steps": 5}))
    sink.close()
    assert capsys.readouterr().out.count("deepseek monitor 'runs/my run'") == 1
    quiet = TerminalSink(quiet=True)
    quiet.write(Event("run", 0, {"run": "mine", "directory": "runs/mine"}))
    quiet.close()
    assert "monitor" not in capsys.readouterr().out


# --- the address --------------------------------------------------------------------------------------------------


def test_a_free_port_is_found() -> None:
    with bind("127.0.0.1", None) as first, bind("127.0.0.1", None) as second:
        assert first.getsockname()[1] != second.getsockname()[1]
        with pytest.raises(ConfigError, match="--port 0"):
            bind("127.0.0.1", first.getsockname()[1])
    for host, port in (("no.such.host.invalid", 0), ("127.0.0.1", 99999), ("127.0.0.1", -1)):
        with pytest.raises(ConfigError, match="cannot listen"):
            bind(host, port)


def test_addresses_to_open() -> None:
    with bind("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        assert url(bound) == f"http://localhost:{port}/"
        assert url(bound, "secret") == f"http://localhost:{port}/?token=secret"


@pytest.mark.parametrize("package", ["starlette", "orjson"])
def test_without_the_extra(package: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name=package)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingExtraError, match=r"deepseek-framework\[web\]"):
        application(root)


# --- the page -----------------------------------------------------------------------------------------------------


@pytest.fixture
def dist(tmp_path: Path) -> Path:
    (tmp_path / "assets").mkdir()
    (tmp_path / "index.html").write_text("<!doctype html><title>page</title>")
    (tmp_path / "assets" / "main-1a2b.js").write_text("let x = 1;\n" * 500)
    (tmp_path / "secret.txt").write_text("x")
    return tmp_path


def page_client(dist: Path, root: Path) -> Any:
    from starlette.testclient import TestClient

    return TestClient(application(root, Access(), dist=dist), base_url="http://localhost")


def test_the_page_and_its_assets(dist: Path, root: Path) -> None:
    with page_client(dist, root) as web:
        for path in ("/", "/run/mine", "/run/mine/incident/3"):
            answer = web.get(path)
            assert answer.text == "<!doctype html><title>page</title>"
            assert answer.headers["cache-control"] == "no-cache"
        script = web.get("/assets/main-1a2b.js", headers={"accept-encoding": "gzip"})
        assert script.headers["content-type"] == "text/javascript; charset=utf-8"
        assert script.headers["content-encoding"] == "gzip"
        assert "immutable" in script.headers["cache-control"]
        assert script.text.startswith("let x")
        assert web.get("/assets/main-1a2b.js", headers={"accept-encoding": "identity"}).text == script.text
        assert web.get("/assets/gone.js").status_code == 404
        tag = script.headers["etag"]
        assert web.get("/assets/main-1a2b.js", headers={"if-none-match": tag}).status_code == 304


def test_a_new_build_is_seen_without_a_restart(dist: Path, root: Path) -> None:
    with page_client(dist, root) as web:
        assert "page" in web.get("/").text
        (dist / "index.html").write_text("<title>newer</title>")
        os.utime(dist / "index.html", (1, 1))
        assert "newer" in web.get("/").text


def test_without_a_page_there_is_a_message(tmp_path: Path, root: Path) -> None:
    with page_client(tmp_path / "none", root) as web:
        assert web.get("/").text == NO_PAGE
        assert web.get("/api/runs").json()


def test_links_and_odd_names_lead_nowhere(dist: Path, tmp_path: Path) -> None:
    page = Page(dist)
    for path in ("../secret.txt", "..", "assets/../secret.txt", "\x00.txt", "/etc/passwd", "secret.txt/"):
        found = page.get(path)
        assert found is None or found.content in (b"x", b"<!doctype html><title>page</title>")
    assert page.get("../secret.txt") is None


def test_the_real_page_asks_for_nothing_from_elsewhere(root: Path) -> None:
    with client(root / "runs") as web:
        text = web.get("/").text
        links = re.findall(r'(?:src|href)="([^"]+)"', text)
        assert all(not re.match(r"(?:\w+:)?//", link) for link in links)
        assert "<script>" not in text
        assert " style=" not in text
        for link in links:
            if link.endswith((".js", ".css")):
                assert web.get("/" + link.lstrip("./")).status_code == 200
