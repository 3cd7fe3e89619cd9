"""``write_report``: one HTML page that keeps a run. It needs no network, no server and no script to be read.

Every text that comes from the run is escaped by ``markup``, and a content security policy with the hashes of
the page's own style and script stands behind it: whatever a corpus or a config contains, nothing of it can
run.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepseek.files import write_atomic
from deepseek.monitor.charts import break_text, smooth
from deepseek.monitor.figures import experts, gates, learning, speed
from deepseek.monitor.history import EventDict, History
from deepseek.monitor.markup import Html, tag
from deepseek.monitor.runs import summarize
from deepseek.monitor.units import (
    MISSING,
    duration,
    finite,
    fixed,
    flops,
    one_line,
    percent,
    si,
    significant,
    size,
    timestamp,
)

REPORT_FILE = "report.html"
WEB = Path(__file__).parent / "web"


def write_report(run_dir: Path | str) -> Path:
    """Write ``report.html`` into a run directory, whole or not at all; returns its path.

    Raises:
        RunError: ``run_dir`` is not a run directory.
    """
    history = History.read(run_dir)
    path = history.directory / REPORT_FILE
    write_atomic(path, page(history))
    return path


def page(history: History) -> str:
    """The whole page as text."""
    style, script = ((WEB / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    policy = (
        f"default-src 'none'; script-src '{_sha256(script)}'; style-src '{_sha256(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    title = f"{run_name(history)} · run report"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title),
        tag("style", Html(style)),
    )
    body = tag(
        "body", header(history), tag("main", sections(history)), footer(history), tag("script", Html(script))
    )
    return "<!DOCTYPE html>\n" + tag("html", head, body, lang="en") + "\n"


def sections(history: History) -> list[Html | None]:
    """The parts of the page in order; a part without data is left out."""
    if not history.steps:
        text = "This run has no training steps yet. When it has, write the report again."
        return [tag("p", text, class_="empty"), data_section(history), reproduce(history)]
    return [
        compression(history),
        section("learning", "Learning", learning(history)),
        section("experts", "Experts", experts(history)),
        section("gates", "Attention gates", gates(history)),
        section("speed", "Speed", speed(history)),
        sample(history),
        interruptions(history),
        data_section(history),
        reproduce(history),
    ]


def section(key: str, title: str, parts: Sequence[Html | None]) -> Html | None:
    parts = [p for p in parts if p]
    return tag("section", tag("h2", title), tag("div", parts, class_="grid"), id=key) if parts else None


def header(history: History) -> Html:
    run = history.run
    summary = summarize(history.directory)
    facts = [one_line(run[k], 60) for k in ("preset", "device", "dtype") if run.get(k)]
    if summary.started is not None:
        facts.append(timestamp(summary.started, "%Y-%m-%d %H:%M UTC"))
    status = tag("span", summary.status, class_=f"status {summary.status}")
    tiles = [
        tag("div", tag("dt", label), tag("dd", value, tag("small", detail) if detail else None))
        for label, value, detail in headline_numbers(history)
    ]
    return tag(
        "header",
        tag("p", "Run report", class_="eyebrow"),
        tag("h1", run_name(history), " ", status),
        tag("p", " · ".join(facts), class_="facts"),
        tag("dl", tiles, class_="tiles") if tiles else None,
    )


def headline_numbers(history: History) -> list[tuple[str, str, str]]:
    """``(label, value, detail)`` of the numbers at the top."""
    run, tiles = history.run, []
    held_out = finite(history.last("evaluate").get("bits_per_byte"))
    bits = [v for _, v in smooth(history.series("train", "bits_per_byte"))]
    if held_out is not None or bits:
        detail = "held-out text" if held_out is not None else "training text, smoothed"
        tiles.append(("Bits per byte", fixed(held_out if held_out is not None else bits[-1], 3), detail))
    loss = smooth(history.series("train", "loss"))
    if loss:
        tiles.append(("Loss", fixed(loss[-1][1], 3), f"nats per token, from {fixed(loss[0][1], 2)}"))
    speeds = [v for _, v in history.series("train", "tokens_per_second")]
    if speeds:
        tiles.append(("Tokens per second", si(_median(speeds)), "median"))
    mfu = [v for _, v in history.series("train", "mfu")]
    if mfu:
        peak = f"of {flops(run['peak_flops'])}" if finite(run.get("peak_flops")) else "of peak"
        source = f" ({one_line(run['peak_source'], 40)})" if run.get("peak_source") else ""
        tiles.append(("MFU", percent(_median(mfu)), peak + source))
    if finite(run.get("parameters")) is not None:
        active = run.get("active_parameters")
        tiles.append(
            ("Parameters", si(run["parameters"]), f"{si(active)} active per token" if active else "")
        )
    tokens = [v for _, v in history.series("train", "tokens")]
    steps = f"in {len(history.steps):,} steps" if history.steps else ""
    if tokens:
        tiles.append(("Tokens", si(sum(tokens)), steps))
    wall = history.wall_seconds()
    if wall:
        stops = len(history.breaks())
        tiles.append(
            (
                "Wall time",
                duration(wall),
                ("resumed once" if stops == 1 else f"resumed {stops} times") if stops else "",
            )
        )
    return tiles


def compression(history: History) -> Html | None:
    """Bits per byte of the model beside general compressors, as bars."""
    held_out = finite(history.last("evaluate").get("bits_per_byte"))
    rows = [("this model", held_out, "held-out text")] if held_out is not None else []
    named = {(one_line(e.get("name", "?"), 40), str(e.get("how"))): e for e in history.named("compress")}
    rows += [
        (name, value, one_line(e.get("how") or "", 40))
        for (name, _), e in named.items()
        if (value := finite(e.get("bits_per_byte"))) is not None
    ]
    if held_out is None or len(rows) < 2:
        return None
    top, best = max(v for _, v, _ in rows), min(v for _, v, _ in rows)
    bars = []
    for i, (name, value, detail) in enumerate(rows):
        bar = tag(
            "svg",
            tag("rect", class_="f0" if i == 0 else "f6", width=f"{value / top * 1000:.1f}", height=20, rx=3),
            viewBox="0 0 1000 20",
            preserveAspectRatio="none",
            role="img",
            aria_label=f"{name}: {value:.3f} bits per byte",
        )
        label = tag("th", name, tag("small", detail), scope="row")
        bars.append(tag("tr", label, tag("td", bar, class_="bar"), tag("td", fixed(value, 3), class_="num")))
    if held_out == best:
        other = min(v for _, v, _ in rows[1:])
        verdict = f"The model needs {1 - held_out / other:.0%} fewer bits than the best compressor here."
    else:
        verdict = f"The best compressor here needs {1 - best / held_out:.0%} fewer bits than the model."
    note = tag("p", "Bits per byte on held-out text, lower is better. ", verdict, class_="note")
    return tag(
        "section",
        tag("h2", "Against general compressors"),
        note,
        tag("table", bars, class_="bars"),
        id="bits",
    )


def sample(history: History) -> Html | None:
    made = history.last("generate")
    if not made.get("text"):
        return None
    prompt, text = str(made.get("prompt") or ""), str(made["text"])
    rest = text[len(prompt) :] if prompt and text.startswith(prompt) else text
    facts = [f"{si(made.get('tokens'))} tokens"] if finite(made.get("tokens")) else []
    if finite(made.get("seconds")):
        facts.append(duration(made["seconds"]))
    block = tag("pre", tag("b", prompt), rest, class_="sample", tabindex="0")
    note = tag("p", "The prompt in bold, then what the model wrote. ", ", ".join(facts), class_="note")
    return tag("section", tag("h2", "A completion"), note, block, id="sample")


def interruptions(history: History) -> Html | None:
    breaks = history.breaks()
    if not breaks:
        return None
    rows = [
        tag("tr", *(tag("td", v) for v in (f"{b.stopped:,.0f}", b.reason, f"{b.resumed:,.0f}")))
        if b.loss_before is None or b.loss_after is None
        else tag(
            "tr",
            tag("td", f"{b.stopped:,.0f}"),
            tag("td", b.reason),
            tag("td", f"{b.resumed:,.0f}"),
            tag("td", fixed(b.loss_before)),
            tag("td", fixed(b.loss_after)),
            title=break_text(b),
        )
        for b in breaks
    ]
    names = ("Stopped at step", "Why", "Resumed from step", "Loss before", "Loss after")
    head = tag("tr", [tag("th", n, scope="col") for n in names])
    return tag(
        "section",
        tag("h2", "Stopped and resumed"),
        tag("div", tag("table", tag("thead", head), tag("tbody", rows)), class_="scroll"),
        id="interruptions",
    )


def data_section(history: History) -> Html | None:
    corpus = history.run.get("corpus")
    corpus = corpus if isinstance(corpus, dict) else {}
    rows = [
        (one_line(k, 40), size(v) if k == "bytes" else si(v, 4))
        for k, v in corpus.items()
        if finite(v) is not None
    ]
    rows += [(one_line(k, 40), one_line(v)) for k, v in corpus.items() if finite(v) is None and v is not None]
    bad = history.named("bad_record")
    log = [e for e in history.events if e["event"] in {"checkpoint", "warning", "export", "evaluate", "done"}]
    parts: list[Html | None] = [definition(rows) if rows else None]
    if bad:
        head = tag("tr", [tag("th", n, scope="col") for n in ("File", "Byte", "Why it was skipped")])
        cells = [
            tag(
                "tr",
                tag("td", e.get("path", MISSING)),
                tag("td", e.get("offset", MISSING)),
                tag("td", e.get("reason", "")),
            )
            for e in bad[:200]
        ]
        body = tag("div", tag("table", tag("thead", head), tag("tbody", cells)), class_="scroll")
        parts.append(unfold(f"{len(bad):,} bad records were skipped", body))
    if log:
        parts.append(unfold(f"{len(log):,} checkpoints, evaluations and warnings", event_table(log[-300:])))
    if history.unreadable:
        parts.append(
            tag("p", f"{history.unreadable} lines of the events file could not be read.", class_="note")
        )
    return tag("section", tag("h2", "Data and events"), parts, id="data") if any(parts) else None


def event_table(events: Sequence[EventDict]) -> Html:
    rows = []
    for event in events:
        rest = {k: v for k, v in event.items() if k not in {"event", "step", "time"}}
        text = ", ".join(f"{k} {_short(v)}" for k, v in rest.items())
        cells = (
            timestamp(event.get("time"), "%H:%M:%S"),
            event["event"],
            MISSING if event.get("step") is None else event["step"],
            one_line(text, 400),
        )
        rows.append(tag("tr", [tag("td", c) for c in cells]))
    head = tag("tr", [tag("th", n, scope="col") for n in ("UTC", "Event", "Step", "")])
    return tag("div", tag("table", tag("thead", head), tag("tbody", rows)), class_="scroll")


def reproduce(history: History) -> Html:
    run = history.run
    first = next(iter(history.named("run")), {})
    command = first.get("command") or run.get("command")
    if isinstance(command, list):
        command = shlex.join(str(part) for part in command)
    command = command or f"deepseek pretrain {shlex.quote(str(history.directory / 'config.toml'))}"
    rows = [
        ("Code version", run.get("code_version")),
        ("Machine", run.get("host_cpu")),
        ("Device", run.get("device")),
        ("Compute", run.get("dtype")),
        ("FLOPs per token", si(run["flops_per_token"]) if finite(run.get("flops_per_token")) else None),
        ("Batch", f"{si(run['batch_tokens'])} tokens" if finite(run.get("batch_tokens")) else None),
        ("Steps planned", f"{run['total_steps']:,}" if isinstance(run.get("total_steps"), int) else None),
    ]
    shown = [(k, one_line(v)) for k, v in rows if v is not None]
    return tag(
        "section",
        tag("h2", "Reproduce it"),
        tag("p", "Run this with the code version and the configuration below:"),
        tag("pre", tag("code", str(command)), tabindex="0"),
        definition(shown) if shown else None,
        unfold("config.toml", tag("pre", tag("code", history.config_text), tabindex="0"), open_=True)
        if history.config_text
        else tag("p", "The run directory has no config.toml.", class_="note"),
        id="reproduce",
    )


def footer(history: History) -> Html:
    text = f"Made from {len(history.events):,} events in {history.directory.resolve().name}/events.jsonl by "
    return tag(
        "footer", tag("p", text, tag("code", "deepseek report"), ". This page loads nothing from anywhere.")
    )


def definition(rows: Sequence[tuple[str, str]]) -> Html:
    return tag("dl", [tag("div", tag("dt", k), tag("dd", v)) for k, v in rows], class_="facts-list")


def unfold(title: str, body: Html, open_: bool = False) -> Html:
    return tag("details", tag("summary", title), body, open="" if open_ else None)


def run_name(history: History) -> str:
    return one_line(history.run.get("run") or history.directory.resolve().name, 120)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _short(value: Any) -> str:
    return significant(value, 5) if isinstance(value, float) else str(value)


def _sha256(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
