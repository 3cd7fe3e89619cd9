"""The model as the engine runs it: packed weights, a paged cache, and one flat list of rows whatever they belong to.

It computes what ``models.transformer`` computes in evaluation, and tests hold the two together; but a step of serving
is many single rows of many sequences, so the weights are laid out once for that (``ops.packed_linear``,
``ops.decode_experts``) and keys and values live in pages (``ops.paged_attention``).

Shape letters: N rows, S sequences, C hidden size, H query heads, K key/value heads, D head size, P pages, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deepseek.models import ModelConfig, Transformer
from deepseek.nn.attention import Attention
from deepseek.nn.hybrid import HybridAttention
from deepseek.nn.layers import RMSNorm, SwiGLU
from deepseek.nn.moe import MoE
from deepseek.nn.rope import RopeScaling, rope_table
from deepseek.ops.decode_experts import PackedExperts
from deepseek.ops.exact import exact_map
from deepseek.ops.native_attention import NativeAppend
from deepseek.ops.native_attention import takes as native_takes_heads
from deepseek.ops.packed_linear import PackedLinear, PackedSwiGLU, normed, normed_heads, pack_linear
from deepseek.ops.paged_attention import (
    Pooled,
    StepRows,
    append_rows,
    paged_attention,
    paged_hybrid_attention,
    pool_pages,
    write_pages,
)
from deepseek.ops.triton import kernels, runs_on
from deepseek.serve.adapters import AdapterBank, AdapterRows
from deepseek.serve.pages import PageLayout
from deepseek.serve.tables import HostRows, PageTables
from deepseek.serve.transfer import put


def compute_dtype(format: str, device: torch.device) -> torch.dtype:
    """Of activations, for a weight format.

    A CPU computes only products in bf16: all else costs it more in bf16, because it is widened and narrowed again
    at every step, and is more exact in fp32.
    """
    return torch.bfloat16 if format == "bf16" and device.type != "cpu" else torch.float32


def cache_dtype(format: str) -> torch.dtype:
    """Of keys and values: what is gathered at every step is memory traffic."""
    return torch.bfloat16 if format == "bf16" else torch.float32


class LayerPages(NamedTuple):
    """The cache tensors of one layer, ``[pages, slots a page, K, D]``; ``None`` where the kind has none.

    ``k`` and ``v`` are in the global group for a full layer, else in the window group; ``raw_k`` (not rotated),
    ``pool_k`` and ``pool_v`` are a hybrid layer's.
    """

    k: Tensor
    v: Tensor
    raw_k: Tensor | None = None
    pool_k: Tensor | None = None
    pool_v: Tensor | None = None


class Traced(NamedTuple):
    """What the layers did: ``experts[layer] = (expert_NK, gate_NK)``, ``gates[layer]``: the global share ``[N]``."""

    experts: dict[int, tuple[Tensor, Tensor]]
    gates: dict[int, Tensor]


class Norm(NamedTuple):
    """RMSNorm as a function; fp32 inside."""

    weight: Tensor
    eps: float

    @classmethod
    def of(cls, norm: RMSNorm, dtype: torch.dtype, device: torch.device) -> Norm:
        return cls(norm.weight.detach().to(device, dtype), norm.eps)

    def __call__(self, x: Tensor) -> Tensor:
        return normed(x, self)


class DecoderLayer:
    """One block. ``adapters`` may add to its projections, row by row."""

    def __init__(
        self, index: int, kind: str, block: torch.nn.Module, config: ModelConfig, format: str, device: torch.device,
        exact: bool,
    ) -> None:  # fmt: skip
        attention: Attention = block.attention  # type: ignore[assignment]
        dtype, a = compute_dtype(format, device), config.attention
        self.index, self.kind, self.config, self.exact = index, kind, a, exact
        self.pooling: Tensor | None = None
        self.native_append: NativeAppend | None = None
        self.rotated = kind != "F" or attention.config.full_rope

        def pack(weight: Tensor, bias: Tensor | None) -> PackedLinear:
            return pack_linear(
                weight.detach(), None if bias is None else bias.detach(), format, device, exact=exact
            )

        parts = (attention.query, attention.key, attention.value)
        bias = torch.cat([p.bias for p in parts]) if a.bias else None
        self.attention_norm = Norm.of(block.attention_norm, dtype, device)  # type: ignore[arg-type]
        self.ffn_norm = Norm.of(block.ffn_norm, dtype, device)  # type: ignore[arg-type]
        self.qkv = pack(torch.cat([p.weight for p in parts]), bias)
        self.output = pack(attention.output.weight, attention.output.bias)
        norms = (attention.query_norm, attention.key_norm)
        self.head_norm: Norm | None = None
        if norms[0] is not None and norms[1] is not None:
            each = [
                n.weight.detach().expand(count, -1) for n, count in zip(norms, (a.heads, a.kv_heads)) if n
            ]
            self.head_norm = Norm(torch.cat(each).to(device, dtype), norms[0].eps)
        if isinstance(attention, HybridAttention):
            pooling = attention.pooling()
            self.sink = attention.sink.detach().to(device, dtype)
            self.gate_bias = attention.gate_bias.detach().to(device, torch.float32)
            self.gate = pack(attention.gate.weight, None) if attention.gate is not None else None
            self.pooling = None if pooling is None else pooling.detach().to(device)
        ffn = block.ffn
        self.experts: PackedExperts | None = None
        if isinstance(ffn, MoE):
            self.experts = PackedExperts(
                ffn.router.weight, ffn.router.bias, ffn.gate_up.detach(), ffn.down.detach(), ffn.config.top_k,
                ffn.config.normalise_gates, format, device, exact=exact,
                shared=None if ffn.shared is None else _packed_swiglu(ffn.shared, format, device, exact),
            )  # fmt: skip
        else:
            assert isinstance(ffn, SwiGLU)
            self.ffn = _packed_swiglu(ffn, format, device, exact)

    def over(self, cache: LayerPages) -> None:
        """Get ready for these pages."""
        c = self.config
        if not self.exact and native_takes_heads(cache.k, c.heads) and not runs_on(cache.k.device):
            norm = None if self.head_norm is None else (self.head_norm.weight, self.head_norm.eps)
            self.native_append = NativeAppend(c.heads, cache.k, cache.v, cache.raw_k, norm)

    def __call__(
        self, x: Tensor, rows: StepRows, rope: Rope, cache: LayerPages, adapters: RowAdapters | None,
        traced: Traced | None,
    ) -> Tensor:  # fmt: skip
        y = self._attend(x, rows, rope, cache, adapters, traced)
        if adapters is not None:
            x = x + self._adapted("output", self.output, y, adapters)
        else:
            x = self.output.fused(y, None, x)
        if self.experts is not None:
            x, chosen, gates = self.experts.fused(x, self.ffn_norm, x)
            if traced is not None:
                traced.experts[self.index] = chosen, gates
            return x
        if adapters is None:
            return self.ffn.fused(x, self.ffn_norm, x)
        inner = self.ffn.activation(self._adapted("gate_up", self.ffn.gate_up, self.ffn_norm(x), adapters))
        return x + self._adapted("down", self.ffn.down, inner, adapters)

    def _attend(
        self, x: Tensor, rows: StepRows, rope: Rope, cache: LayerPages, adapters: RowAdapters | None,
        traced: Traced | None,
    ) -> Tensor:  # fmt: skip
        c = self.config
        alone = adapters is None and (
            self.kind != "H" or self.gate is None
        )  # nobody else reads the normed rows
        h = x if alone else self.attention_norm(x)
        flat = self.qkv.fused(x, self.attention_norm) if alone else self.qkv(h)
        if adapters is not None:
            sizes = [n * c.head_dim for n in (c.heads, c.kv_heads, c.kv_heads)]
            for name, part in zip(("query", "key", "value"), flat.split(sizes, 1)):
                adapters.bank.add(self.index, name, h, part, adapters.rows)
        qkv = flat.view(h.shape[0], -1, c.head_dim)
        qk, v = qkv[:, : c.heads + c.kv_heads], qkv[:, c.heads + c.kv_heads :]
        if self.native_append is not None and not rows.static:
            q = self.native_append(flat, rope.pair if self.rotated else None, self._slots(rows))
            self._pool(cache, rows)
        else:
            if self.head_norm is not None:
                qk = normed_heads(qk, self.head_norm)
            q = self._append(qk, v, rows, rope, cache)
        if self.kind == "F":
            return paged_attention(q, cache.k, cache.v, rows.global_SP, rows).flatten(1)
        if self.kind == "L":
            return paged_attention(q, cache.k, cache.v, rows.window_SP, rows, c.window).flatten(1)
        assert cache.pool_k is not None
        assert cache.pool_v is not None
        gate = self._gates(h)
        if traced is not None:
            traced.gates[self.index] = gate.mean(1)
        pooled = Pooled(qk[:, : c.heads], gate, cache.pool_k, cache.pool_v, self.sink, c.block, c.stride)
        return paged_hybrid_attention(q, cache.k, cache.v, pooled, rows, c.window).flatten(1)

    def _append(self, qk: Tensor, v: Tensor, rows: StepRows, rope: Rope, cache: LayerPages) -> Tensor:
        """Rotate, write keys and values, pool what is complete; the rotated queries."""
        c, slot_N = self.config, self._slots(rows)
        if qk.is_cuda or runs_on(qk.device):
            pool = None if cache.pool_k is None or cache.pool_v is None else (cache.pool_k, cache.pool_v)
            return append_rows(
                qk[:, : c.heads], qk[:, c.heads :], v, rope.halves if self.rotated else None, (cache.k, cache.v), rows,
                slot_N, cache.raw_k, pool, c.block, c.stride, self.pooling,
            )  # fmt: skip
        turned = rope.rotate(qk) if self.rotated else qk
        write_pages(cache.k, cache.v, turned[:, c.heads :], v, slot_N)
        if cache.raw_k is not None:
            cache.raw_k.flatten(0, 1).index_copy_(0, slot_N, qk[:, c.heads :].to(cache.raw_k.dtype))
        self._pool(cache, rows)
        return turned[:, : c.heads]

    def _slots(self, rows: StepRows) -> Tensor:
        return rows.global_slot_N if self.kind == "F" else rows.window_slot_N

    def _pool(self, cache: LayerPages, rows: StepRows) -> None:
        """Pool the blocks that the step's rows completed, in a hybrid layer."""
        c = self.config
        if cache.raw_k is not None and cache.pool_k is not None and cache.pool_v is not None:
            pool_pages(
                cache.raw_k, cache.v, cache.pool_k, cache.pool_v, rows, c.block, c.stride, self.pooling
            )

    def _gates(self, h: Tensor) -> Tensor:
        """Share of the global branch, fp32 ``[N, H]``."""
        if self.gate is None:
            return self.gate_bias.sigmoid().expand(h.shape[0], -1)
        logits = self.gate(h).float() + self.gate_bias
        return exact_map(torch.sigmoid, logits) if self.exact else logits.sigmoid()

    def _adapted(self, name: str, linear: PackedLinear, x: Tensor, adapters: RowAdapters) -> Tensor:
        y = linear(x)
        adapters.bank.add(self.index, name, x, y, adapters.rows)
        return y

    def bytes_read(self, rows: int) -> float:
        """Bytes of weights that a step of ``rows`` rows reads, experts as far as they are chosen if all are alike."""
        fixed = self.qkv.nbytes + self.output.nbytes
        if self.experts is None:
            return fixed + self.ffn.nbytes
        e = self.experts
        chosen = 1 - (1 - e.top_k / e.experts) ** rows
        shared = 0 if e.shared is None else e.shared.nbytes
        return fixed + e.router_nbytes + shared + chosen * e.experts_nbytes


