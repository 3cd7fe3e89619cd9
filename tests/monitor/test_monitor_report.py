"""The report page: well-formed, self-contained, safe, and complete."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from monitor_runs import START, events, write_run

from deepseek.errors import RunError
from deepseek.monitor.markup import VOID, Html, data_block, tag
from deepseek.monitor.report import write_report

HOSTILE = "</script><script>alert(1)</script>'\"><img src=x onerror=alert(2)>&amp;\u202e\x00"


class Page(HTMLParser):
    """A strict reader: every element is closed in order; keeps elements, text and scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.scripts: list[tuple[dict[str, str], str]] = []
        self.styles: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {k: v or "" for k, v in attrs}
        assert len(values) == len(attrs), "an attribute twice"
        self.elements.append((tag, values))
        if tag == "script":
            self.scripts.append((values, ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without a start"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self.open and self.open[-1] == "style":
            self.styles.append(data)
        else:
            self.text.append(data)

    def named(self, tag: str) -> list[dict[str, str]]:
        return [values for name, values in self.elements if name == tag]

    def charts(self) -> list[dict[str, Any]]:
        return [json.loads(text) for attrs, text in self.scripts if attrs.get("type") == "application/json"]


def render(directory: Path, rows: list[dict[str, Any]], **options: Any) -> tuple[str, Page]:
    text = write_report(write_run(directory, rows, **options)).read_text(encoding="utf-8")
    return text, Page(text)


def test_page_is_well_formed_and_loads_nothing(tmp_path: Path) -> None:
    text, page = render(tmp_path / "run", events())
    for name, values in page.elements:
        for key, value in values.items():
            assert not key.startswith("on"), f"<{name} {key}>"
            assert key != "style", "the policy forbids inline style"
            if key in {"src", "href", "xlink:href", "action", "srcset", "poster", "data"}:
                assert value.startswith(("data:image/png;base64,", "#")), f"<{name} {key}={value[:40]}>"
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    assert not {"link", "iframe", "object", "embed", "base"} & {name for name, _ in page.elements}


def test_policy_allows_exactly_the_page_s_own_script_and_style(tmp_path: Path) -> None:
    _, page = render(tmp_path / "run", events(60, stop=None))
    policy = next(
        m["content"] for m in page.named("meta") if m.get("http-equiv") == "Content-Security-Policy"
    )
    code = [text for attrs, text in page.scripts if "type" not in attrs]

    def digest(content: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() + "'"

    assert len(code) == 1
    assert f"script-src {digest(code[0])};" in policy
    assert f"style-src {digest(''.join(page.styles))};" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_charts_have_names_and_numbers(tmp_path: Path) -> None:
    _, page = render(tmp_path / "run", events())
    ids = {f["id"] for f in page.named("figure") if "id" in f}
    assert {"loss", "bits-per-byte", "gradient", "rate", "mfu", "load-2", "gate-7", "coverage"} <= ids
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in page.named("svg"))
    text = " ".join(page.text)
    for expected in (
        "quickstart",
        "1.121",
        "1.957",
        "1.871",
        "each file",
        "one archive",
        "3.41M",
        "9.83M",
        "41.0%",
    ):
        assert expected in text
    assert "resumed at 320" in text
    assert "SIGTERM" in text
    assert "experts_per_token = 2" in text
    assert "not valid UTF-8 at byte 18,244" in text
    assert "needs 27% fewer bits" in text


def test_a_spike_of_one_step_is_drawn_in_a_long_run(tmp_path: Path) -> None:
    rows = events(12_000, stop=None, layers=1, experts=2, spike=7_777)
    _, page = render(tmp_path / "run", rows)
    chart = next(c for c in page.charts() if c.get("log"))
    line = chart["lines"][0]
    assert len(line["x"]) < 3000 < 12_000
    assert (7777, 31.0) in list(zip(line["x"], line["y"]))
    path = next(v["d"] for v in page.named("path") if v.get("class") == "line s2 faint")
    top = min(float(pair.split()[1]) for pair in path[1:].split("L"))
    assert top < 30, "the drawn line does not reach the spike"


def test_the_same_events_give_the_same_page(tmp_path: Path) -> None:
    first, _ = render(tmp_path / "a" / "run", events(80))
    second, _ = render(tmp_path / "b" / "run", events(80))
    assert first == second


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    rows = events(40, stop=20)
    for row in rows:
        for key, value in list(row.items()):
            if isinstance(value, str) and key != "event":
                row[key] = HOSTILE
        if "gates" in row:
            row["gates"] = {HOSTILE: [0.5, 0.5]}
        if "seconds" in row and isinstance(row["seconds"], dict):
            row["seconds"][HOSTILE] = 0.1
        if row["event"] == "run":
            row["corpus"] = {HOSTILE: HOSTILE, "tokens": HOSTILE}
            row["command"] = ["deepseek", HOSTILE]
    rows.append({"event": "warning", "step": 40, "time": START, "text": HOSTILE, HOSTILE: HOSTILE})
    text, page = render(tmp_path / "run", rows, config=f'name = "{HOSTILE}"')
    assert "<script>alert" not in text
    assert "<img" not in text
    assert not page.named("img")
    assert len([1 for attrs, _ in page.scripts if "type" not in attrs]) == 1
    assert "alert(1)" in "".join(page.text)
    assert "\x00" not in text
    assert "\u202e" not in text


@pytest.mark.parametrize(
    "value", ["nan", "inf", "-inf", None, "garbage", [], {}, [[]], True, -1e308, {"a": ["nan"]}]
)
def test_odd_values_cost_only_their_own_place(tmp_path: Path, value: Any) -> None:
    rows = events(30, stop=15)
    for row in rows[::3]:
        for key in list(row):
            if key not in {"event", "step"}:
                row[key] = value
    rows += [{"event": "from the future", "step": value}, {"event": "train", "step": value, "loss": value}]
    text, _ = render(tmp_path / "run", rows)
    assert "Learning" in text


def test_not_finite_steps_are_marked(tmp_path: Path) -> None:
    rows = events(50, stop=None)
    next(r for r in rows if r["event"] == "train" and r["step"] == 25)["loss"] = "nan"
    _, page = render(tmp_path / "run", rows)
    loss = page.charts()[0]
    assert loss["lost"] == [25]
    assert 25 not in loss["lines"][0]["x"]
    assert "not finite at step 25" in "".join(page.text)


def test_torn_and_garbage_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", events(30, stop=None))
    with (directory / "events.jsonl").open("ab") as file:
        file.write(b'\xff\xfe garbage\n[1, 2]\n"text"\n\n{"event": 3}\n{"event": "train", "step": 31, "lo')
    text = write_report(directory).read_text(encoding="utf-8")
    Page(text)
    assert "5 lines of the events file could not be read" in text


def test_empty_run_says_so(tmp_path: Path) -> None:
    text, _ = render(tmp_path / "run", [])
    assert "no training steps yet" in text
    assert "experts_per_token = 2" in text


def test_wrong_directory_names_what_was_expected(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "good", [])
    with pytest.raises(RunError, match=r"not a run.*expected a run directory with events\.jsonl.*good"):
        write_report(tmp_path / "runs")
    with pytest.raises(RunError, match=r"no directory .*goood.*expected.*good"):
        write_report(tmp_path / "runs" / "goood")


def test_tag_escapes_all_but_markup() -> None:
    assert (
        tag("p", "<b>", Html("<i></i>"), None, ["&"], title='"x"')
        == '<p title="&quot;x&quot;">&lt;b&gt;<i></i>&amp;</p>'
    )
    assert json.loads(data_block({"a": HOSTILE}).split(">", 1)[1].rsplit("<", 1)[0]) == {"a": HOSTILE}
    assert "</script><" not in data_block(HOSTILE)
