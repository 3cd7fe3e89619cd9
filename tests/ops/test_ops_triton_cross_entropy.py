"""The loss's kernels against float64; here in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from deepseek.batch import IGNORE
from deepseek.ops.cross_entropy import reference_rows
from deepseek.ops.triton import cross_entropy as kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: the interpreter truncates where a GPU rounds
STEPS = {torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7, torch.float16: 2**-10, torch.float32: 0.0}
CASES = [
    (48, torch.bfloat16),
    (4096, torch.bfloat16),
    (5008, torch.bfloat16),
    (50, torch.bfloat16),
    (48, torch.float16),
    (5000, torch.float32),
]


def drawn(vocab: int, dtype: torch.dtype, rows: int = 9) -> tuple[Tensor, Tensor]:
    logits = (4 * torch.randn(rows, vocab)).to(DEVICE, dtype)
    logits[1] += 100
    logits[2] -= 100
    logits[3, ::2] = -torch.inf  # the target is finite
    logits[4, 5] = 60.0
    targets = torch.randint(vocab, (rows,), device=DEVICE) | 1
    targets[0], targets[4], targets[5], targets[6] = vocab - 1, 5, IGNORE, 0
    return logits, targets


def ran(
    rows: object, logits: Tensor, targets: Tensor, z_weight: float, gradient: bool = True
) -> tuple[Tensor, Tensor]:
    """What ``rows`` found, and the logits after it."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    found, logits = torch.full((2, len(targets)), 7.0, device=DEVICE, dtype=wide), logits.clone()
    assert callable(rows)
    rows(logits, targets, found, IGNORE, z_weight, gradient)
    return found, logits


def test_which_rows_are_read_once() -> None:
    assert [kernel.fits(vocab, dtype) for vocab, dtype in CASES] == [True] * 3 + [False] * 3
    assert all(kernel.fits(vocab, torch.bfloat16) for vocab in (16_384, 32_768, 50_304, 65_536))
    assert not any(kernel.fits(vocab, torch.bfloat16) for vocab in (40_960, 50_257, 131_072))


@pytest.mark.parametrize("z_weight", [0.0, 0.01])
@pytest.mark.parametrize(("vocab", "dtype"), CASES)
def test_rows_are_the_reference_in_float64(vocab: int, dtype: torch.dtype, z_weight: float) -> None:
    logits, targets = drawn(vocab, dtype)
    found, d = ran(kernel.rows, logits, targets, z_weight)
    want, want_d = ran(reference_rows, logits.double(), targets, z_weight)
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=2e-5)
    # One rounding of a gradient to its dtype, after errors of fp32 of arguments up to 120.
    torch.testing.assert_close(d.double(), want_d, rtol=STEPS[dtype] + 4e-5, atol=1e-6)
    assert found[:, 5].eq(0).all()
    assert d[5].eq(0).all()
    assert d[3, ::2].eq(0).all()


@pytest.mark.parametrize(("vocab", "dtype"), CASES[:4])
def test_without_a_gradient_the_logits_stay(vocab: int, dtype: torch.dtype) -> None:
    logits, targets = drawn(vocab, dtype)
    found, after = ran(kernel.rows, logits, targets, 0.1, gradient=False)
    assert after.equal(logits)
    assert found.equal(ran(kernel.rows, logits, targets, 0.1)[0])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize(("vocab", "dtype"), CASES[:4])
def test_what_is_not_finite_spoils_its_row_only(vocab: int, dtype: torch.dtype) -> None:
    logits, targets = drawn(vocab, dtype)
    targets[0], targets[2] = vocab, -3
    logits[3] = -torch.inf
    logits[4, 7] = torch.nan
    logits[6, 7] = torch.inf
    found, d = ran(kernel.rows, logits, targets, 0.0)
    bad = torch.tensor([0, 2, 3, 4, 6], device=DEVICE)
    assert not found[0, bad].isfinite().any()
    fine = [i for i in range(len(targets)) if i not in bad.tolist()]
    assert found[:, fine].isfinite().all()
    assert d[fine].isfinite().all()
    # An id that is none has no place in the gradient: the row is the softmax.
    torch.testing.assert_close(
        d[[0, 2]].double(), logits[[0, 2]].double().softmax(-1), rtol=STEPS[dtype] + 4e-5, atol=1e-6
    )


@pytest.mark.parametrize(("vocab", "dtype"), CASES)
def test_little_is_lost_of_a_sure_target(vocab: int, dtype: torch.dtype) -> None:
    """Its loss and its gradient are differences of large numbers; here exact to a few bits of fp32, not of 60."""
    logits, targets = drawn(vocab, dtype)
    found, d = ran(kernel.rows, logits, targets, 0.0)
    want, want_d = ran(reference_rows, logits.double(), targets, 0.0)
    torch.testing.assert_close(found[0, 4].double(), want[0, 4], rtol=0, atol=4e-7)
    torch.testing.assert_close(d[4, 5].double(), want_d[4, 5], rtol=2**-7, atol=4e-7)


@pytest.mark.parametrize("z_weight", [0.0, 0.1])
@pytest.mark.parametrize("vocab", [23, 5000])
def test_loss_rows(vocab: int, z_weight: float) -> None:
    """fp32 rows against the reference in fp32, at the bounds that they have had since there is a kernel."""
    logits, targets = (3 * torch.randn(7, vocab)).to(DEVICE), torch.randint(0, vocab, (7,)).to(DEVICE)
    targets[2] = IGNORE
    want, a = ran(reference_rows, logits, targets, z_weight)
    got, b = ran(kernel.rows, logits, targets, z_weight)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)
    assert got[0][torch.arange(7).to(DEVICE) != 2].isfinite().all()
    for wrong in (-1, vocab):
        spoilt = targets.clone()
        spoilt[0] = wrong
        assert ran(kernel.rows, logits, spoilt, z_weight, gradient=False)[0][0][0].isnan()
    found, c = ran(kernel.rows, logits, targets, z_weight, gradient=False)
    torch.testing.assert_close(found, want)
    assert c.equal(logits)
