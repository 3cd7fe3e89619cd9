"""Which format is chosen, on machines that do not exist."""

from __future__ import annotations

import pytest
import torch

from deepseek.errors import ConfigError
from deepseek.precision import Policy, choose, matmul_flops, policy

CPU = torch.device("cpu")


def machine(monkeypatch: pytest.MonkeyPatch, fp32: float, bf16: float) -> list[torch.dtype]:
    """A CPU of so many FLOP/s; returns the list of what was measured."""
    asked: list[torch.dtype] = []

    def measured(device_type: str, dtype: torch.dtype, seconds: float = 0.1) -> float:
        assert device_type == "cpu"
        asked.append(dtype)
        return {torch.float32: fp32, torch.bfloat16: bf16}[dtype]

    monkeypatch.setattr(policy, "matmul_flops", measured)
    return asked


@pytest.mark.parametrize(
    ("fp32", "bf16", "name"), [(100e9, 800e9, "bf16"), (100e9, 0.5e9, "fp32"), (100e9, 105e9, "fp32")]
)
def test_auto_takes_bf16_only_where_the_cpu_is_clearly_faster_in_it(
    fp32: float, bf16: float, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = machine(monkeypatch, fp32, bf16)
    found = choose("auto", CPU)
    assert found.name == name
    assert set(asked) == {torch.float32, torch.bfloat16}
    assert f"{fp32 / 1e9:.0f}" in found.reason
    assert found.loss_scale == 1.0


@pytest.mark.parametrize(
    ("mode", "dtype", "scale"),
    [("fp32", torch.float32, 1.0), ("bf16", torch.bfloat16, 1.0), ("fp16", torch.float16, 64.0)],
)
def test_a_mode_that_is_named_is_taken_without_measuring(
    mode: str, dtype: torch.dtype, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = machine(monkeypatch, 1.0, 1e12)
    found = choose(mode, CPU, 64.0)
    assert (found.name, found.dtype, found.loss_scale) == (mode, dtype, scale)
    assert asked == []


@pytest.mark.parametrize("mode", ["fp8", "", "BF16", "float32"])
def test_an_unknown_mode_is_refused_with_the_known_ones(mode: str) -> None:
    with pytest.raises(ConfigError, match="choose auto, fp32, bf16, fp16"):
        choose(mode, CPU)


@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
def test_matmuls_compute_in_the_format_and_sensitive_parts_do_not(mode: str) -> None:
    found = choose(mode, CPU)
    a = torch.randn(4, 4)
    with found.compute(CPU):
        assert (a @ a).dtype == found.dtype
        assert torch.nn.functional.cross_entropy(a, torch.arange(4)).dtype == torch.float32
    assert (a @ a).dtype == torch.float32


def test_a_measured_rate_is_positive_and_measured_once() -> None:
    first = matmul_flops("cpu", torch.float32, 0.001)
    assert 1e6 < first < 1e15
    assert matmul_flops("cpu", torch.float32, 0.001) == first


def test_a_policy_travels_between_processes() -> None:
    import pickle

    found = choose("bf16", CPU)
    assert pickle.loads(pickle.dumps(found)) == found
    assert isinstance(found, Policy)
