"""What is known of an optional package, and what keeping it must not keep."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from deepseek.ops.optional import OptionalKernels


@pytest.mark.parametrize("chained", [False, True])
def test_an_import_that_failed_keeps_nothing_of_its_callers(chained: bool) -> None:
    """An exception's traceback holds the frames of all callers, and so the tensors of the step that asked first."""

    def load() -> None:
        try:
            raise ModuleNotFoundError("nothing there", name="einops")
        except ModuleNotFoundError as error:
            if chained:
                raise ImportError("no kernels") from error
            raise

    package = OptionalKernels(
        "kernels", "torch runs", "kernels", "flash", "kernels", "DEEPSEEK_KERNELS", load
    )

    def step() -> list[weakref.ref[torch.Tensor]]:
        before = torch.zeros(3)
        assert not package.usable(torch.device("cuda"), lambda: "", "all", lambda: 0.0)
        after = torch.zeros(3)
        return [weakref.ref(before), weakref.ref(after)]

    gone = step()
    gc.collect()
    assert [x() for x in gone] == [None, None]
    assert isinstance(package.broken(), ImportError)
