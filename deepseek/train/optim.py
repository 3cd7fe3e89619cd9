"""Which parameter goes to which optimizer, and all of them as one (F29).

Muon for the hidden matrices and AdamW for the rest, or AdamW or Adafactor for everything. With fp32 masters of a model
that is stored in a lower precision, a checkpoint is the same as without.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deepseek.config import configclass
from deepseek.errors import CheckpointError, ConfigError
from deepseek.train.adafactor import DSAdafactor, Moment
from deepseek.train.adamw import AdamW
from deepseek.train.muon import Muon
from deepseek.train.part import Part


@configclass
class OptimConfig:
    """Which optimizer, and its constants (the source's β: 0.9 and 0.95)."""

    name: Literal["adamw", "muon", "adafactor"] = "muon"  # muon: hidden matrices by Muon, the rest by AdamW
    lr: float = 3e-3
    embedding_lr: float = 1.0  # multiplies lr for the embedding and the head
    betas: tuple[float, ...] = (0.9, 0.95)
    betas_schedule: Literal["constant", "dynamic"] = "constant"  # dynamic: of AdamW, by step (train.betas)
    eps: float = 1e-8
    weight_decay: float = 0.1
    momentum: float = 0.95  # muon only
    newton_schulz_steps: int = 5  # muon only
    first_moment: Moment = "bf16"  # adafactor only: how it is kept, if at all
    relative_lr: bool = False  # adafactor only: lr relative to the size of the weights, as published

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


class Optimizers:
    """Several optimizers as one: step, zero, groups, and a state dictionary by parameter *name*.

    Attributes:
        masters: fp32 weights of the parameters that are stored in a lower precision.
        gradients: where a gradient is accumulated that is not in ``p.grad``; all parts read it.
        extras: other state that belongs to training, by name and key, kept and restored in place: a clipper's.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        names: Mapping[nn.Parameter, str],
        masters: Mapping[nn.Parameter, Tensor] | None = None,
    ) -> None:
        self.parts, self.names, self.masters = list(parts), dict(names), dict(masters or {})
        self.param_groups: list[dict[str, Any]] = [g for part in parts for g in part.param_groups]
        self.gradients: dict[nn.Parameter, Tensor] = {}
        self.extras: dict[str, dict[str, Tensor]] = {}
        for part in parts:
            part.gradients = self.gradients

    def fill(self) -> None:
        """Copy learning rates and betas to the device."""
        for part in self.parts:
            part.fill()

    def update(self, scale: Tensor | None = None, apply: Tensor | None = None) -> None:
        """``step`` with the hyperparameters last filled in: what a CUDA graph captures."""
        for part in self.parts:
            part.update(scale, apply)

    def step(self, scale: Tensor | None = None, apply: Tensor | None = None) -> None:
        """Update every parameter, on gradients times ``scale``, unless ``apply`` is false; see ``Part.step``."""
        self.fill()
        self.update(scale, apply)

    def zero_grad(self) -> None:
        self.gradients.clear()
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def master_state(self, model_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A model's state dictionary with fp32 masters in the place of what is stored lower."""
        masters = {self.names[p]: master for p, master in self.masters.items()}
        return {name: masters.get(name, tensor) for name, tensor in model_state.items()}

    @torch.no_grad()
    def load_master_state(self, model_state: Mapping[str, Tensor]) -> None:
        """Inverse of ``master_state``: masters, and the weights rounded from them."""
        for p, master in self.masters.items():
            master.copy_(model_state[self.names[p]])
            p.copy_(master)

    def state_dict(self) -> dict[str, Tensor]:
        """``{"blocks.0.ffn.down|momentum": tensor, …}``: flat, by name, independent of group order."""
        state = {
            f"{name}|{key}": value
            for part in self.parts
            for p, name in self.names.items()
            for key, value in part.state.get(p, {}).items()
        }
        return state | {
            f"{EXTRA}{name}|{key}": value for name, own in self.extras.items() for key, value in own.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of ``state_dict``; raises ``CheckpointError`` when names or shapes do not fit this optimizer.

        Extras that either side lacks are left as they are: a run may change its clipping.
        """
        owner = {
            self.names[p]: (part, p) for part in self.parts for g in part.param_groups for p in g["params"]
        }
        found: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for entry, value in state.items():
            name, _, key = entry.rpartition("|")
            found[name][key] = value
        extras = {name: found.pop(name) for name in list(found) if name.startswith(EXTRA)}
        for name, values in found.items():
            if name not in owner:
                raise CheckpointError(
                    f"the checkpoint's optimizer state is for a parameter '{name}' this model lacks"
                )
            part, p = owner[name]
            _check_state(name, values, part, p)
        for part in self.parts:
            part.state.clear()
        for name, values in found.items():
            part, p = owner[name]
            part.state[p] = {key: value.to(p.device).clone() for key, value in values.items()}
        for name, own in self.extras.items():
            for key, value in extras.get(EXTRA + name, {}).items():
                if key in own and own[key].shape == value.shape:
                    own[key].copy_(value)


EXTRA = "*"  #: what the names of ``extras`` start with in a state dictionary: no parameter's does


def _check_state(name: str, values: dict[str, Tensor], part: Part, p: nn.Parameter) -> None:
    shapes = part.state_shapes(p)
    if values.keys() != shapes.keys():
        raise CheckpointError(
            f"the checkpoint's optimizer keeps {', '.join(sorted(values))} for '{name}', this one "
            f"{', '.join(sorted(shapes))}: was optim.name, betas_schedule or first_moment changed?"
        )
    for key, value in values.items():
        if value.shape != torch.Size(shapes[key]):
            raise CheckpointError(
                f"optimizer state {name}|{key} is {tuple(value.shape)}, this parameter's {tuple(shapes[key])}"
            )


def is_matrix(name: str, p: nn.Parameter) -> bool:
    """Whether Muon takes it: hidden matrices and experts; not embedding, head, router, gates or sinks."""
    hidden = not name.startswith(("embedding", "head")) and not name.endswith(
        ("router.weight", "gate.weight", "sink", "attention.pool")
    )
    return p.dim() >= 2 and hidden


def build_optimizer(
    model: nn.Module, config: OptimConfig, masters: Mapping[nn.Parameter, Tensor] | None = None
) -> Optimizers:
    """Parameter groups by rule: matrices decay, vectors do not; embedding and head have their own learning rate.

    ``masters``: what ``precision.lower`` returned of this model.
    """
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

    rest = (
        group("matrix", config.weight_decay)
        + group("embedding", 0.0, config.lr * config.embedding_lr)
        + group("vector", 0.0)
    )
    own = masters or {}
    parts: list[Part] = []
    if groups["muon"]:
        matrices = group("muon", config.weight_decay)
        steps = config.newton_schulz_steps
        parts.append(Muon(matrices, config.lr, config.momentum, steps=steps, masters=own))
    if rest and config.name == "adafactor":
        moment, relative = config.first_moment, config.relative_lr
        parts.append(DSAdafactor(rest, config.lr, config.betas[0], 0.0, moment, relative, own))
    elif rest:
        moving = config.betas_schedule == "dynamic"
        parts.append(AdamW(rest, config.lr, config.betas, config.eps, masters=own, moving=moving))
    return Optimizers(parts, names, own)
