"""The figures of the report: what is drawn from a run's history, section by section.

A figure without data is ``None`` and leaves no gap.
"""

from __future__ import annotations

from collections.abc import Sequence

from deepseek.monitor.charts import Chart, HeatMap, Line, smooth, stacked_bar
from deepseek.monitor.history import History
from deepseek.monitor.markup import Html, tag
from deepseek.monitor.units import finite, one_line

LAYERS_OPEN = 8  #: layers shown at once; the others unfold


def learning(history: History) -> list[Html | None]:
    breaks = history.breaks()
    loss, bits = history.series("train", "loss"), history.series("train", "bits_per_byte")
    held_loss = history.series("evaluate", "loss")
    held_bits = history.series("evaluate", "bits_per_byte")
    gradient = history.series("train", "grad_norm")
    clipped = sum(e.get("clipped") is True for e in history.steps)
    skipped = sum(e.get("skipped") is True for e in history.steps)
    loss_lines = [Line("each step", loss, 0, "faint"), Line("smoothed", smooth(loss), 0)]
    loss_lines.append(Line("held out", held_loss, 1, "dots"))
    bit_lines = [Line("each step", bits, 0, "faint"), Line("smoothed", smooth(bits), 0)]
    bit_lines.append(Line("held out", held_bits, 1, "dots"))
    note = f"clipped at {clipped:,} of {len(history.steps):,} steps" + (
        f", skipped {skipped:,}" if skipped else ""
    )
    norm_lines = [Line("each step", gradient, 2, "faint"), Line("smoothed", smooth(gradient, log=True), 2)]
    return [
        Chart("loss", "Loss", loss_lines, "nats per token", breaks=breaks).figure(),
        Chart("bits-per-byte", "Bits per byte", bit_lines, breaks=breaks).figure(),
        Chart(
            "gradient", "Gradient norm", norm_lines, "log scale", log=True, note=note, breaks=breaks
        ).figure(),
        Chart(
            "rate",
            "Learning rate",
            [Line("lr", history.series("train", "lr"), 3)],
            breaks=breaks,
            bounds=(0.0, 0.0),
        ).figure(),
    ]


def experts(history: History) -> list[Html | None]:
    breaks = history.breaks()
    coverage, violation = history.series("train", "coverage"), history.series("train", "max_vio")
    entropy = history.series("train", "router_entropy")
    balance = history.series("train", "balance_loss")
    maps = []
    for index, rows in enumerate(history.load()):
        ratios = [v * len(shares) / sum(shares) for _, shares in rows if sum(shares) > 0 for v in shares]
        note = ""
        if ratios:
            reach = f"{min(ratios):.2f} to {max(ratios):.2f}"
            note = f"{len(rows[-1][1])} experts; single steps reach {reach} × the mean"
        maps.append(HeatMap(f"load-{index}", f"Load, MoE layer {index}", rows, note, breaks).figure())
    key = Html(
        '<p class="note heat-key"><span>⅓ of the mean</span><svg viewBox="0 0 200 10" aria-hidden="true">'
        '<rect class="under" width="100" height="10"/><rect class="over" x="100" width="100" height="10"/>'
        '<defs><linearGradient id="under"><stop class="u1"/><stop offset="1" class="u0"/></linearGradient>'
        '<linearGradient id="over"><stop class="o0"/><stop offset="1" class="o1"/></linearGradient></defs>'
        "</svg><span>3 × the mean</span></p>"
    )
    return [
        Chart(
            "violation",
            "MaxVio",
            [Line("each step", violation, 1, "faint"), Line("smoothed", smooth(violation), 1)],
            "largest load above the mean",
            breaks=breaks,
            bounds=(0.0, 0.0),
        ).figure(),
        Chart(
            "coverage",
            "Coverage",
            [Line("coverage", coverage, 2)],
            "share of experts in use",
            breaks=breaks,
            bounds=(0.0, 1.0),
        ).figure(),
        Chart("entropy", "Router entropy", [Line("entropy", entropy, 5)], breaks=breaks).figure(),
        Chart("balance", "Balance loss", [Line("balance loss", balance, 4)], breaks=breaks).figure(),
        key if any(maps) else None,
        *folded(maps, "MoE layers"),
    ]


def gates(history: History) -> list[Html | None]:
    breaks, figures = history.breaks(), []
    for layer, rows in history.gates().items():
        heads = max(len(values) for _, values in rows)
        lines = [
            Line(f"head {h}", [(x, v[h]) for x, v in rows if h < len(v)], h % 8, "line" if h < 8 else "dash")
            for h in range(min(heads, 64))
        ]
        note = "1: all from the global branch; 0: all from the local window"
        chart = Chart(
            f"gate-{layer}",
            f"Gates, layer {one_line(layer, 12)}",
            lines,
            note=note,
            breaks=breaks,
            bounds=(0.0, 1.0),
        )
        figures.append(chart.figure())
    return folded(figures, "hybrid layers")


def speed(history: History) -> list[Html | None]:
    breaks = history.breaks()
    speeds, mfu = history.series("train", "tokens_per_second"), history.series("train", "mfu")
    fill = history.series("train", "fill")
    speed_lines = [Line("each step", speeds, 0, "faint"), Line("smoothed", smooth(speeds), 0)]
    used = [(x, y * 100) for x, y in mfu]
    mfu_lines = [Line("each step", used, 2, "faint"), Line("smoothed", smooth(used), 2)]
    return [
        Chart(
            "tokens-per-second", "Tokens per second", speed_lines, breaks=breaks, bounds=(0.0, 0.0)
        ).figure(),
        Chart("mfu", "MFU", mfu_lines, "% of peak", breaks=breaks, bounds=(0.0, 0.0)).figure(),
        stacked_bar(
            "Where the time went",
            time_parts(history),
            "all training steps of this run, evaluation and saving",
        ),
        Chart(
            "fill", "Packing fill", [Line("fill", fill, 4)], "share of positions with text", breaks=breaks
        ).figure(),
    ]


def time_parts(history: History) -> list[tuple[str, float]]:
    """Seconds by what they were spent on, in the order of a step."""
    totals: dict[str, float] = dict.fromkeys(("data", "forward", "backward", "optimizer"), 0.0)
    for event in history.steps:
        parts = event.get("seconds")
        for key, value in parts.items() if isinstance(parts, dict) else ():
            totals[one_line(key, 24)] = totals.get(one_line(key, 24), 0.0) + max(finite(value) or 0.0, 0.0)
    other = totals.pop("other", 0.0)
    totals["checkpoint"] = sum(v for _, v in history.series("checkpoint", "stall_seconds") if v > 0)
    totals["evaluation"] = sum(v for _, v in history.series("evaluate", "seconds") if v > 0)
    return [*totals.items(), ("other", other)]


def folded(figures: Sequence[Html | None], what: str) -> list[Html | None]:
    """The first figures as they are, the others behind one click."""
    shown = [f for f in figures if f]
    if len(shown) <= LAYERS_OPEN + 2:
        return list(shown)
    rest = tag("div", shown[LAYERS_OPEN:], class_="grid")
    return [
        *shown[:LAYERS_OPEN],
        tag("details", tag("summary", f"{len(shown) - LAYERS_OPEN} more {what}"), rest),
    ]
