"""FLOPs as they happen, by ``torch.utils.flop_counter``, with the operations that it does not know.

Like torch's own formulas these count a causal mask as full, and matrix products only. Experts are counted with the rows
that are set aside for the token floor, used or not.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

Shape = tuple[int, ...]


def flop_counter() -> FlopCounterMode:
    """A context manager; ``get_total_flops()`` afterwards is what ran inside, recomputation and backward included."""
    known: dict[Any, Callable[..., int]] = {}
    for kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu"):
        name = f"_scaled_dot_product_{kind}"
        known[getattr(torch.ops.aten, name)] = _attention
        known[getattr(torch.ops.aten, f"{name}_backward")] = _attention_backward
    for name, formula in _OURS.items():
        if hasattr(torch.ops.deepseek, name):  # known once its module is imported
            known[getattr(torch.ops.deepseek, name)] = formula
    return FlopCounterMode(display=False, custom_mapping=known)


def _attention(q: Shape, k: Shape, v: Shape, *rest: Any, **more: Any) -> int:
    """Two products, with fewer heads of keys than of queries too, which torch counts from 2.13 on only."""
    return 2 * prod(q[:3]) * k[2] * (q[3] + v[3])


def _attention_backward(grad: Shape, q: Shape, k: Shape, v: Shape, *rest: Any, **more: Any) -> int:
    """Five products: the scores again, and the gradients of probabilities, values, queries and keys."""
    return 2 * prod(q[:3]) * k[2] * (3 * q[3] + 2 * v[3])


def _router(x: Shape, weight: Shape, *rest: Any, **more: Any) -> int:
    return 2 * x[0] * prod(weight)


def _experts(x: Shape, gate: Shape, row: Shape, token: Shape, *rest: Any, **more: Any) -> int:
    w_in, w_out = [s for s in rest if isinstance(s, (tuple, torch.Size)) and len(s) == 3][:2]
    return 2 * token[0] * (prod(w_in[1:]) + prod(w_out[1:]))


def _experts_backward(grad: Shape, *given: Any, **more: Any) -> int:
    return 2 * _experts(*given)


def _cross_entropy(
    hidden: Shape, weight: Shape, targets: Shape, z: float, gradient: bool, **more: Any
) -> int:
    return 2 * hidden[0] * prod(weight) * (3 if gradient else 1)


def _swiglu_linear(h: Shape, weight: Shape, *rest: Any, **more: Any) -> int:
    return 2 * h[0] * prod(weight)


def _swiglu_linear_backward(
    grad: Shape, h: Shape, weight: Shape, weight_too: bool, *rest: Any, **more: Any
) -> int:
    return _swiglu_linear(h, weight) * (2 if weight_too else 1)


def _swiglu_network(x: Shape, up: Shape, down: Shape, *rest: Any, **more: Any) -> int:
    return 2 * x[0] * (prod(up) + prod(down))


def _window(q: Shape, k: Shape, v: Shape, start: Any, end: Any, window: int, **more: Any) -> int:
    return 4 * prod(q) * min(window, q[2])


def _flash(q: Shape, k: Shape, v: Shape, offsets: Any, window: int | None, *rest: Any, **more: Any) -> int:
    return 4 * prod(q) * min(window or q[1], q[1])


def _hybrid(q: Shape, *given: Any, **more: Any) -> int:
    pool, window = given[3], given[-3]
    return 4 * prod(q) * (min(window, q[2]) + pool[2])


_OURS: dict[str, Callable[..., int]] = {
    "router": _router,
    "experts": _experts,
    "experts_backward": _experts_backward,
    "linear_cross_entropy": _cross_entropy,
    "swiglu_linear": _swiglu_linear,
    "swiglu_linear_backward": _swiglu_linear_backward,
    "swiglu_network": _swiglu_network,
    "swiglu_network_backward": lambda grad, *given, **more: (
        _swiglu_network(*given[:3]) * (2 if given[-1] else 1)
    ),
    "flash_attention": _flash,
    "flash_attention_backward": lambda grad, q, k, v, out, lse, offsets, window, *rest, **more: (
        5 * _flash(q, k, v, offsets, window) // 2
    ),
    "window_attention": _window,
    "hybrid_attention": _hybrid,
    "window_attention_backward": lambda grad, q, k, v, out, lse, start, end, window, **more: (
        5 * _window(q, k, v, start, end, window) // 2
    ),
    "hybrid_attention_backward": lambda grad, q, qr, k, v, kp, *rest, **more: (
        5 * _hybrid(q, qr, k, v, kp, *rest[-3:]) // 2
    ),
}
