"""The experts of a model on a held-out batch: who works, who does not, and who does the same as another.

Two experts are the same if they answer alike, whatever the order of their hidden units: all experts of a layer answer
one sample of tokens, and the answers are compared. Equal weights are looked for as well.

Shape letters: B rows, T positions, N tokens, E experts, K experts per token, S sampled tokens, C hidden size, F expert
size.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepseek.batch import Batch
from deepseek.models import Transformer
from deepseek.monitor.inspect.examine import cosines, evaluating
from deepseek.monitor.inspect.suspects import Suspect, duplicate_score
from deepseek.nn.layers import widen
from deepseek.nn.moe import MoE, chosen_mask, coverage, max_violation
from deepseek.ops.experts import swiglu

SAMPLE = 128  #: tokens that every expert of a layer answers
DEAD_SHARE = 0.05  #: an expert with less than this share of the mean load counts as dead
LOUD = 20.0  #: … and so does one that answers this many times more quietly than the middle expert


@dataclass(frozen=True)
class LayerExperts:
    """The experts of one layer; tensors on the CPU.

    Attributes:
        index: the block. choices: how many were made, K for every token.
        load: share of the choices, ``[E]``, sums to one. confidence: mean gate of the tokens that chose the expert.
        entropy: mean entropy of the router's distribution, nats; ``log E`` is the largest.
        coverage: Σ min(load, 1/E). max_vio: (largest load − mean) / mean. dead: how many experts nobody chose.
        output_norm: root mean square of each expert's answers to the sample, ``[E]``.
        outputs, weights: cosine similarities of the answers (less their mean over tokens) and the weights, ``[E, E]``.
    """

    index: int
    choices: int
    load: Tensor
    confidence: Tensor
    entropy: float
    coverage: float
    max_vio: float
    dead: int
    output_norm: Tensor
    outputs: Tensor
    weights: Tensor

    def to_dict(self) -> dict[str, Any]:
        """JSON, an object per expert; ``twin`` is the most similar other expert."""
        alike = torch.maximum(self.outputs, self.weights).fill_diagonal_(-1.0)
        similarity, twin = alike.max(1)
        return {
            "index": self.index,
            "choices": self.choices,
            "entropy": self.entropy,
            "entropy_share": self.entropy / math.log(len(self.load)) if len(self.load) > 1 else 0.0,
            "coverage": self.coverage,
            "max_vio": self.max_vio,
            "dead": self.dead,
            "load": self.load.tolist(),
            "experts": [
                {
                    "load": float(self.load[e]),
                    "confidence": float(self.confidence[e]),
                    "output_norm": float(self.output_norm[e]),
                    "similarity": float(similarity[e]) if len(self.load) > 1 else 0.0,
                    "twin": int(twin[e]) if len(self.load) > 1 else None,
                }
                for e in range(len(self.load))
            ],
        }


@torch.no_grad()
def examine_experts(
    model: Transformer, batch: Batch, *, sample: int = SAMPLE, rows: int = 8
) -> list[LayerExperts]:
    """One forward pass over ``batch`` (on the model's device), and a sample of its tokens through every expert."""
    seen: dict[int, list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {i: [] for i in model.moe_layers()}

    def hook(index: int) -> Any:
        def keep(module: MoE, args: tuple[Any, ...], routing: Any) -> None:
            x_NC, valid = args[0], args[1] if len(args) > 1 else None
            ok = torch.ones(len(x_NC), dtype=torch.bool, device=x_NC.device) if valid is None else valid
            gate = routing.gate_A[: routing.expert_NK.numel()].view_as(routing.expert_NK)
            take = x_NC[ok][:: max(1, int(ok.sum()) * -(-batch.rows // rows) // sample)]
            seen[index].append((routing.expert_NK[ok], routing.probs_NE[ok], gate[ok], take))

        return keep

    with ExitStack() as hooks, evaluating(model):
        for index, moe in model.moe_layers().items():
            hooks.callback(moe.router.register_forward_hook(hook(index)).remove)
        for part in batch.split(rows):
            model(part.tokens, part.documents, part.positions)
        return [_layer(i, moe, *map(torch.cat, zip(*seen[i]))) for i, moe in model.moe_layers().items()]


def _layer(
    index: int, moe: MoE, expert_NK: Tensor, probs_NE: Tensor, gate_NK: Tensor, x_SC: Tensor
) -> LayerExperts:
    experts = moe.config.experts
    chosen_E = chosen_mask(expert_NK, experts).sum(0).float()
    load = chosen_E / chosen_E.sum().clamp(min=1)
    entropy = -torch.xlogy(probs_NE, probs_NE).sum(-1).mean()
    gates = torch.zeros(experts, device=load.device).index_add_(
        0, expert_NK.flatten().long(), gate_NK.flatten().float()
    )
    answers = expert_answers(moe, x_SC)
    centred = (answers - answers.mean(1, keepdim=True)).flatten(1)
    return LayerExperts(
        index, expert_NK.numel(), load.cpu(), (gates / chosen_E.clamp(min=1)).cpu(), float(entropy),
        float(coverage(load)), float(max_violation(load)), int((chosen_E == 0).sum()),
        answers.square().mean((1, 2)).sqrt().cpu(), cosines(centred @ centred.T).cpu(), _weights(moe).cpu(),
    )  # fmt: skip


def expert_answers(moe: MoE, x_SC: Tensor) -> Tensor:
    """What every expert would answer to every token of a sample: ``[E, S, C]``, fp32 at least, without gates."""
    x = widen(x_SC)
    pairs = zip(moe.gate_up, moe.down)
    with torch.autocast(x.device.type, enabled=False):
        return torch.stack([swiglu(x @ w_in.to(x.dtype)) @ w_out.to(x.dtype) for w_in, w_out in pairs])


def _weights(moe: MoE) -> Tensor:
    """The smaller of the cosines of both matrices, ``[E, E]``."""
    flat = [w.flatten(1).float() for w in (moe.gate_up, moe.down)]
    first, second = (cosines(w @ w.T) for w in flat)
    return torch.minimum(first, second)


def suspect_experts(layers: list[LayerExperts]) -> list[Suspect]:
    """Experts that are dead, mute or a copy of another, worst first; a score of 1 is where suspicion begins."""
    found = [suspect for layer in layers for suspect in (*_dead(layer), *_doubles(layer))]
    best: dict[tuple[int, int | None], Suspect] = {}
    for suspect in sorted(found, key=lambda s: -s.score):
        best.setdefault((suspect.layer, suspect.expert), suspect)
    return list(best.values())


def _dead(layer: LayerExperts) -> list[Suspect]:
    experts, middle, found = len(layer.load), float(layer.output_norm.median()), []
    floor = (
        0.25 * experts / max(layer.choices, 1)
    )  # an expert that nobody chose: as if a quarter of a token had
    for e in range(experts):
        share, norm = float(layer.load[e]) * experts, float(layer.output_norm[e])
        if share < DEAD_SHARE:
            score = math.log(max(share, floor)) / math.log(DEAD_SHARE)
            why = f"dead: it answers {share:.1%} of the tokens that a mean expert answers"
            found.append(Suspect(layer.index, None, e, "dead", score, why))
        elif norm < middle / LOUD:
            score = math.log(max(norm, middle * 1e-6) / middle) / math.log(1 / LOUD)
            why = f"mute: its answers have a size of {norm:.3g}, the middle expert's {middle:.3g}"
            found.append(Suspect(layer.index, None, e, "dead", score, why))
    return found


def _doubles(layer: LayerExperts) -> list[Suspect]:
    alike = torch.maximum(layer.outputs, layer.weights).clone().fill_diagonal_(-1.0)
    if len(alike) < 2:
        return []
    found = []
    for e, (similarity, twin) in enumerate(zip(*(t.tolist() for t in alike.max(1)))):
        score = duplicate_score(similarity)
        if score >= 1:
            why = f"duplicated: its answers and those of expert {twin} have a cosine of {similarity:.4f}"
            found.append(Suspect(layer.index, None, e, "duplicated", score, why))
    return found
