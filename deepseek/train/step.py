"""One optimizer step: micro-batches forward and backward, ranks added up, clip, guard, update.

The order of additions is fixed, so a step is a pure function of weights, optimizer state and batch: two runs that see
the same batches are bit-identical on a CPU, interrupted or not. Nothing is read back from the device: whether a step
counts is decided there, so that the host can prepare the next step while this one runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deepseek.batch import Batch
from deepseek.dist import comm
from deepseek.errors import ConfigError
from deepseek.models.transformer import LayerStats, Transformer
from deepseek.nn.moe import RoutingStats, coverage, max_violation
from deepseek.precision import Policy
from deepseek.train.accumulate import Accumulator
from deepseek.train.clip import Clip, NormClip, Pairs, each_norm
from deepseek.train.losses import Loss
from deepseek.train.optim import Optimizers

LossFunction = Callable[[Transformer, Batch], Loss]


@dataclass
class StepResult:
    """What a step did. Tensors stay on the device until somebody reads them.

    Attributes:
        loss: mean cross-entropy, nats per target. grad_norm: before clipping. skipped: bool scalar, the update was not
            applied. clipped: bool scalar, gradients were scaled down.
        tokens: targets counted. n_bytes: their bytes. load: per expert layer the share of tokens per expert ``[E]``.
        gates: per hybrid layer the mean gate per head ``[H]``. seconds: where the time went.
        gradient_norms: ``[P]``, of each of ``TrainStep.parameters`` before clipping; 0 where there was no gradient.
        entropies: per expert layer the mean entropy of the router's distribution, nats, ``[L]``.
    """

    loss: Tensor
    grad_norm: Tensor
    balance_loss: Tensor
    skipped: Tensor
    clipped: Tensor
    tokens: int
    n_bytes: int
    load: list[Tensor]
    gates: dict[int, Tensor]
    router_entropy: Tensor
    seconds: dict[str, float] = field(default_factory=dict)
    gradient_norms: Tensor | None = None
    entropies: Tensor | None = None

    @property
    def coverage(self) -> Tensor:
        """Mean over expert layers of Σ min(fᵢ, 1/E); 0 without any."""
        return self._over_layers(coverage)

    @property
    def max_violation(self) -> Tensor:
        """Mean over expert layers of (largest load − mean) / mean; 0 without any."""
        return self._over_layers(max_violation)

    def _over_layers(self, figure: Callable[[Tensor], Tensor]) -> Tensor:
        """The mean of a figure of each layer's load, computed for all layers at once."""
        return torch.vmap(figure)(torch.stack(self.load)).mean() if self.load else torch.zeros_like(self.loss)


class Sums(NamedTuple):
    """What the micro-batches of a step add up to: both losses, scalars, and each layer's statistics."""

    loss: Tensor
    total: Tensor
    layers: list[LayerStats]


