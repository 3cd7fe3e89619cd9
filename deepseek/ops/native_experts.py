"""The experts of a serving step by one native CPU kernel: norm, route, both products, the sum and the residual.

Shape letters: N rows, E experts, K experts per row, C hidden size, F expert size.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from deepseek.ops import native
from deepseek.ops.native import pointer
from deepseek.ops.native_linear import Around, Weight, cut, interleave
from deepseek.ops.packed_linear import Norm


class Layer(ctypes.Structure):
    """``Experts`` of experts.cpp."""

    _fields_ = (
        ("experts", ctypes.c_int64),
        ("top_k", ctypes.c_int64),
        ("normalise", ctypes.c_int64),
        ("router", Weight),
        ("bias", ctypes.c_void_p),
        ("up", Weight),
        ("down", Weight),
    )


class NativeExperts:
    """Arguments as of ``deepseek.ops.decode_experts.PackedExperts``; exact always, of equal scores the first wins."""

    def __init__(
        self, router_EC: Tensor, bias_E: Tensor, gate_up_ECF2: Tensor, down_EFC: Tensor, top_k: int, normalise: bool,
        format: str,
    ) -> None:  # fmt: skip
        self.experts, self.top_k = len(router_EC), top_k
        self.router = cut(router_EC.detach().float()[None], "fp32")
        self.bias = bias_E.detach().float().contiguous()
        self.up = cut(interleave(gate_up_ECF2.detach().mT), format)
        self.down = cut(down_EFC.detach().mT, format)
        self.router_nbytes, self.experts_nbytes = self.router.nbytes, self.up.nbytes + self.down.nbytes
        self._layer = Layer(
            self.experts, top_k, int(normalise), self.router.weight(), pointer(self.bias), self.up.weight(),
            self.down.weight(),
        )  # fmt: skip
        self._at = ctypes.addressof(self._layer)
        self._call = native.function("ds_experts")

    def __call__(
        self, x_NC: Tensor, norm: Norm | None = None, residual_NC: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, given = x_NC.shape[0], Around.of(x_NC, norm, residual_NC)
        y = torch.empty(n, self.down.outputs)
        expert = torch.empty(n, self.top_k, dtype=torch.int64)
        gate = torch.empty(n, self.top_k)
        self._call(
            self._at, *given.pointers, y.data_ptr(), expert.data_ptr(), gate.data_ptr(), n, torch.get_num_threads()
        )  # fmt: skip
        return y if x_NC.dtype == torch.float32 else y.to(x_NC.dtype), expert, gate
