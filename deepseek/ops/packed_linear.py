"""Linear layers for serving: the one seam for weight formats.

A weight is laid out once, when a model is loaded, for the kernel that will read it at every step; ``pack_linear`` is
the only place where a format is chosen. A new format (FP8, int4, a vendor's kernel) is one function of the same
signature, registered as ``register_op("packed_linear", name)``, that returns its own
``PackedLinear``; nothing else changes.

On a CPU the formats are native kernels of ours (``deepseek.ops.native``), compiled where they run: a row's sums are
taken in one order however many rows there are, so they are ``exact`` anyway. Where there is no C++ compiler, or no
instructions for a format, or AMX for bf16, ``fp32`` and ``bf16`` are oneDNN products over weights in oneDNN's own
blocked layout: from two rows up they beat a plain product (which MKL runs row by row there). In which order oneDNN adds
up a row may depend on how many there are (with AMX it does, for some numbers of rows and not for most: trying some
proves nothing), so ``exact`` never goes there: with AMX it is ours all the same, and where ours cannot be had a product
for every row. ``int8``: see ``deepseek.ops.int8_linear``.

On CUDA one row goes through a kernel that streams the weight, more through the vendor's product, and ``exact``
through a product of one tile shape for every number of rows (``deepseek.ops.triton.linear``).

Shape letters: N rows, C inputs, F outputs of a layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.errors import ConfigError
from deepseek.ops import native
from deepseek.ops.exact import exact_swiglu
from deepseek.ops.experts import swiglu
from deepseek.ops.triton import kernels, runs_on
from deepseek.registry import backends, get_op, register_op

if TYPE_CHECKING:
    from deepseek.ops.native_linear import NativeSwiGLU

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GEMV_ROWS = 1  #: up to how many rows a product on CUDA is a matter of reading the weight
SMALL = 1 << 16  #: weights of an fp32 layer below which calling oneDNN costs more than it saves


Norm = tuple[Tensor, float]  #: weight ``[C]`` and epsilon of an RMSNorm


def normed(x_NC: Tensor, norm: Norm | None) -> Tensor:
    """``x`` through an RMSNorm, fp32 inside, or as it is; a row's result does not depend on the others."""
    if norm is None:
        return x_NC
    if x_NC.dim() == 2 and runs_on(x_NC.device):
        y: Tensor = kernels("rows").rms_norm(x_NC, *norm)
        return y
    return F.rms_norm(x_NC, norm[0].shape, *norm)


def normed_heads(x_NHD: Tensor, norm: Norm) -> Tensor:
    """Every head of every row through an RMSNorm of its own weight ``[H, D]``."""
    weight_HD, eps = norm
    if runs_on(x_NHD.device):
        y: Tensor = kernels("rows").head_norm(x_NHD, weight_HD, eps)
        return y
    return F.rms_norm(x_NHD, x_NHD.shape[-1:], None, eps) * weight_HD


class PackedLinear(ABC):
    """``x Wᵀ + b`` with a weight that was laid out for one device and format.

    Attributes:
        in_features, out_features: C and F.
        nbytes: bytes of weights (and their scales) that one call reads.
    """

    in_features: int
    out_features: int
    nbytes: int

    @abstractmethod
    def __call__(self, x_NC: Tensor) -> Tensor:
        """``[N, C]`` → ``[N, F]`` in the dtype of ``x``: fp32 or bf16, on the weight's device, contiguous; N ≥ 1."""

    def fused(self, x_NC: Tensor, norm: Norm | None = None, residual_NF: Tensor | None = None) -> Tensor:
        """``residual + self(norm(x))``: what surrounds a product in a decoder; one kernel where the format has it.

        ``residual`` may be overwritten by the result.
        """
        y = self(normed(x_NC, norm))
        return y if residual_NF is None else residual_NF + y


def pack_linear(
    weight_FC: Tensor, bias_F: Tensor | None, format: str, device: torch.device | str, *, exact: bool = False
) -> PackedLinear:
    """Lay a weight out for serving; the tensors given are not kept.

    Args:
        weight_FC: as in ``nn.Linear``, any float dtype and device. bias_F: the same, or ``None``.
        format: 'fp32', 'bf16', 'int8' (CPU), or one an extension registered.
        exact: every row of a result is bit-identical whatever the other rows and their number are.

    Raises:
        ConfigError: an unknown format, one that the device does not have, or ``exact`` where it cannot be had.
    """
    pack = get_op("packed_linear", format)
    device = torch.device(device)
    with torch.no_grad():
        bias = None if bias_F is None else bias_F.detach()
        packed: PackedLinear = pack(weight_FC.detach(), bias, device, exact)
    return packed