class Stopwatch:
    """Seconds by name. On an accelerator, work is asynchronous: only the total of a step means something there."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._detailed, self._last = device.type == "cpu", time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        name = name if self._detailed else "step"
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


class TrainStep:
    """``step(batch) -> StepResult`` for a model, a loss and an optimizer.

    Args:
        micro_rows: rows per forward pass; a batch with more is accumulated. 0: all at once.
        grad_clip: largest gradient norm, 0 for none; or any other clipping. Its state goes into the optimizer's
            ``extras``, and so into checkpoints.

    Raises:
        ConfigError: the policy is one with masters and the optimizer was built without them.
    """

    def __init__(
        self,
        model: Transformer,
        loss_fn: LossFunction,
        optimizer: Optimizers,
        policy: Policy,
        *,
        micro_rows: int = 0,
        grad_clip: float | Clip = 1.0,
    ) -> None:
        self.model, self.loss_fn, self.optimizer, self.policy = model, loss_fn, optimizer, policy
        self.micro_rows = micro_rows
        self.clip = grad_clip if isinstance(grad_clip, Clip) else NormClip(grad_clip)
        optimizer.extras["clip"] = self.clip.state
        self.device = next(model.parameters()).device
        self.parameters: list[nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
        self.gradient_bytes = 0  #: of all gradients of a step, from the first step on
        self.waited: tuple[torch.Event, torch.Event] | None = None  #: marks around the last exchange of ranks
        if policy.masters and not optimizer.masters:
            raise ConfigError(
                f"precision {policy.name} with masters needs a lowered model: masters = lower(model, policy), then "
                "build_optimizer(model, config, masters)"
            )
        lowered = [p for p in self.parameters if p in optimizer.masters]
        self.accumulator = Accumulator(lowered, optimizer.gradients)

    def __call__(self, batch: Batch) -> StepResult:
        watch, sums = Stopwatch(self.device), None
        parts = list(batch.split(self.micro_rows or batch.rows))
        self.optimizer.fill()
        self.optimizer.zero_grad()  # of a step that failed between its micro-batches, gradients would be left
        # Ranks are added up like micro-batches, in fp32.
        with self.accumulator.over(len(parts) * comm.world()):
            for part in parts:
                sums = self.micro(part.to(self.device), part.rows / batch.rows, sums, watch)
        assert sums is not None
        self._reduce(sums, watch)
        result = self.finish(sums)
        watch.lap("optimizer")
        return replace(result, tokens=batch.n_targets, n_bytes=batch.n_bytes, seconds=watch.seconds)

    def micro(
        self,
        part: Batch,
        share: float,
        sums: Sums | None = None,
        watch: Stopwatch | None = None,
        factor: Tensor | None = None,
    ) -> Sums:
        """Forward and backward of a micro-batch on the device; what it found is added to ``sums``.

        Args:
            share: of the batch's rows. factor: a scalar that multiplies the losses.
        """
        with self.policy.compute(self.device):
            result = self.loss_fn(self.model, part)
        if watch is not None:
            watch.lap("forward")
        scaled, loss = result.total * self.policy.loss_scale, result.cross_entropy
        if factor is not None:
            scaled, loss = scaled * factor, loss * factor
        scaled.backward()
        if watch is not None:
            watch.lap("backward")
        total = scaled.detach() / self.policy.loss_scale
        if sums is None:
            return Sums(loss, total, _add_layers([], result.layers, share))
        return Sums(sums.loss + loss, sums.total + total, _add_layers(sums.layers, result.layers, share))

    def finish(self, sums: Sums) -> StepResult:
        """Clip, update and forget the gradients. All on the device: a CUDA graph can hold it."""
        norms, norm, apply, clipped = self._update(sums.loss)
        self._update_routing(sums.layers, apply)
        self.optimizer.zero_grad()
        routings = [layer.routing for layer in sums.layers if layer.routing is not None]
        return StepResult(
            loss=sums.loss,
            grad_norm=norm,
            balance_loss=sums.total - sums.loss,
            skipped=~apply,
            clipped=clipped,
            tokens=0,
            n_bytes=0,
            load=_loads(sums.layers),
            gates={i: layer.gate_H for i, layer in enumerate(sums.layers) if layer.gate_H is not None},
            router_entropy=_mean([r.entropy for r in routings], sums.loss),
            gradient_norms=norms,
            entropies=torch.stack([r.entropy for r in routings]) if routings else None,
        )

    def gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        """What was accumulated, for every parameter that has a gradient."""
        sums = self.optimizer.gradients
        found = ((p, sums.get(p, p.grad)) for p in self.parameters)
        return [(p, gradient) for p, gradient in found if gradient is not None]

    def _update(self, loss: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Clip and step: the gradients' norms ``[P]`` and joint norm, whether it and the loss are finite, and whether
        they were clipped."""
        pairs, scale = self.gradients(), self.policy.loss_scale
        norms = each_norm([gradient for _, gradient in pairs])
        norm = torch.linalg.vector_norm(norms) / scale
        apply = torch.isfinite(norm) & torch.isfinite(loss)
        factor, clipped = self.clip(pairs, norm, apply, scale)
        self.optimizer.update(factor / scale, apply)
        self.gradient_bytes = self.gradient_bytes or sum(g.numel() * g.element_size() for _, g in pairs)
        return self._in_order(norms / scale, pairs), norm, apply, clipped

    def _in_order(self, norms: Tensor, pairs: Pairs) -> Tensor:
        """``norms`` of the pairs as those of ``parameters``."""
        if len(pairs) == len(self.parameters):
            return norms
        found = dict(zip((p for p, _ in pairs), norms.unbind()))
        return torch.stack([found.get(p, norms.new_zeros(())) for p in self.parameters])

    def _reduce(self, sums: Sums, watch: Stopwatch) -> None:
        """Add gradients, losses and counts over the data-parallel ranks."""
        ranks = comm.world()
        if ranks == 1:
            return
        tensors = [*(gradient for _, gradient in self.gradients()), sums.loss, sums.total]
        for layer in sums.layers:
            if layer.routing is not None:
                layer.routing.entropy.div_(ranks)
                tensors += layer.routing[1:]  # everything but the balance loss, which ``total`` holds
            if layer.gate_H is not None:
                tensors.append(layer.gate_H.div_(ranks))
        before = self._mark()
        comm.sum_in_place(tensors)
        after = self._mark()
        self.waited = (before, after) if before is not None and after is not None else None
        watch.lap("communication")

    def _mark(self) -> torch.Event | None:
        """A mark in the queue of an accelerator."""
        if self.device.type == "cpu":
            return None
        mark = torch.Event(self.device, enable_timing=True)
        mark.record()
        return mark

    def _update_routing(self, layers: list[LayerStats], apply: Tensor) -> None:
        for index, moe in self.model.moe_layers().items():
            stats = layers[index].routing
            assert stats is not None
            moe.update(stats, apply)


def _add_layers(sums: list[LayerStats], new: list[LayerStats], share: float) -> list[LayerStats]:
    """``sums + new``: counts add up, means (entropy, gates) are weighted by ``share``. Everything is detached."""
    fresh = [_weighted(stats, share) for stats in new]
    before, flat = _flat(sums), _flat(fresh)
    if not before:
        return fresh
    added = iter(torch._foreach_add(before, flat))  # one kernel for hundreds of small tensors
    return [
        LayerStats(
            None if stats.routing is None else RoutingStats(*(next(added) for _ in stats.routing)),
            None if stats.gate_H is None else next(added),
        )
        for stats in fresh
    ]


def _weighted(stats: LayerStats, share: float) -> LayerStats:
    routing, gate = stats.routing, stats.gate_H
    if routing is not None:
        routing = RoutingStats(*(t.detach() for t in routing))
        routing = routing._replace(entropy=routing.entropy * share)
    return LayerStats(routing, None if gate is None else gate.detach() * share)


def _flat(layers: list[LayerStats]) -> list[Tensor]:
    """Every tensor, layer by layer."""
    return [
        t
        for layer in layers
        for t in [*(layer.routing or ()), *([] if layer.gate_H is None else [layer.gate_H])]
    ]


def _loads(layers: list[LayerStats]) -> list[Tensor]:
    """Per expert layer the share of the choices that fell on each expert ``[E]``."""
    chosen = [layer.routing.chosen_E for layer in layers if layer.routing is not None]
    if not chosen:
        return []
    chosen_LE = torch.stack(chosen)
    return list((chosen_LE / chosen_LE.sum(-1, keepdim=True).clamp(min=1)).unbind())


def _mean(values: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(values).mean() if values else torch.zeros_like(like)
