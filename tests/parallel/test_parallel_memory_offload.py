"""Offload: what leaves, what stays, what comes back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from deepseek.parallel import offload
from deepseek.parallel.memory import activation_checkpoint, measure
from deepseek.parallel.offload import Offloader
from deepseek.parallel.saved import SavedBytes


def away(held: object) -> bool:
    return not isinstance(held, Tensor)


def test_views_share_one_copy() -> None:
    base = torch.randn(64, 64)
    offloader = Offloader(smallest=1)
    with SavedBytes() as saved:
        held = [offloader.pack(t) for t in (base, base.T, base[:40], base.view(32, 128)[1:, ::2][:, :64])]
    assert [away(h) for h in held] == [True, True, True, False]  # the last is less than half of the storage
    assert saved.offloaded == base.numel() * 4
    expected = [base.clone(), base.T.clone(), base[:40].clone()]
    base.zero_()
    for h, value in zip(held, expected):
        found = offloader.unpack(h)
        assert found.stride() == value.stride() or value.shape != (64, 64)
        assert torch.equal(found, value)
    a, b = (offloader.unpack(h).untyped_storage().data_ptr() for h in held[:2])
    assert a == b


def test_a_changed_tensor_is_another_one() -> None:
    x, offloader = torch.ones(64), Offloader(smallest=1)
    first = offloader.pack(x)
    x.add_(1)
    second = offloader.pack(x)
    assert offloader.unpack(first).sum() == 64
    assert offloader.unpack(second).sum() == 128


def test_small_tensors_and_weights_stay() -> None:
    offloader = Offloader()
    weight = nn.Parameter(torch.empty(1024, 1024))
    for stays in (torch.empty(100), weight, weight.T, torch.empty(1 << 20, dtype=torch.uint8)[:9]):
        assert not away(offloader.pack(stays))
    assert away(offloader.pack(torch.empty(1 << 20, dtype=torch.uint8)))
    assert not away(offloader.pack(torch.eye(3).to_sparse()))


def test_what_comes_next_is_fetched_ahead() -> None:
    offloader = Offloader(smallest=1)
    held = [offloader.pack(torch.full((8,), float(i))) for i in range(6)]
    offloader.unpack(held[5])
    back = [h.copy.back is not None for h in held]
    assert back == [False] * (5 - offload.AHEAD) + [True] * (offload.AHEAD + 1)


def test_nothing_is_kept_on_the_device() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(4)))
    x = torch.randn(2048, 256)
    none = measure(lambda: model(x).square().mean())
    activation_checkpoint(model, "none", offload=True)
    found = measure(lambda: model(x).square().mean())
    assert found.saved_bytes <= 0.15 * none.saved_bytes  # the loss is outside of the blocks
    assert found.saved_bytes + found.offloaded_bytes >= none.saved_bytes
    assert found.flops == none.flops


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["none", "sqrt", "selective"])
def test_on_a_gpu_memory_goes_down_and_gradients_stay(mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(1024, 1024), nn.GELU()) for _ in range(16))).cuda()
    x = torch.randn(16384, 1024, device="cuda")

    def run() -> tuple[list[Tensor], int]:
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(x).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None], (
            torch.cuda.max_memory_allocated() - before
        )

    activation_checkpoint(model, mode)
    expected, kept = run()
    activation_checkpoint(model, mode, offload=True)
    for _ in range(3):
        found, less = run()
        for a, b in zip(expected, found):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert mode != "none" or less < 0.6 * kept
