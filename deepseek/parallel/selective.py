"""Selective checkpointing: results that are dear to compute are kept, the rest is computed again.

Dear are matrix products, attention, top-k, communication and this package's own operations, its rotation and norms
excepted; norms, activations, rotations and residual sums are cheap. So no FLOP of a matrix product is spent twice.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from deepseek.errors import TrainingError

OPERATIONS = (
    "mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm", "_scaled_grouped_mm", "convolution", "topk",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable", "_scaled_dot_product_attention_math",
)  # fmt: skip
NAMESPACES = ("deepseek", "_c10d_functional")
CHEAP = ("rotary", "rms_norm", "add_rms_norm", "wait_tensor")  #: in these namespaces


def is_dear(op: Any) -> bool:
    """Whether the result of an operator (``torch.ops.…``) is kept."""
    namespace, _, name = op.name().partition("::") if hasattr(op, "name") else ("", "", "")
    name = name.partition(".")[0]
    if namespace == "aten":
        return name in OPERATIONS
    return namespace == "flex_attention" or (namespace in NAMESPACES and name not in CHEAP)


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """``value`` with every leaf of its tuples, lists and dictionaries changed."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(v, change) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(v, change) for v in value)
    if isinstance(value, dict):
        return {k: mapped(v, change) for k, v in value.items()}
    return change(value)


class Results:
    """The dear results of one call: kept on its first run (``remember``), handed out on the next (``recall``).

    Args:
        keep: what to hold for a tensor, and ``fetch``: the tensor for what is held (offload moves it meanwhile).
    """

    def __init__(self, keep: Callable[[Tensor], Any], fetch: Callable[[Any], Tensor]) -> None:
        self.keep, self.fetch = keep, fetch
        self.held: dict[Any, list[Any]] = defaultdict(list)

    def remember(self) -> AbstractContextManager[Any]:
        return _Remember(self)

    def recall(self) -> AbstractContextManager[Any]:
        return _Recall(self)


class _Held:
    """A result and the version it had: a later change in place would make it useless."""

    def __init__(self, tensor: Tensor, results: Results) -> None:
        # Below autograd a detached tensor has a version of its own; the guard lets it share the result's.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            shared = tensor.detach()
        self.version, self.kept = shared._version, results.keep(shared)

    def fetch(self, results: Results, op: Any) -> Tensor:
        if isinstance(self.kept, Tensor) and self.kept._version != self.version:
            raise TrainingError(
                f"the result of {op} was changed in place after it was kept for backward; use another mode of "
                "activation_checkpoint, or an operation that is not in place"
            )
        return results.fetch(self.kept).detach()


class _Remember(TorchDispatchMode):
    def __init__(self, results: Results) -> None:
        super().__init__()
        self.results = results

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if is_dear(func):
            r = self.results
            r.held[func].append(mapped(out, lambda t: _Held(t, r) if isinstance(t, Tensor) else t))
        return out


class _Recall(TorchDispatchMode):
    def __init__(self, results: Results) -> None:
        super().__init__()
        self.results, self.left = results, {op: deque(outs) for op, outs in results.held.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not is_dear(func):
            return func(*args, **(kwargs or {}))
        left = self.left.get(func)
        if not left:
            raise TrainingError(f"{func} ran more often when its block was run again than the first time")
        r = self.results
        return mapped(left.popleft(), lambda t: t.fetch(r, func) if isinstance(t, _Held) else t)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_dear(op) else CheckpointPolicy.PREFER_RECOMPUTE


def selective_when_compiled(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``forward(*args)``; a compiler that traces this is told the same rule."""
    if not torch.compiler.is_compiling():
        return forward(*args, **kwargs)
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)
