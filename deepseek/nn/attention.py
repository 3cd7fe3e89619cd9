"""Grouped-query attention (arXiv 2305.13245) over whole rows or a sliding window; RoPE, optional QK-norm.

``Attention`` does what every kind shares: project, normalise heads, rotate, mix, project out. A kind says only how
positions are mixed. ``Context`` is what all layers of one forward pass share: rotations, documents, masks.

Shape letters: B rows, T positions, H query heads, K key/value heads, D head size, C hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.config import configclass
from deepseek.errors import ConfigError
from deepseek.nn.cache import LayerCache
from deepseek.nn.layers import RMSNorm, compute_dtype, is_plain, to_compute_dtype
from deepseek.nn.rope import RopeScaling, counted_rope_table, rope_table, rotate
from deepseek.ops import flash_attention
from deepseek.ops.attention import (
    DocumentSpans,
    causal_mask,
    dense_attention,
    document_spans,
    pick_backend,
    window_attention,
    window_attention_kernel,
    window_mask,
)
from deepseek.ops.hybrid_attention import PooledSpans, pooled_mask, pooled_spans
from deepseek.ops.rotary import rotary
from deepseek.ops.triton import fuses


@configclass
class AttentionConfig:
    """How attention is made; all layers share the sizes, the model's ``pattern`` says the kind of each."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = RopeScaling()
    qk_norm: bool = False  # RMSNorm on each head's query and key
    bias: bool = False  # on the query, key, value projections
    output_bias: bool = False
    window: int = 128  # positions a window or hybrid layer sees, itself included
    block: int = 32  # positions per pooled block of a hybrid layer
    stride: int = 32  # positions between pooled blocks; as many as a block: no position is pooled twice
    gate: Literal["token", "static"] = "token"  # gate from the token, or one learned constant per head
    gate_init: float = -3.0  # logit: hybrids learn fastest starting near the local branch (LOG.md)
    pooling: Literal["mean", "learned"] = "mean"  # learned: weights per key/value head and place in the block
    full_rope: bool = True  # False: full layers have no rotary embedding, where other layers tell positions

    def check(self) -> None:
        if self.heads < 1 or self.kv_heads < 1 or self.heads % self.kv_heads:
            divisors = [str(d) for d in range(1, self.heads + 1) if self.heads % d == 0]
            raise ConfigError(
                f"kv_heads={self.kv_heads} does not divide heads={self.heads}; try {', '.join(divisors)}"
            )
        if self.rope_theta < 1:
            raise ConfigError(f"rope_theta={self.rope_theta} must be at least 1")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ConfigError(
                f"head_dim={self.head_dim} must be even and at least 2: rotary embedding turns pairs"
            )
        self.rope_scaling.check_head(self.head_dim, self.rope_theta)
        if self.window < 1 or self.block < 1 or not 1 <= self.stride <= self.block:
            raise ConfigError(
                f"window={self.window} and block={self.block} must be positive "
                f"and 1 <= stride={self.stride} <= block"
            )


class Context:
    """What the layers of one forward pass share, all of it made up front: a compiled block meets only tensors.

    Args:
        length, device, dtype: of the row, and of the model's weights.
        positions: ``[T]`` or ``[B, T]``, for the rotation; ``None``: ``start, start + 1, …``.
        documents: ``[B, T]`` ids, or ``None`` for one document a row.
        start: how many positions the cache already holds.
        kinds: the letters of the model's attention layers; only what they need is made.
        cached: whether layers are given caches.
        starts: ``[B, M]``, where the documents of each row start, and T in unused slots; counted on the host.

    Attributes:
        backend: who computes windows and documents, ``triton`` or ``chunked``.
        flash: the kinds of layers that run through FlashAttention-4: in training, where it is usable.
        spans, pooled, offsets: the documents for the kernels; the masks are for plain torch.
    """

    def __init__(
        self,
        config: AttentionConfig,
        length: int,
        device: torch.device,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        start: int = 0,
        kinds: str = "FLH",
        dtype: torch.dtype = torch.float32,
        cached: bool = False,
        starts: Tensor | None = None,
    ) -> None:
        self.config, self.length, self.device, self.start = config, length, device, start
        self.backend = pick_backend(device, config.head_dim, dtype)
        self.flash = ""
        self.offsets: Tensor | None = None
        if not cached and torch.is_grad_enabled():
            self._try_flash(kinds, documents is not None, starts, compute_dtype(device, dtype))
        self.index = torch.arange(start, start + length, device=device)  #: place in the row
        if positions is None and start == 0:
            self.rope = counted_rope_table(
                length, config.head_dim, config.rope_theta, device, config.rope_scaling
            )
        else:
            self.rope = self.rope_at(self.index if positions is None else positions)
        self.spans: DocumentSpans | None = None
        self.pooled: PooledSpans | None = None
        self.full_mask: Tensor | None = None
        self.window_mask: Tensor | None = None
        self.pooled_mask: Tensor | None = None
        self._see(kinds, documents)

    def _see(self, kinds: str, documents: Tensor | None) -> None:
        """Who sees whom, for layers of these kinds."""
        c, T = self.config, self.length
        if self.start:
            if "F" in kinds:
                self.full_mask = causal_mask(self.index, torch.arange(self.start + T, device=self.device))
            return  # the other kinds look at what their cache still holds
        if documents is not None and (self.backend == "triton" or "H" in kinds):
            spans = document_spans(documents)
            if "H" in kinds:
                self.pooled = pooled_spans(documents, spans, c.block, c.stride)
            if self.backend == "triton":
                self.spans = spans
        if self.backend == "triton":
            return
        if "F" in kinds and documents is not None:
            self.full_mask = causal_mask(self.index, self.index, documents=documents)
        if "L" in kinds or "H" in kinds:
            self.window_mask = window_mask(T, c.window, documents, self.device)
        if "H" in kinds:
            self.pooled_mask = pooled_mask(self.index, T, c.block, c.stride, documents)

    def _try_flash(self, kinds: str, packed: bool, starts: Tensor | None, dtype: torch.dtype) -> None:
        """Full layers and wide windows through FlashAttention-4, if it is there and takes what they do."""
        c = self.config
        if packed and not flash_attention.countable(starts, self.length):
            return
        for kind, gains in (("F", True), ("L", flash_attention.WIDE <= c.window < self.length)):
            if kind in kinds and gains:
                heads = c.head_dim, c.heads // c.kv_heads
                if flash_attention.usable(self.device, dtype, *heads, packed, window=kind == "L"):
                    self.flash += kind
        if self.flash and packed and starts is not None:
            self.offsets = flash_attention.document_offsets(starts, self.length)

    def rope_at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        cos, sin = rope_table(positions, c.head_dim, c.rope_theta, c.rope_scaling)
        return (cos[:, None], sin[:, None]) if positions.dim() == 2 else (cos, sin)


