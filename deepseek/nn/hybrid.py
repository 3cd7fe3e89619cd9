"""Hybrid attention layer: sliding window + pooled global branch, blended by a gate per head (F11, S1 §1).

Keys and values are shared by both branches. The gate is ``sigmoid(W x + b)`` per token and head, or with
``gate="static"`` the source's γ: one learned constant per head.

Shape letters: B rows, T positions, H query heads, K key/value heads, D head size, C hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepseek.nn.attention import Attention, AttentionConfig, Context
from deepseek.nn.cache import LayerCache
from deepseek.nn.layers import widen
from deepseek.nn.rope import rotate
from deepseek.ops.attention import causal_mask, dense_attention
from deepseek.ops.hybrid_attention import (
    hybrid_attention,
    hybrid_attention_kernel,
    pooled_attention,
    pooled_mask,
)


class HybridAttention(Attention):
    """``γ · attention over pooled blocks + (1 − γ) · attention over the window``."""

    rotates = False  # blocks are pooled, and asked for, without rotation; the window alone has it

    def __init__(self, hidden: int, config: AttentionConfig, eps: float = 1e-6) -> None:
        super().__init__(hidden, config, eps)
        self.sink = nn.Parameter(torch.zeros(2, config.kv_heads, config.head_dim))
        self.gate_bias = nn.Parameter(torch.full((config.heads,), config.gate_init))
        self.gate = nn.Linear(hidden, config.heads, bias=False) if config.gate == "token" else None
        learned = config.pooling == "learned"
        self.pool = nn.Parameter(torch.zeros(2, config.kv_heads, config.block)) if learned else None

    def pooling(self) -> Tensor | None:
        """The share ``[2, K, block]`` of each place of a block in its key and value; ``None``: equal shares."""
        return None if self.pool is None else widen(self.pool).softmax(-1)

    def gates(self, x_BTC: Tensor) -> Tensor:
        """γ ``[B, H, T]`` in (0, 1), fp32 at least."""
        if self.gate is None:
            return widen(self.gate_bias).sigmoid()[None, :, None].expand(x_BTC.shape[0], -1, x_BTC.shape[1])
        return (widen(self.gate(x_BTC)) + self.gate_bias).sigmoid().transpose(1, 2)

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, x_BTC: Tensor, context: Context, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor]:
        gate = self.gates(x_BTC)
        if cache is not None and context.start:
            y = self._decode(q, k, v, gate, context, cache)
        else:
            y = self._rows(q, k, v, gate, context)
            if cache is not None:
                cache.extend(k, v, self.pooling())
        return y, gate.detach().mean((0, 2))

    def _rows(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, context: Context) -> Tensor:
        c, starts = self.config, context.pooled.starts if context.pooled is not None else None
        q_rope, k_rope = rotate(q, context.rope), rotate(k, context.rope)
        if context.backend == "triton":
            return hybrid_attention_kernel(
                q, k, v, q_rope, k_rope, self.sink, gate,
                window=c.window, block=c.block, stride=c.stride, spans=context.spans, pooled=context.pooled,
                pooling=self.pooling(),
            )  # fmt: skip
        return hybrid_attention(
            q, k, v, q_rope, k_rope, self.sink, gate,
            window=c.window, block=c.block, stride=c.stride, window_mask=context.window_mask,
            global_mask=context.pooled_mask, starts=starts, pooling=self.pooling(),
        )  # fmt: skip

    def _decode(
        self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, context: Context, cache: LayerCache
    ) -> Tensor:
        c = self.config
        keys, values, first = cache.extend(k, v, self.pooling())
        places = torch.arange(first, first + keys.shape[2], device=context.device)
        mask = causal_mask(context.index, places, c.window)
        local = dense_attention(rotate(q, context.rope), rotate(keys, context.rope_at(places)), values, mask)
        k_pool, v_pool = cache.pooled() or (k[:, :, :0], v[:, :, :0])
        seen = pooled_mask(context.index, cache.length, c.block, c.stride)
        whole = pooled_attention(q, k_pool, v_pool, self.sink, seen)
        g = gate[..., None].to(local.dtype)
        return g * whole + (1 - g) * local

    def new_cache(self) -> LayerCache:
        c = self.config
        return LayerCache(keep=max(c.window, c.block), block=c.block, stride=c.stride)
