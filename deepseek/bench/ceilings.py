"""Ceilings of a machine: what a matrix product, a copy and a grouped matrix product reach here and now.

A share of a ceiling measured in the same run says more than an absolute number; beside it stands the data
sheet's peak, which is what MFU is usually relative to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from deepseek.bench.timing import measure, random_like

#: Dense bf16 TFLOP/s without sparsity, from the makers' data sheets; the first name found in the GPU's wins.
DATASHEET = (
    ("GB200", 2500.0), ("B200", 2250.0), ("B100", 1750.0), ("GH200", 989.0), ("H200", 989.0), ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0), ("H100", 989.0), ("H800", 989.0), ("H20", 148.0), ("A100", 312.0), ("A800", 312.0),
    ("L40S", 362.0), ("L40", 181.0), ("L4", 121.0), ("A40", 149.7), ("A10", 125.0), ("RTX 5090", 209.5),
    ("RTX 4090", 165.2), ("RTX 3090", 71.0), ("MI300X", 1307.0), ("MI250", 362.1),
)  # fmt: skip


def datasheet_tflops(device_name: str) -> float | None:
    """Peak dense bf16 TFLOP/s of a GPU by its name; ``None`` when it is not in the table."""
    return next((peak for name, peak in DATASHEET if name in device_name), None)


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 on an accelerator, fp32 on a CPU."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def ceiling_size(device: torch.device, quick: bool) -> int:
    """The side of the square product that a device is judged by: seconds of work at most."""
    return 256 if quick else 1024 if device.type == "cpu" else 8192


def matmul_tflops(device: torch.device, size: int = 8192, dtype: torch.dtype | None = None) -> float:
    """TFLOP/s of ``size``-cubed on random data."""
    dtype = dtype or compute_dtype(device)
    a, b = (random_like((size, size), device, dtype) for _ in range(2))
    return 2 * size**3 / measure(lambda: a @ b, device).median / 1e12


def copy_tb_per_s(device: torch.device, numbers: int = 2**30) -> float:
    """TB/s read plus written when ``numbers`` fp32 are copied."""
    source = random_like((numbers,), device, torch.float32)
    target = torch.empty_like(source)
    return 8 * numbers / measure(lambda: target.copy_(source), device).median / 1e12


def grouped_tflops(
    device: torch.device, rows: int, experts: int, inner: int, outer: int, dtype: torch.dtype | None = None
) -> float:
    """TFLOP/s of one ``grouped_mm``, ``rows`` shared equally by ``experts``, each ``inner × outer``."""
    dtype = dtype or compute_dtype(device)
    x, w = random_like((rows, inner), device, dtype), random_like((experts, inner, outer), device, dtype)
    ends = torch.arange(1, experts + 1, device=device, dtype=torch.int32) * (rows // experts)
    used = rows // experts * experts
    return (
        2 * used * inner * outer / measure(lambda: F.grouped_mm(x[:used], w, offs=ends), device).median / 1e12
    )
