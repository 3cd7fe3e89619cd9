"""The one model file: a decoder-only transformer whose blocks take any attention and any feed-forward.

Precision, placement and memory are applied from outside; here is only the model. ``forward`` returns hidden
states, so that a loss may avoid holding the logits, and per-layer statistics, so that nothing is measured
twice.

Shape letters: B rows, T positions, C hidden size, V vocabulary, L layers.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.config import replace
from deepseek.errors import ConfigError
from deepseek.models.config import ModelConfig
from deepseek.nn.attention import Attention, Context, FullAttention, WindowAttention
from deepseek.nn.cache import Cache, LayerCache
from deepseek.nn.hybrid import HybridAttention
from deepseek.nn.layers import RMSNorm, SwiGLU, is_plain
from deepseek.nn.moe import MoE, RoutingStats

ATTENTION: dict[str, type[Attention]] = {"F": FullAttention, "L": WindowAttention, "H": HybridAttention}

#: What starts at zero although it is a matrix: ways back into the residual stream, gates, sinks, averages.
ZERO = (
    "attention.output.weight",
    "down.weight",
    ".down",
    "gate.weight",
    "sink",
    "attention.pool",
    "default_EC",
    "drift.moments_ED",
)


class LayerStats(NamedTuple):
    """What one block has to tell: its routing (expert layers), its mean gate per head (hybrid layers)."""

    routing: RoutingStats | None
    gate_H: Tensor | None


class Output(NamedTuple):
    """``hidden [B, T, C]`` after the final norm, and one ``LayerStats`` per layer."""

    hidden: Tensor
    layers: list[LayerStats]


class Block(nn.Module):
    """Pre-norm residual block: attention, then feed-forward."""

    def __init__(self, hidden: int, eps: float, attention: Attention, ffn: nn.Module) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(hidden, eps), attention
        self.ffn_norm, self.ffn = RMSNorm(hidden, eps), ffn

    def forward(
        self, x_BTC: Tensor, context: Context, valid_BT: Tensor | None = None, cache: LayerCache | None = None
    ) -> tuple[Tensor, LayerStats]:
        x_BTC, y = self.attention_norm.beside(x_BTC)
        y, gate = self.attention(y, context, cache)
        routing = None
        if isinstance(self.ffn, MoE):
            again = None
            if is_plain(self.ffn, MoE):
                x_BTC, y, again = self.ffn_norm.after_sum_twice(x_BTC, y)
            else:  # a hook may change what the experts read, and the router reads that, too
                x_BTC, y = self.ffn_norm.after_sum(x_BTC, y)
            y, routing = self.ffn(y, valid_BT, again)
        else:
            x_BTC, y = self.ffn_norm.after_sum(x_BTC, y)
            y = self.ffn(y)
        return x_BTC + y, LayerStats(routing, gate)


class Transformer(nn.Module):
    """Embedding, blocks, norm, head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = _embedding(config.vocab_size, config.hidden)
        self.blocks = nn.ModuleList(
            self._block(config, *letters)
            for letters in zip(config.kinds, config.ffn_kinds, config.rope_kinds)
        )
        self.norm = RMSNorm(config.hidden, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.hidden, config.vocab_size, bias=False)
        self.reset_parameters()

    @staticmethod
    def _block(config: ModelConfig, attention: str, ffn: str, rope: str) -> Block:
        inner = (
            MoE(config.hidden, config.moe)
            if ffn == "E"
            else SwiGLU(config.hidden, config.ffn, config.ffn_bias)
        )
        options = config.attention
        if rope == "N" and options.full_rope:
            options = replace(options, full_rope=False)
        mixer = ATTENTION[attention](config.hidden, options, config.norm_eps)
        return Block(config.hidden, config.norm_eps, mixer, inner)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal(0, init_std) matrices; projections back into the residual stream and gates start at zero.

        Sets every parameter and buffer, so that a model made on the meta device and then given memory is
        complete.
        """
        for name, p in [*self.named_parameters(), *self.named_buffers()]:
            if p.is_meta:
                continue
            if name.endswith("norm.weight"):
                p.fill_(1.0)
            elif name.endswith("gate_bias"):
                p.fill_(self.config.attention.gate_init)
            elif p.dim() < 2 or name.endswith(ZERO):
                p.zero_()
            else:
                nn.init.normal_(p, std=self.config.init_std)

    def forward(
        self,
        tokens_BT: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        starts: Tensor | None = None,
    ) -> Output:
        """Hidden states of every position.

        Args:
            tokens_BT: int64 ids ``[B, T]``.
            documents: ``[B, T]`` ids; attention stays inside a document, -1 is padding. ``None``: one
                document a row.
            positions: ``[B, T]`` position of each token in its document; ``None``: ``0…T-1`` (plus the
                cache's length).
            cache: keys and values of the positions before; extended in place. Not with ``documents``.
            starts: ``[B, M]``, where the documents start (``Batch.starts``); with it training may be faster.

        Raises:
            ConfigError: both ``cache`` and ``documents``.
        """
        if cache is not None and documents is not None:
            raise ConfigError("a cache holds one document a row: pass documents or a cache, not both")
        start = cache.length if cache is not None else 0
        context = Context(
            self.config.attention, tokens_BT.shape[1], tokens_BT.device, positions, documents, start,
            kinds="".join(self.config.kinds), dtype=self.embedding.weight.dtype, cached=cache is not None,
            starts=starts,
        )  # fmt: skip
        valid = None if documents is None else documents >= 0
        x = self.embedding(tokens_BT)
        layers: list[LayerStats] = []
        for index, block in enumerate(self.blocks):
            x, stats = block(x, context, valid, cache.layers[index] if cache is not None else None)
            layers.append(stats)
        return Output(self.norm(x), layers)

    @property
    def head_weight(self) -> Tensor:
        """``[V, C]``; the embedding itself when tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """``[..., C]`` → ``[..., V]``."""
        return F.linear(hidden, self.head_weight.to(hidden.dtype))

    def new_cache(self) -> Cache:
        """An empty cache of keys and values."""
        return Cache([cast(Block, block).attention.new_cache() for block in self.blocks])

    def moe_layers(self) -> dict[int, MoE]:
        """The expert layers by index."""
        ffns = {i: cast(Block, block).ffn for i, block in enumerate(self.blocks)}
        return {i: ffn for i, ffn in ffns.items() if isinstance(ffn, MoE)}


def _embedding(size: int, hidden: int) -> nn.Embedding:
    """On the meta device without the random start, for which torch would import its compiler: 0.8 s of a server's."""
    weight = torch.empty(size, hidden)
    return nn.Embedding(size, hidden, _weight=weight) if weight.is_meta else nn.Embedding(size, hidden)
