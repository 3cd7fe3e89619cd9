"""Where there is no GPU, Triton's kernels run in its interpreter, which must be chosen before Triton is imported."""

import contextlib
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

with contextlib.suppress(
    ImportError
):  # its tests need it; how long an example takes says nothing of the code
    from hypothesis import HealthCheck, settings

    settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("patient")