def formats() -> list[str]:
    """The names ``pack_linear`` takes."""
    return backends("packed_linear")


class PackedSwiGLU:
    """``down(silu(gate(x)) · up(x))``, gate and up in one matrix: a dense layer, or the shared expert of a sparse one.

    Args:
        gate_up_F2C: gate above up, ``[2F, C]``; gate_up_bias_F2: its bias or ``None``.
        down_CF: ``[C, F]``; down_bias_C: its bias or ``None``.
        format, device, exact: as in ``pack_linear``.
    """

    def __init__(
        self,
        gate_up_F2C: Tensor,
        gate_up_bias_F2: Tensor | None,
        down_CF: Tensor,
        down_bias_C: Tensor | None,
        format: str,
        device: torch.device | str,
        *,
        exact: bool = False,
    ) -> None:
        self.native: NativeSwiGLU | None = None
        self.gate_up: PackedLinear
        self.down: PackedLinear
        where = torch.device(device)
        if where.type == "cpu" and not runs_on(where) and native_takes(format, exact):
            from deepseek.ops.native_linear import NativeSwiGLU

            self.native = NativeSwiGLU(
                gate_up_F2C.detach(), gate_up_bias_F2, down_CF.detach(), down_bias_C, format
            )
            self.gate_up, self.down = self.native.gate_up, self.native.down
        else:
            self.gate_up = pack_linear(gate_up_F2C, gate_up_bias_F2, format, device, exact=exact)
            self.down = pack_linear(down_CF, down_bias_C, format, device, exact=exact)
        self.activation = exact_swiglu if exact else swiglu
        if isinstance(self.gate_up, TritonLinear) and not exact:
            self.activation = kernels("rows").swiglu

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes

    def __call__(self, x_NC: Tensor) -> Tensor:
        return self.fused(x_NC)

    def fused(self, x_NC: Tensor, norm: Norm | None = None, residual_NC: Tensor | None = None) -> Tensor:
        """``residual + self(norm(x))``; ``residual`` may be overwritten by the result."""
        if self.native is not None:
            return self.native(x_NC, norm, residual_NC)
        up = self.gate_up
        if isinstance(up, TritonLinear) and up.streams(x_NC):
            return self.down.fused(up.stream(x_NC, norm=norm, swiglu=True), None, residual_NC)
        return self.down.fused(self.activation(up.fused(x_NC, norm)), None, residual_NC)


# --- fp32 and bf16 --------------------------------------------------------------------------------------------------


class PlainLinear(PackedLinear):
    """``F.linear``: the reference, what GPUs run, and what a CPU without oneDNN runs."""

    def __init__(self, weight_FC: Tensor, bias_F: Tensor | None) -> None:
        self.out_features, self.in_features = weight_FC.shape
        self.weight, self.bias = weight_FC, bias_F
        self.nbytes = weight_FC.nbytes

    def __call__(self, x_NC: Tensor) -> Tensor:
        return F.linear(x_NC.to(self.weight.dtype), self.weight, self.bias).to(x_NC.dtype)


class RowwiseLinear(PlainLinear):
    """One product a row: bit-identical rows on any machine, and no faster than a row at a time.

    Every row is copied to a place of its own first: where in a cache line numbers begin may decide in which order a
    library adds them up.
    """

    def __call__(self, x_NC: Tensor) -> Tensor:
        x = x_NC.to(self.weight.dtype)
        rows = [F.linear(row.clone(), self.weight, self.bias) for row in x.split(1)]
        return torch.cat(rows).to(x_NC.dtype)


class TritonLinear(PlainLinear):
    """Few rows by ``gemv``, more by ``F.linear``; ``exact``: all by ``row_matmul``."""

    def __init__(self, weight_FC: Tensor, bias_F: Tensor | None, exact: bool) -> None:
        super().__init__(weight_FC, bias_F)
        self.exact, self._kernels = exact, kernels("linear")

    def streams(self, x_NC: Tensor) -> bool:
        """Whether ``stream`` is how to compute these rows."""
        return not self.exact and x_NC.shape[0] <= GEMV_ROWS

    def stream(self, x_NC: Tensor, **options: Any) -> Tensor:
        """The product by ``gemv``, whose options these are."""
        y: Tensor = self._kernels.gemv(x_NC.contiguous(), self.weight, self.bias, **options)
        return y

    def __call__(self, x_NC: Tensor) -> Tensor:
        if self.exact:
            y: Tensor = self._kernels.row_matmul(x_NC.contiguous(), self.weight, self.bias)
            return y
        return self.stream(x_NC) if self.streams(x_NC) else F.linear(x_NC, self.weight, self.bias)

    def fused(self, x_NC: Tensor, norm: Norm | None = None, residual_NF: Tensor | None = None) -> Tensor:
        if self.streams(x_NC):
            residual = None if residual_NF is None else residual_NF.contiguous()
            return self.stream(x_NC, norm=norm, residual_NF=residual)
        if self.exact or residual_NF is None or self.bias is not None:
            return super().fused(x_NC, norm, residual_NF)
        return residual_NF.addmm_(normed(x_NC, norm), self.weight.mT)  # the product adds to what is there


