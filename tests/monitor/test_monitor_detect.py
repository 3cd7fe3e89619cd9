"""The watch: healthy rows stay silent, each kind of fault is found and judged, and it goes on after a restart."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek.errors import ConfigError
from deepseek.monitor.detect import Watch
from deepseek.monitor.detectors import DetectConfig
from deepseek.monitor.incident import Incident

SHARED = Path(__file__).parents[3] / "shared" / "data"
LAYERS, EXPERTS, RANKS = 4, 8, 4
Row = dict[str, float]
Change = Callable[[int, Row], None]


def healthy(seed: int = 0) -> Callable[[int], Row]:
    """Rows of a run that goes well, at 0.5 s a step."""
    random = np.random.default_rng(seed)
    norms = random.uniform(10, 20, LAYERS)

    def row(step: int) -> Row:
        nonlocal norms
        noise = random.normal(0, 1, 8 + 4 * LAYERS)
        norms = norms * (1 + 1e-4 * random.random(LAYERS))
        loss = 2 + 4 / math.sqrt(step + 10) + 0.03 * noise[0]
        norm = 0.4 * math.exp(0.12 * noise[1])
        seconds = 0.5 * math.exp(0.02 * noise[2])
        found = {
            "train/loss": loss, "train/grad_norm": norm, "train/lr": 1e-3, "train/skipped": 0.0,
            "precision/loss_scale": 1024.0, "precision/nonfinite": 0.0,
            "time/data": 0.01, "time/compute": seconds, "time/step": seconds + 0.01,
            "memory/rss": 2e9 + 1e6 * noise[3],
            "data/web/loss": loss + 0.05 * noise[4], "data/code/loss": loss + 0.05 * noise[5],
            "data/web/psi": 0.02 * abs(noise[6]), "data/code/psi": 0.02 * abs(noise[7]),
            "data/web/duplicates": 0.0,
        }  # fmt: skip
        for i in range(LAYERS):
            found[f"layer/{i}/grad_norm"] = norm / 2 * math.exp(0.1 * noise[8 + i])
            found[f"layer/{i}/update_ratio"] = 2e-3 * math.exp(0.05 * noise[12 + i])
            found[f"layer/{i}/weight_norm"] = float(norms[i])
            load = random.dirichlet(np.full(EXPERTS, 60.0))
            found.update({f"expert/{i}/{e}/load": float(x) for e, x in enumerate(load)})
        found.update(
            {f"rank/{r}/step_seconds": seconds * math.exp(0.01 * random.normal()) for r in range(RANKS)}
        )
        return found

    return row


def watched(
    change: Change | None = None, steps: int = 320, seed: int = 0, watch: Watch | None = None
) -> list[Incident]:
    """The last version of every incident of a run that ``change`` breaks from step 200."""
    watch, row, found, clock = watch or Watch(), healthy(seed), dict[str, Incident](), 0.0
    for step in range(1, steps + 1):
        values = row(step)
        if change is not None and step >= 200:
            change(step, values)
        clock += values["time/step"] if math.isfinite(values["time/step"]) else 0.5
        for incident in watch.update(step, values, clock):
            found[incident.id] = incident
    return list(found.values())


def test_a_healthy_run_is_silent() -> None:
    assert watched(steps=1500) == []


def noise_batch(step: int, row: Row) -> None:
    if step == 200:
        row["train/loss"], row["train/grad_norm"] = 9.0, 8.0


def gradient_blows_up(step: int, row: Row) -> None:
    grown = min(3.0 ** (step - 200), 1e4)
    row["train/grad_norm"] *= grown
    for i in range(LAYERS):
        row[f"layer/{i}/grad_norm"] *= grown
    row["train/loss"] += 2.0 if step >= 204 else 0.0


def not_a_number(step: int, row: Row) -> None:
    row["train/loss"] = row["train/grad_norm"] = math.nan


def high_learning_rate(step: int, row: Row) -> None:
    row["train/lr"] *= 50
    for i in range(LAYERS):
        row[f"layer/{i}/update_ratio"] *= 50
    row["train/loss"] += 1.0 if step > 201 else 0.0


def wrong_betas(step: int, row: Row) -> None:
    for i in range(LAYERS):
        row[f"layer/{i}/update_ratio"] *= 3.5


def loss_scale_collapses(step: int, row: Row) -> None:
    row["precision/loss_scale"] = max(1024.0 / 2 ** (step - 200), 1e-3)
    row["train/skipped"] = 1.0
    row["precision/nonfinite"] = float(step - 199)


def bit_flip(step: int, row: Row) -> None:
    row["layer/2/weight_norm"] *= 1.2


def dead_expert(step: int, row: Row) -> None:
    row["expert/1/3/load"] = 0.0


def router_collapses(step: int, row: Row) -> None:
    row.update({f"expert/1/{e}/load": 0.5 if e < 2 else 0.0 for e in range(EXPERTS)})


def slow_rank(step: int, row: Row) -> None:
    row["rank/2/step_seconds"] *= 1.3
    row["time/compute"] *= 1.3
    row["time/step"] = row["time/compute"] + row["time/data"]


def slow_steps(step: int, row: Row) -> None:
    row["time/compute"] *= 1.5
    row["time/step"] = row["time/compute"] + row["time/data"]


def data_stall(step: int, row: Row) -> None:
    if step == 200:
        row["time/data"] += 6.0
        row["time/step"] += 6.0


def memory_leak(step: int, row: Row) -> None:
    row["memory/rss"] += (step - 200) * 2e7


def drift(step: int, row: Row) -> None:
    row["data/code/psi"] = 0.6
    row["data/code/loss"] += 0.4


def repeated(step: int, row: Row) -> None:
    row["train/loss"] -= 0.01 * (step - 200)
    row["data/web/duplicates"] = 1.0


@pytest.mark.parametrize(
    ("change", "kind", "verdict"),
    [
        (noise_batch, "loss_spike", "DATA"),
        (gradient_blows_up, "loss_spike", "MODEL"),
        (not_a_number, "nan", "MODEL"),
        (high_learning_rate, "divergence", "OPTIMISER"),
        (wrong_betas, "update", "OPTIMISER"),
        (loss_scale_collapses, "precision", "PRECISION"),
        (bit_flip, "corruption", "HARDWARE"),
        (dead_expert, "dead_expert", "MODEL"),
        (router_collapses, "router_collapse", "MODEL"),
        (slow_rank, "slow_rank", "HARDWARE"),
        (slow_steps, "slow", "HARDWARE"),
        (data_stall, "stall", "DATA"),
        (memory_leak, "memory", "MODEL"),
        (drift, "data_drift", "DATA"),
        (repeated, "data_drift", "DATA"),
    ],
)
def test_each_fault_makes_one_incident_of_its_kind(change: Change, kind: str, verdict: str) -> None:
    (incident,) = watched(change)
    assert (incident.kind, incident.verdict) == (kind, verdict)
    assert 200 <= incident.step <= 230
    assert incident.window == [incident.step - 200, incident.step + 200]
    assert 0.3 < incident.confidence <= 1
    assert incident.evidence
    assert all(e["text"] for e in incident.evidence)


def test_a_hang_is_told_once_by_the_clock() -> None:
    watch, row = Watch(), healthy()
    for step in range(1, 60):
        assert watch.update(step, row(step), step * 0.5) == []
    last = 59 * 0.5
    assert watch.idle(last + 29.0) == []
    (incident,) = watch.idle(last + 31.0)
    assert (incident.kind, incident.severity, incident.step) == ("hang", "critical", 59)
    assert watch.idle(last + 100.0) == []
    (over,) = watch.update(60, row(60), last + 120.0)
    assert (over.id, over.status, over.severity) == (incident.id, "resolved", "info")
    assert "went on with step 60" in over.summary


def test_a_pause_that_the_run_is_used_to_is_no_hang() -> None:
    watch, row, clock = Watch(), healthy(), 0.0
    for step in range(1, 100):
        clock += 60.0 if step % 40 == 0 else 0.5  # an evaluation
        watch.update(step, row(step), clock)
    assert watch.idle(clock + 100.0) == []
    assert watch.idle(clock + 130.0) != []


def test_the_loss_that_never_falls_is_a_plateau() -> None:
    watch, random, found = Watch(), np.random.default_rng(0), []
    for step in range(1, 6101):
        found += watch.update(step, {"train/loss": 3.0 + 0.05 * random.normal()}, float(step))
    assert [(i.kind, i.severity) for i in found[:1]] == [("plateau", "info")]


def test_a_restarted_watch_goes_on_as_the_one_before() -> None:
    one, row = Watch(), healthy()
    rows = [row(step) for step in range(1, 260)]
    for step in range(1, 198):
        one.update(step, rows[step - 1], step * 0.5)
        if step % 36 == 0:  # the end of a chunk of memory figures
            json.dumps(one.state_dict(), allow_nan=False)
    two, three = Watch(), pickle.loads(pickle.dumps(one))
    two.load_state_dict(json.loads(json.dumps(one.state_dict(), allow_nan=False)))
    for step in range(198, 259):
        values = dict(rows[step - 1])
        noise_batch(step, values)
        told = [[i.to_dict() for i in w.update(step, values, step * 0.5)] for w in (one, two, three)]
        assert told[0] == told[1] == told[2]
    with pytest.raises(ConfigError, match="version"):
        Watch().load_state_dict({"version": 0})


def test_a_loss_that_begins_to_fall_is_learning_not_repeated_data() -> None:
    watch, random = Watch(), np.random.default_rng(0)
    for step in range(1, 300):
        loss = 7.3 - 4 * (1 - math.exp(-max(step - 35, 0) / 30)) + 0.01 * random.normal()
        assert watch.update(step, {"train/loss": loss}, float(step)) == []


def test_a_loss_that_falls_off_its_course_late_is_data_seen_before() -> None:
    watch, random, found = Watch(), np.random.default_rng(0), list[Incident]()
    for step in range(1, 800):
        loss = 2 + 4 / math.sqrt(step + 10) + 0.03 * random.normal() - 0.01 * max(step - 700, 0)
        found += watch.update(step, {"train/loss": loss}, float(step))
    assert {(i.kind, i.verdict) for i in found} == {("data_drift", "DATA")}


def test_one_slow_step_is_nothing_but_one_long_wait_for_data_is() -> None:
    def pause(step: int, row: Row) -> None:
        if step == 200:
            row["time/compute"] += 6.0
            row["time/step"] += 6.0

    assert watched(pause) == []
    assert [i.kind for i in watched(data_stall)] == ["stall"]


@pytest.mark.parametrize("bad", [1, 2, 3, 40])
def test_weights_that_were_not_a_number_for_a_while_are_watched_as_before(bad: int) -> None:
    """Wherever in the history the NaN was, the first row included: a norm's usual change is known again later."""
    watch, row, found = Watch(), healthy(), dict[str, Incident]()
    for step in range(1, 260):
        values = row(step)
        if bad <= step < bad + 2:
            values.update({f"layer/{i}/weight_norm": math.nan for i in range(LAYERS)})
        if step >= 200:
            bit_flip(step, values)
        for incident in watch.update(step, values, 0.5 * step):
            found[incident.id] = incident
    assert [i.kind for i in found.values()] == ["nan", "corruption"]
    assert json.dumps(watch.state_dict()["detectors"]["Weights"], allow_nan=False)


