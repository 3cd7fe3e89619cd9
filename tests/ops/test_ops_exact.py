import pytest
import torch

from deepseek.ops.exact import PIECE, exact_map, exact_swiglu
from deepseek.ops.experts import swiglu


@pytest.mark.parametrize("function", [torch.sigmoid, torch.exp, torch.nn.functional.silu])
def test_equal_elements_give_equal_bits_whatever_their_number(function: object) -> None:
    x = torch.randn(2 * PIECE + 5, generator=torch.Generator().manual_seed(0))
    whole = exact_map(function, x)  # type: ignore[arg-type]
    for n in (1, 3, 17, 63, 64, 100, 1000, PIECE - 1, PIECE + 1):
        for first in (0, 7, x.numel() - n):
            assert exact_map(function, x[first : first + n]).equal(whole[first : first + n])  # type: ignore[arg-type]
    torch.testing.assert_close(whole, function(x))  # type: ignore[operator]


def test_swiglu_takes_any_rows() -> None:
    x = torch.randn(37, 2 * 11, generator=torch.Generator().manual_seed(0))
    whole = exact_swiglu(x)
    torch.testing.assert_close(whole, swiglu(x))
    assert all(exact_swiglu(x[i : i + 1]).equal(whole[i : i + 1]) for i in range(37))