class Attention(nn.Module, ABC):
    """Project to heads, ``mix`` positions, project back.

    Attributes:
        rotates: whether ``mix`` is given rotated queries and keys; otherwise it gets them as they are.
    """

    rotates = True

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
        q, k, v = self._project(x_BTC, context.rope if self.rotates else None)
        y, gate = self.mix(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), x_BTC, context, cache)
        return self.output(y.transpose(1, 2).flatten(2)), gate

    def _project(self, x_BTC: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[B, T, H, D]``, keys and values ``[B, T, K, D]``, normalised, and rotated by ``rope`` if given.

        On a GPU one product, for which the small weights are laid side by side, and one operation that takes it apart.
        """
        parts = (self.query, self.key, self.value)
        if self._merges(x_BTC):
            bias = torch.cat([part.bias for part in parts]) if self.config.bias else None
            y_BTE = F.linear(x_BTC, torch.cat([part.weight for part in parts]), bias)
            if rope is not None and self.query_norm is None and fuses(y_BTE):
                return rotary(y_BTE, *rope, self.config.heads)
            split = y_BTE.split([part.out_features for part in parts], -1)
        else:
            split = tuple(part(x_BTC) for part in parts)
        q, k, v = (y.unflatten(-1, (-1, self.config.head_dim)) for y in split)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if rope is not None:
            q, k = (rotate(y.transpose(1, 2), rope).transpose(1, 2) for y in (q, k))
        return q, k, v

    def _merges(self, x_BTC: Tensor) -> bool:
        """Whether queries, keys and values are one product: not where one of them is an adapter, or has a listener."""
        if not x_BTC.is_cuda or not all(is_plain(p, nn.Linear) for p in (self.query, self.key, self.value)):
            return False
        return self.query.weight.dtype == x_BTC.dtype

    @abstractmethod
    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, x_BTC: Tensor, context: Context, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """``q [B, H, T, D]`` attends to ``k, v [B, K, T, D]``, rotated if ``rotates``, and to the cache."""

    @abstractmethod
    def new_cache(self) -> LayerCache: ...


class FullAttention(Attention):
    """Every position sees every earlier one of its document."""

    def __init__(self, hidden: int, config: AttentionConfig, eps: float = 1e-6) -> None:
        super().__init__(hidden, config, eps)
        self.rotates = config.full_rope

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, x_BTC: Tensor, context: Context, cache: LayerCache | None
    ) -> tuple[Tensor, None]:
        if cache is not None:
            k, v, _ = cache.extend(k, v)
        if "F" in context.flash:
            return flash_attention.flash_attention(q, k, v, context.offsets), None
        if context.spans is not None:
            return window_attention_kernel(q, k, v, context.length, context.spans), None
        return dense_attention(q, k, v, context.full_mask), None

    def new_cache(self) -> LayerCache:
        return LayerCache()


class WindowAttention(Attention):
    """Every position sees the last ``window`` positions of its document, itself included."""

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, x_BTC: Tensor, context: Context, cache: LayerCache | None
    ) -> tuple[Tensor, None]:
        window = self.config.window
        keys, values, first = cache.extend(k, v) if cache is not None else (k, v, 0)
        if context.start:
            places = torch.arange(first, first + keys.shape[2], device=context.device)
            return dense_attention(q, keys, values, causal_mask(context.index, places, window)), None
        if "L" in context.flash:
            return flash_attention.flash_attention(q, k, v, context.offsets, window), None
        if context.backend == "triton":
            return window_attention_kernel(q, k, v, window, context.spans), None
        return window_attention(q, k, v, window, context.window_mask), None

    def new_cache(self) -> LayerCache:
        return LayerCache(keep=self.config.window)
