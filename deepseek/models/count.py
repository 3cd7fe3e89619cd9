"""Parameters, FLOPs and bytes of a model, from its config alone: nothing is built, no device is touched.

FLOPs are those of matrix multiplications (a multiply-add is two), the convention of
``torch.utils.flop_counter``; norms, softmaxes, rotations and pooling are memory traffic, not FLOPs. Two
counts exist because two questions do:

* **model FLOPs** (default): what the mathematics needs. A position pays for the keys it can see and no
  others: causal attention costs half the square, a window its visible keys. This is what MFU divides by.
* **executed FLOPs** (``executed=True``): what our plain-torch path runs, masked entries and chunk padding
  included. It equals ``FlopCounterMode`` on the real model, which is the proof that the first count forgets
  nothing.

Letters: C hidden size, H query heads, K key/value heads, D head size, W window, J pooled blocks, E experts, V
vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from deepseek.config import replace
from deepseek.errors import ConfigError
from deepseek.models.config import PRESETS, ModelConfig
from deepseek.ops.cross_entropy import chunk_rows
from deepseek.ops.hybrid_attention import pooled_length

PARTS = (
    "embedding",
    "head",
    "attention",
    "router",
    "experts",
    "shared_experts",
    "dense_ffn",
    "norms",
    "gates",
)


@dataclass(frozen=True)
class Parameters:
    """How many numbers a model learns.

    ``total`` counts every learned number once (a tied embedding is one table). ``active`` counts those that
    take part in arithmetic with every token: everything except the experts a token does not choose, and
    except an untied embedding table, which is only looked up. A tied table counts: it is the head.
    """

    total: int
    active: int
    by_part: dict[str, int]  #: the nine ``PARTS``; ``gates`` are a hybrid layer's gate, sink and pooling


def parameters(config: ModelConfig) -> Parameters:
    """The parameters of ``Transformer(config)``, exactly."""
    parts = Counter(dict.fromkeys(PARTS, 0))
    parts["embedding"] = config.vocab_size * config.hidden
    parts["head"] = 0 if config.tie_embeddings else parts["embedding"]
    parts["norms"] = config.hidden
    for kind, ffn in zip(config.kinds, config.ffn_kinds):
        parts.update(_attention_parameters(config, kind))
        parts.update(_ffn_parameters(config, ffn))
    idle = 0 if config.tie_embeddings else parts["embedding"]
    if config.moe.experts:
        idle += parts["experts"] * (config.moe.experts - config.moe.top_k) // config.moe.experts
    total = sum(parts.values())
    return Parameters(total, total - idle, dict(parts))


def _attention_parameters(config: ModelConfig, kind: str) -> dict[str, int]:
    c, C = config.attention, config.hidden
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    projections = 2 * C * q + 2 * C * kv
    biases = (q + 2 * kv if c.bias else 0) + (C if c.output_bias else 0)
    pooling = 2 * c.kv_heads * c.block if c.pooling == "learned" else 0
    gates = (2 * kv + pooling + c.heads + (C * c.heads if c.gate == "token" else 0)) if kind == "H" else 0
    return {
        "attention": projections + biases,
        "norms": 2 * C + (2 * c.head_dim if c.qk_norm else 0),
        "gates": gates,
    }


def _ffn_parameters(config: ModelConfig, kind: str) -> dict[str, int]:
    m, C = config.moe, config.hidden
    if kind == "D":
        return {"dense_ffn": 3 * C * config.ffn + (2 * config.ffn + C if config.ffn_bias else 0)}
    return {
        "router": m.experts * C,
        "experts": m.experts * 3 * C * m.expert_ffn,
        "shared_experts": 3 * C * m.shared_experts * m.expert_ffn,
    }


@dataclass(frozen=True)
class Flops:
    """FLOPs of one row of ``length`` positions: ``forward`` and ``backward`` per part, exact integers.

    Parts: ``projections`` (query, key, value, output), ``scores`` (query·key and probability·value),
    ``gates``, ``router``, ``experts``, ``shared_experts``, ``dense_ffn``, ``head``, and ``default_outputs``
    (executed only).
    """

    length: int
    forward: dict[str, int]
    backward: dict[str, int]

    @property
    def forward_row(self) -> int:
        return sum(self.forward.values())

    @property
    def row(self) -> int:
        """Forward and backward of one row."""
        return self.forward_row + sum(self.backward.values())

    @property
    def forward_per_token(self) -> float:
        """Mean over the row's positions."""
        return self.forward_row / self.length

    @property
    def per_token(self) -> float:
        """Training: forward and backward, mean over the row's positions."""
        return self.row / self.length

    @property
    def by_part(self) -> dict[str, float]:
        """Training FLOPs per token of each part."""
        return {part: (n + self.backward[part]) / self.length for part, n in self.forward.items()}

    @property
    def attention(self) -> int:
        """Forward FLOPs a row of all attention blocks: projections, scores, gates."""
        return self.forward["projections"] + self.forward["scores"] + self.forward["gates"]

    @property
    def attention_share(self) -> float:
        """The share of attention blocks in the forward pass."""
        return self.attention / self.forward_row


