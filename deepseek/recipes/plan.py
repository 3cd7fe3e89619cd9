"""What a pretraining run is asked to do, and what it will do: ``derive`` fills in every open value and says why."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deepseek.assemble import pick_device
from deepseek.config import configclass, from_dict, load_toml, replace
from deepseek.data import DataConfig
from deepseek.dist import comm
from deepseek.errors import ConfigError, did_you_mean
from deepseek.models import PRESETS, ModelConfig, Transformer, count, model_config
from deepseek.models.config import tiny
from deepseek.monitor.config import MonitorConfig
from deepseek.parallel.memory import kept_share
from deepseek.parallel.plan import ParallelConfig, check_layout
from deepseek.precision import Policy, choose, matmul_flops
from deepseek.train import OptimConfig, ScheduleConfig, TrainingConfig
from deepseek.train.probe import fastest
from deepseek.weights.checkpoint import CheckpointConfig

TOKENS_PER_PARAMETER = 20  #: the compute-optimal ratio of arXiv 2203.15556, for runs that name no length
VOCABULARY_MULTIPLE = 64  #: matmuls like round sizes; the ids above the tokenizer's are never targets
POINTS, LONG = (
    10,
    200,
)  #: checkpoints in a run whose config names no interval, and the steps that make it worth them


@configclass
class EvaluateConfig:
    """Held-out evaluation: every so many steps and at the end."""

    every: int = 0  # steps; 0: only at the end
    tokens: int = 0  # held-out tokens per evaluation while training; 0: all. The last one always takes all
    length: int = 0  # positions per row; 0: train.length

    def check(self) -> None:
        if self.every < 0 or self.tokens < 0 or self.length < 0 or self.length == 1:
            raise ConfigError(
                f"evaluate.every={self.every} and evaluate.tokens={self.tokens} must not be negative, "
                f"evaluate.length={self.length} 0 or at least 2"
            )


@configclass
class PretrainConfig:
    """Everything a pretraining run depends on; ``config.toml`` in a run directory is this, printed."""

    model: ModelConfig = tiny()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    parallel: ParallelConfig = ParallelConfig()
    monitor: MonitorConfig = MonitorConfig()


def read_config(path: Path | str) -> PretrainConfig:
    """A TOML file, whose ``[model]`` may start from a preset, as a config."""
    values = load_toml(path)
    table = values.pop("model", {"preset": "tiny"})
    if not isinstance(table, dict):
        raise ConfigError("model must be a table of options")
    return replace(from_dict(PretrainConfig, values), model=model_config(table))


def preset(name: str) -> PretrainConfig:
    """A whole run by the name of its model; ``tiny`` comes with the settings that its study found best (LOG.md)."""
    if name not in PRESETS:
        raise ConfigError(
            f"unknown preset {name!r}{did_you_mean(name, PRESETS)}; one of {', '.join(PRESETS)}"
        )
    config = PretrainConfig(model=PRESETS[name]())
    if name != "tiny":
        return replace(config, data=replace(config.data, vocab_size=config.model.vocab_size))
    return replace(
        config,
        data=replace(config.data, vocab_size=2048),
        evaluate=EvaluateConfig(length=1024),
        optim=replace(config.optim, lr=6e-3, embedding_lr=4.0, momentum=0.9, newton_schulz_steps=3),
        schedule=replace(config.schedule, warmup=0.03, floor=0.05),
        train=replace(config.train, batch_tokens=2048, length=256),
    )


@dataclass(frozen=True)
class Plan:
    """What will be done: the config with every derived value filled in, and ``(name, value, why)`` for each."""

    config: PretrainConfig
    device: torch.device
    policy: Policy
    flops_per_token: float
    peak_flops: float
    derived: list[tuple[str, str, str]]

    @property
    def rows(self) -> int:
        """Rows of the global batch."""
        return self.config.train.batch_tokens // self.config.train.length


def derive(config: PretrainConfig, vocab_size: int | None = None, embeddings: int = 0) -> Plan:
    """Fill in what the config leaves open.

    Args:
        vocab_size: the tokenizer's, once there is one.
        embeddings: ids that the model has already, of a run that is resumed: they stay, if they are enough.
    """
    derived: list[tuple[str, str, str]] = []

    def note(name: str, value: Any, why: str) -> Any:
        derived.append((name, f"{value:,}" if isinstance(value, int) else str(value), why))
        return value

    model, train, world = config.model, config.train, comm.world()
    vocab = -(-(vocab_size or config.data.vocab_size) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    if embeddings >= (vocab_size or vocab):
        note("model.vocab_size", vocab := embeddings, "as the checkpoint has it")
    else:
        note("model.vocab_size", vocab, f"the tokenizer's {vocab_size or config.data.vocab_size:,}, rounded up to "
             f"a multiple of {VOCABULARY_MULTIPLE}")  # fmt: skip
    model = replace(model, vocab_size=vocab, max_length=max(model.max_length, train.length))
    check_layout(config.parallel, model, world)
    device = pick_device(train.device)
    policy = comm.from_first(choose(train.precision_mode, device, train.loss_scaling_factor, training=True))
    note("device", device, "the accelerator, if there is one" if train.device == "auto" else "as configured")
    note("precision", policy.name, policy.reason)

    if train.batch_tokens % train.length:
        raise ConfigError(
            f"train.batch_tokens={train.batch_tokens} is not a multiple of train.length={train.length}; "
            f"try {train.batch_tokens // train.length * train.length}"
        )
    rows = note("rows per step", train.batch_tokens // train.length, "train.batch_tokens / train.length")
    micro = train.micro_rows or comm.from_first(_micro_rows(model, train, policy, device, -(-rows // world)))
    note(
        "train.micro_rows",
        micro,
        f"{-(-rows // world // micro)} forward passes a step on each of {world} ranks",
    )
    parameters = count.parameters(model)
    steps = train.steps
    if not steps:
        tokens = train.tokens or TOKENS_PER_PARAMETER * parameters.active
        why = "train.tokens" if train.tokens else f"{TOKENS_PER_PARAMETER} tokens per active parameter"
        steps = note("train.steps", max(1, round(tokens / train.batch_tokens)), f"{why} / train.batch_tokens")
    checkpoint = config.checkpoint
    if checkpoint.every is None:
        why = f"{POINTS} points to go back to; none in a run of fewer than {LONG} steps"
        every = note("checkpoint.every", -(-steps // POINTS) if steps >= LONG else 0, why)
        checkpoint = replace(checkpoint, every=every)
    per_token = count.flops(model, train.length).per_token
    note("parameters", parameters.total, f"{parameters.active:,} active per token")
    note("FLOPs per token", round(per_token), "forward and backward, causal attention as half")
    note("tokens", steps * train.batch_tokens, f"{steps:,} steps × {train.batch_tokens:,} positions")
    peak = matmul_flops(device.type, policy.dtype)
    note(
        "peak",
        f"{peak / 1e9:,.0f} GFLOP/s",
        f"a {policy.name} matrix product on this {device.type}, measured now",
    )
    train = replace(train, steps=steps, micro_rows=micro)
    config = replace(config, model=model, train=train, checkpoint=checkpoint)
    return Plan(config, device, policy, per_token, peak, derived)


def confirm_precision(plan: Plan, model: Transformer) -> Plan:
    """'auto' on a CPU that multiplies fast in bf16: let the model's own step decide. Other plans stay as they are."""
    train, policy = plan.config.train, plan.policy
    if (
        train.precision_mode != "auto"
        or plan.device.type != "cpu"
        or policy.name == "fp32"
        or comm.world() > 1
    ):
        return plan
    policy = fastest(model, [policy, choose("fp32", plan.device)], train.micro_rows, train.length)
    derived = [*plan.derived, ("precision", policy.name, policy.reason)]
    peak = matmul_flops(plan.device.type, policy.dtype)
    return dataclasses.replace(plan, policy=policy, peak_flops=peak, derived=derived)


