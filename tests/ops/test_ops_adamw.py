"""AdamW on one tensor: the reference against torch's optimizer, the kernel against the reference."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from deepseek.ops.adamw import SCALARS, adamw_, reference_adamw_
from deepseek.ops.triton import kernels

LR, BETA1, BETA2, EPS, DECAY = 0.01, 0.9, 0.95, 1e-8, 0.1


def scalars(step: int, dtype: torch.dtype, scale: float = 1.0, apply: bool = True) -> Tensor:
    values = {
        "beta1": BETA1, "rest1": 1 - BETA1, "beta2": BETA2, "rest2": 1 - BETA2, "eps": EPS, "keep": 1 - LR * DECAY,
        "rate": LR / (1 - BETA1**step), "widen": (1 - BETA2**step) ** -0.5, "scale": scale, "apply": float(apply),
    }  # fmt: skip
    return torch.tensor([values[name] for name in SCALARS], dtype=dtype)


def gradient(shape: tuple[int, ...], step: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_reference_is_torchs_adamw_on_scaled_gradients(dtype: torch.dtype, scale: float) -> None:
    weight = torch.randn(5, 7, dtype=dtype)
    p = nn.Parameter(weight.clone())
    theirs = torch.optim.AdamW([p], lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY)
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, 6):
        g = gradient((5, 7), step, dtype)
        adamw_(weight, weight, mean, square, g, scalars(step, dtype, scale))
        p.grad = g * scale
        theirs.step()
    tight = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(weight, p.detach(), **tight)
    torch.testing.assert_close(square, theirs.state[p]["exp_avg_sq"], **tight)


def test_a_bf16_weight_is_its_master_rounded_and_small_steps_are_not_lost() -> None:
    master = torch.full((256,), 1.0)
    weight = master.bfloat16()
    mean, square = torch.zeros(256), torch.zeros(256)
    row = scalars(1, torch.float32)
    row[SCALARS.index("keep")], row[SCALARS.index("rate")] = 1.0, 1e-4
    row[SCALARS.index("beta1")], row[SCALARS.index("beta2")] = 0.0, 0.0
    row[SCALARS.index("rest1")], row[SCALARS.index("rest2")], row[SCALARS.index("widen")] = 1.0, 1.0, 1.0
    for _ in range(40):  # 1e-4 a step is below bf16's resolution at 1, 40 of them are not
        adamw_(weight, master, mean, square, torch.ones(256, dtype=torch.bfloat16), row)
    torch.testing.assert_close(master, torch.full((256,), 0.996))
    assert torch.equal(weight, master.bfloat16())
    assert weight[0] != 1


def tensors(n: int, dtype: torch.dtype) -> list[Tensor]:
    random = torch.Generator().manual_seed(n)
    master, mean, grad = (torch.randn(n, generator=random) for _ in range(3))
    return [master.to(dtype), master, mean, torch.rand(n, generator=random), grad.to(dtype)]


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("n", [1, 1024, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("same", [True, False])
def test_the_kernel_is_the_reference(n: int, dtype: torch.dtype, same: bool) -> None:
    """In fp16: the interpreter truncates to bf16, where a GPU rounds."""
    ours, theirs = tensors(n, dtype), tensors(n, dtype)
    if same:
        ours[0], theirs[0] = ours[1], theirs[1]
    row = scalars(3, torch.float32, scale=0.3)
    kernels("adamw").adamw_(*ours, row)
    reference_adamw_(*theirs, row)
    for a, b in zip(ours[1:], theirs[1:]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours[0], ours[1].to(ours[0].dtype))


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("kernel", [False, True])
def test_a_step_that_does_not_apply_changes_nothing_whatever_the_gradient(kernel: bool) -> None:
    if kernel and torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    found, before = tensors(70, torch.bfloat16), tensors(70, torch.bfloat16)
    found[4].fill_(float("nan"))
    run = kernels("adamw").adamw_ if kernel else reference_adamw_
    run(*found, scalars(3, torch.float32, scale=float("nan"), apply=False))
    assert all(torch.equal(a, b) for a, b in zip(found[:4], before[:4]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_on_a_gpu_is_the_reference(dtype: torch.dtype) -> None:
    ours, theirs = ([t.cuda() for t in tensors(100_001, dtype)] for _ in range(2))
    for step in range(1, 4):
        row = scalars(step, torch.float32, scale=0.3, apply=step != 2).cuda()
        adamw_(*ours, row)
        reference_adamw_(*theirs, row)
    for a, b in zip(ours[1:], theirs[1:]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours[0], ours[1].to(dtype))
