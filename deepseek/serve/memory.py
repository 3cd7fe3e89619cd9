"""How much memory the cache may take."""

from __future__ import annotations

from pathlib import Path

import torch

GIB = 2**30
ACCELERATOR_SHARE = 0.9  #: of what is free after the weights are there
HOST_SHARE, HOST_MOST = 0.25, 4 * GIB  #: of what is free; more only when asked for


def cache_budget(device: torch.device, memory_gib: float) -> int:
    """Bytes for the cache: as told, or a share of what is free now."""
    if memory_gib:
        return int(memory_gib * GIB)
    if device.type == "cuda":
        return int(ACCELERATOR_SHARE * torch.cuda.mem_get_info(device)[0])
    return min(HOST_MOST, int(HOST_SHARE * free_host_memory()))


def free_host_memory() -> int:
    """Bytes that can be had without swapping, the container's limit considered; 8 GiB where nobody tells."""
    free = 8 * GIB
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        table = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
        free = table.get("MemAvailable", free)
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max":
            free = min(free, max(0, int(limit) - used))
    except (OSError, ValueError, IndexError):
        pass
    return free