def _micro_rows(
    model: ModelConfig, train: TrainingConfig, policy: Policy, device: torch.device, rows: int
) -> int:
    """As many rows as fit the activation budget: a power of two, or all."""
    budget = train.memory_budget * 2**30
    if device.type == "cuda":
        budget = 0.6 * torch.cuda.mem_get_info(device)[0]
    size = 2 if policy.dtype != torch.float32 else 4
    kept, fits = kept_share(train.activation_checkpoint, model.layers), 1
    while fits < rows and _micro_bytes(model, 2 * fits, train.length, size, kept) <= budget:
        fits *= 2
    return min(fits, rows)


def _micro_bytes(model: ModelConfig, rows: int, length: int, size: int, kept: float) -> int:
    held = count.memory(model, rows, length, compute_bytes=size)
    return round(kept * held["activations"]) + held["logits"]


def held_out_shape(config: PretrainConfig) -> tuple[int, int]:
    """Rows and positions per held-out batch: about the positions of a training micro-batch."""
    length = config.evaluate.length or config.train.length
    return max(1, max(1, config.train.micro_rows) * config.train.length // length), length


def dry_run(config: PretrainConfig) -> dict[str, Any]:
    """What a run would cost, without reading the corpus or building the model."""
    plan = derive(config)
    c, parameters = plan.config, count.parameters(plan.config.model)
    size = 2 if plan.policy.dtype != torch.float32 else 4
    return {
        "parameters": asdict(parameters),
        "flops_per_token": plan.flops_per_token,
        "tokens": c.train.steps * c.train.batch_tokens,
        "steps": c.train.steps,
        "total_flops": plan.flops_per_token * c.train.steps * c.train.batch_tokens,
        "memory_bytes": count.memory(
            c.model, c.train.micro_rows, c.train.length, c.optim.name, compute_bytes=size
        ),
        "cache_bytes_at_max_length": count.cache_bytes(c.model, c.model.max_length),
        "peak_flops": plan.peak_flops,
        "seconds_at_40_percent_mfu": plan.flops_per_token * c.train.steps * c.train.batch_tokens
        / (0.4 * plan.peak_flops),
    }  # fmt: skip
