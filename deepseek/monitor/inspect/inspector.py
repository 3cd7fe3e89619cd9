"""``Inspector``: everything there is to see in a run's model, as JSON-able dicts, computed here and kept.

It opens any checkpoint of a run, also while the run goes on, or a Hugging Face directory; looks at it with held-out
text; and remembers what it found. One lock lets one question be answered at a time, from any thread. Nothing is sent
anywhere.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deepseek import assemble
from deepseek.assemble import Run
from deepseek.errors import ConfigError, RunError, did_you_mean
from deepseek.models import ModelConfig, count
from deepseek.monitor.inspect import trace
from deepseek.monitor.inspect.ablate import Mode, ablate, ablate_all
from deepseek.monitor.inspect.attention_map import attention_map
from deepseek.monitor.inspect.examine import examine
from deepseek.monitor.inspect.experts import examine_experts, suspect_experts
from deepseek.monitor.inspect.head_table import KINDS, head_table, plain
from deepseek.monitor.inspect.held_out import TOKENS, held_out
from deepseek.monitor.inspect.histograms import activation_histograms, weight_histograms
from deepseek.monitor.inspect.opened import Opened, written
from deepseek.monitor.inspect.updates import checkpoint_updates, recorded_updates
from deepseek.monitor.inspect.view import branches_of
from deepseek.weights import checkpoint
from deepseek.weights.convert import read_config

Answer = dict[str, Any]

OPEN = 2  #: checkpoints that are kept in memory
GRADIENT_PARAMETERS = 4_000_000_000  #: larger models are looked at without the backward pass


class Inspector:
    """The model of a run, opened to be looked into.

    Args:
        run: a run directory, one checkpoint of it, or a Hugging Face directory.
        text: a UTF-8 file to look with, instead of the run's held-out documents.
        tokens: how many positions the figures are taken over. length: positions of a row; 0: the run's, at most 512.
        device: where to compute.

    Raises:
        RunError: there is nothing at ``run``. Every method raises a ``DeepseekError`` for what does not exist.
    """

    def __init__(
        self,
        run: Path | str,
        text: Path | str | None = None,
        *,
        tokens: int = TOKENS,
        length: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.path, self.text, self.device = Path(run), text, torch.device(device)
        self.tokens, self.length = tokens, length
        self._only: int | None = None
        if not (self.path / "config.json").is_file():
            self._open_run()
        self._lock = threading.RLock()
        self._opened: OrderedDict[tuple[str, int], Opened] = OrderedDict()

    @classmethod
    def open(cls, run: Path | str, step: int | None = None, **options: Any) -> Inspector:
        """An inspector that has already loaded ``step`` (the newest by default)."""
        inspector = cls(run, **options)
        inspector._at(step)
        return inspector

    def _open_run(self) -> None:
        if (self.path / "monitor").is_dir() and not (self.path / "config.toml").is_file():
            return  # somebody's own loop: it may have traces, and says what it lacks when asked for more
        if self.path.name.startswith("step-") and (self.path.parent / "config.toml").is_file():
            self._only = checkpoint.load(self.path, groups=()).step
            self.path = self.path.parent
        self.path = Run.open(self.path).path

    @property
    def is_run(self) -> bool:
        return (self.path / "config.toml").is_file()

    def steps(self) -> list[int]:
        """The steps of the run's checkpoints, ascending; empty for a Hugging Face directory."""
        return [int(p.name.split("-")[1].split(".")[0]) for p in checkpoint.list_checkpoints(self.path)]

    def overview(self) -> Answer:
        """Checkpoints and layers, without loading the model."""
        config = self._config()
        return {
            "steps": self.steps() if self.is_run else [],
            "parameters": count.parameters(config).total,
            "max_length": config.max_length,
            "layers": [
                {
                    "index": i,
                    "kind": KINDS[kind],
                    "heads": config.attention.heads,
                    "kv_heads": config.attention.kv_heads,
                    "experts": config.moe.experts if ffn == "E" else 0,
                    "window": config.attention.window if kind in "LH" else None,
                    "branches": {"F": ["full"], "L": ["window"], "H": ["", "window", "pooled"]}[kind],
                }
                for i, (kind, ffn) in enumerate(zip(config.kinds, config.ffn_kinds))
            ],
            "traces": len(trace.list_traces(self.path)),
        }

    def heads(self, step: int | None = None) -> Answer:
        """Every head's figures, z-scores, reasons and rank, and the same for experts.

        ``layers``: per layer its heads; ``suspects``: heads with a score of 1 or more; ``ranking``: the ten highest;
        ``experts`` and ``suspects_experts``: see ``experts``.
        """
        with self._lock:
            opened = self._at(step)
            found: Answer = opened.once("heads", lambda: self._heads(opened))
            return {**found, **self.experts(step)}

    def experts(self, step: int | None = None) -> Answer:
        """Per expert layer load, entropy, coverage, dead and duplicated experts; empty for a dense model."""
        with self._lock:
            opened = self._at(step)
            return opened.once("experts", lambda: self._experts(opened))

    def suspects(self, step: int | None = None) -> list[Answer]:
        """Suspect heads and experts together, worst first."""
        found = self.heads(step)
        return sorted([*found["suspects"], *found["suspects_experts"]], key=lambda s: -s["score"])

    def attention(
        self,
        layer: int,
        head: int,
        step: int | None = None,
        start: int = 0,
        size: int | None = None,
        pixels: int = 512,
        branch: str = "",
    ) -> Answer:
        """What one head looks at in one long row of held-out text; see ``AttentionMap.to_dict``.

        Adds ``tokens`` (id and text of each position shown), ``length`` of the row, ``layer`` and ``head``.
        """
        with self._lock:
            opened = self._at(step)
            view = opened.view(layer)
            found = attention_map(view, head, branch=branch, start=start, size=size, pixels=pixels)
            return {
                **found.to_dict(),
                "layer": layer,
                "head": head,
                "step": opened.loaded.step,
                "length": view.length,
                "tokens": opened.tokens(found.start, found.size),
                "branches": list(branches_of(view.attention)),
            }

    def ablate(
        self,
        layer: int,
        head: int | None = None,
        expert: int | None = None,
        mode: Mode = "zero",
        step: int | None = None,
    ) -> Answer:
        """The loss without one head or one expert; see ``Ablation``."""
        with self._lock:
            opened = self._at(step)
            key = f"ablate {layer} {head} {expert} {mode}"
            return opened.once(
                key, lambda: ablate(opened.replay(), layer, head=head, expert=expert, mode=mode).to_dict()
            )

    def ablate_all(
        self,
        step: int | None = None,
        mode: Mode = "zero",
        progress: Callable[[int, int], None] | None = None,
        experts: bool = True,
    ) -> Answer:
        """Every head (and expert) taken out in turn: ``{parts: [Ablation …]}``, the most harmful part first."""
        with self._lock:
            opened = self._at(step)

            def work() -> Answer:
                found = ablate_all(opened.replay(), mode=mode, experts=experts, progress=progress)
                return {"parts": [a.to_dict() for a in sorted(found, key=lambda a: a.delta)]}

            return opened.once(f"ablate_all {mode} {experts}", work)

    def histograms(self, step: int | None = None) -> Answer:
        """``{layers: [{index, activations: {residual, attention, feed-forward}, weights: {name: …}}]}``."""
        with self._lock:
            opened = self._at(step)
            return opened.once("histograms", lambda: self._histograms(opened))

    def updates(self) -> Answer:
        """How fast each layer's weights move: between checkpoints, and as recorded step by step."""
        with self._lock:
            if not self.is_run:
                return {"checkpoints": [], "recorded": {}}
            names = [name for name, _ in self._at(None).loaded.model.named_parameters()]
            found = {
                "checkpoints": checkpoint_updates(self.path, names),
                "recorded": recorded_updates(self.path),
            }
            return plain(found)

    def traces(self) -> list[Answer]:
        """The verdicts of the run's recorded traces, newest first."""
        return trace.list_traces(self.path)

    def trace(self, key: str, form: str = "speedscope") -> Answer:
        """One trace: ``speedscope`` (its file format) or ``verdict``."""
        path = trace.trace_file(self.path, key, form)
        if path.suffix != ".json":
            raise ConfigError(f"the form '{form}' is a file for other programs: {path}")
        return json.loads(path.read_text(encoding="utf-8"))

    def trace_file(self, key: str, form: str = "chrome") -> Path:
        """Where one trace lies on the disk."""
        return trace.trace_file(self.path, key, form)

    # --- how ------------------------------------------------------------------------------------------------------

    def _config(self) -> ModelConfig:
        if (self.path / "config.json").is_file():
            return read_config(self.path)
        return Run.open(self.path).model_config()

    def _at(self, step: int | None) -> Opened:
        """The checkpoint of ``step``, loaded; the newest one by default."""
        step = self._which(step)
        path = self.path if step is None else self._checkpoint(step)
        key = str(path), written(path)
        if key not in self._opened:
            loaded = assemble.load(path, self.device)
            held = held_out(loaded, self.text, self.tokens, self.length)
            self._opened[key] = Opened(loaded, held, self.text)
            while len(self._opened) > OPEN:
                self._opened.popitem(last=False)
        self._opened.move_to_end(key)
        return self._opened[key]

    def _which(self, step: int | None) -> int | None:
        """The step that is meant; ``None`` for a directory that has one model and no steps."""
        if (self.path / "config.json").is_file():
            if step is not None:
                raise RunError(f"{self.path} is no run: it has one model and no step {step}")
            return None
        Run.open(self.path)
        steps = self.steps()
        if not steps:
            raise RunError(
                f"{self.path} has no checkpoint yet; the first comes with checkpoint.every, or at the end"
            )
        if step is None:
            step = steps[-1] if self._only is None else self._only
        if step not in steps:
            near = did_you_mean(str(step), map(str, steps))
            raise RunError(f"{self.path} has no checkpoint of step {step}{near}; it has {steps}")
        return step

    def _checkpoint(self, step: int) -> Path:
        paths = checkpoint.list_checkpoints(self.path)
        return next(p for p in paths if int(p.name.split("-")[1].split(".")[0]) == step)

    def _heads(self, opened: Opened) -> Answer:
        model = opened.loaded.model
        small = sum(p.numel() for p in model.parameters()) <= GRADIENT_PARAMETERS
        loss, layers = examine(model, opened.batch, gradient=small)
        of = {
            "step": opened.loaded.step,
            "loss": loss,
            "tokens": opened.batch.n_targets,
            "text": opened.held.source,
        }
        return plain({**of, **head_table(layers)})

    def _experts(self, opened: Opened) -> Answer:
        layers = examine_experts(opened.loaded.model, opened.batch)
        suspects = [s.to_dict() for s in suspect_experts(layers)]
        return plain({"experts": [layer.to_dict() for layer in layers], "suspects_experts": suspects})

    def _histograms(self, opened: Opened) -> Answer:
        model = opened.loaded.model
        pairs = zip(activation_histograms(model, opened.batch), weight_histograms(model))
        layers = [{"index": i, "activations": a, "weights": w} for i, (a, w) in enumerate(pairs)]
        return plain({"step": opened.loaded.step, "layers": layers})
