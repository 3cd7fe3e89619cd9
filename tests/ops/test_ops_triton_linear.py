"""Small-batch linear kernels against plain products: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from deepseek.ops.experts import swiglu
from deepseek.ops.packed_linear import PackedSwiGLU, TritonLinear, rows_agree
from deepseek.ops.triton import linear
from deepseek.ops.triton.linear import Tile, forced_tile, gemv, row_matmul
from deepseek.ops.triton.rows import swiglu as kernel_swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("parts", [0, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 10), (300, 5), (2304, 3)])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_gemv(rows: int, inputs: int, outputs: int, bias: bool, parts: int) -> None:
    x, weight, b = make(0, rows, inputs), make(1, outputs, inputs), make(2, outputs) if bias else None
    y = gemv(x, weight, b, parts=parts)
    torch.testing.assert_close(y, F.linear(x, weight, b), rtol=1e-4, atol=1e-3)
    assert y.equal(gemv(x, weight, b, parts=parts))


def test_gemv_in_bf16_gives_what_is_asked() -> None:
    x, weight = make(0, 2, 512).bfloat16(), make(1, 20, 512).bfloat16()
    want = x.float() @ weight.float().T
    torch.testing.assert_close(gemv(x, weight, dtype=torch.float32), want, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(gemv(x, weight), want.bfloat16(), rtol=2e-2, atol=1e-1)


@pytest.mark.parametrize(("inputs", "outputs", "bias"), [(64, 10, True), (130, 66, False)])
def test_rows_of_row_matmul_do_not_depend_on_the_others(inputs: int, outputs: int, bias: bool) -> None:
    x, weight, b = make(0, 70, inputs), make(1, outputs, inputs), make(2, outputs) if bias else None
    whole = row_matmul(x, weight, b)
    torch.testing.assert_close(whole, F.linear(x, weight, b), rtol=1e-4, atol=1e-3)
    for rows in (1, 17, 64):
        for first in (0, 70 - rows):
            assert row_matmul(x[first : first + rows], weight, b).equal(whole[first : first + rows])


@pytest.mark.parametrize("exact", [False, True])
def test_the_layer_picks_a_kernel_by_the_number_of_rows(exact: bool) -> None:
    weight, bias = make(0, 12, 64), make(1, 12)
    linear = TritonLinear(weight, bias, exact)
    for rows in (1, 4, 9):
        x = make(rows, rows, 64)
        torch.testing.assert_close(linear(x), F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)
    if exact:
        assert rows_agree(linear, torch.float32, DEVICE)


@pytest.mark.parametrize(
    "tile", [Tile(2, 512, 1, 4), Tile(8, 1024, 4, 1), Tile(4, 4096, 8, 1), Tile(1, 4096, 4, 64)]
)
@pytest.mark.parametrize("swiglu_", [False, True])
def test_every_tile_gives_the_product(tile: Tile, swiglu_: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x, norm = make(0, 2 * 11, 2100) / 46, make(1, 2, 2100), (make(2, 2100), 1e-5)
    want = F.linear(F.rms_norm(x, (2100,), *norm), weight)
    monkeypatch.setattr(linear, "processors", lambda device: 2)  # so that a program has several tiles
    with forced_tile(tile):
        got = gemv(x, weight, norm=norm, swiglu=swiglu_)
    torch.testing.assert_close(got, swiglu(want) if swiglu_ else want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 6])
def test_norm_and_residual_around_a_product(rows: int, biased: bool, norm: bool, residual: bool) -> None:
    weight, bias, x = make(0, 9, 2100), make(1, 9) if biased else None, make(2, rows, 2100)
    around = (make(3, 2100), 1e-5) if norm else None
    add = make(4, rows, 9) if residual else None
    want = F.linear(x if around is None else F.rms_norm(x, (2100,), *around), weight, bias)
    linear = TritonLinear(weight, bias, exact=False)
    want = want if add is None else want + add
    torch.testing.assert_close(linear.fused(x, around, add), want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 6])
def test_a_dense_layer_with_its_norm_and_residual(rows: int, bias: bool) -> None:
    weights = (
        make(0, 2 * 21, 48),
        make(1, 2 * 21) if bias else None,
        make(2, 48, 21),
        make(3, 48) if bias else None,
    )
    layer = PackedSwiGLU(*weights, "fp32", DEVICE)
    layer.gate_up, layer.down = (
        TritonLinear(*weights[:2], exact=False),
        TritonLinear(*weights[2:], exact=False),
    )
    layer.activation = kernel_swiglu
    x, residual, norm = make(4, rows, 48), make(5, rows, 48), (make(6, 48), 1e-5)
    h = swiglu(F.linear(F.rms_norm(x, (48,), *norm), *weights[:2]))
    want = residual + F.linear(h, *weights[2:])
    torch.testing.assert_close(layer.fused(x, norm, residual), want, rtol=1e-4, atol=1e-3)
