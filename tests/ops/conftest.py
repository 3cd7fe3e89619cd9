"""Where there is no GPU, Triton's kernels run in its interpreter, which must be chosen before Triton is imported."""

import os

import pytest
import torch

from deepseek.ops import native

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(params=["native", "torch"])
def cpu_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Serving's operations on a CPU by the native kernels, then by what runs where there is no compiler."""
    if request.param == "torch":
        monkeypatch.setenv("DEEPSEEK_NATIVE", "0")
    elif not native.available():
        pytest.skip("no C++ compiler here")
    return str(request.param)
