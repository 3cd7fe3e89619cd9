"""Linear layers and SwiGLU layers by the native CPU kernels: how a weight lies in memory, and the calls.

``deepseek/ops/native/product.h`` tells the layout. A format is 32-bit words of inputs: one fp32, two bf16, or four int8
(a scale per output, activations scaled row by row as in ``deepseek.ops.int8_linear``). Every row's sums are taken in
the same order in any company, so these are exact whether asked or not.

Shape letters: N rows, C inputs, F outputs of a layer, E experts.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek.ops import native
from deepseek.ops.int8_linear import quantize_rows
from deepseek.ops.native import pointer
from deepseek.ops.packed_linear import Norm, PackedLinear

LANES = 16  #: outputs of a block
PER_WORD = {"fp32": 1, "bf16": 2, "int8": 4}
CODES = {"fp32": 0, "bf16": 1, "int8": 2}


class Weight(ctypes.Structure):
    """``Weight`` of product.h."""

    _fields_ = (
        ("format", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("words", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
    )


class Blocks(NamedTuple):
    """One weight, or the equal weights of several experts, cut into blocks.

    Attributes:
        data: ``[E · blocks, words, 16, inputs of a word]``. scale, sums: ``[E · blocks · 16]`` of int8, else ``None``.
    """

    format: str
    inputs: int
    outputs: int
    words: int
    blocks: int
    data: Tensor
    scale: Tensor | None
    sums: Tensor | None

    def weight(self, bias: Tensor | None = None) -> Weight:
        """What the kernels take; these tensors must outlive it."""
        return Weight(
            CODES[self.format], self.inputs, self.outputs, self.words, self.blocks, pointer(self.data), pointer(bias),
            pointer(self.scale), pointer(self.sums),
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        scales = 0 if self.scale is None or self.sums is None else self.scale.nbytes + self.sums.nbytes
        return self.data.nbytes + scales


def cut(weight_EFC: Tensor, format: str) -> Blocks:
    """Lay out ``[E, F, C]`` (any float dtype) in a format; F and C are filled up with zeros."""
    experts, outputs, inputs = weight_EFC.shape
    per_word = PER_WORD[format]
    blocks, words = -(-outputs // LANES), -(-inputs // per_word)
    scale = sums = None
    values = weight_EFC
    if format == "int8":
        flat, scale_A1 = quantize_rows(weight_EFC.reshape(-1, inputs))
        values = flat.view(experts, outputs, inputs)
        fill = (0, blocks * LANES - outputs)
        scale = torch.nn.functional.pad(scale_A1.view(experts, outputs), fill).flatten().contiguous()
        total = values.sum(2, dtype=torch.int32) * 128
        sums = torch.nn.functional.pad(total, fill).flatten().contiguous()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[format]
    data = torch.empty(experts * blocks, words, LANES, per_word, dtype=dtype)
    for e in range(experts):  # one at a time: nothing large is made on the way
        corner = (0, words * per_word - inputs, 0, blocks * LANES - outputs)
        padded = torch.nn.functional.pad(values[e].to(dtype), corner)
        data[e * blocks : (e + 1) * blocks] = padded.view(blocks, LANES, words, per_word).transpose(1, 2)
    return Blocks(format, inputs, outputs, words, blocks, data, scale, sums)


def interleave(gate_up_E2FC: Tensor) -> Tensor:
    """``[E, 2F, C]``, gate above up, with 16 rows of one after 16 of the other, as ``ds_swiglu`` takes them."""
    experts, double, inputs = gate_up_E2FC.shape
    half = double // 2
    fill = (0, 0, 0, -half % LANES)
    parts = [
        torch.nn.functional.pad(part, fill).view(experts, -1, LANES, inputs)
        for part in gate_up_E2FC.split(half, 1)
    ]
    return torch.stack(parts, 2).view(experts, -1, inputs)


def as_rows(x: Tensor) -> Tensor:
    """fp32 and contiguous."""
    return (x if x.dtype == torch.float32 else x.float()).contiguous()


class Around(NamedTuple):
    """What lies before and after a product, as the kernels take it; it holds what the pointers point to."""

    x_NC: Tensor
    norm: Tensor | None
    eps: float
    residual: Tensor | None

    @classmethod
    def of(cls, x_NC: Tensor, norm: Norm | None, residual: Tensor | None) -> Around:
        weight, eps = (None, 0.0) if norm is None else (as_rows(norm[0]), norm[1])
        return cls(as_rows(x_NC), weight, eps, None if residual is None else as_rows(residual))

    @property
    def pointers(self) -> tuple[int, int | None, float, int | None]:
        return self.x_NC.data_ptr(), pointer(self.norm), self.eps, pointer(self.residual)


class NativeLinear(PackedLinear):
    """A product over blocks, with the norm before and the residual after in the same call."""

    def __init__(self, blocks: Blocks, bias_F: Tensor | None) -> None:
        self.out_features, self.in_features, self.nbytes = blocks.outputs, blocks.inputs, blocks.nbytes
        self.blocks, self.bias = blocks, None if bias_F is None else bias_F.float().contiguous()
        self._weight = blocks.weight(self.bias)
        self.address = ctypes.addressof(self._weight)
        self._call = native.function("ds_linear")

    @classmethod
    def pack(cls, weight_FC: Tensor, bias_F: Tensor | None, format: str) -> NativeLinear:
        return cls(cut(weight_FC[None], format), bias_F)

    def __call__(self, x_NC: Tensor) -> Tensor:
        return self.fused(x_NC)

    def fused(self, x_NC: Tensor, norm: Norm | None = None, residual_NF: Tensor | None = None) -> Tensor:
        n, given = x_NC.shape[0], Around.of(x_NC, norm, residual_NF)
        y = torch.empty(n, self.out_features)
        self._call(self.address, *given.pointers, y.data_ptr(), n, torch.get_num_threads())
        return y if x_NC.dtype == torch.float32 else y.to(x_NC.dtype)


class Interleaved(PackedLinear):
    """The gate-and-up product by itself, outputs in the usual order: what adapters add to."""

    def __init__(self, linear: NativeLinear, half: int) -> None:
        self.linear, self.half = linear, half
        self.in_features, self.out_features, self.nbytes = linear.in_features, 2 * half, linear.nbytes

    def __call__(self, x_NC: Tensor) -> Tensor:
        n = x_NC.shape[0]
        y = self.linear(x_NC).view(n, -1, 2, LANES).transpose(1, 2)
        return y.reshape(n, 2, -1)[..., : self.half].reshape(n, -1)


class NativeSwiGLU:
    """``residual + down(silu(gate(norm(x))) · up(norm(x)))`` in one call; arguments as of ``PackedSwiGLU``."""

    def __init__(
        self, gate_up_F2C: Tensor, gate_up_bias_F2: Tensor | None, down_CF: Tensor, down_bias_C: Tensor | None,
        format: str,
    ) -> None:  # fmt: skip
        bias = gate_up_bias_F2
        flat = None if bias is None else interleave(bias.float()[None, :, None]).flatten()
        up = NativeLinear(cut(interleave(gate_up_F2C[None]), format), flat)
        self.gate_up, self.down = (
            Interleaved(up, len(gate_up_F2C) // 2),
            NativeLinear.pack(down_CF, down_bias_C, format),
        )
        self._call = native.function("ds_swiglu")

    def __call__(self, x_NC: Tensor, norm: Norm | None, residual_NC: Tensor | None) -> Tensor:
        n, given = x_NC.shape[0], Around.of(x_NC, norm, residual_NC)
        y = torch.empty(n, self.down.out_features)
        self._call(
            self.gate_up.linear.address, self.down.address, *given.pointers, y.data_ptr(), n, torch.get_num_threads()
        )  # fmt: skip
        return y if x_NC.dtype == torch.float32 else y.to(x_NC.dtype)
