"""Muon's element-wise steps: the reference against the formula in fp64, the kernels against the reference."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from deepseek.ops.muon import SCALARS, descend_, look_ahead_, reference_descend_, reference_look_ahead_
from deepseek.ops.triton import kernels

CUDA = torch.cuda.is_available()
INTERPRETED = pytest.mark.skipif(
    CUDA or find_spec("triton") is None, reason="the interpreter is for machines without a GPU"
)


def scalars(apply: bool = True, scale: float = 0.3) -> Tensor:
    on = float(apply)
    values = {
        "scale": scale,
        "apply": on,
        "fresh": 0.1 * on,
        "beta": 0.9,
        "keep": 1 - 0.01 * on,
        "rate": 0.05 * on,
    }
    return torch.tensor([values[name] for name in SCALARS])


def tensors(n: int, dtype: torch.dtype) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(n)
    grad, momentum, weight, update = (torch.randn(n, generator=random) for _ in range(4))
    return {
        "grad": grad.to(dtype), "momentum": momentum, "weight": weight, "update": update.to(dtype),
        "direction": torch.full((n,), 7.0, dtype=dtype), "lowered": weight.to(dtype),
    }  # fmt: skip


def test_the_reference_is_the_formula() -> None:
    t = tensors(50, torch.float32)
    g, m, w = 0.3 * t["grad"].double(), t["momentum"].double(), t["weight"].double()
    m = 0.9 * m + 0.1 * g
    look_ahead_(t["direction"], t["momentum"], t["grad"], scalars())
    descend_(None, t["weight"], t["update"], scalars())
    torch.testing.assert_close(t["momentum"].double(), m, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(t["direction"].double(), 0.1 * g + 0.9 * m, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(t["weight"].double(), w * 0.99 - 0.05 * t["update"], rtol=1e-5, atol=1e-6)


@INTERPRETED
@pytest.mark.parametrize("n", [3, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("apply", [True, False])
def test_the_kernels_are_the_reference(n: int, dtype: torch.dtype, apply: bool) -> None:
    """In fp16: the interpreter truncates to bf16, where a GPU rounds."""
    ours, theirs = tensors(n, dtype), tensors(n, dtype)
    row = scalars(apply)
    low = dtype != torch.float32
    kernels("muon").look_ahead_(ours["direction"], ours["momentum"], ours["grad"], row)
    reference_look_ahead_(theirs["direction"], theirs["momentum"], theirs["grad"], row)
    kernels("muon").descend_(ours["lowered"] if low else None, ours["weight"], ours["update"], row)
    reference_descend_(theirs["lowered"] if low else None, theirs["weight"], theirs["update"], row)
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=2e-3 if low else 1e-5, atol=1e-6)
    assert not low or torch.equal(ours["lowered"], ours["weight"].to(dtype))


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("kernel", [False, True])
def test_a_step_that_does_not_apply_changes_nothing_whatever_the_gradient(kernel: bool) -> None:
    if kernel and CUDA:
        pytest.skip("the interpreter is for machines without a GPU")
    t, before = tensors(70, torch.float16), tensors(70, torch.float16)
    t["grad"].fill_(float("nan"))
    row = scalars(False, scale=float("nan"))
    ahead, descend = reference_look_ahead_, reference_descend_
    if kernel:
        ahead, descend = kernels("muon").look_ahead_, kernels("muon").descend_
    ahead(t["direction"], t["momentum"], t["grad"], row)
    descend(t["lowered"], t["weight"], t["update"], row)
    assert all(torch.equal(t[key], before[key]) for key in ("momentum", "weight", "lowered"))
    assert bool(torch.isfinite(t["direction"]).all())


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_on_a_gpu_are_the_reference(dtype: torch.dtype) -> None:
    ours, theirs = ({k: t.cuda() for k, t in tensors(100_001, dtype).items()} for _ in range(2))
    for apply in (True, False, True):
        row = scalars(apply).cuda()
        look_ahead_(ours["direction"], ours["momentum"], ours["grad"], row)
        reference_look_ahead_(theirs["direction"], theirs["momentum"], theirs["grad"], row)
        descend_(ours["lowered"], ours["weight"], ours["update"], row)
        reference_descend_(theirs["lowered"], theirs["weight"], theirs["update"], row)
    for key in ours:
        torch.testing.assert_close(
            ours[key], theirs[key], rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-5
        )