ODD = (math.nan, math.inf, -math.inf, 0.0, -1.0, 3.4e38, 1e39, 1e300, -1e300, 1e-300)


@pytest.mark.parametrize("head", ["", "train/", "time/", "layer/", "expert/", "rank/", "data/", "memory/"])
def test_no_numbers_that_a_row_may_hold_stop_the_watch(head: str) -> None:
    """Warnings are errors here: what the arithmetic makes of them is not worth a line on the terminal either."""
    random = np.random.default_rng(len(head))
    for odd in (math.nan, math.inf, -1e300, None):
        watch, row = Watch(), healthy()
        for step in range(1, 45):
            values = row(step)
            for name in [n for n in values if n.startswith(head) and step > 15 and random.random() < 0.4]:
                values[name] = float(random.choice(ODD)) if odd is None else odd
            found = watch.update(step, values, 0.5 * step) + watch.tick(0.5 * step + 100.0)
            json.dumps([incident.to_dict() for incident in found], allow_nan=False)
        for array in (watch.base.level, watch.base.trend, watch.base.spread, watch.base.up, watch.base.down):
            assert np.isfinite(array).all(), f"{head}: {odd} is remembered"
        assert np.isfinite(watch.base.z).all()


def test_going_back_to_a_checkpoint_is_no_incident() -> None:
    watch, row, found = Watch(), healthy(), []
    for step in [*range(1, 200), *range(150, 320)]:
        found += watch.update(step, row(step), float(len(found)))
    assert found == []


