"""What this machine has, and which path each operation takes on it. Measured or looked up, never assumed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

import torch

from deepseek.assemble import pick_device
from deepseek.errors import DeepseekError
from deepseek.ops import flash_attention, fused_products, native
from deepseek.ops.attention import KERNEL_HEAD_DIMS
from deepseek.ops.attention import pick_backend as pick_attention
from deepseek.ops.experts import pick_backend
from deepseek.ops.triton import available
from deepseek.precision import choose, matmul_flops
from deepseek.registry import backends, load_plugins

OPTIONAL = {
    "triton": "kernels",
    "flash-attn-4": "flash",
    "transformers": "hf",
    "rensa": "data",
    "py3langid": "data",
    "pyarrow": "data",
    "datasets": "data",
    "liger-kernel": "bench",
}


def examine() -> dict[str, dict[str, str]]:
    """Findings by topic: machine, number formats, operations, optional packages."""
    device = pick_device("auto")
    return {
        "machine": _machine(device),
        "number formats": _formats(device),
        "operations": _operations(device),
        "optional packages": {name: _version(name, extra) for name, extra in OPTIONAL.items()},
    }


def _machine(device: torch.device) -> dict[str, str]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    found = {
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "torch": torch.__version__,
        "CPU": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads used, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "memory": f"{memory / 2**30:.1f} GiB" if memory else "unknown",
        "free disk here": f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB",
        "device used": str(device),
    }
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        found["GPU"] = (
            f"{torch.cuda.device_count()} × {p.name}, {p.total_memory / 2**30:.0f} GiB, SM{p.major}{p.minor}"
        )
    return found


def _formats(device: torch.device) -> dict[str, str]:
    names = {"fp32": torch.float32, "bf16": torch.bfloat16}
    found = {
        n: f"{matmul_flops(device.type, d) / 1e9:,.1f} GFLOP/s (matrix product)" for n, d in names.items()
    }
    policy = choose("auto", device)
    note = "; a run then times its own step in both" if device.type == "cpu" and policy.name != "fp32" else ""
    return {**found, "precision_mode = auto": f"{policy.name} ({policy.reason}){note}"}


def _operations(device: torch.device) -> dict[str, str]:
    load_plugins()
    work = choose("auto", device).dtype
    probe = torch.empty(1, device=device, dtype=work)
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    compiled = (
        "available" if compiler or device.type == "cuda" else "not available: no C++ compiler on the PATH"
    )
    rows = "Triton" if device.type == "cuda" and available() else "plain torch"
    fused = pick_attention(device, KERNEL_HEAD_DIMS[0], work) == "triton"
    sizes = ", ".join(map(str, KERNEL_HEAD_DIMS))
    attention = f"triton for heads of {sizes}, else chunked" if fused else "chunked, plain torch"
    packed = "the same kernels" if fused else "a dense mask"
    return {
        "full attention": f"{_whole_rows(device, work)}; packed documents by {packed}",
        "window attention": attention + _choices("window_attention"),
        "hybrid attention": attention + _choices("hybrid_attention"),
        "experts": f"{pick_backend(probe)}"
        + _choices("grouped_linear")
        + f"; rows by {rows}"
        + _fused(device, work, True),
        "dense networks": f"torch; rows by {rows}" + _fused(device, work, False),
        "head and loss": f"one operation, in chunks; rows by {rows}",
        "optimizer": "Muon for hidden matrices, fused AdamW for the rest",
        "train.compile": compiled,
        "serving on a CPU": _cpu_serving(),
        "parallelism": "data parallel by torchrun (gloo)"
        if device.type == "cpu"
        else "data parallel by torchrun (NCCL)",
    }


def _whole_rows(device: torch.device, dtype: torch.dtype) -> str:
    """Asking is trying: on a GPU with the package this compiles and checks its kernels, for some seconds."""
    plain = "torch scaled_dot_product_attention"
    if device.type != "cuda":
        return plain
    try:
        sizes = [D for D in flash_attention.HEAD_DIMS if flash_attention.usable(device, dtype, D, 4)]
    except DeepseekError as error:
        return f"{plain} ({error})"
    if not sizes:
        return plain
    return f"in training FlashAttention-4 for heads of {', '.join(map(str, sizes))}, else {plain}"


def _fused(device: torch.device, dtype: torch.dtype, grouped: bool) -> str:
    """Asking is trying, as above."""
    try:
        found = fused_products.usable(device, dtype, grouped, fused_products.UNIT)
    except DeepseekError as error:
        return f" ({error})"
    return f"; in training fused products for sizes of multiples of {fused_products.UNIT}" if found else ""


def _cpu_serving() -> str:
    if not native.available():
        return (
            "plain torch: no native kernels (they need Linux and a C++ compiler, and DEEPSEEK_NATIVE not 0)"
        )
    own = [name for name in ("bf16", "int8") if native.has(name)]
    return f"native kernels; this processor's own products: {', '.join(['fp32', *own])}"


def _choices(op: str) -> str:
    return f" (of {', '.join(backends(op))})"


def _version(package: str, extra: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed: pip install 'deepseek-framework[{extra}]'"