class OneDNNLinear(PackedLinear):
    """A oneDNN product over a weight in its blocked layout."""

    def __init__(self, weight_FC: Tensor, bias_F: Tensor | None) -> None:
        self.out_features, self.in_features = weight_FC.shape
        self.nbytes = weight_FC.nbytes
        self.bias, self.dtype = bias_F, weight_FC.dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight_FC.contiguous(), None)
        self._product = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x_NC: Tensor) -> Tensor:
        x = x_NC if x_NC.dtype == self.dtype else x_NC.to(self.dtype)
        y: Tensor = self._product(x, self.weight, self.bias, "none", [], "")
        return y if y.dtype == x_NC.dtype else y.to(x_NC.dtype)


def native_takes(format: str, exact: bool = False) -> bool:
    """Whether the native CPU kernels are how to compute in this format here.

    With AMX oneDNN's products of many bf16 rows are beyond what ours reach, but not ``exact``; a format that the
    processor has no instructions for is left to who has made something of that.
    """
    if not native.available():
        return False
    if format == "fp32":
        return True
    beaten = format == "bf16" and torch.cpu._is_amx_tile_supported()
    return native.has(format) and (exact or not beaten)


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes products of ``dtype`` on this CPU (bf16: AVX512 or better)."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def rows_agree(
    linear: PackedLinear, dtype: torch.dtype, device: torch.device | str = "cpu", most: int = 97
) -> bool:
    """Whether a row's result was bit-identical in every one of some compositions of up to ``most`` rows.

    For tests of ``exact`` formats: it can refute the claim, not prove it.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(most, linear.in_features, generator=generator).to(device, dtype)
    whole = linear(x)
    for rows in (1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 31, 32, 48, 64):
        for first in (0, most - rows):
            if not linear(x[first : first + rows]).equal(whole[first : first + rows]):
                return False
    return True


def _pack(weight: Tensor, bias: Tensor | None, device: torch.device, exact: bool, name: str) -> PackedLinear:
    dtype = DTYPES[name]
    weight = weight.to(device, dtype).contiguous()
    bias = None if bias is None else bias.to(device, dtype).contiguous()
    if runs_on(device):
        return TritonLinear(weight, bias, exact)
    if device.type != "cpu":
        if exact:
            raise ConfigError(
                f"rows on {device.type} are bit-identical only by our Triton kernels, which need CUDA of SM80 or "
                "newer and the extra 'kernels'; use the CPU, or do without `exact`"
            )
        return PlainLinear(weight, bias)
    if native_takes(name, exact):
        from deepseek.ops.native_linear import NativeLinear

        return NativeLinear.pack(weight, bias, name)
    if exact:
        return RowwiseLinear(weight, bias)
    small = dtype == torch.float32 and weight.numel() < SMALL
    return PlainLinear(weight, bias) if small or not has_onednn(dtype) else OneDNNLinear(weight, bias)


@register_op("packed_linear", "fp32")
def pack_fp32(weight_FC: Tensor, bias_F: Tensor | None, device: torch.device, exact: bool) -> PackedLinear:
    return _pack(weight_FC, bias_F, device, exact, "fp32")


@register_op("packed_linear", "bf16")
def pack_bf16(weight_FC: Tensor, bias_F: Tensor | None, device: torch.device, exact: bool) -> PackedLinear:
    """Weights in bf16, sums in fp32. Rows go in and results come out in bf16, too; on a CPU ``x`` may be wider."""
    return _pack(weight_FC, bias_F, device, exact, "bf16")


@register_op("packed_linear", "int8")
def pack_int8(weight_FC: Tensor, bias_F: Tensor | None, device: torch.device, exact: bool) -> PackedLinear:
    from deepseek.ops import int8_linear

    return int8_linear.pack(weight_FC, bias_F, device, exact)
