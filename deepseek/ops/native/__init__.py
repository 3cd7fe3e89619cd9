"""Kernels for serving on a CPU, in C++: products of a few rows, the experts, paged attention, cache writes.

The sources lie beside this file and are compiled for this machine when they are first needed (``compiler``), which
takes some seconds once. Where there is no C++ compiler, everything runs in plain torch; that is also the reference that
the tests hold these kernels against. They share torch's OpenMP threads. ``DEEPSEEK_NATIVE=0`` turns them off.

Python calls them through ``ctypes`` with plain pointers: a call costs about two microseconds, so each does what lies
between two points where a decoder has a choice (adapters, traces).
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from deepseek.ops.native.compiler import BuildError, build

log = logging.getLogger(__name__)

VERSION = 1  #: of the functions' signatures
P, I, F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float  # noqa: E741
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "ds_linear": (P, P, P, F, P, P, I, I),
    "ds_swiglu": (P, P, P, P, F, P, P, I, I),
    "ds_experts": (P, P, P, F, P, P, P, P, I, I),
    "ds_attention": (P, P, I, P, P, P, I),
    "ds_append": (P, P, P, P, P, P, I, I),
}


def library() -> ctypes.CDLL | None:
    """The compiled kernels, ``None`` if they cannot be had or are turned off."""
    return None if os.environ.get("DEEPSEEK_NATIVE") == "0" else _load()


@cache
def _load() -> ctypes.CDLL | None:
    """Compile and load; what went wrong is logged once."""
    try:
        lib = ctypes.CDLL(str(build()))
        if (found := lib.ds_version()) != VERSION:
            raise BuildError(f"the library has version {found}, not {VERSION}")
    except (BuildError, OSError) as error:
        log.warning("no native CPU kernels, serving on a CPU takes plain torch: %s", error)
        return None
    for name, arguments in SIGNATURES.items():
        found_function = getattr(lib, name)
        found_function.argtypes, found_function.restype = arguments, None
    return lib


def available() -> bool:
    """Whether the kernels can run here, compiling them if need be."""
    return library() is not None


@cache
def function(name: str) -> Callable[..., None]:
    """A kernel; only where they are ``available``."""
    found: Callable[..., None] = getattr(_load(), name)
    return found


def has(feature: str) -> bool:
    """Whether the kernels use this processor's own products of ``'bf16'`` or ``'int8'`` numbers."""
    lib = library()
    return lib is not None and bool(getattr(lib, f"ds_has_{feature}")())


def pointer(x: torch.Tensor | None) -> int | None:
    """The address of a contiguous tensor's numbers."""
    return None if x is None else x.data_ptr()
