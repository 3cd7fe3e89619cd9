"""Pretraining: corpus → model → ``fit`` → checkpoints, from one config, resumable at any step (F51).

``plan`` says what will be done and why; here it is done.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deepseek.assemble import TRAINER, Run, build, load_weights
from deepseek.batch import Batch
from deepseek.config import replace, to_dict, to_toml
from deepseek.data import Loader, prepare
from deepseek.data.quarantine import FILE as QUARANTINE
from deepseek.data.quarantine import bring_forward, read_quarantine
from deepseek.dist import comm
from deepseek.errors import CheckpointError, ConfigError, RunError, TrainingError
from deepseek.events import JsonlSink, Sink, attached, emit
from deepseek.files import InUse, claimed, write_atomic
from deepseek.models import ModelConfig, count
from deepseek.ops.jit import compile_blocks
from deepseek.parallel.memory import activation_checkpoint
from deepseek.precision import lower
from deepseek.recipes import rollback
from deepseek.recipes.control import Controller, together
from deepseek.recipes.observe import Observer
from deepseek.recipes.plan import (
    EvaluateConfig,
    Plan,
    PretrainConfig,
    confirm_precision,
    derive,
    dry_run,
    held_out_shape,
    preset,
    read_config,
)
from deepseek.train import (
    Evaluation,
    Schedule,
    StepResult,
    Stop,
    TrainStep,
    build_optimizer,
    evaluate,
    fit,
    graphs,
    next_token_loss,
    seed_everything,
)
from deepseek.train.clip import build_clip
from deepseek.train.loop import Hook, NonFiniteGuard
from deepseek.weights import checkpoint
from deepseek.weights.checkpoint import Checkpointer

IMPORTED = "imported"  #: in the state of a checkpoint that ``recipes.import_model`` made
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
#: Options of a model that a resumed run may change: they guide training and leave the function as it is.
FREE_TO_CHANGE = (
    "max_length", "init_std", "moe.entropy_weight", "moe.bias_rate", "moe.bias_step", "moe.token_floor",
    "moe.default_decay", "moe.backend",
)  # fmt: skip


@dataclass(frozen=True)
class PretrainResult:
    """Where the run is, the last step done, whether that is the last one asked for, and the last evaluation."""

    run: Path
    step: int
    finished: bool
    evaluation: Evaluation | None


def pretrain(
    config: PretrainConfig,
    run: Path | str = "runs/pretrain",
    *,
    resume: Path | None = None,
    skip: tuple[int, int] | None = None,
    sinks: Sequence[Sink] = (),
    stop: Stop | None = None,
) -> PretrainResult:
    """Train ``config.model`` on ``config.data`` in the directory ``run``.

    Args:
        resume: the checkpoint to go on from; ``None`` starts a new run.
        skip: first and last step of the run so far whose batches are left out (``recipes.rollback``).
        sinks: who else hears the events (they are always kept in ``run/events.jsonl``).
        stop: ask it to end early; a checkpoint is written. SIGINT and SIGTERM ask, too.

    Raises:
        RunError: a new run would overwrite one that has checkpoints, or another process trains in ``run``.
        DeepseekError: everything else that can be wrong with config, data or disk.
    """
    rank, world = comm.start()
    path, stop = Path(run), stop or Stop()
    plan = derive(config)  # what cannot be used is refused before anything is read or written
    if config.train.cuda_graph:
        graphs.check_device(plan.device)
    with _alone(path) if rank == 0 else nullcontext():
        if resume is None:
            _check_new(path)
        own: list[Sink] = [JsonlSink(path / "events.jsonl", every=5), *sinks] if rank == 0 else []
        observer = Observer(config.monitor, path, rank, resumed=resume is not None)
        try:
            with attached(*own, *observer.sinks), stop.on_signals():
                return _Pretraining(config, path, rank, world, stop, observer).run(resume, skip)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise RunError(f"cannot write in {path}: {error.strerror}; its checkpoints are intact") from error


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Refuse a second process in the same run directory."""
    with ExitStack() as held:
        try:
            path.mkdir(parents=True, exist_ok=True)
            held.enter_context(claimed(path / TRAINER))
        except InUse as error:
            raise RunError(
                f"process {error} is training in {path}; wait for it, stop it, or choose another --run"
            ) from None
        except OSError as error:
            raise RunError(f"{path} cannot be a run directory: {error.strerror or error}") from None
        yield


