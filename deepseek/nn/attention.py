"""Grouped-query attention (arXiv 2305.13245) over whole rows or a sliding window; RoPE, optional QK-norm.

``Attention`` does what every kind shares: project, normalise heads, mix, project out. A kind says only how
positions are mixed. ``Context`` is what all layers of one forward pass share: rotations, documents, masks.

Shape letters: B rows, T positions, H query heads, K key/value heads, D head size, C hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from deepseek.config import configclass
from deepseek.errors import ConfigError
from deepseek.nn.cache import LayerCache
from deepseek.nn.layers import RMSNorm, to_compute_dtype
from deepseek.nn.rope import rope_table, rotate
from deepseek.ops.attention import causal_mask, dense_attention, window_attention, window_mask


@configclass
class AttentionConfig:
    """How attention is made; all layers share the sizes, the model's ``pattern`` says the kind of each."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 10_000.0
    qk_norm: bool = False  # RMSNorm on each head's query and key
    bias: bool = False  # on the query, key, value projections
    output_bias: bool = False
    window: int = 128  # positions a window or hybrid layer sees, itself included
    block: int = 32  # positions per pooled block of a hybrid layer
    stride: int = 16  # positions between pooled blocks
    gate: Literal["token", "static"] = "token"  # gate from the token, or one learned constant per head
    gate_init: float = -3.0  # logit: hybrids learn fastest starting near the local branch (LOG.md)

    def check(self) -> None:
        if self.heads < 1 or self.kv_heads < 1 or self.heads % self.kv_heads:
            divisors = [str(d) for d in range(1, self.heads + 1) if self.heads % d == 0]
            raise ConfigError(
                f"kv_heads={self.kv_heads} does not divide heads={self.heads}; try {', '.join(divisors)}"
            )
        if self.rope_theta <= 0:
            raise ConfigError(f"rope_theta={self.rope_theta} must be positive")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ConfigError(
                f"head_dim={self.head_dim} must be even and at least 2: rotary embedding turns pairs"
            )
        if self.window < 1 or self.block < 1 or not 1 <= self.stride <= self.block:
            raise ConfigError(
                f"window={self.window} and block={self.block} must be positive "
                f"and 1 <= stride={self.stride} <= block"
            )


class Context:
    """What the layers of one forward pass share.

    Args:
        positions: ``[T]`` or ``[B, T]``, for the rotation.
        documents: ``[B, T]`` ids, or ``None`` for one document a row.
        start: how many positions the cache already holds.
    """

    def __init__(
        self, config: AttentionConfig, positions: Tensor, documents: Tensor | None = None, start: int = 0
    ) -> None:
        self.config, self.documents, self.start = config, documents, start
        self.length, self.device = positions.shape[-1], positions.device
        self.rope = self.rope_at(positions)
        self.index = torch.arange(start, start + self.length, device=self.device)  #: place in the row
        self._masks: dict[str, Tensor | None] = {}

    def rope_at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = rope_table(positions, self.config.head_dim, self.config.rope_theta)
        return (cos[:, None], sin[:, None]) if positions.dim() == 2 else (cos, sin)

    def mask(self, kind: str, make: Callable[[], Tensor | None]) -> Tensor | None:
        """The mask called ``kind``, made once and shared by the layers."""
        if kind not in self._masks:
            self._masks[kind] = make()
        return self._masks[kind]


class Attention(nn.Module, ABC):
    """Project to heads, ``mix`` positions, project back."""

    def __init__(self, hidden: int, config: AttentionConfig, eps: float = 1e-6) -> None:
        super().__init__()
        c = self.config = config
        self.query = nn.Linear(hidden, c.heads * c.head_dim, bias=c.bias)
        self.key = nn.Linear(hidden, c.kv_heads * c.head_dim, bias=c.bias)
        self.value = nn.Linear(hidden, c.kv_heads * c.head_dim, bias=c.bias)
        self.output = nn.Linear(c.heads * c.head_dim, hidden, bias=c.output_bias)
        self.query_norm = RMSNorm(c.head_dim, eps) if c.qk_norm else None
        self.key_norm = RMSNorm(c.head_dim, eps) if c.qk_norm else None

    def forward(
        self, x_BTC: Tensor, context: Context, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """``[B, T, C]`` → ``[B, T, C]`` and the mean gate per head ``[H]`` (hybrid layers only)."""
        x_BTC = to_compute_dtype(x_BTC)
        q = self.query(x_BTC).unflatten(-1, (-1, self.config.head_dim))
        k = self.key(x_BTC).unflatten(-1, (-1, self.config.head_dim))
        v = self.value(x_BTC).unflatten(-1, (-1, self.config.head_dim))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        y, gate = self.mix(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), x_BTC, context, cache)
        return self.output(y.transpose(1, 2).flatten(2)), gate

    @abstractmethod
    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, x_BTC: Tensor, context: Context, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """``q [B, H, T, D]`` attends to ``k, v [B, K, T, D]`` (not yet rotated) and to the cache."""

    @abstractmethod
    def new_cache(self) -> LayerCache: ...


class FullAttention(Attention):
    """Every position sees every earlier one of its document."""

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, x_BTC: Tensor, context: Context, cache: LayerCache | None
    ) -> tuple[Tensor, None]:
        q, k = rotate(q, context.rope), rotate(k, context.rope)
        if cache is not None:
            k, v, _ = cache.extend(k, v)
        return dense_attention(q, k, v, context.mask("full", lambda: self._mask(context))), None

    def _mask(self, context: Context) -> Tensor | None:
        if context.documents is None and context.start == 0:
            return None
        keys = torch.arange(context.start + context.length, device=context.device)
        return causal_mask(context.index, keys, documents=context.documents)

    def new_cache(self) -> LayerCache:
        return LayerCache()


class WindowAttention(Attention):
    """Every position sees the last ``window`` positions of its document, itself included."""

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, x_BTC: Tensor, context: Context, cache: LayerCache | None
    ) -> tuple[Tensor, None]:
        q, k, window = rotate(q, context.rope), rotate(k, context.rope), self.config.window
        keys, values, first = cache.extend(k, v) if cache is not None else (k, v, 0)
        if context.start:
            places = torch.arange(first, first + keys.shape[2], device=context.device)
            return dense_attention(q, keys, values, causal_mask(context.index, places, window)), None
        mask = context.mask(
            "window", lambda: window_mask(context.length, window, context.documents, context.device)
        )
        return window_attention(q, k, v, window, mask), None

    def new_cache(self) -> LayerCache:
        return LayerCache(keep=self.config.window)