def test_two_faults_far_apart_are_two_incidents_and_close_ones_one() -> None:
    def twice(apart: int) -> Change:
        def change(step: int, row: Row) -> None:
            if step in (200, 200 + apart):
                row["train/loss"], row["train/grad_norm"] = 9.0, 8.0

        return change

    assert len(watched(twice(20), steps=400)) == 1
    assert len(watched(twice(150), steps=400)) == 2


def test_a_config_that_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="loss_sum"):
        DetectConfig(loss_sum=0.0)
    with pytest.raises(ConfigError, match="both sides"):
        DetectConfig(rows=100)


def chronicle() -> list[tuple[int, Row, float]]:
    path = SHARED / "incidents" / "bigscience.jsonl"
    if not path.exists():
        pytest.skip("../shared/data/incidents is not here")
    lines: list[dict[str, Any]] = [json.loads(x) for x in path.read_text().splitlines()]
    names = {"loss": "train/loss", "grad_norm": "train/grad_norm", "seconds": "time/step"}
    return sorted(
        (x["iteration"], {names[k]: x[k] for k in names if x[k] is not None}, x["seconds"])
        for x in lines
        if x["file"].endswith("tr11-176B-ml/chronicles.md")
    )


def test_bloom_176bs_gradient_leads_and_its_slow_gpu() -> None:
    watch, told, clock = Watch(), list[tuple[int, Incident]](), 0.0
    for step, row, seconds in chronicle():
        clock += seconds
        told += [(step, i) for i in watch.update(step, row, clock)]
    first = next((step, i) for step, i in told if i.kind == "gradient_spike")
    assert first[0] == 31217  # two iterations before the loss peaks
    assert first[1].verdict == "MODEL"
    slow = next((step, i) for step, i in told if i.kind == "slow")
    assert 42782 <= slow[0] <= 42785
    assert slow[1].verdict == "HARDWARE"


@pytest.mark.parametrize("part", ["WindowWarmup__ba299b7e", "SOAP"])
def test_a_public_healthy_curve_is_silent(part: str) -> None:
    path = SHARED / "curves" / "losses.npz"
    if not path.exists():
        pytest.skip("../shared/data/curves is not here")
    with np.load(path) as curves:
        values = curves[next(n for n in curves.files if part in n)].tolist()
    watch = Watch()
    assert [
        i for step, v in enumerate(values) for i in watch.update(step, {"train/loss": v}, float(step))
    ] == []
