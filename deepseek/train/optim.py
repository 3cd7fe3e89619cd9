"""Optimizers: AdamW for everything, or Muon for the hidden matrices and AdamW for the rest (F29).

Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest orthogonal matrix, found by a few Newton–Schulz
iterations. Here it is batched: all matrices of one shape, the experts' included, go through one chain of batched
matmuls. Its update is scaled to the size of AdamW's (arXiv 2502.16982), so one learning rate serves both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deepseek.config import configclass
from deepseek.errors import CheckpointError, ConfigError

NEWTON_SCHULZ = (
    3.4445,
    -4.7750,
    2.0315,
)  #: quintic coefficients: steep at 0, roughly 1 ± 0.3 after five steps


@configclass
class OptimConfig:
    """Which optimizer, and its constants (the source's β: 0.9 and 0.95)."""

    name: Literal["adamw", "muon"] = "muon"  # muon: hidden matrices by Muon, the rest by AdamW
    lr: float = 3e-3
    embedding_lr: float = 1.0  # multiplies lr for the embedding and the head
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    momentum: float = 0.95  # muon only
    newton_schulz_steps: int = 5  # muon only

    def check(self) -> None:
        if not self.lr > 0 or len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ConfigError(
                f"optim needs lr > 0 and two betas in [0, 1); got lr={self.lr}, betas={self.betas}"
            )
        for name in ("embedding_lr", "eps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"optim.{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.momentum < 1 or self.newton_schulz_steps < 1:
            raise ConfigError(
                f"optim.momentum={self.momentum} must lie in [0, 1) and "
                f"optim.newton_schulz_steps={self.newton_schulz_steps} be at least 1"
            )


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix of each ``[..., m, n]``, roughly (singular values within about 0.7…1.2).

    Runs in bf16 on CUDA, where it is fast and precise enough, and in fp32 (fp64 for fp64) elsewhere.
    """
    a, b, c = NEWTON_SCHULZ
    wide_type = torch.promote_types(matrices.dtype, torch.float32)
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else wide_type)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for parameters whose last two dimensions are a matrix.

    Update: ``p ← p·(1 − lr·wd) − lr·0.2·√max(m, n)·orthogonalise(nesterov momentum)``.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 5,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "ns_steps": steps}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape[-2:]].append(p)
            for same in by_shape.values():
                self._step_shape(same, group)

    def _step_shape(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        beta, shape = group["momentum"], params[0].shape[-2:]
        directions = []
        for p in params:
            assert p.grad is not None
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 1 - beta)
            directions.append(p.grad.lerp(state["momentum"], beta).reshape(-1, *shape))
        update = orthogonalise(torch.cat(directions), group["ns_steps"])
        scale = group["lr"] * 0.2 * max(shape) ** 0.5
        for p, u in zip(params, update.split([d.shape[0] for d in directions])):
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(u.reshape(p.shape), alpha=-scale)


class Optimizers:
    """Several optimizers as one: step, zero, groups, and a state dictionary by parameter *name*."""

    def __init__(self, parts: list[torch.optim.Optimizer], names: dict[nn.Parameter, str]) -> None:
        self.parts, self.names = parts, names
        self.param_groups: list[dict[str, Any]] = [g for part in parts for g in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """``{"blocks.0.ffn.down|momentum": tensor, …}``: flat, by name, independent of group order."""
        return {
            f"{name}|{key}": value if isinstance(value, Tensor) else torch.tensor(value)
            for part in self.parts
            for p, name in self.names.items()
            for key, value in part.state.get(p, {}).items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of ``state_dict``; raises ``CheckpointError`` when names or shapes do not fit this optimizer."""
        owner = {
            self.names[p]: (part, p) for part in self.parts for g in part.param_groups for p in g["params"]
        }
        found: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for entry, value in state.items():
            name, _, key = entry.rpartition("|")
            found[name][key] = value
        for name, values in found.items():
            if name not in owner:
                raise CheckpointError(
                    f"the checkpoint's optimizer state is for a parameter '{name}' this model lacks"
                )
            part, p = owner[name]
            _check_state(name, values, STATE_KEYS[type(part)], p)
        for part in self.parts:
            part.state.clear()
        for name, values in found.items():
            part, p = owner[name]
            part.state[p] = {key: value.to(p.device).clone() for key, value in values.items()}


#: What each optimizer remembers about a parameter.
STATE_KEYS: dict[type[torch.optim.Optimizer], set[str]] = {
    Muon: {"momentum"},
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
}


def _check_state(name: str, values: dict[str, Tensor], keys: set[str], p: nn.Parameter) -> None:
    if values.keys() != keys:
        raise CheckpointError(
            f"the checkpoint's optimizer keeps {', '.join(sorted(values))} for '{name}', this one "
            f"{', '.join(sorted(keys))}: was optim.name changed?"
        )
    for key, value in values.items():
        if value.shape != (torch.Size() if key == "step" else p.shape):
            raise CheckpointError(
                f"optimizer state {name}|{key} is {tuple(value.shape)}, its parameter {tuple(p.shape)}"
            )


def is_matrix(name: str, p: nn.Parameter) -> bool:
    """Whether Muon takes it: hidden matrices and experts; not embedding, head, router, gates or sinks."""
    hidden = not name.startswith(("embedding", "head")) and not name.endswith(
        ("router.weight", "gate.weight", "sink", "attention.pool")
    )
    return p.dim() >= 2 and hidden


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizers:
    """Parameter groups by rule: matrices decay, vectors do not; embedding and head have their own learning rate."""
    groups: dict[str, list[nn.Parameter]] = {"muon": [], "matrix": [], "embedding": [], "vector": []}
    names = {}
    for name, p in model.named_parameters():
        names[p] = name
        if is_matrix(name, p):
            groups["muon" if config.name == "muon" else "matrix"].append(p)
        elif name.startswith(("embedding", "head")):
            groups["embedding"].append(p)
        else:
            groups["matrix" if p.dim() >= 2 else "vector"].append(p)

    def group(kind: str, decay: float, lr: float = config.lr) -> list[dict[str, Any]]:
        return (
            [{"params": groups[kind], "lr": lr, "base_lr": lr, "weight_decay": decay}] if groups[kind] else []
        )

    adam_groups = (
        group("matrix", config.weight_decay)
        + group("embedding", 0.0, config.lr * config.embedding_lr)
        + group("vector", 0.0)
    )
    parts: list[torch.optim.Optimizer] = []
    if groups["muon"]:
        parts.append(
            Muon(
                group("muon", config.weight_decay), config.lr, config.momentum, config.weight_decay,
                config.newton_schulz_steps,
            )
        )  # fmt: skip
    if adam_groups:
        beta1, beta2 = config.betas
        parts.append(
            torch.optim.AdamW(adam_groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=True)
        )
    return Optimizers(parts, names)