def flops(config: ModelConfig, length: int, *, executed: bool = False) -> Flops:
    """FLOPs of a row of ``length`` positions (one document) through ``Transformer(config)`` and its head.

    Args:
        executed: count what plain torch runs in a training step instead of what the mathematics needs: whole
            score matrices with masked entries, chunk padding, and the router's default outputs. Two things
            depend on data and stay out: rows that the token floor adds, and the attention kernel's own
            recomputation in backward (exact for the maths kernel, which keeps its probabilities).

    Raises:
        ConfigError: ``length`` is not positive.
    """
    if length < 1:
        raise ConfigError(f"length={length} must be at least 1")
    names = ("projections", "scores", "gates", "router", "experts", "shared_experts", "dense_ffn", "head")
    forward = Counter(dict.fromkeys((*names, "default_outputs") if executed else names, 0))
    forward["head"] = 2 * length * config.hidden * config.vocab_size
    for kind, ffn in zip(config.kinds, config.ffn_kinds):
        forward.update(_attention_flops(config, kind, length, executed))
        forward.update(_ffn_flops(config, ffn, length))
    backward = {part: 2 * n for part, n in forward.items()}  # by the transposes of both operands
    if executed and config.moe.default_decay > 0:  # constants: one product, in backward only
        backward["default_outputs"] = forward["router"]
    return Flops(length, dict(forward), backward)


