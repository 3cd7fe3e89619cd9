"""Matrix products that gather their rows and apply SwiGLU by themselves: kernels of the package ``quack-kernels``.

Optional: it comes with the extra ``flash`` (Hopper GPUs). ``fused_experts`` and ``swiglu`` are made of them in
training. The kernels want gate and up as neighbours, ``[…, F, 2]``.

Before it is believed, the kernels are compiled (seconds, once a machine: they are kept in our cache directory, or in
``QUACK_CACHE_DIR``) and compared with float64; a package that cannot be imported, compiled or trusted is told once in
the log, and the plain path goes on. ``DEEPSEEK_FUSED_PRODUCTS=0`` turns it off, ``1`` makes it an error when a CUDA
device cannot have it.

Shape letters: N tokens or rows, R rows sorted by expert, E experts, D hidden size, F size after the activation.
``starts [E + 1]`` says where each expert's rows start; rows from ``starts[-1]`` on are unused, and what they hold is
undefined.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from deepseek.ops.native.compiler import directory
from deepseek.ops.optional import OptionalKernels

CAPABILITIES = ((9, 0),)
UNIT = 8  #: sizes must be multiples: 16 bytes

#: Tile, whether two groups of warps take turns, and blocks that share a load: the fastest of a sweep on an H200.
TILES = {
    "up": (128, 192, True, 2),
    "down_gradient": (128, 128, True, 2),
    "rows": (128, 256, False, 2),
    "outer": (128, 256, False, 2),
    "dense_up": (128, 160, True, 2),
}


def _load() -> None:
    products()


package = OptionalKernels(
    "quack-kernels", "plain products run", "quack-kernels", "flash", "quack", "DEEPSEEK_FUSED_PRODUCTS", _load
)
forced = package.forced


def usable(device: torch.device, dtype: torch.dtype, grouped: bool, *sizes: int) -> bool:
    """Whether products of these sizes run here; a first answer may compile kernels.

    Args:
        grouped: for experts, or for one dense network.

    Raises:
        MissingExtraError, ConfigError: it is switched on, ``device`` is CUDA, and it cannot be had.
    """
    check = grouped_error if grouped else dense_error
    kind = "experts" if grouped else "dense networks", device
    return package.usable(device, lambda: _refusal(device, dtype, sizes), kind, lambda: check(device))


usable._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as flash_attention.usable


def _refusal(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> str:
    """Why inputs of this kind are not taken, or nothing."""
    if (capability := torch.cuda.get_device_capability(device)) not in CAPABILITIES:
        return f"fused products are used on GPUs of capability 9.0, and this has {capability}"
    if dtype != torch.bfloat16 or any(size % UNIT for size in sizes):
        return f"fused products are used for bf16 and sizes of multiples of {UNIT}, not {sizes} of {dtype}"
    return ""


def grouped_error(device: torch.device) -> float:
    """The worst error of the four products on four experts, one of them without rows, against float64."""
    N, D, F_, sizes = 300, 192, 136, (210, 0, 77, 133)
    random = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=random, device=device) * scale).bfloat16()

    starts = torch.tensor((0, *sizes), device=device, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    used, rows = sum(sizes), sum(sizes) + 30
    token = torch.randint(N, (rows,), generator=random, device=device, dtype=torch.int32)
    x, d_out = draw(N, D), draw(N, D)
    w_in, w_out = draw(4, D, 2 * F_, scale=D**-0.5), draw(4, F_, D, scale=F_**-0.5)
    gate = torch.rand(rows, generator=random, device=device)
    run = products()
    hidden, inner = run.up(x, w_in, starts, token)
    d_hidden, gated, d_gate = run.down_gradient(d_out, w_out, hidden, gate, starts, token)
    got = {
        "hidden": hidden, "inner": inner, "y": run.rows(inner, w_out, starts), "d_hidden": d_hidden, "gated": gated,
        "d_gate": d_gate, "d_rows": run.rows(d_hidden.flatten(1), w_in.mT, starts),
        "d_out": run.outer(d_out, gated, starts, token, turned=True).mT,
        "d_in": run.outer(x, d_hidden.flatten(1), starts, token),
    }  # fmt: skip
    parts: dict[str, list[Tensor]] = {name: [] for name in got}
    for e, size in enumerate(sizes):
        here = slice(int(starts[e]), int(starts[e]) + size)
        xs, ds = x[token[here].long()].double(), d_out[token[here].long()].double()
        h = (xs @ w_in[e].double()).unflatten(1, (F_, 2))
        a, b = h.unbind(-1)
        s, g = a.sigmoid(), gate[here, None].double()
        y, d = a * s * b, ds @ w_out[e].double().mT
        dh = torch.stack((g * d * b * s * (1 + a * (1 - s)), g * d * a * s), -1)
        want = {
            "hidden": h, "inner": y, "y": y @ w_out[e].double(), "d_hidden": dh, "gated": g * y,
            "d_gate": (d * y).sum(1), "d_rows": dh.flatten(1) @ w_in[e].double().mT,
            "d_out": (g * y).mT @ ds, "d_in": xs.mT @ dh.flatten(1),
        }  # fmt: skip
        for name, value in want.items():
            parts[name].append(value)
    errors = []
    for name, values in parts.items():
        exact = torch.stack(values) if name in ("d_out", "d_in") else torch.cat(values)
        found = got[name].double() if name in ("d_out", "d_in") else got[name][:used].double()
        errors.append((found - exact).norm() / exact.norm())
    return float(torch.stack(errors).nan_to_num(torch.inf).max())


def dense_error(device: torch.device) -> float:
    """The worst error of the dense products against float64."""
    N, D, F, C = 300, 192, 136, 160
    random = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=random, device=device) * scale).bfloat16()

    x, d_out, w_in, w_out = (
        draw(N, D),
        draw(N, C),
        draw(2 * F, D, scale=D**-0.5),
        draw(C, F, scale=F**-0.5),
    )
    run = products()
    h, y = run.dense_up(x, w_in)
    got = (h, y, *run.dense_down_gradient(d_out, w_out, h))
    wide = (x.double() @ w_in.double().T).unflatten(1, (2, F)).mT
    a, b = wide.unbind(-1)
    s, d = a.sigmoid(), d_out.double() @ w_out.double()
    d_h = torch.stack((d * b * s * (1 + a * (1 - s)), d * a * s), -1)
    want = (wide, a * s * b, d_h, a * s * b)
    errors = torch.stack([(a.double() - b).norm() / b.norm() for a, b in zip(got, want)])
    return float(errors.nan_to_num(torch.inf).max())


# --- the products ---------------------------------------------------------------------------------------------------


class Products:
    """The package's kernels under the shapes of this file; imported when made."""

    def __init__(self) -> None:
        store: Any = import_module("quack.cache")
        if store.CACHE_DIR is None:  # what lies there is run, and the package's own choice is open to others
            store.CACHE_DIR = str(directory() / "quack")
        self._package = import_module("quack.gemm_interface")
        self._config = import_module("quack.gemm_config").GemmConfig
        self.tiles = {name: self.tile(*sizes) for name, sizes in TILES.items()}

    def tile(self, rows: int, columns: int, turns: bool, share: int) -> Any:
        """The package's options for one of ``TILES``."""
        return self._config(
            tile_m=rows, tile_n=columns, pingpong=turns, cluster_m=share, cluster_n=1, swap_ab=False,
            is_dynamic_persistent=False, device_capacity=9,
        )  # fmt: skip

    def up(self, x_ND: Tensor, w_EDF2: Tensor, starts: Tensor, token_R: Tensor) -> tuple[Tensor, Tensor]:
        """``h = x[token] @ w[e]``, gate and up as neighbours: ``[R, F, 2]`` and ``silu(gate) · up [R, F]``."""
        h, y = self._package.gemm_act(
            x_ND, w_EDF2, activation="swiglu", cu_seqlens_m=starts, A_idx=token_R, config=self.tiles["up"]
        )
        return h.unflatten(1, (-1, 2)), y

    def down_gradient(
        self, d_ND: Tensor, w_EFD: Tensor, h_RF2: Tensor, gate_R: Tensor, starts: Tensor, token_R: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """With ``d = d[token] @ w[e]ᵀ``: the gradient of ``h`` times the gate ``[R, F, 2]``, ``gate · silu(gate) · up
        [R, F]``, and the gates' own gradient, fp32 ``[R]``."""
        d_h, y, d_gate = self._package.gemm_dact(
            d_ND, w_EFD.mT, h_RF2.flatten(1), activation="swiglu", colvec_scale=gate_R, colvec_reduce=True,
            cu_seqlens_m=starts, A_idx=token_R, dynamic_scheduler=False, config=self.tiles["down_gradient"],
        )  # fmt: skip
        return d_h.view_as(h_RF2), y, d_gate

    def rows(self, x_RD: Tensor, w_EDF: Tensor, starts: Tensor) -> Tensor:
        """``x @ w[e]``, ``[R, F]``."""
        out = x_RD.new_empty(x_RD.shape[0], w_EDF.shape[2])
        self._package.gemm_tuned.fn(x_RD, w_EDF, out, cu_seqlens_m=starts, config=self.tiles["rows"])
        return out

    def outer(
        self, x_ND: Tensor, y_RF: Tensor, starts: Tensor, token_R: Tensor, turned: bool = False
    ) -> Tensor:
        """``x[token of rows of e]ᵀ @ y[rows of e]``, ``[E, D, F]``; zeros for an expert without rows. ``turned``: in
        memory ``[E, F, D]``."""
        E, D, inner = starts.shape[0] - 1, x_ND.shape[1], y_RF.shape[1]
        out = x_ND.new_empty(E, inner, D).mT if turned else x_ND.new_empty(E, D, inner)
        self._package.gemm_tuned.fn(
            x_ND.mT, y_RF, out, cu_seqlens_k=starts, A_idx=token_R, config=self.tiles["outer"]
        )
        return out

    def dense_up(self, x_ND: Tensor, w_2FD: Tensor) -> tuple[Tensor, Tensor]:
        """``h = x @ wᵀ`` of a weight with gate and up one below the other, as ``up``: ``[N, F, 2]`` and ``[N, F]``."""
        h, y = self._package.gemm_act(
            x_ND, w_2FD.mT, activation="swiglu", concat_layout=("B",), config=self.tiles["dense_up"]
        )
        return h.unflatten(1, (-1, 2)), y

    def dense_down_gradient(self, d_NC: Tensor, w_CF: Tensor, h_NF2: Tensor) -> tuple[Tensor, Tensor]:
        """With ``d @ w``: the gradient of ``h [N, F, 2]`` and ``silu(gate) · up [N, F]``."""
        d_h, y = self._package.gemm_dact(
            d_NC, w_CF, h_NF2.flatten(1), activation="swiglu", dynamic_scheduler=False,
            config=self.tiles["down_gradient"],
        )  # fmt: skip
        return d_h.view_as(h_NF2), y


@cache
def products() -> Products:
    return Products()
