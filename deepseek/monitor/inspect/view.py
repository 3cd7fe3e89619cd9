"""One attention layer laid open: its queries, keys and masks, made again from the layer's input.

Fused kernels never hold the probabilities, so whoever wants to see them has to compute them again. ``AttentionView``
does so for the queries asked for, branch by branch, in fp32 at least, never the whole ``T × T`` of all heads. It is
the one place where the inspector, the attention maps and the live probes take their probabilities from.

A full or window layer has one branch of that name; a hybrid layer has ``window`` and ``pooled``, whose slot 0 is the
learned sink and whose slot ``j + 1`` is the block that starts at ``starts_BJ[:, j]``.

Shape letters: B rows, T positions, R chosen queries, H query heads, K key/value heads, D head size, C hidden size, J
pooled blocks, S slots that a query may look at (``T``, or ``1 + J`` in the pooled branch).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.errors import ConfigError, did_you_mean
from deepseek.nn.attention import Attention, FullAttention, WindowAttention
from deepseek.nn.hybrid import HybridAttention
from deepseek.nn.layers import RMSNorm, widen
from deepseek.nn.rope import rope_table, rotate
from deepseek.ops.attention import causal_mask
from deepseek.ops.hybrid_attention import document_blocks, pool_blocks, pooled_length, pooled_mask


def branches_of(attention: nn.Module) -> tuple[str, ...]:
    """The names of a layer's branches: ``full``, ``window``, or both branches of a hybrid.

    Raises:
        ConfigError: ``attention`` is of a kind that is not known here.
    """
    if isinstance(attention, FullAttention):
        return ("full",)
    if isinstance(attention, WindowAttention):
        return ("window",)
    if isinstance(attention, HybridAttention):
        return ("window", "pooled")
    raise ConfigError(f"{type(attention).__name__} is no attention layer that can be looked into")


def project(linear: nn.Linear, x: Tensor) -> Tensor:
    """``linear(x)`` in the dtype of ``x``, whatever the weights are kept in."""
    bias = None if linear.bias is None else linear.bias.to(x.dtype)
    return F.linear(x, linear.weight.to(x.dtype), bias)


def gates(attention: HybridAttention, x_BTC: Tensor) -> Tensor:
    """``attention.gates`` in the dtype of ``x``, whatever the weights are kept in: ``[B, H, T]``."""
    if attention.gate is None:
        return attention.gates(x_BTC)
    return (project(attention.gate, x_BTC) + widen(attention.gate_bias)).sigmoid().transpose(1, 2)


class AttentionView:
    """What the queries ``rows`` of a layer see.

    Args:
        attention: the layer; its weights are read, nothing is changed.
        x_BTC: the layer's input (what its pre-norm returned).
        documents, positions: what the model was given for these rows.
        rows: int64 ``[R]``, the positions whose queries are wanted, ascending; ``None``: all.

    Attributes:
        branches: names of the branches, see ``branches_of``.
        gate_BHR: the weight of the pooled branch, ``None`` where there is no such branch.
        starts_BJ: where each pooled block starts, ``T`` for a slot that is not used.

    Everything is computed without gradient and outside autocast, in fp32 (fp64 for an fp64 input).
    """

    @torch.no_grad()
    def __init__(
        self,
        attention: Attention,
        x_BTC: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> None:
        self.branches = branches_of(attention)
        self.attention, self.config, self.documents = attention, attention.config, documents
        self.length, x = x_BTC.shape[1], widen(x_BTC)
        self.index = torch.arange(self.length, device=x.device)
        self.rows = self.index if rows is None else rows
        x_BRC = x if rows is None else x[:, rows]
        with torch.autocast(x.device.type, enabled=False):
            q = self._heads(attention.query, attention.query_norm, x_BRC)
            k = self._heads(attention.key, attention.key_norm, x)
            self._place(q, k, positions)
            self.gate_BHR = gates(attention, x_BRC) if isinstance(attention, HybridAttention) else None
            self.starts_BJ = self._pool(k) if isinstance(attention, HybridAttention) else None

    def _heads(self, linear: nn.Linear, norm: RMSNorm | None, x: Tensor) -> Tensor:
        """``[B, T, C]`` → ``[B, heads, T, D]``, normed where the layer does so."""
        y = project(linear, x).unflatten(-1, (-1, self.config.head_dim))
        return (y if norm is None else norm(y)).transpose(1, 2)

    def _place(self, q: Tensor, k: Tensor, positions: Tensor | None) -> None:
        """Rotate, except in full layers that have no rotary embedding."""
        places = self.index if positions is None else positions
        self.q_BHRD, self.k_BKTD = {"pooled": q}, {}
        name = self.branches[0]
        if name == "full" and not self.config.full_rope:
            self.q_BHRD[name], self.k_BKTD[name] = q, k
            return
        c = self.config
        cos, sin = rope_table(places, c.head_dim, c.rope_theta, c.rope_scaling)
        if positions is not None and positions.dim() == 2:
            cos, sin = cos[:, None], sin[:, None]
        self.q_BHRD[name] = rotate(q, (cos[..., self.rows, :], sin[..., self.rows, :]))
        self.k_BKTD[name] = rotate(k, (cos, sin))

    def _pool(self, k: Tensor) -> Tensor:
        attention, c = self.attention, self.config
        assert isinstance(attention, HybridAttention)
        starts, pooling = None, attention.pooling()
        if self.documents is not None:
            starts = document_blocks(self.documents, c.block, c.stride)
        pooled = pool_blocks(k, c.block, c.stride, starts, None if pooling is None else pooling[0])
        sink = attention.sink[0][None, :, None].expand(k.shape[0], -1, -1, -1)
        self.k_BKTD["pooled"] = torch.cat((sink.to(k.dtype), pooled), 2)
        if starts is None:
            blocks = pooled_length(self.length, c.block, c.stride)
            starts = (torch.arange(blocks, device=k.device) * c.stride).expand(k.shape[0], -1)
        return starts

    def visible(self, branch: str, some: slice = slice(None)) -> Tensor:
        """Which slot each query ``rows[some]`` may see: bool ``[R, S]``, or ``[B, 1, R, S]`` with documents."""
        rows, c = self.rows[some], self.config
        if branch == "pooled":
            return pooled_mask(rows, self.length, c.block, c.stride, self.documents)
        return causal_mask(rows, self.index, c.window if branch == "window" else None, self.documents)

    @torch.no_grad()
    def logits(self, branch: str, some: slice = slice(None), heads: slice = slice(None)) -> Tensor:
        """``q·k / √D``, −inf where a query may not look: ``[B, heads, R, S]``.

        Args:
            some: which of ``rows``. heads: which query heads.

        Raises:
            ConfigError: the layer has no such branch.
        """
        if branch not in self.branches:
            raise ConfigError(
                f"no branch '{branch}' in this layer{did_you_mean(branch, self.branches)}; "
                f"it has {', '.join(self.branches)}"
            )
        group = self.config.heads // self.config.kv_heads
        chosen = torch.arange(self.config.heads, device=self.index.device)[heads]
        q = self.q_BHRD[branch][:, heads, some]
        k = self.k_BKTD[branch][:, chosen // group]
        with torch.autocast(q.device.type, enabled=False):
            scores = q @ k.transpose(-1, -2) * self.config.head_dim**-0.5
        return scores.masked_fill(~self.visible(branch, some), float("-inf"))

    def probabilities(self, branch: str, some: slice = slice(None), heads: slice = slice(None)) -> Tensor:
        """The softmax of ``logits``: rows sum to one."""
        return self.logits(branch, some, heads).softmax(-1)

    @torch.no_grad()
    def over_positions(self, some: slice = slice(None), heads: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """How much each position's value weighs in a head's output, and how much the learned sink does.

        For a hybrid layer both branches count with their gate, and a pooled block's share is spread over its positions
        as the values are pooled. So ``output = Σ share · value + sink share · sink value``, exactly.

        Returns:
            shares ``[B, heads, R, T]`` and sink shares ``[B, heads, R]`` (zero without a pooled branch); together
            they sum to one.
        """
        local = self.probabilities(self.branches[0], some, heads)
        if self.gate_BHR is None:
            return local, local.new_zeros(local.shape[:-1])
        gate = self.gate_BHR[:, heads, some].to(local.dtype)
        whole = gate[..., None] * self.probabilities("pooled", some, heads)
        shares = (1 - gate[..., None]) * local
        return shares + self._spread(whole[..., 1:], heads), whole[..., 0]

    def _spread(self, whole_BHRJ: Tensor, heads: slice) -> Tensor:
        """Blocks' shares as positions' shares: ``[B, heads, R, J]`` → ``[B, heads, R, T]``."""
        attention, c, B = self.attention, self.config, whole_BHRJ.shape[0]
        assert isinstance(attention, HybridAttention)
        assert self.starts_BJ is not None
        chosen = torch.arange(c.heads, device=self.index.device)[heads] // (c.heads // c.kv_heads)
        pooling = attention.pooling()
        if pooling is None:
            weight = whole_BHRJ.new_full((len(chosen), c.block), 1 / c.block)
        else:
            weight = pooling[1][chosen].to(whole_BHRJ.dtype)
        place = self.starts_BJ[..., None] + torch.arange(c.block, device=self.index.device)
        place = place.clamp(max=self.length).flatten(1)  # one place too many, for slots that are not used
        spread = whole_BHRJ.new_zeros(B, len(chosen), whole_BHRJ.shape[2], self.length + 1)
        for n in range(c.block):  # one place of all blocks at a time: nothing as large as all of them at once
            at = place[:, n :: c.block][:, None, None].expand_as(whole_BHRJ)
            spread.scatter_add_(3, at, whole_BHRJ * weight[:, n, None, None])
        return spread[..., :-1]
