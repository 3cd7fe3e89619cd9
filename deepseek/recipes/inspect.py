"""``deepseek inspect``: the heads and experts of any checkpoint as tables, the suspects first."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepseek.assemble import Run, pick_device
from deepseek.monitor.inspect import Inspector
from deepseek.monitor.narrator import BAD, GOOD, QUIET, WARN, encodable, glyphs, headline, table

MOST_PARTS = 20  #: rows of the ablation table
MOST_HEADS = 48  #: rows of the heads' table
MOST_SUSPECTS = 20


@dataclass(frozen=True)
class Inspection:
    """What was found, JSON-able: the answers of ``Inspector.heads`` and, when asked for, of ``ablate_all``."""

    path: Path
    found: dict[str, Any]
    ablation: dict[str, Any] | None


def inspect_run(
    run: Path | str,
    step: int | None = None,
    text: Path | str | None = None,
    *,
    ablate: bool = False,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Look into a run's checkpoint (the newest by default), one checkpoint, or a Hugging Face directory.

    Args:
        text: a UTF-8 file to look with, instead of the run's held-out documents.
        ablate: also take every head and every expert out in turn and measure the loss; ``progress(done, of)``.

    Raises:
        DeepseekError: nothing there, damaged, no such step, or no text to look with.
    """
    path = Path(run)
    if not (path / "config.json").is_file() and not path.name.startswith("step-"):
        path = Run.open(path).path
    inspector = Inspector(path, text, device=pick_device(device))
    found = inspector.heads(step)
    return Inspection(path, found, inspector.ablate_all(step, progress=progress) if ablate else None)


def render(inspection: Inspection, console: Console | None = None) -> None:
    """Print the suspects, then the heads layer by layer, then the experts."""
    console = console or Console()
    found = inspection.found
    at = f"step {found['step']}, " if found["step"] is not None else ""
    detail = f"{at}held-out loss {found['loss']:.4f} over {found['tokens']:,} tokens of {found['text']}"
    headline(inspection.path.name, detail, console)
    _render_suspects(found, console)
    _render_grid(found, console)
    console.print()
    table(_head_rows(found), console)
    console.print(Text("removal: estimated change of the loss without the head, 1e-3 nats", style=QUIET))
    if found["experts"]:
        console.print(Text("\nExperts (a load of 1 is an equal share)", style="bold"))
        table(_expert_rows(found), console)
    if inspection.ablation is not None:
        console.print(Text("\nChange of the loss without it, nats per token, ± standard error", style="bold"))
        table(_ablation_rows(inspection.ablation["parts"]), console)


def _render_suspects(found: dict[str, Any], console: Console) -> None:
    suspects = sorted([*found["suspects"], *found["suspects_experts"]], key=lambda s: -s["score"])
    if not suspects:
        highest = found["ranking"][0] if found["ranking"] else None
        line = Text("No suspects. ", style=GOOD)
        if highest:
            line.append(
                f"The highest score is {highest['score']:.2f} (suspicion begins at 1): "
                f"layer {highest['layer']} head {highest['head']}.", QUIET
            )  # fmt: skip
        console.print(encodable(line, console))
        return
    console.print(Text(f"{len(suspects)} suspect{'s' if len(suspects) > 1 else ''}", style="bold"))
    grid = Table.grid(padding=(0, 2), pad_edge=True)
    for suspect in suspects[:MOST_SUSPECTS]:
        part = f"head {suspect['head']}" if "head" in suspect else f"expert {suspect['expert']}"
        where = encodable(Text(f"layer {suspect['layer']} {part}", style="bold", no_wrap=True), console)
        score = Text(f"{suspect['score']:.2f}", style=_style(suspect["score"]), no_wrap=True)
        grid.add_row(score, where, encodable(Text(suspect["why"]), console))
    console.print(grid)
    if len(suspects) > MOST_SUSPECTS:
        console.print(Text(f"  and {len(suspects) - MOST_SUSPECTS} more: --json lists all", style=QUIET))


def _render_grid(found: dict[str, Any], console: Console) -> None:
    """A row per layer, a cell per head: the higher, the more suspect; a full cell is a score of 2 or more."""
    marks = glyphs(console).heights
    console.print(Text("\nHeads, by how suspect they are", style="bold"))
    for layer in found["layers"]:
        line = Text(f"  {layer['index']:>3} {layer['kind']:<7} ", style=QUIET)
        for head in layer["heads"]:
            cell = marks[min(int(head["score"] / 2 * len(marks)), len(marks) - 1)]
            line.append(cell, _style(head["score"]))
        console.print(encodable(line, console))


def _head_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per head, or per most suspect head of a large model; a figure that no head has gets no column."""
    heads = [(layer, head) for layer in found["layers"] for head in layer["heads"]]
    if len(heads) > MOST_HEADS:
        worst = sorted(heads, key=lambda pair: -pair[1]["score"])[:MOST_HEADS]
        heads = sorted(worst, key=lambda pair: (pair[0]["index"], pair[1]["index"]))
    rows = [
        {
            "head": f"{layer['index']}.{head['index']}",
            "writes": _short(head["output_norm"]),
            "entropy": _fixed(head["entropy"]),
            "sink": _fixed(head["sink"]),
            "logit": _fixed(head["max_logit"], 1),
            "gate": _fixed(head["gate"]),
            "self": _fixed(head["diagonal"]),
            "prev": _fixed(head["previous"]),
            "alike": "" if head["twin"] is None else f"{head['similarity']:.2f} ({head['twin']})",
            "removal": "" if head["removal"] is None else f"{head['removal'] * 1e3:+.1f}",
            "score": Text(f"{head['score']:.2f}", style=_style(head["score"])),
        }
        for layer, head in heads
    ]
    empty = {name for name in rows[0] if all(not row[name] for row in rows)}
    return [{name: value for name, value in row.items() if name not in empty} for row in rows]


def _expert_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per expert layer: how evenly it works, and its extremes."""
    rows = []
    for layer in found["experts"]:
        loads = layer["load"]
        alike = max(layer["experts"], key=lambda e: e["similarity"])
        twin = layer["experts"].index(alike)
        rows.append({
            "layer": layer["index"], "experts": len(loads), "dead": layer["dead"],
            "least": f"{min(loads) * len(loads):.2f} ({loads.index(min(loads))})",
            "most": f"{max(loads) * len(loads):.2f} ({loads.index(max(loads))})",
            "coverage": _fixed(layer["coverage"]), "entropy": f"{layer['entropy']:.2f} ({layer['entropy_share']:.0%})",
            "alike": f"{alike['similarity']:.2f} ({twin}, {alike['twin']})",
        })  # fmt: skip
    return rows


def _ablation_rows(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts whose loss helps, and those that matter most."""
    shown = parts if len(parts) <= MOST_PARTS else [*parts[: MOST_PARTS // 2], *parts[-MOST_PARTS // 2 :]]
    return [
        {
            "layer": part["layer"],
            "part": f"head {part['head']}" if part["head"] is not None else f"expert {part['expert']}",
            "change": f"{part['delta']:+.5f}",
            "±": "" if math.isnan(part["error"]) else f"{part['error']:.5f}",
        }
        for part in shown
    ]


def _style(score: float) -> str:
    return BAD if score >= 2 else WARN if score >= 1 else QUIET


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _fixed(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"