def _packed_swiglu(ffn: SwiGLU, format: str, device: torch.device, exact: bool) -> PackedSwiGLU:
    up, down = ffn.gate_up, ffn.down
    return PackedSwiGLU(up.weight, up.bias, down.weight, down.bias, format, device, exact=exact)


class RowAdapters(NamedTuple):
    """Which LoRA adapters of a bank the step's rows use."""

    bank: AdapterBank
    rows: AdapterRows


class Rope:
    """The rotations of one step's rows; ``[cos, cos]`` and ``[-sin, sin]`` so that turning takes three operations."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self._cos, self._sin, self._half = cos, sin, cos.shape[-1] // 2

    @property
    def halves(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[N, D/2]``."""
        return self._cos[:, 0, : self._half], self._sin[:, 0, self._half :]

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """Both factors ``[N, 1, D]``."""
        return self._cos, self._sin

    @staticmethod
    def table(
        length: int, head_dim: int, theta: float, scaling: RopeScaling, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        cos, sin = rope_table(torch.arange(length, device=device), head_dim, theta, scaling)
        return torch.cat((cos, cos), 1)[:, None], torch.cat((-sin, sin), 1)[:, None]

    def rotate(self, x_NHD: Tensor) -> Tensor:
        wide = x_NHD.float()
        return torch.addcmul(wide * self._cos, wide.roll(self._half, -1), self._sin).to(x_NHD.dtype)


class Decoder:
    """Packed weights and the cache they fill; ``allocate`` makes the cache once it is known what memory is left."""

    def __init__(
        self,
        model: Transformer,
        layout: PageLayout,
        *,
        format: str,
        device: torch.device,
        max_running: int,
        max_length: int,
        exact: bool = False,
    ) -> None:
        c = self.config = model.config
        self.layout, self.device, self.exact = layout, device, exact
        self.dtype = compute_dtype(format, device)
        self.cache_dtype = cache_dtype(format)
        self.embedding = model.embedding.weight.detach().to(device, self.cache_dtype)
        self.layers = [
            DecoderLayer(i, kind, block, c, format, device, exact)
            for i, (kind, block) in enumerate(zip(c.kinds, model.blocks))
        ]
        self.norm = Norm.of(model.norm, self.dtype, device)
        self.head = pack_linear(model.head_weight.detach(), None, format, device, exact=exact)
        self.tables = PageTables(max_running, -(-max_length // layout.page) + 1, layout.page)
        a = c.attention
        self._rope = Rope.table(max_length + 1, a.head_dim, a.rope_theta, a.rope_scaling, device)
        self.caches: list[LayerPages] = []

    def allocate(self, pages: tuple[int, int]) -> None:
        """Make room for so many pages of the global and of the window group."""
        self.caches = [self._new_pages(kind, pages) for kind in self.config.kinds]
        for layer, cache in zip(self.layers, self.caches):
            layer.over(cache)

    def _new_pages(self, kind: str, pages: tuple[int, int]) -> LayerPages:
        a, page = self.config.attention, self.layout.page

        def made(count: int, slots: int) -> Tensor:
            return torch.zeros(
                count + 1, slots, a.kv_heads, a.head_dim, dtype=self.cache_dtype, device=self.device
            )

        if kind == "F":
            return LayerPages(made(pages[0], page), made(pages[0], page))
        if kind == "L":
            return LayerPages(made(pages[1], page), made(pages[1], page))
        slots = page // a.stride
        return LayerPages(
            *(made(pages[1], page) for _ in range(3)), *(made(pages[0], slots) for _ in range(2))
        )

    @torch.inference_mode()
    def hidden(
        self,
        tokens_N: Tensor,
        rows: StepRows,
        adapters: RowAdapters | None = None,
        traced: Traced | None = None,
    ) -> Tensor:
        """Run the layers over the step's rows, filling the cache: ``[N, C]`` after the final norm."""
        x, rope = self._enter(tokens_N, rows.position_N)
        for layer, cache in zip(self.layers, self.caches):
            x = layer(x, rows, rope, cache, adapters, traced)
        return self.norm(x)

    def _enter(self, token_N: Tensor, position_N: Tensor) -> tuple[Tensor, Rope]:
        """The rows' embeddings and rotations."""
        if runs_on(token_N.device):
            x, cos, sin = kernels("rows").enter(token_N, position_N, self.embedding, self._rope, self.dtype)
            return x, Rope(cos, sin)
        cos, sin = self._rope
        return self.embedding[token_N].to(self.dtype), Rope(cos[position_N], sin[position_N])

    @torch.inference_mode()
    def logits(self, hidden_NC: Tensor) -> Tensor:
        """``[N, C]`` → ``[N, V]`` in the compute dtype."""
        return self.head(hidden_NC)

    def rows(self, host: HostRows) -> StepRows:
        """A step on the device."""

        def sent(x: npt.NDArray[np.generic]) -> Tensor:
            return put(x, self.device)

        counts = host.rows
        return StepRows(
            position_N=sent(host.position_N), ends_S=sent(host.ends_S), length_S=sent(host.length_S.astype(np.int32)),
            global_SP=sent(host.global_SP), window_SP=sent(host.window_SP), global_slot_N=sent(host.slot_2N[0]),
            window_slot_N=sent(host.slot_2N[1]), page=self.layout.page, rows=tuple(counts),
            lengths=tuple(host.length_S.tolist()), decodes=host.decodes, exact=self.exact,
        )  # fmt: skip

    def bytes_read(self, rows: int) -> float:
        """Bytes of weights that a step of ``rows`` rows reads."""
        return sum(layer.bytes_read(rows) for layer in self.layers) + self.head.nbytes

    @property
    def cache_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for cache in self.caches for t in cache if t is not None)