def _check_new(path: Path) -> None:
    if checkpoint.list_checkpoints(path):
        raise RunError(
            f"{path} already has checkpoints; go on with `deepseek resume {path}`, or choose another --run"
        )
    if (path / "config.toml").exists() and not (path / "events.jsonl").exists():
        raise RunError(
            f"{path} has a config.toml that no run wrote, and it would be overwritten; choose another --run"
        )


def resume_run(
    run: Path | str,
    config: PretrainConfig | None = None,
    *,
    step: int | None = None,
    skip: tuple[int, int] | None = None,
    sinks: Sequence[Sink] = (),
    stop: Stop | None = None,
) -> PretrainResult:
    """Go on with a run from its newest checkpoint, or from ``step``, with its own config or a changed one.

    With ``skip``, the first and last of the steps whose batches are left out, from the newest checkpoint before them.
    """
    found = Run.open(run)
    config = config or read_config(found.config_path)
    at = rollback.resume_point(found.path, step, skip)
    return pretrain(config, found.path, resume=at, skip=skip, sinks=sinks, stop=stop)


class _Pretraining:
    """The parts of one run, in the order in which they come to be."""

    def __init__(
        self, config: PretrainConfig, path: Path, rank: int, world: int, stop: Stop, observer: Observer
    ) -> None:
        self.config, self.path, self.rank, self.world, self.stop = config, path, rank, world, stop
        self.observer = observer
        self.began = time.perf_counter()
        self.evaluation: Evaluation | None = None
        self.evaluated_at = -1

    def run(self, resume: Path | None, skip: tuple[int, int] | None) -> PretrainResult:
        seed_everything(self.config.train.seed, self.config.train.deterministic)
        self.corpus = prepare(self.config.data, self.config.data.cache or self.path.parent / ".corpora")
        found = checkpoint.load(resume) if resume is not None else None
        self.plan = derive(self.config, self.corpus.tokenizer.vocab_size, _embeddings(found))
        self.config = self.plan.config
        if found is not None:
            _check_ours(found)
            if found.step >= self.config.train.steps:
                return self._nothing_left(found.step)
        self.model = build(self.config.model, self.plan.device, self.config.train.seed)
        self.plan = confirm_precision(self.plan, self.model)
        # What was measured once is kept: a resumed run must not measure, and compute, something else.
        kept = replace(self.config.train, precision_mode=self.plan.policy.name)
        self.config = replace(self.config, train=kept)
        masters = lower(self.model, self.plan.policy)
        self.optimizer = build_optimizer(self.model, self.config.optim, masters)
        self.clip = build_clip(self.config.train.clip, self.config.train.grad_clip_threshold, self.model)
        self.optimizer.extras["clip"] = self.clip.state
        with self._loader() as self.loader:
            start = self._begin(found, skip)
            if self.rank == 0:
                self.corpus.tokenizer.save(self.path / "tokenizer")
            with self._written_config():
                self._announce(start)
                with Checkpointer(
                    self.path, self.config.checkpoint, rank=self.rank, world=self.world, parent=start or None
                ) as self.checkpointer:
                    done = self._fit(start)
        return PretrainResult(self.path, done, done >= self.config.train.steps, self.evaluation)

    @contextmanager
    def _written_config(self) -> Iterator[None]:
        """Write ``config.toml``; options that turn out to be unusable leave the one before in its place."""
        path = self.path / "config.toml"
        before = path.read_text(encoding="utf-8") if path.exists() else None
        if self.rank == 0:
            write_atomic(path, to_toml(self.config))
        try:
            yield
        except ConfigError:
            if self.rank == 0 and before is not None:
                write_atomic(path, before)
            raise

    def _nothing_left(self, step: int) -> PretrainResult:
        steps = self.config.train.steps
        if step > steps:
            raise RunError(
                f"{self.path} is at step {step} already, train.steps={steps} lies before it; give a larger "
                f"--train.steps, or go back with --from"
            )
        return PretrainResult(self.path, step, True, None)

    def _loader(self) -> Loader:
        length = self.config.train.length
        loader = self.corpus.loader(rows=self.plan.rows, length=length, rank=self.rank, world=self.world)
        loader.exclude(comm.from_first(read_quarantine(self.path / QUARANTINE)), missing_ok=True)
        return loader

    def _begin(self, found: checkpoint.Checkpoint | None, skip: tuple[int, int] | None) -> int:
        """The first step's number less one: of a new run, or where a resumed one goes on."""
        if found is not None:
            return self._go_to(found, rollback.resumed(self.path, found, skip) if skip else None)
        if self.rank == 0:
            rollback.forget(self.path)
            checkpoint.rewind(self.path, 0)
            bring_forward(self.path / QUARANTINE, 1)
        return 0

    def _go_to(self, found: checkpoint.Checkpoint, rewind: rollback.Rewind | None = None) -> int:
        """Take everything from a checkpoint, and leave out what is to be; the checkpoints after it are set aside."""
        if self.rank == 0 and rewind is not None:
            rollback.write_rewind(self.path, rewind)
        start = self._restore(found)
        self.loader.skip(comm.from_first(rollback.skips_of(self.path)))
        if self.rank == 0:
            checkpoint.rewind(self.path, start)
            bring_forward(self.path / QUARANTINE, start + 1)
            rollback.settle(self.path)
        self.evaluated_at = -1
        return start

    def _restore(self, found: checkpoint.Checkpoint) -> int:
        load_weights(self.model, found)
        _check_same_model(found, self.config.model)
        self.optimizer.load_master_state(found.model)
        if IMPORTED in found.state:
            emit("resume", found.step, path=found.path, imported=found.state[IMPORTED])
            return found.step
        self.optimizer.load_state_dict(found.optimizer)
        self.loader.load_state_dict(found.state["loader"])
        checkpoint.set_rng_state(found.state["rng"])
        before = found.state.get("probe")
        emit(
            "resume", found.step, path=found.path, previous_loss=found.state.get("loss"),
            probe_before=before, probe_after=self._probe() if before is not None else None,
        )  # fmt: skip
        return found.step

    def _announce(self, start: int) -> None:
        c, parameters = self.config, count.parameters(self.config.model)
        report = self.corpus.report
        emit(
            "run", start, run=self.path.name, directory=str(self.path), device=str(self.plan.device),
            dtype=self.plan.policy.name, parameters=parameters.total, active_parameters=parameters.active,
            flops_per_token=self.plan.flops_per_token, peak_flops=self.plan.peak_flops,
            peak_source=f"measured {self.plan.policy.name} matrix product", total_steps=c.train.steps,
            batch_tokens=c.train.batch_tokens, resumed_from=start or None,
            command=" ".join(["deepseek", *sys.argv[1:]]),
            corpus={"documents": len(self.corpus.train), "bytes": self.corpus.train.n_bytes,
                    "tokens": self.corpus.train.n_tokens, "seconds": report.get("seconds")},
            code_version=checkpoint.code_version(), derived=self.plan.derived,
            expert_layers=list(self.model.moe_layers()), **_process(),
        )  # fmt: skip

    def _fit(self, start: int) -> int:
        c = self.config
        activation_checkpoint(self.model, c.train.activation_checkpoint)
        if c.train.compile:
            compile_blocks(self.model.blocks)
        with Controller(self, self.observer.tracer.capture) as self.control:
            done = self._train(start)
            while (rewind := self.control.rewind) is not None and self.control.found is not None:
                start = self._go_to(self.control.found, rewind)
                self.checkpointer.parent = start
                self.control.rewound()
                done = self._train(start)
            self._end(start, done)
        return done

    def _train(self, start: int) -> int:
        """Train on from step ``start``; the last step done."""
        c = self.config
        step = TrainStep(
            self.model, partial(next_token_loss, z_weight=c.train.z_loss), self.optimizer, self.plan.policy,
            micro_rows=c.train.micro_rows, grad_clip=self.clip,
        )  # fmt: skip
        if c.train.cuda_graph:
            step = graphs.GraphedStep(step)
        schedule = Schedule(c.schedule, c.train.steps)
        self.observer.begin(
            step, self.loader, self.corpus.tokenizer, start, c.train.steps, flops_per_token=self.plan.flops_per_token,
            peak_flops=self.plan.peak_flops * self.world,
        )  # fmt: skip
        hooks: list[Hook] = [
            NonFiniteGuard(c.train.max_nonfinite),
            self.observer,
            self.control,
            self._after_step,
            self.observer.tracer,
        ]
        ceiling = self.plan.peak_flops * self.world / self.plan.flops_per_token
        done = fit(
            step, self.loader, schedule, steps=c.train.steps, start=start, hooks=hooks, stop=self.stop,
            peak_tokens_per_second=ceiling,
        )  # fmt: skip
        self.observer.end()
        self.observer.tracer.finish()
        return done

    def _end(self, start: int, done: int) -> None:
        c = self.config
        if done < c.train.steps:
            emit("interrupted", done, signal=self.stop.reason)
            self.save(done, self.last, wait=True)
        elif start < done:
            self._evaluate(done, everything=True)
            if self.evaluation is not None and not math.isfinite(self.evaluation.loss):
                raise TrainingError(
                    f"the weights after step {done} give a held-out loss of {self.evaluation.loss}; no checkpoint was "
                    "written. Lower optim.lr, or resume from an earlier checkpoint with --from"
                )
            self.save(done, self.last, wait=True)
            emit("done", done, seconds=time.perf_counter() - self.began)

    def _after_step(self, step: int, result: StepResult) -> None:
        self.last = result
        c = self.config
        if step == c.train.steps or self.stop.agreed:
            return  # the end of ``_fit`` does it
        if c.evaluate.every and step % c.evaluate.every == 0:
            self._evaluate(step)
        if c.checkpoint.every and step % c.checkpoint.every == 0:
            self.save(step, result)

    def _evaluate(self, step: int, everything: bool = False) -> None:
        if self.corpus.held_out is None:
            return
        emit("busy", step, what="evaluation")
        tokens = 0 if everything else self.config.evaluate.tokens
        self.evaluation = evaluate(self.model, self._held_out(), self.plan.policy, tokens=tokens)
        self.evaluated_at = step
        emit("evaluate", step, **asdict(self.evaluation))

    def _held_out(self) -> Iterator[Batch]:
        rows, length = held_out_shape(self.config)
        rows = -(-rows // self.world) * self.world
        return self.corpus.eval_batches(rows=rows, length=length, rank=self.rank, world=self.world)

    def _probe(self) -> float | None:
        """Loss on the first held-out batch: the same number before an interruption and after it."""
        if self.corpus.held_out is None:
            return None
        return evaluate(self.model, itertools.islice(self._held_out(), 1), self.plan.policy).loss

    def save(self, step: int, result: StepResult, wait: bool = False) -> None:
        state = {
            "loader": self.loader.state_dict(), "rng": checkpoint.rng_state(), "config": to_dict(self.config),
            "loss": float(result.loss), "world": self.world, "probe": self._probe() if wait else None,
        }  # fmt: skip
        tensors = {
            "model": self.optimizer.master_state(self.model.state_dict()), "optimizer": self.optimizer.state_dict()
        }  # fmt: skip
        metric = self.evaluation.bits_per_byte if self.evaluation and self.evaluated_at == step else None
        save = partial(self.checkpointer.save, step, tensors=tensors, state=state, metric=metric, wait=wait)
        together(save)  # no rank goes on before it is written, and none waits for one that could not write


def _embeddings(found: checkpoint.Checkpoint | None) -> int:
    """Rows of the embedding in a checkpoint, which a resumed run keeps; 0 where there is none."""
    rows = found.model.get("embedding.weight") if found is not None else None
    return 0 if rows is None else rows.shape[0]


def _check_ours(found: checkpoint.Checkpoint) -> None:
    if IMPORTED in found.state:
        return  # weights alone: training begins
    if missing := {"loader", "rng"} - found.state.keys():
        raise CheckpointError(f"{found.path} was not made by pretraining: its state lacks {sorted(missing)}")


def _check_same_model(found: checkpoint.Checkpoint, model: ModelConfig) -> None:
    """A resumed run keeps the function it has been training: refuse changes that alter no shape and yet the model."""
    before, now = _flat(found.state.get("config", {}).get("model", {})), _flat(to_dict(model))
    changed = [k for k in before if k not in FREE_TO_CHANGE and k in now and before[k] != now[k]]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"model.{key} was {before[key]!r} when {found.path.name} was made and is {now[key]!r} now: a resumed run "
            "keeps its model; start a new run for another"
        )


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host_cpu": f"{os.cpu_count()} × {platform.machine()}",
            "threads": torch.get_num_threads(), "torch": torch.__version__}  # fmt: skip


__all__ = [
    "EvaluateConfig", "Plan", "PretrainConfig", "PretrainResult", "derive", "dry_run", "preset", "pretrain",
    "read_config", "resume_run",
]  # fmt: skip
