"""The layout of a run over devices, checked against the model before anything starts."""

from __future__ import annotations

from deepseek.config import configclass
from deepseek.errors import ConfigError
from deepseek.models import ModelConfig


@configclass
class ParallelConfig:
    """Degrees of parallelism; data parallelism is what the ranks that torchrun starts are left with."""

    tp: int = 1  # tensor parallel
    pp: int = 1  # pipeline parallel
    ep: int = 1  # expert parallel

    def check(self) -> None:
        for name in ("tp", "pp", "ep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"parallel.{name}={getattr(self, name)} must be at least 1")


def check_layout(parallel: ParallelConfig, model: ModelConfig, world: int) -> None:
    """Raise ``ConfigError`` when the layout does not fit the model, or asks for what does not exist yet."""
    heads, kv = model.attention.heads, model.attention.kv_heads
    _divides("tp", parallel.tp, heads, "attention heads")
    _divides("tp", parallel.tp, kv, "key/value heads")
    _divides("pp", parallel.pp, model.layers, "layers")
    _divides("ep", parallel.ep, model.moe.experts or 1, "experts")
    size = parallel.tp * parallel.pp * parallel.ep
    if size > 1:
        raise ConfigError(
            f"parallel.tp·pp·ep={size}: only data parallelism exists so far; set them to 1 and start "
            f"`torchrun --nproc-per-node {max(world, size)} -m -- deepseek …`"
        )


def _divides(name: str, degree: int, count: int, what: str) -> None:
    if count % degree:
        fits = [d for d in range(2, count + 1) if count % d == 0] or [1]
        tries = ", ".join(map(str, fits[:-1])) + f" or {fits[-1]}" if len(fits) > 1 else str(fits[0])
        raise ConfigError(f"parallel.{name}={degree} does not divide {count} {what}; try {tries}")
