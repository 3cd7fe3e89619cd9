"""A recording of live steps: files that viewers open, phases that add up, and a verdict that names what was planted."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from inspect_models import config, model

from deepseek.batch import Batch
from deepseek.errors import ConfigError, RunError
from deepseek.events import MemorySink, attached
from deepseek.monitor.inspect.bottleneck import bottleneck, judge
from deepseek.monitor.inspect.speedscope import to_speedscope
from deepseek.monitor.inspect.timeline import PHASE, STEP, Span, own_times, read_trace, union, without
from deepseek.monitor.inspect.trace import TraceCapture, list_traces, trace_file
from deepseek.precision import choose
from deepseek.train import (
    OptimConfig,
    Schedule,
    ScheduleConfig,
    TrainStep,
    build_optimizer,
    fit,
    next_token_loss,
)


def stream(wait: float = 0.0) -> Iterator[Batch]:
    random = torch.Generator().manual_seed(0)
    while True:
        time.sleep(wait)
        yield Batch.from_rows(torch.randint(0, 64, (4, 33), generator=random))


def train(
    run: Path, steps: int = 5, at: int = 2, wait: float = 0.0, **capture: Any
) -> tuple[TrainStep, list[Any]]:
    """A short training whose recording is armed after step ``at``."""
    torch.manual_seed(0)
    made = model(config("LH", layers=1)).train()
    step = TrainStep(
        made,
        next_token_loss,
        build_optimizer(made, OptimConfig(name="adamw")),
        choose("fp32", torch.device("cpu")),
        micro_rows=2,
    )
    tracer = TraceCapture(run, step, flops_per_token=1e5, peak_flops=1e11)
    answers: list[Any] = []

    def arm(number: int, result: Any) -> None:
        if number == at:
            tracer.capture(done=answers.append, **capture)

    fit(step, stream(wait), Schedule(ScheduleConfig(), steps), steps=steps, hooks=[arm, tracer])
    tracer.finish()
    return step, answers


def test_three_steps_of_a_live_run(tmp_path: Path) -> None:
    sink = MemorySink()
    with attached(sink):
        step, answers = train(tmp_path / "run")
    (found,) = answers
    assert (found["id"], found["step"], found["last_step"], found["steps"]) == ("step-000003", 3, 5, 3)
    assert sum(found["shares"].values()) == pytest.approx(1, abs=0.02)
    assert sum(found["phases"].values()) == pytest.approx(1, abs=0.01)
    assert all(found["phases"][name] > 0 for name in ("forward", "backward", "optimizer"))
    assert found["flops"] == pytest.approx(1e5 * 4 * 32 / found["seconds"], rel=1e-6)
    assert found["peak_share"] == pytest.approx(found["flops"] / 1e11)
    assert found["usual_seconds"] > 0
    assert found["shares"]["compute"] > 0.01
    assert found["top"] == sorted(found["top"], key=lambda t: -t["seconds"])
    assert [e.step for e in sink.events if e.name == "trace"] == [5]
    assert list_traces(tmp_path / "run") == [found]
    # The step is what it was before: nothing stays hung on it.
    assert not {"micro", "finish"} & vars(step).keys()
    assert step.loss_fn is next_token_loss
    assert "fill" not in vars(step.optimizer)


def test_training_is_the_same_with_a_recording(tmp_path: Path) -> None:
    recorded, _ = train(tmp_path / "a")
    plain, _ = train(tmp_path / "b", at=99)
    for p, q in zip(recorded.model.parameters(), plain.model.parameters()):
        assert torch.equal(p, q)
    assert list_traces(tmp_path / "b") == []


def test_files_are_what_viewers_read(tmp_path: Path) -> None:
    train(tmp_path / "run")
    chrome = json.loads(gzip.decompress(trace_file(tmp_path / "run", "step-000003", "chrome").read_bytes()))
    names = {e.get("name") for e in chrome["traceEvents"]}
    assert {f"{STEP}3", f"{STEP}5", f"{PHASE}forward", "aten::mm"} <= names
    check_speedscope(json.loads(trace_file(tmp_path / "run", "step-000003").read_text()))
    with pytest.raises(RunError, match="step-000003"):
        trace_file(tmp_path / "run", "step-000009")
    with pytest.raises(ConfigError, match="speedscope"):
        trace_file(tmp_path / "run", "step-000003", "pdf")


def check_speedscope(found: dict[str, Any]) -> None:
    """The rules of the 'evented' format: times never fall, and every frame closes in the reverse order of opening."""
    assert found["$schema"] == "https://www.speedscope.app/file-format-schema.json"
    frames = found["shared"]["frames"]
    assert 0 <= found["activeProfileIndex"] < len(found["profiles"])
    for profile in found["profiles"]:
        assert profile["type"] == "evented"
        assert profile["unit"] == "microseconds"
        stack, at = [], profile["startValue"]
        for event in profile["events"]:
            assert event["at"] >= at
            at = event["at"]
            assert 0 <= event["frame"] < len(frames)
            if event["type"] == "O":
                stack.append(event["frame"])
            else:
                assert stack.pop() == event["frame"]
        assert stack == []
        assert at <= profile["endValue"]


def test_clocks_that_round_do_not_break_the_nesting() -> None:
    spans = [Span("a", 0, 10), Span("b", 2, 10.4), Span("c", 3, 10.2), Span("d", 10.4, 12)]
    timeline = read_trace({"traceEvents": []})
    timeline.host["thread 1"] = spans
    check_speedscope(to_speedscope(timeline, "t"))
    assert dict(own_times(spans)) == pytest.approx({"a": 2, "b": 1, "c": 7, "d": 1.6})


def test_a_slow_loader_is_the_verdict(tmp_path: Path) -> None:
    _, (found,) = train(tmp_path / "run", wait=0.5)
    assert found["verdict"] == "data-bound"
    assert found["phases"]["data"] == pytest.approx(found["shares"]["data"], abs=0.02)
    assert found["shares"]["data"] * found["seconds"] >= 0.49
    assert "waits for its batch" in found["reason"]


def test_a_loop_of_ones_own(tmp_path: Path) -> None:
    tracer = TraceCapture(tmp_path / "run")
    layer = torch.nn.Linear(256, 256)
    for number in range(4):
        if number == 1:
            tracer.start(2, at=number)
        for _ in range(20):
            layer(torch.randn(256, 256)).sum().backward()
        if number >= 1:
            assert tracer.step() == (number == 1)
    tracer.finish()
    (found,) = list_traces(tmp_path / "run")
    assert (found["id"], found["steps"]) == ("step-000002", 2)
    assert found["verdict"] in ("compute-bound", "host-bound", "memory-bound")
    assert found["shares"]["data"] == 0


def test_a_recording_that_is_ended_early_is_kept(tmp_path: Path) -> None:
    _, (found,) = train(tmp_path / "run", steps=4, at=3)
    assert (found["step"], found["last_step"]) == (4, 4)


def test_one_recording_at_a_time_and_from_any_thread(tmp_path: Path) -> None:
    tracer = TraceCapture(tmp_path)
    thread = threading.Thread(target=tracer.capture, args=(2,))
    thread.start()
    thread.join()
    with pytest.raises(RunError, match="being recorded"):
        tracer.capture()
    with pytest.raises(ConfigError, match="between 1 and 50"):
        TraceCapture(tmp_path).capture(0)
    quiet = TraceCapture(tmp_path, rank=1)
    quiet.capture(2)
    quiet(1, None)
    assert quiet._recording is None


def event(
    name: str, start: float, length: float, kind: str = "cpu_op", tid: str = "1", **args: Any
) -> dict[str, Any]:
    return {"ph": "X", "cat": kind, "name": name, "ts": start, "dur": length, "tid": tid, "args": args}


def device_trace(kernels: list[tuple[str, float, float]], data: float = 0.0) -> dict[str, Any]:
    """One step of 1000 µs: the host waits ``data`` µs, then launches; kernels are (name, start, length)."""
    events = [event(f"{STEP}1", 0, 1000, "user_annotation")]
    events.append(event(f"{PHASE}data", 0, data, "user_annotation"))
    events.append(event(f"{PHASE}backward", data, 500, "user_annotation"))
    events.append(event(f"{PHASE}forward", data, 200, "user_annotation"))
    for i, (name, start, length) in enumerate(kernels):
        launched = max(0.0, start - 1)
        events.append(event("cudaLaunchKernel", launched, 1, "cuda_runtime", correlation=i))
        events.append(event(name, start, length, "kernel", "7", correlation=i))
    return {"traceEvents": events}


@pytest.mark.parametrize(
    ("kernels", "data", "verdict"),
    [
        ([("sm90_xmma_gemm_bf16", 10, 900), ("elementwise_kernel", 920, 60)], 0, "compute"),
        ([("sm90_xmma_gemm_bf16", 10, 300), ("elementwise_kernel", 320, 650)], 0, "memory"),
        ([("sm90_xmma_gemm_bf16", 600, 390)], 600, "data"),
        ([("gemm", 50 * i, 20) for i in range(20)], 0, "host"),
        ([("gemm", 10, 500), ("ncclDevKernel_AllReduce", 500, 490)], 0, "communication"),
        ([("gemm", 10, 980), ("ncclDevKernel_AllReduce", 500, 450)], 0, "compute"),
    ],
)
def test_what_bounds_an_accelerator(
    kernels: list[tuple[str, float, float]], data: float, verdict: str
) -> None:
    found = bottleneck(read_trace(device_trace(kernels, data)))
    assert found.verdict == f"{verdict}-bound"
    assert found.device
    assert sum(found.shares.values()) == pytest.approx(1)
    assert sum(found.phases.values()) == pytest.approx(1, abs=1e-6)


def test_a_kernel_belongs_to_the_phase_that_launched_it() -> None:
    trace = device_trace([("gemm", 100, 50), ("gemm", 400, 100), ("elementwise", 700, 40)])
    found = bottleneck(read_trace(trace))
    assert found.phases["forward"] == pytest.approx(0.05)
    assert found.phases["backward"] == pytest.approx(0.10)
    assert found.top[0] == {"name": "gemm", "kind": "compute", "seconds": 150e-6, "share": 0.15, "calls": 2}


def test_a_replayed_step_is_not_taken_for_waiting() -> None:
    """Nothing of a replayed CUDA graph is called: its one range, of the data, would cover the whole step."""
    trace = device_trace([("gemm", 300, 300)], data=1000)
    trace["traceEvents"] = [e for e in trace["traceEvents"] if "ward" not in e["name"]]
    found = bottleneck(read_trace(trace))
    assert found.verdict == "host-bound"
    assert found.shares["data"] == 0


def test_waiting_comes_before_the_kind_of_work() -> None:
    assert judge({"data": 0.3, "compute": 0.6}) == "data"
    assert judge({"data": 0.1, "compute": 0.5, "memory": 0.4}) == "compute"
    assert judge({"communication": 0.3, "host": 0.26, "memory": 0.44}) == "communication"


def test_intervals() -> None:
    assert union([Span("", 3, 5), Span("", 0, 1), Span("", 4, 8)]) == [(0, 1), (3, 8)]
    assert without([(0, 10)], [(2, 3), (5, 12)]) == [(0, 2), (3, 5)]
    assert without([(0, 1), (4, 6)], [(0, 1)]) == [(4, 6)]
