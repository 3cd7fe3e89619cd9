"""Peers: other people's stacks on our shapes, made for the same batches and the same tokens per optimizer step.

* ``plain-torch``: what a practitioner writes in an afternoon: RMSNorm, grouped-query SDPA, SwiGLU or grouped-matmul
  experts, chunked loss, ``torch.compile``, bf16 weights, fused AdamW. No load balancing.
* ``transformers``: ``LlamaForCausalLM`` or ``Qwen3MoeForCausalLM`` with grouped experts, bf16 weights, fused AdamW.
* ``liger``: the same Llama with Liger kernels; dense only.

bf16 weights without fp32 masters are what these stacks reach their best speed with; small updates are lost in them,
which ours does not allow itself. Peers know full attention only: other patterns are replaced by it.

Shape letters: B rows, T positions, C hidden size, E experts, K experts per token, N tokens, R assignments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepseek.batch import IGNORE, Batch
from deepseek.bench.ceilings import compute_dtype
from deepseek.config import replace
from deepseek.errors import ConfigError, MissingExtraError
from deepseek.models import ModelConfig

Step = Callable[[Batch], Tensor]  #: one optimizer step; returns the mean loss, on the device
LOSS_ROWS = 4096  #: positions whose logits exist at once in the plain model


@dataclass(frozen=True)
class Setup:
    """What a stack is made for."""

    config: ModelConfig
    device: torch.device
    micro_rows: int
    compile: bool = True
    lr: float = 1e-4


def full_attention(config: ModelConfig) -> ModelConfig:
    """``config`` with full attention in every layer: what peers can do."""
    return replace(config, pattern="F")


class Norm(nn.Module):
    """RMSNorm by torch's own function."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class PlainAttention(nn.Module):
    """One projection for query, key and value; half-split rotation; causal SDPA."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = self.config = config.attention
        self.sizes = [c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim]
        self.qkv = nn.Linear(config.hidden, sum(self.sizes), bias=False)
        self.output = nn.Linear(self.sizes[0], config.hidden, bias=False)
        self.norms = nn.ModuleList(Norm(c.head_dim, config.norm_eps) for _ in range(2)) if c.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, self.config.head_dim)) for t in self.qkv(x).split(self.sizes, -1))
        if self.norms is not None:
            q, k = self.norms[0](q), self.norms[1](k)
        q, k, v = turn(q.transpose(1, 2), cos, sin), turn(k.transpose(1, 2), cos, sin), v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return self.output(y.transpose(1, 2).flatten(2))


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the halves of the last dimension."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class PlainFFN(nn.Module):
    """SwiGLU with gate and up in one matrix."""

    def __init__(self, hidden: int, size: int) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(hidden, 2 * size, bias=False), nn.Linear(size, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class PlainMoE(nn.Module):
    """Softmax router, sort, two grouped matmuls, weighted sum: everything needed and nothing else."""

    def __init__(self, hidden: int, size: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.experts, self.top_k = experts, top_k
        self.router = nn.Linear(hidden, experts, bias=False)
        self.gate_up = nn.Parameter(torch.randn(experts, hidden, 2 * size) * 0.02)
        self.down = nn.Parameter(torch.randn(experts, size, hidden) * 0.02)

    def route(self, x_NC: Tensor) -> tuple[Tensor, Tensor]:
        """Gates (fp32) and experts ``[N, K]``."""
        gate_NK, expert_NK = self.router(x_NC).float().softmax(-1).topk(self.top_k, -1)
        return gate_NK / gate_NK.sum(-1, keepdim=True), expert_NK

    def forward(self, x: Tensor) -> Tensor:
        x_NC = x.flatten(0, -2)
        gate_NK, expert_NK = self.route(x_NC)
        expert_R = expert_NK.flatten()
        order = expert_R.argsort(stable=True)
        counts = torch.zeros(self.experts, dtype=torch.int32, device=x.device)
        ends = counts.scatter_add_(0, expert_R, torch.ones_like(expert_R, dtype=torch.int32)).cumsum(
            0, dtype=torch.int32
        )
        gate, up = F.grouped_mm(x_NC[order // self.top_k], self.gate_up, offs=ends).chunk(2, -1)
        y = F.grouped_mm(F.silu(gate) * up, self.down, offs=ends)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=x.device)
        y_NKC = y[back].unflatten(0, (-1, self.top_k))
        return (y_NKC * gate_NK[..., None].to(y.dtype)).sum(1).view_as(x)


class LoopMoE(PlainMoE):
    """The same with one expert after the other, as older model files have it; waits for the device once an expert."""

    def forward(self, x: Tensor) -> Tensor:
        x_NC = x.flatten(0, -2)
        gate_NK, expert_NK = self.route(x_NC)
        out = torch.zeros_like(x_NC)
        for expert in range(self.experts):
            token, slot = (expert_NK == expert).nonzero(as_tuple=True)
            gate, up = (x_NC[token] @ self.gate_up[expert]).chunk(2, -1)
            y = (F.silu(gate) * up) @ self.down[expert]
            out = out.index_add(0, token, y * gate_NK[token, slot, None].to(y.dtype))
        return out.view_as(x)


class PlainBlock(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: ModelConfig, kind: str) -> None:
        super().__init__()
        m = config.moe
        self.attention_norm, self.ffn_norm = (Norm(config.hidden, config.norm_eps) for _ in range(2))
        self.attention = PlainAttention(config)
        self.ffn = (
            PlainMoE(config.hidden, m.expert_ffn, m.experts, m.top_k)
            if kind == "E"
            else PlainFFN(config.hidden, config.ffn)
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.ffn(self.ffn_norm(x))


class PlainLM(nn.Module):
    """Embedding, blocks, norm, head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden)
        self.blocks = nn.ModuleList(PlainBlock(config, kind) for kind in config.ffn_kinds)
        self.norm = Norm(config.hidden, config.norm_eps)
        self.head = nn.Linear(config.hidden, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Hidden states ``[B, T, C]`` after the final norm."""
        c, x = self.config.attention, self.embedding(tokens_BT)
        rate = c.rope_theta ** -(torch.arange(0, c.head_dim, 2, device=x.device).float() / c.head_dim)
        angle = torch.arange(x.shape[1], device=x.device)[:, None] * rate
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.norm(x)


def chunk_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropy of some positions, logits in fp32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, ignore_index=IGNORE, reduction="sum")


def plain_torch(setup: Setup) -> Step:
    """The plain model, compiled as a whole, in bf16 on an accelerator."""
    with torch.device(setup.device):
        model = PlainLM(setup.config)
    model = model.to(compute_dtype(setup.device))
    run: Any = torch.compile(model) if setup.compile else model
    part_loss: Any = torch.compile(chunk_loss) if setup.compile else chunk_loss

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        hidden = run(tokens).flatten(0, 1)
        parts = [
            checkpoint(part_loss, h, model.head.weight, t, use_reentrant=False)
            for h, t in zip(hidden.split(LOSS_ROWS), targets.flatten().split(LOSS_ROWS))
        ]
        return torch.stack(parts).sum()

    return _stepper(model, loss, setup)


def transformers(setup: Setup) -> Step:
    """The library's own model and loss."""
    with torch.device(setup.device):
        model = hf_model(setup.config).to(compute_dtype(setup.device))
    run: Any = torch.compile(model) if setup.compile else model

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        # The library shifts labels itself; one position a row is lost to that.
        return run(input_ids=tokens, labels=tokens, use_cache=False).loss * targets.numel()

    return _stepper(model, loss, setup)


def liger(setup: Setup) -> Step:
    """``transformers``' Llama with Liger's kernels. They replace parts of that library for the whole process.

    Raises:
        ConfigError: the package is absent, or the model has experts.
    """
    if setup.config.moe.experts:
        raise ConfigError("Liger has kernels for the dense Llama only; choose a model without experts")
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
    except ImportError as error:
        raise ConfigError(f"the peer 'liger' needs its package: pip install liger-kernel ({error})") from None
    apply_liger_kernel_to_llama()
    return transformers(setup)


def hf_model(config: ModelConfig) -> nn.Module:
    """``LlamaForCausalLM`` or ``Qwen3MoeForCausalLM`` of our shape, fresh weights, in training mode.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    try:
        import transformers as hf
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", "the peer 'transformers'") from error
    a, m = config.attention, config.moe
    shape: dict[str, Any] = {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden, "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers, "num_attention_heads": a.heads, "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim, "max_position_embeddings": config.max_length, "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings, "attn_implementation": "sdpa",
    }  # fmt: skip
    if not m.experts:
        return hf.LlamaForCausalLM(hf.LlamaConfig(**shape)).train()
    experts = {
        "moe_intermediate_size": m.expert_ffn, "num_experts": m.experts, "num_experts_per_tok": m.top_k,
        "decoder_sparse_step": 1, "norm_topk_prob": m.normalise_gates, "experts_implementation": "grouped_mm",
    }  # fmt: skip
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**shape, **experts)).train()


def _stepper(model: nn.Module, loss_sum: Callable[[Tensor, Tensor], Tensor], setup: Setup) -> Step:
    """Micro-batches forward and backward, then fused AdamW."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=setup.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )

    def step(batch: Batch) -> Tensor:
        total = torch.zeros((), device=setup.device)
        for part in batch.split(setup.micro_rows):
            part = part.to(setup.device)
            loss = loss_sum(part.tokens, part.targets) / batch.n_targets
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


#: Peers in the order in which they run; Liger last, because it changes the library for the whole process.
PEERS: dict[str, Callable[[Setup], Step]] = {
    "plain-torch": plain_torch, "transformers": transformers, "liger": liger,
}  # fmt: skip
