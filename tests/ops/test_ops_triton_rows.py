"""The kernels between a serving step's products, against float64; here in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from deepseek.ops.triton import rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def test_what_the_layers_begin_with() -> None:
    embedding, tables = drawn(50, 72, dtype=torch.bfloat16), (drawn(30, 1, 24), drawn(30, 1, 24))
    token, position = (torch.randint(n, (7,), device=DEVICE) for n in (50, 30))
    x, cos, sin = rows.enter(token, position, embedding, tables, torch.float32)
    assert x.equal(embedding[token].float())
    assert cos.equal(tables[0][position])
    assert sin.equal(tables[1][position])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "features"), [(1, 64), (3, 1000), (70, 2048)])
def test_norm(count: int, features: int, dtype: torch.dtype) -> None:
    x, weight = drawn(count, features + 5, dtype=dtype)[:, 5:], drawn(features, dtype=dtype)
    y = rows.rms_norm(x, weight, 1e-5)
    want = F.rms_norm(x.double(), (features,), weight.double(), 1e-5)
    assert y.dtype == dtype
    assert y.is_contiguous()
    torch.testing.assert_close(y.double(), want, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_heads(dtype: torch.dtype) -> None:
    x, weight = drawn(3, 9, 80, dtype=dtype)[:, 2:8], drawn(6, 80, dtype=dtype)
    y = rows.head_norm(x, weight, 1e-6)
    want = F.rms_norm(x.double(), (80,), None, 1e-6) * weight.double()
    assert y.is_contiguous()
    torch.testing.assert_close(y.double(), want, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "features"), [(1, 24), (5, 1500)])
def test_swiglu(count: int, features: int, dtype: torch.dtype) -> None:
    x = drawn(count, 2 * features, dtype=dtype)
    gate, up = x.double().chunk(2, 1)
    y = rows.swiglu(x)
    assert y.shape == (count, features)
    torch.testing.assert_close(
        y.double(), F.silu(gate) * up, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [7, 2048, 5000])
def test_likeliest_is_the_first_of_the_largest(vocabulary: int, dtype: torch.dtype) -> None:
    wide = drawn(6, vocabulary + 3, dtype=dtype)
    wide[:, vocabulary:] = 1e9  # columns that are no tokens
    x = wide[:, :vocabulary]
    x[1, 3] = x[1, vocabulary - 1] = 50.0
    x[2] = -torch.inf
    x[3, 5] = torch.nan
    x[4, 2] = torch.inf
    token, bad = rows.likeliest(x).unbind(1)
    assert bad.tolist() == [0, 0, 1, 1, 1, 0]
    assert token[[0, 1, 5]].tolist() == [int(x[0].float().argmax()), 3, int(x[5].float().argmax())]
    assert ((token >= 0) & (token < vocabulary)).all()
