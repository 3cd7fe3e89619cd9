"""The expert layer of a serving step: route, run only the chosen experts, add up.

A step has few rows, so time goes into reading weights and into calls. On a CPU every chosen expert is two
``PackedLinear`` products over the rows that chose it (``deepseek.ops.host_experts``); on CUDA the layer is a handful of
kernels without a wait for the host (``deepseek.ops.triton.decode_experts``). No weight is copied, and of the experts
nobody chose none is read.

Shape letters: N rows, E experts, K experts per row, A = N·K assignments, C hidden size, F expert size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.errors import ConfigError
from deepseek.ops import expert_rows, native
from deepseek.ops.experts import dispatch, gates, route, run_experts, swiglu
from deepseek.ops.host_experts import HostExperts
from deepseek.ops.native_experts import NativeExperts
from deepseek.ops.native_linear import CODES
from deepseek.ops.packed_linear import DTYPES, Norm, PackedSwiGLU, normed
from deepseek.ops.triton import kernels, runs_on

STREAM_ROWS = 4  #: up to how many rows each assignment reads its expert by itself on CUDA
KERNEL_ROWS = 256  #: from how many rows on the grouped products of training are the faster ones on CUDA


class PackedExperts:
    """A sparse feed-forward layer, laid out once for serving.

    Args:
        router_EC, bias_E: the router's weight and selection bias.
        gate_up_ECF2, down_EFC: as in ``deepseek.nn.moe.MoE``: inputs before outputs.
        top_k, normalise: experts per row; whether the gates of a row sum to one.
        format, device, exact: as in ``pack_linear``; the router is always fp32.
        shared: the always-on expert, or ``None``.

    Attributes:
        router_nbytes, experts_nbytes: bytes of the router's and of all experts' weights.

    Raises:
        ConfigError: a format the device does not have, or ``exact`` where it cannot be had.
    """

    def __init__(
        self,
        router_EC: Tensor,
        bias_E: Tensor,
        gate_up_ECF2: Tensor,
        down_EFC: Tensor,
        top_k: int,
        normalise: bool,
        format: str,
        device: torch.device | str,
        *,
        shared: PackedSwiGLU | None = None,
        exact: bool = False,
    ) -> None:
        self.experts, self.top_k, self.normalise, self.shared = len(gate_up_ECF2), top_k, normalise, shared
        parts = router_EC, bias_E, gate_up_ECF2, down_EFC, top_k, normalise, format
        self._layer: NativeExperts | HostExperts | DeviceExperts
        if torch.device(device).type != "cpu" or runs_on(torch.device(device)):
            self._layer = DeviceExperts(*parts, device, exact)
        elif native.available() and (format == "fp32" or (format in CODES and native.has(format))):
            self._layer = NativeExperts(*parts)
        else:
            self._layer = HostExperts(*parts, device, exact)
        self.router_nbytes, self.experts_nbytes = self._layer.router_nbytes, self._layer.experts_nbytes

    def __call__(self, x_NC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows through their experts.

        Args:
            x_NC: in the engine's compute dtype.

        Returns:
            ``out [N, C]`` in the dtype of ``x``, the experts ``[N, K]`` (integer, likeliest first by probability
            plus bias) and their gates ``[N, K]`` (fp32).
        """
        return self.fused(x_NC)

    def fused(
        self, x_NC: Tensor, norm: Norm | None = None, residual_NC: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same with ``residual + experts(norm(x))`` as ``out``: fewer kernels where the device has them."""
        if isinstance(self._layer, HostExperts):
            x_NC = normed(x_NC, norm)
            out, expert, gate = self._layer(x_NC)
            if self.shared is not None:
                out = out + self.shared(x_NC)
            return out if residual_NC is None else residual_NC + out, expert, gate
        out, expert, gate = self._layer(x_NC, norm, residual_NC)
        return out if self.shared is None else self.shared.fused(x_NC, norm, out), expert, gate


class DeviceExperts:
    """On an accelerator: kernels for a step's rows; for a long prompt's the grouped products that training uses."""

    def __init__(
        self, router_EC: Tensor, bias_E: Tensor, gate_up_ECF2: Tensor, down_EFC: Tensor, top_k: int, normalise: bool,
        format: str, device: torch.device | str, exact: bool,
    ) -> None:  # fmt: skip
        if format not in DTYPES:
            raise ConfigError(
                f"experts on {torch.device(device).type} are kept in fp32 or bf16, not '{format}'"
            )
        fused = runs_on(torch.device(device))
        self.kernels = kernels("decode_experts") if fused else None
        if exact and not fused:
            raise ConfigError("experts with bit-identical rows need a CPU, or CUDA with the extra 'kernels'")
        self.top_k, self.normalise, self.exact = top_k, normalise, exact
        self.router = router_EC.detach().to(device, torch.float32)
        self.bias = bias_E.detach().to(device, torch.float32)
        self.gate_up, self.down = (  # inputs side by side: what the kernels read
            w.detach().to(device, DTYPES[format]).mT.contiguous() for w in (gate_up_ECF2, down_EFC)
        )
        self.router_nbytes = self.router.nbytes
        self.experts_nbytes = self.gate_up.nbytes + self.down.nbytes

    def __call__(
        self, x_NC: Tensor, norm: Norm | None = None, residual_NC: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.kernels is not None and (self.exact or x_NC.shape[0] <= KERNEL_ROWS):
            few = not self.exact and x_NC.shape[0] <= STREAM_ROWS
            out: tuple[Tensor, Tensor, Tensor] = (self.kernels.few if few else self.kernels.grouped)(
                x_NC.contiguous(), self.router, self.bias, self.gate_up, self.down, self.top_k, self.normalise,
                norm=norm, residual_NC=None if residual_NC is None else residual_NC.contiguous(),
            )  # fmt: skip
            return out
        x_NC = normed(x_NC, norm)
        probs, expert, gate = route(x_NC, self.router, self.bias, self.top_k, self.normalise)
        where = dispatch(expert, probs)
        y, _ = run_experts(x_NC, gates(gate, probs, where), where, self.gate_up.mT, self.down.mT)
        return y if residual_NC is None else residual_NC + y, expert, gate


def experts_reference(
    x_NC: Tensor,
    router_EC: Tensor,
    bias_E: Tensor,
    gate_up_ECF2: Tensor,
    down_EFC: Tensor,
    top_k: int,
    normalise: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``PackedExperts`` computes (without the shared expert), one assignment at a time."""
    _, expert, gate = expert_rows.router(x_NC, router_EC, bias_E, top_k, normalise)
    out = torch.zeros_like(x_NC, dtype=gate.dtype)
    for n, k in torch.cartesian_prod(torch.arange(len(x_NC)), torch.arange(top_k)).tolist():
        e = int(expert[n, k])
        inner = swiglu(x_NC[n] @ gate_up_ECF2[e].to(x_NC.dtype)) * gate[n, k].to(x_NC.dtype)
        out[n] += F.linear(inner, down_EFC[e].to(x_NC.dtype).T)
    return out.to(x_NC.dtype), expert, gate
