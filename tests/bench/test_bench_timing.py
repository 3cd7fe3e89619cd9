"""Taking turns, and going on when one competitor fails."""

import pytest
import torch

from deepseek.bench.ceilings import datasheet_tflops
from deepseek.bench.timing import attempt, race
from deepseek.errors import ConfigError

CPU = torch.device("cpu")


def test_competitors_take_turns() -> None:
    calls: list[str] = []
    found = race({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, rounds=3, warmup=1,
                 burst_seconds=0.0)  # fmt: skip
    assert calls == ["a", "b"] + ["a", "b"] * 3  # one warm-up each, then rounds of one call
    assert found["a"].best <= found["a"].median <= found["a"].worst


def test_a_burst_repeats_a_short_call() -> None:
    count = 0

    def call() -> None:
        nonlocal count
        count += 1

    found = race({"x": call}, CPU, rounds=2, warmup=1, burst_seconds=1e-3)
    assert found["x"].calls == count - 1
    assert found["x"].calls > 2


def test_attempt_tells_memory_from_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    def memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried …")

    def mistake() -> None:
        raise ValueError("no such thing\nsecond line")

    def refused() -> None:
        raise ConfigError("dense only")

    assert attempt(lambda: 3, CPU).value == 3
    assert attempt(memory, CPU).out_of_memory
    assert attempt(refused, CPU).problem == "dense only"
    assert "Traceback" not in capsys.readouterr().err
    found = attempt(mistake, CPU)
    assert (found.value, found.out_of_memory, found.problem) == (None, False, "ValueError: no such thing")
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989.0), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA H200", 989.0), ("NVIDIA H20", 148.0),
     ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA L40S", 362.0), ("NVIDIA L4", 121.0), ("CPU x86_64, 2 cores", None)],
)  # fmt: skip
def test_peaks_by_name(name: str, peak: float | None) -> None:
    assert datasheet_tflops(name) == peak
