import pytest
import torch

from deepseek.batch import IGNORE, Batch
from deepseek.errors import ConfigError


def make() -> Batch:
    tokens = torch.arange(12).view(4, 3)
    targets = tokens + 1
    targets[0, 2] = IGNORE
    documents = torch.zeros(4, 3, dtype=torch.int32)
    return Batch(tokens, targets, documents, None, n_targets=11, n_bytes=40)


def test_from_rows_shifts_by_one() -> None:
    batch = Batch.from_rows(torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int32))
    assert batch.tokens.tolist() == [[1, 2], [4, 5]]
    assert batch.targets.tolist() == [[2, 3], [5, 6]]
    assert batch.n_targets == 4
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 9])
def test_split_loses_no_row_and_keeps_the_counts(rows: int) -> None:
    batch = make()
    parts = list(batch.split(rows))
    assert torch.equal(torch.cat([p.tokens for p in parts]), batch.tokens)
    assert torch.equal(torch.cat([p.targets for p in parts]), batch.targets)
    assert torch.equal(
        torch.cat([p.documents for p in parts if p.documents is not None]), torch.zeros(4, 3).int()
    )
    assert all(
        p.rows <= rows and p.n_targets == 11 and p.n_bytes == 40 and p.positions is None for p in parts
    )


@pytest.mark.parametrize("rows", [0, -1])
def test_split_refuses_to_drop_everything(rows: int) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        list(make().split(rows))


def test_to_moves_every_tensor_and_keeps_the_rest() -> None:
    moved = make().to("meta")
    assert moved.documents is not None
    assert {moved.tokens.device.type, moved.targets.device.type, moved.documents.device.type} == {"meta"}
    assert (moved.n_targets, moved.n_bytes, moved.positions) == (11, 40, None)