def visible_pairs(config: ModelConfig, kind: str, length: int) -> int:
    """How many pairs (query, visible key or pooled slot) a layer of ``kind`` has in a row of ``length``."""
    c = config.attention
    if kind == "F":
        return length * (length + 1) // 2
    w = min(c.window, length)
    local = w * (w + 1) // 2 + (length - w) * w
    if kind == "L":
        return local
    blocks = pooled_length(length, c.block, c.stride)
    pooled = blocks * (length - c.block + 1) - c.stride * (blocks * (blocks - 1) // 2)
    return local + length + pooled  # every query sees the sink


def computed_pairs(config: ModelConfig, kind: str, length: int) -> int:
    """How many pairs plain torch multiplies for such a layer, masked ones included."""
    c = config.attention
    if kind == "F":
        return length * length
    w = min(c.window, length)
    local = -(-length // w) * w * 2 * w
    return local if kind == "L" else local + length * (1 + pooled_length(length, c.block, c.stride))


def _attention_flops(config: ModelConfig, kind: str, length: int, executed: bool) -> dict[str, int]:
    c, C = config.attention, config.hidden
    pairs = (computed_pairs if executed else visible_pairs)(config, kind, length)
    return {
        "projections": 4 * length * C * (c.heads + c.kv_heads) * c.head_dim,
        "scores": 4 * pairs * c.heads * c.head_dim,
        "gates": 2 * length * C * c.heads if kind == "H" and c.gate == "token" else 0,
    }


def _ffn_flops(config: ModelConfig, kind: str, length: int) -> dict[str, int]:
    m, C = config.moe, config.hidden
    if kind == "D":
        return {"dense_ffn": 6 * length * C * config.ffn}
    return {
        "router": 2 * length * C * m.experts,
        "experts": 6 * length * m.top_k * C * m.expert_ffn,
        "shared_experts": 6 * length * C * m.shared_experts * m.expert_ffn,
    }


def cache_bytes(config: ModelConfig, length: int, rows: int = 1, dtype_bytes: int = 2) -> int:
    """Bytes of keys and values held after ``length`` positions: what ``Cache.nbytes`` says."""
    c = config.attention
    held = 0
    for kind in config.kinds:
        if kind == "F":
            held += length
        elif kind == "L":
            held += min(length, c.window)
        else:
            held += min(length, max(c.window, c.block)) + pooled_length(length, c.block, c.stride)
    return 2 * held * rows * c.kv_heads * c.head_dim * dtype_bytes


def activation_bytes(config: ModelConfig, rows: int, length: int, *, compute_bytes: int = 2) -> int:
    """Bytes autograd keeps between forward and backward of ``rows × length`` positions, up to the final norm.

    What the fused attention kernels and the plain-torch layers save on a CPU, in a model that computes in
    ``compute_bytes`` (norms, gates and the router in fp32 always); parameters and their autocast copies are
    not activations, and no layer is recomputed. Within 10% of what ``saved_tensors_hooks`` measures.
    """
    n = rows * length
    total = n * 8 + _norm_bytes(n, config.hidden) + 4 * length * config.attention.head_dim
    for kind, ffn in zip(config.kinds, config.ffn_kinds):
        total += 2 * _norm_bytes(n, config.hidden)
        total += _attention_activations(config, kind, rows, length, compute_bytes)
        total += _ffn_activations(config, ffn, n, compute_bytes)
    return total


def _norm_bytes(vectors: int, size: int) -> int:
    """An fp32 norm keeps its input, the normalised input and one scale a vector."""
    return vectors * (8 * size + 4)


def _attention_activations(config: ModelConfig, kind: str, rows: int, length: int, b: int) -> int:
    c = config.attention
    n, width = rows * length, c.heads * c.head_dim
    total = n * config.hidden * b + n * width * b  # inputs of the projections
    if c.qk_norm:
        total += _norm_bytes(n * (c.heads + c.kv_heads), c.head_dim)
    if kind == "F":
        return total + 3 * n * width * b + 4 * n * c.heads  # the output is also the projection's input
    w = min(c.window, length)
    padded = -(-length // w) * w * rows
    total += (
        6 * padded * width * b + 4 * padded * c.heads + padded * 2 * w * b
    )  # q, 2k, 2v, out; log-sums; mask
    if kind == "L":
        return total
    slots = 1 + pooled_length(length, c.block, c.stride)
    total += 2 * n * width * b + 2 * rows * slots * width * b + 4 * n * c.heads + length * slots * b
    return (
        total + n * width * b + 4 * n * c.heads + (4 if b == 4 else 2 * b) * n * c.heads
    )  # blend of the branches


def _ffn_activations(config: ModelConfig, kind: str, n: int, b: int) -> int:
    m, C = config.moe, config.hidden
    if kind == "D":
        return n * C * b + 4 * n * config.ffn * b
    chosen = n * m.top_k
    slots = m.experts * min(n, math.ceil(m.token_floor * chosen / m.experts))
    rows = chosen + slots
    # Tokens; probabilities; the chosen experts and their gates.
    total = n * C * b + 4 * n * m.experts + 8 * chosen
    total += rows * 2 * m.expert_ffn * b + 12 * rows  # the first projection; who goes where
    total += 4 * rows + 12 * slots if slots else 0  # gates of all rows; who is rescued
    if m.default_decay > 0:
        total += n * m.experts + b * m.experts * C
    if m.shared_experts:
        total += 4 * n * m.shared_experts * m.expert_ffn * b + (n * C * b if b < 4 else 0)
    return total


def memory(
    config: ModelConfig,
    rows: int,
    length: int,
    optimizer: Literal["adamw", "muon", "adafactor"] = "adamw",
    master_bytes: int = 4,
    compute_bytes: int = 2,
    *,
    loss_positions: int | None = None,
) -> dict[str, int]:
    """Bytes of one training step of a micro-batch on one device, by what they hold; ``total`` is their sum.

    Args:
        optimizer: 'adamw' keeps two fp32 numbers a parameter; 'muon' keeps one for the matrices inside blocks
            and two for everything else (embedding, head, norms, router, gates); 'adafactor' one in bf16.
        master_bytes: bytes of a weight and of its gradient.
        compute_bytes: bytes of the copy that matmuls read, if smaller.
        loss_positions: how many positions' logits exist at once; ``None``: a chunk of ``linear_cross_entropy``.
    """
    count = parameters(config)
    by, total = count.by_part, count.total
    matrices = by["attention"] + by["experts"] + by["shared_experts"] + by["dense_ffn"]
    states = {"adamw": 8 * total, "muon": 8 * total - 4 * matrices, "adafactor": 2 * total}[optimizer]
    chunk = loss_positions or chunk_rows(config.vocab_size, compute_bytes, cuda=compute_bytes < master_bytes)
    positions = min(chunk, rows * length)
    held = {
        "weights": master_bytes * total,
        "compute_copy": compute_bytes * total if compute_bytes < master_bytes else 0,
        "gradients": master_bytes * total,
        "optimizer": states,
        "activations": activation_bytes(config, rows, length, compute_bytes=compute_bytes),
        # A chunk's logits, which become their own gradient, and the gradients of the head and of the hidden states.
        "logits": positions * config.vocab_size * (compute_bytes + (4 if compute_bytes < 4 else 0))
        + config.vocab_size * config.hidden * 4
        + rows * length * config.hidden * compute_bytes,
    }
    return {**held, "total": sum(held.values())}


def mfu(tokens_per_second: float, flops_per_token: float, peak_flops: float) -> float:
    """Model FLOPs utilisation: the share of ``peak_flops`` (FLOP/s) put to use (arXiv 2204.02311)."""
    if peak_flops <= 0:
        raise ConfigError(f"peak_flops={peak_flops} must be positive: the FLOP/s this machine can reach")
    return tokens_per_second * flops_per_token / peak_flops


def table(length: int = 4096) -> str:
    """Every preset's counts and attention kinds as Markdown: ``python -m deepseek.models.count``."""
    lines = [
        f"| preset | parameters | active | forward FLOPs a token at {length:,} | attention | cache, MB |",
        "|---|---|---|---|---|---|",
    ]
    for name, preset in PRESETS.items():
        config = preset()
        count, work = parameters(config), flops(config, length)
        lines.append(
            f"| {name} ({config.pattern}) | {count.total / 1e6:,.1f}M | {count.active / 1e6:,.1f}M "
            f"| {work.forward_per_token / 1e6:,.1f}M | {work.attention_share:.0%} "
            f"| {cache_bytes(config, length) / 1e6:,.1f} |"
        )
    lines += [
        "",
        "| attention blocks of `small` | FLOPs a token | of full | executed, of full | cache of full |",
    ]
    lines.append("|---|---|---|---|---|")
    full = PRESETS["small"](pattern="F")
    base, ran = flops(full, length), flops(full, length, executed=True)
    for pattern in ("F", "L", "H", "LLLH", "LLLF"):
        config = replace(full, pattern=pattern)
        mine = flops(config, length)
        lines.append(
            f"| {pattern} | {mine.attention / length / 1e6:,.1f}M | {mine.attention / base.attention:.0%} "
            f"| {flops(config, length, executed=True).attention / ran.attention:.0%} "
            f"| {cache_bytes(config, length) / cache_bytes(full, length):.1%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
