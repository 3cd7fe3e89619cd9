"""Collectives in one process do nothing; two processes are tested with the recipes."""

from __future__ import annotations

import random

import pytest
import torch

from deepseek.dist import comm


def test_alone_everything_is_a_no_op(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in comm.TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    assert comm.start() == (0, 1)
    assert (comm.rank(), comm.world()) == (0, 1)
    x = torch.arange(3.0)
    comm.sum_in_place([x])
    assert x.tolist() == [0, 1, 2]
    assert comm.agree(True) is True
    assert comm.agree(False) is False
    value = object()
    assert comm.from_first(value) is value
    comm.barrier()
    comm.stop()


def test_half_of_torchruns_environment_is_not_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some schedulers set RANK for their own purposes."""
    for name in comm.TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "3")
    assert comm.start() == (0, 1)


def test_a_group_of_one_is_joined_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    port = random.SystemRandom().randrange(20_000, 32_000)  # which the system gives to nobody by itself
    values = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    try:
        assert comm.start() == (0, 1)
        assert torch.distributed.is_initialized()
        assert comm.start() == (0, 1)  # once is enough
        comm.barrier()
    finally:
        comm.stop()
    assert not torch.distributed.is_initialized()
