"""Where there is no GPU, Triton's kernels run in its interpreter, which must be chosen before Triton is imported."""

import contextlib
import os
import random

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

with contextlib.suppress(
    ImportError
):  # its tests need it; how long an example takes says nothing of the code
    from hypothesis import HealthCheck, settings

    settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("patient")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A test draws the same numbers whichever tests ran before it: processes that share the work take what comes."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
