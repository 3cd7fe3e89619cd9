"""Layers in plain torch, and torch's own under the names the source documents use (``ds.nn.Module``, …)."""

from torch.nn import Linear, Module, Parameter, functional

from deepseek.nn.attention import Attention, AttentionConfig, Context, FullAttention, WindowAttention
from deepseek.nn.balance import DynamicGate, LoadBalancer
from deepseek.nn.cache import Cache, LayerCache
from deepseek.nn.hybrid import HybridAttention
from deepseek.nn.layers import RMSNorm, SwiGLU, layer_norm
from deepseek.nn.moe import MoE, MoEConfig, Router, coverage, max_violation

__all__ = [
    "Attention", "AttentionConfig", "Cache", "Context", "DynamicGate", "FullAttention", "HybridAttention",
    "LayerCache", "Linear", "LoadBalancer", "MoE", "MoEConfig", "Module", "Parameter", "RMSNorm", "Router", "SwiGLU",
    "WindowAttention", "coverage", "functional", "layer_norm", "max_violation",
]  # fmt: skip
