"""Eight-bit linear layers on a CPU: int8 weights with a scale per output, activations quantized row by row.

The product is FBGEMM's (through ``torch.ops.quantized.linear_dynamic``): it quantizes fp32 activations itself, in one
call, but with one range for all rows of the call, so that a row with large values would blur its neighbours and a
result would depend on the company it is computed in. Two things mend that: rows are divided by their largest magnitude
first, and one row more, alternately +1 and −1, pins the range to [−1, 1]. What a row gives is then a function of that
row alone, to the last bit: sums of integers do not depend on their order. A single row needs neither, unless ``exact``
asks that it be rounded as in company.

Where FBGEMM is not built in, ``torch._int_mm`` does the product on activations quantized here: the plain reference.

Symmetric per-channel weights, per-row activations: the W8A8 of arXiv 2208.07339 without its outlier columns.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from deepseek.errors import ConfigError
from deepseek.ops.packed_linear import PackedLinear, native_takes


def quantize_rows(x_NC: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and fp32 scales ``[N, 1]`` with ``x ≈ values · scale``; a row of zeros has scale 1."""
    scale = x_NC.float().abs().amax(1, keepdim=True) / 127
    scale = torch.where(scale > 0, scale, 1.0)
    return (x_NC / scale).round_().clamp_(-127, 127).to(torch.int8), scale


class Int8Reference(PackedLinear):
    """Integer product of quantized rows in plain torch; exact by nature."""

    def __init__(self, weight_FC: Tensor, bias_F: Tensor | None) -> None:
        self.out_features, self.in_features = weight_FC.shape
        self.weight, self.scale = quantize_rows(weight_FC)
        self.bias = bias_F
        self.nbytes = self.weight.nbytes + self.scale.nbytes

    def __call__(self, x_NC: Tensor) -> Tensor:
        values, scale = quantize_rows(x_NC)
        y = torch._int_mm(values, self.weight.T).float() * scale * self.scale.T
        return (y if self.bias is None else y + self.bias).to(x_NC.dtype)


def largest(x_NC: Tensor) -> Tensor:
    """The largest magnitude of every row ``[N, 1]``, at least 1e-30."""
    return x_NC.abs().amax(1, keepdim=True).clamp_(min=1e-30)


class FbgemmLinear(PackedLinear):
    """The same by FBGEMM's dynamic product."""

    def __init__(self, weight_FC: Tensor, bias_F: Tensor | None, exact: bool) -> None:
        self.out_features, self.in_features = weight_FC.shape
        values, scale = quantize_rows(weight_FC)
        self.nbytes = values.nbytes + scale.nbytes
        with (
            warnings.catch_warnings()
        ):  # quantized tensors are deprecated, this product's weights are made of one
            warnings.simplefilter("ignore")
            quantized = torch._make_per_channel_quantized_tensor(
                values, scale[:, 0], torch.zeros(self.out_features, dtype=torch.long), 0
            )
            self.packed = torch.ops.quantized.linear_prepack(quantized, None)
        self.bias, self.exact = bias_F, exact
        self.limits = torch.ones(1, self.in_features)  #: the row that pins the range
        self.limits[0, 1::2] = -1.0
        self.product = torch.ops.quantized.linear_dynamic.default

    def __call__(self, x_NC: Tensor) -> Tensor:
        x = x_NC if x_NC.dtype == torch.float32 else x_NC.float()
        if x.shape[0] == 1 and not self.exact:
            y = self.product(x, self.packed)
        else:
            scale = largest(x)
            y = self.product(torch.cat((x / scale, self.limits)), self.packed)[:-1].mul_(scale)
        if self.bias is not None:
            y += self.bias
        return y if y.dtype == x_NC.dtype else y.to(x_NC.dtype)


def has_fbgemm() -> bool:
    """Whether this build and CPU have FBGEMM's 8-bit product without saturating sums (AVX512 VNNI)."""
    engines = torch.backends.quantized.supported_engines
    return bool(torch.cpu._is_vnni_supported()) and ("x86" in engines or "fbgemm" in engines)


def pack(weight_FC: Tensor, bias_F: Tensor | None, device: torch.device, exact: bool) -> PackedLinear:
    """``pack_linear`` for the format 'int8'.

    Raises:
        ConfigError: the device is not a CPU.
    """
    if device.type != "cpu":
        raise ConfigError(f"format 'int8' is for CPUs, not {device.type}; use 'bf16' there")
    weight = weight_FC.to(device, torch.float32)
    bias = None if bias_F is None else bias_F.to(device, torch.float32)
    if native_takes("int8"):
        from deepseek.ops.native_linear import NativeLinear

        return NativeLinear.pack(weight, bias, "int8")
    if has_fbgemm() and weight.shape[1] > 1:  # a range takes two numbers to pin
        return FbgemmLinear(weight, bias, exact)
    return Int8Reference(weight, bias)
