"""Small tensors between host and device: values, kinds, and two buffers in turn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepseek.serve.transfer import Readback, put

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("name", DEVICES)
def test_what_is_put_has_its_kind(name: str) -> None:
    device = torch.device(name)
    whole = put([1, 2, 3], device)
    assert (whole.tolist(), whole.dtype, whole.device.type) == ([1, 2, 3], torch.int64, name)
    half = put([0.5, 0.25], device, np.float64)
    assert (half.tolist(), half.dtype) == ([0.5, 0.25], torch.float64)
    table = np.arange(12, dtype=np.int32).reshape(3, 4)
    assert put(table, device).dtype == torch.int32
    assert put(table[[2, 0], :3], device).tolist() == [[8, 9, 10], [0, 1, 2]]
    assert put([], device).tolist() == []


@pytest.mark.parametrize("name", DEVICES)
def test_a_copy_holds_until_the_second_one_after_it(name: str) -> None:
    device = torch.device(name)
    fetch = Readback(device)
    waits = []
    for i in range(7):
        size = 3 if i % 2 else 3000  # the buffers grow
        waits.append(fetch(torch.full((size, 2), i, device=device)))
        for back in range(min(2, i + 1)):
            assert np.unique(waits[i - back]()).tolist() == [i - back]
