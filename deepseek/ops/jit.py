"""``ds.jit``: ``torch.compile`` with this package's passes, one compilation for all alike blocks, and a cache (F06).

    fast = ds.jit(model)                       # or a function, or @ds.jit
    fast = ds.jit(model, mode="reduce-overhead")  # CUDA graphs: when launching costs more than computing

Compiled code is kept on disk and found again by the next process: where ``keep_compiled`` says, else where
``TORCHINDUCTOR_CACHE_DIR`` says, else in a temporary directory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import nn

from deepseek.errors import ConfigError, did_you_mean
from deepseek.ops import fusion

F = TypeVar("F", bound=Callable[..., Any])

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
RECOMPILE_LIMIT = (
    64  #: compilations of blocks before torch would silently run them eagerly: kinds × shapes × modes
)


@overload
def jit(
    function: F,
    *,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    mode: str | None = None,
    patterns: bool = True,
) -> F: ...
@overload
def jit(
    function: None = None,
    *,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    mode: str | None = None,
    patterns: bool = True,
) -> Callable[[F], F]: ...
def jit(
    function: Any = None,
    *,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    mode: str | None = None,
    patterns: bool = True,
) -> Any:
    """Compile a function or a module; without one, a decorator.

    Args:
        fullgraph: refuse what would break the graph. dynamic: shapes may vary (``None``: after the first change).
        mode: ``"default"``; ``"reduce-overhead"`` (CUDA graphs); ``"max-autotune"`` (both, and measured kernels, with
            epilogues fused into matrix products); ``"max-autotune-no-cudagraphs"``.
        patterns: use the passes of ``deepseek.ops.fusion``; ``False`` is ``torch.compile``.

    Raises:
        ConfigError: unknown mode, or nothing that can be called.
    """
    if function is not None and not callable(function):
        raise ConfigError(f"ds.jit takes a function or a module, not {type(function).__name__}")
    if function is None:
        return partial(jit, fullgraph=fullgraph, dynamic=dynamic, mode=mode, patterns=patterns)
    return torch.compile(
        function, fullgraph=fullgraph, dynamic=dynamic, options=_options(mode, dynamic, patterns) or None
    )


def compile_blocks(
    blocks: Iterable[nn.Module],
    *,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    mode: str | None = None,
    patterns: bool = False,
    backend: str = "inductor",
) -> None:
    """Compile every block in place, all blocks of one kind by a single compilation.

    The first step then waits for one block of each kind, not for all layers; code and checkpoints of the model are as
    before. With ``activation_checkpoint``, compile the blocks, never the whole model.
    """
    limit = torch._dynamo.config
    limit.recompile_limit = max(limit.recompile_limit, RECOMPILE_LIMIT)
    options = _options(mode, dynamic, patterns) if backend == "inductor" else {}
    for block in blocks:
        block.compile(backend=backend, fullgraph=fullgraph, dynamic=dynamic, options=options or None)


def keep_compiled(directory: Path | str) -> Path:
    """Keep compiled code in ``directory`` from now on, and look for it there; returns the absolute path of its folder.

    Each kind of CPU has a folder of its own: torch finds what was compiled for AVX512 on a machine with AVX2, too,
    compiles it for half as wide vectors, and half of every result is what lay in memory before.
    """
    kind = torch.backends.cpu.get_cpu_capability().lower().replace(" ", "-")
    path = Path(directory).expanduser().absolute() / kind
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(
        path
    )  # torch writes its default there: this cannot be a default
    return path


def _options(mode: str | None, dynamic: bool | None, patterns: bool) -> dict[str, Any]:
    if mode is not None and mode not in MODES:
        raise ConfigError(
            f"jit: unknown mode '{mode}'{did_you_mean(mode, MODES)}; there are: {', '.join(MODES)}"
        )
    of_mode = torch._inductor.list_mode_options(mode, dynamic) if mode else {}
    return {**of_mode, **fusion.options(patterns)}
