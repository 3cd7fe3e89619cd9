"""LoRA adapters (arXiv 2106.09685) chosen per request: ``y += scale · (x Aᵀ) Bᵀ`` on the rows that asked for one.

``load_adapter`` reads a directory that ``peft`` wrote (``adapter_config.json``, ``adapter_model.safetensors``), with
the module names of Hugging Face's models or of ours. ``AdapterBank`` holds several on the device. A step first sorts
its rows by adapter, once (``bank.rows``); each linear layer then adds to the rows of each adapter (``bank.add``). Rows
without one are not touched: their bits are those of the plain model.

Refused with the name of what is in the way: adapters of embeddings, heads, routers and experts, DoRA, biases, whole
modules saved beside the adapter, and starts that change the base model's own weights (PiSSA, OLoRA, CorDA, LoftQ).

Shape letters: N rows, C inputs, F outputs of a layer, R rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepseek.errors import ConfigError, RequestError, WeightsError, did_you_mean
from deepseek.models import ModelConfig
from deepseek.ops.packed_linear import PackedLinear, pack_linear
from deepseek.weights.hf_files import read_json

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAYER = re.compile(r"(?:model\.)?(?:layers|blocks)\.(\d+)\.(.+)")
#: Their module → ours and which half of it.
MODULES: dict[str, tuple[str, int]] = {
    "self_attn.q_proj": ("query", 0),
    "self_attn.k_proj": ("key", 0),
    "self_attn.v_proj": ("value", 0),
    "self_attn.o_proj": ("output", 0),
    "mlp.gate_proj": ("gate_up", 0),
    "mlp.up_proj": ("gate_up", 1),
    "mlp.down_proj": ("down", 0),
    "attention.query": ("query", 0),
    "attention.key": ("key", 0),
    "attention.value": ("value", 0),
    "attention.output": ("output", 0),
    "ffn.gate_up": ("gate_up", 0),
    "ffn.down": ("down", 0),
}
NAMES = ("query", "key", "value", "output", "gate_up", "down")  #: what ``AdapterBank.add`` takes
#: Options of ``adapter_config.json`` that must be off, and values of ``init_lora_weights`` that change the base model.
MUST_BE_OFF = (
    "use_dora", "fan_in_fan_out", "lora_bias", "modules_to_save", "layer_replication", "trainable_token_indices",
    "target_parameters", "use_qalora", "alora_invocation_tokens",
)  # fmt: skip
CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


class Delta(NamedTuple):
    """One low-rank change: ``scale · B A`` on the outputs of a linear layer from ``first`` on."""

    down_RC: Tensor
    up_FR: Tensor
    scale: float
    first: int


@dataclass(frozen=True)
class Adapter:
    """What a directory holds: the changes by layer and linear layer (one of ``NAMES``), on the CPU as stored."""

    path: str
    deltas: Mapping[tuple[int, str], tuple[Delta, ...]]

    @property
    def rank(self) -> int:
        """The largest rank of any layer."""
        return max((d.down_RC.shape[0] for group in self.deltas.values() for d in group), default=0)


def load_adapter(directory: Path | str, config: ModelConfig) -> Adapter:
    """Read a PEFT directory for a model of this shape.

    Raises:
        WeightsError: a file is missing or damaged, an option or a module is not supported, a shape does not fit.
    """
    directory = Path(directory)
    options = read_json(directory / CONFIG)
    _check(options, directory)
    deltas: dict[tuple[int, str], list[Delta]] = {}
    for module, pair in sorted(_pairs(_tensors(directory), directory).items()):
        layer, name, half, whole = _place(module, config, directory)
        inputs, outputs = _sizes(name, config)
        if name == "gate_up" and not whole:
            outputs //= 2
        a, b = pair["A"], pair["B"]
        if a.shape[1:] != (inputs,) or b.shape != (outputs, a.shape[0]):
            raise WeightsError(
                f"{directory}: {module} has A {list(a.shape)} and B {list(b.shape)}; this model's layer takes "
                f"[rank, {inputs}] and [{outputs}, rank]: the adapter is of another model"
            )
        scale = _scale(module, a.shape[0], options, directory)
        deltas.setdefault((layer, name), []).append(Delta(a, b, scale, half * outputs))
    if not deltas:
        raise WeightsError(f"{directory / TENSORS} holds no adapter tensors")
    return Adapter(str(directory), {key: tuple(group) for key, group in deltas.items()})


def _check(options: dict[str, Any], directory: Path) -> None:
    where = directory / CONFIG
    if options.get("peft_type", "LORA") != "LORA":
        raise WeightsError(f"{where}: peft_type {options['peft_type']!r} is not supported; only 'LORA' is")
    for key in MUST_BE_OFF:
        if options.get(key):
            raise WeightsError(
                f"{where}: {key}={options[key]!r} is not supported; merge the adapter into the model "
                "(peft: merge_and_unload) and serve that"
            )
    if options.get("bias", "none") != "none":
        raise WeightsError(f"{where}: bias={options['bias']!r} is not supported; only 'none' is")
    start = options.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise WeightsError(
            f"{where}: init_lora_weights={start!r} changes the base model's weights; "
            "save the adapter converted to plain LoRA (peft: path_initial_model_for_weight_conversion)"
        )


def _tensors(directory: Path) -> dict[str, Tensor]:
    path = directory / TENSORS
    if not path.is_file():
        pickle = (directory / "adapter_model.bin").is_file()
        hint = (
            "; adapter_model.bin is a pickle, which we do not open: save it as safetensors" if pickle else ""
        )
        raise WeightsError(f"{directory} has no {TENSORS}{hint}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file: {error}") from None


def _pairs(tensors: dict[str, Tensor], directory: Path) -> dict[str, dict[str, Tensor]]:
    """A and B of every module, by the module's name without PEFT's prefix."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if match is None:
            raise WeightsError(
                f"{directory / TENSORS}: {name} is not the A or B of a linear layer; "
                "adapters of other layers are not supported"
            )
        if tensor.dim() != 2 or tensor.dtype not in FLOATS or not bool(tensor.isfinite().all()):
            raise WeightsError(
                f"{directory / TENSORS}: {name} is not a matrix of finite 16- to 64-bit floats"
            )
        pairs.setdefault(match[1].removeprefix(PREFIX), {})[match[2]] = tensor
    for module, pair in pairs.items():
        if len(pair) != 2:
            raise WeightsError(
                f"{directory / TENSORS}: {module} has lora_{next(iter(pair))} and not the other one"
            )
    return pairs


def _place(module: str, config: ModelConfig, directory: Path) -> tuple[int, str, int, bool]:
    """Layer, our name, half of it, and whether it is the whole of ours."""
    match = LAYER.fullmatch(module)
    if match is None or match[2] not in MODULES:
        part = match[2] if match else module
        if "expert" in part or part in ("mlp.gate", "ffn.router", "block_sparse_moe.gate"):
            raise WeightsError(
                f"{directory}: {module} belongs to an expert layer; LoRA on experts and routers is not supported: "
                "train it on the attention and dense layers, or merge it into the model"
            )
        known = did_you_mean(part, MODULES)
        raise WeightsError(f"{directory}: {module} is no linear layer of this model{known}")
    layer, (name, half) = int(match[1]), MODULES[match[2]]
    if layer >= config.layers:
        raise WeightsError(
            f"{directory}: {module}: this model has {config.layers} layers, 0 to {config.layers - 1}"
        )
    if name in ("gate_up", "down") and config.ffn_kinds[layer] == "E":
        raise WeightsError(
            f"{directory}: {module}: layer {layer} of this model has experts there; LoRA on experts is not supported"
        )
    return layer, name, half, match[2] == "ffn.gate_up"


def _sizes(name: str, config: ModelConfig) -> tuple[int, int]:
    """Inputs and outputs of one of our linear layers."""
    c, hidden = config.attention, config.hidden
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    return {
        "query": (hidden, queries),
        "key": (hidden, keys),
        "value": (hidden, keys),
        "output": (queries, hidden),
        "gate_up": (hidden, 2 * config.ffn),
        "down": (config.ffn, hidden),
    }[name]


def _scale(module: str, rank: int, options: dict[str, Any], directory: Path) -> float:
    """``alpha / rank``, or ``alpha / √rank`` (arXiv 2312.03732), with the module's own alpha where there is one."""
    alpha, stated = options.get("lora_alpha", 8), options.get("r", 8)
    for key in ("alpha", "rank"):
        patterns = options.get(f"{key}_pattern") or {}
        if not isinstance(patterns, dict):
            raise WeightsError(f"{directory / CONFIG}: {key}_pattern must be an object, not {patterns!r}")
        for pattern, value in patterns.items():
            try:
                found = re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module)
            except re.error as error:
                raise WeightsError(f"{directory / CONFIG}: {key}_pattern {pattern!r}: {error}") from None
            if found:
                alpha, stated = (value, stated) if key == "alpha" else (alpha, value)
                break
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and v > 0 for v in (alpha, stated)):
        raise WeightsError(
            f"{directory / CONFIG}: lora_alpha={alpha!r} and r={stated!r} must be positive numbers"
        )
    if stated != rank:
        raise WeightsError(f"{directory}: {module} has rank {rank}, {CONFIG} says {stated}")
    return float(alpha) / (sqrt(rank) if options.get("use_rslora") else rank)


# --- on the device --------------------------------------------------------------------------------------------------


class AdapterRows(NamedTuple):
    """The rows of one step by adapter: ``(adapter, rows)``, where ``None`` stands for all rows of the step."""

    groups: tuple[tuple[int, Tensor | None], ...]

    def __bool__(self) -> bool:
        return bool(self.groups)


class _Packed(NamedTuple):
    down: PackedLinear
    up: PackedLinear
    first: int


class AdapterBank:
    """Adapters on the device, laid out for serving.

    Args:
        adapters: by the name that requests ask for.
        format: 'fp32' or 'bf16': the dtype that activations have (an int8 engine's adapters are not quantized).
        device, exact: as in ``deepseek.ops.packed_linear.pack_linear``.
    """

    def __init__(
        self, adapters: Mapping[str, Adapter], format: str, device: torch.device | str, *, exact: bool = False
    ) -> None:
        if format not in ("fp32", "bf16"):
            raise ConfigError(f"adapters are kept in fp32 or bf16, not {format!r}")
        self.names = tuple(adapters)
        self.device = torch.device(device)
        self._index = {name: i for i, name in enumerate(self.names)}
        self._packed: list[dict[tuple[int, str], list[_Packed]]] = [
            {
                key: [
                    _Packed(
                        pack_linear(d.down_RC, None, format, device, exact=exact),
                        pack_linear(d.up_FR.float() * d.scale, None, format, device, exact=exact),
                        d.first,
                    )
                    for d in group
                ]
                for key, group in adapter.deltas.items()
            }
            for adapter in adapters.values()
        ]

    def __len__(self) -> int:
        return len(self.names)

    def index(self, name: str | None) -> int:
        """The number of an adapter, -1 for none. Raises ``RequestError`` for an unknown name."""
        if name is None:
            return -1
        if name not in self._index:
            known = ", ".join(self.names) or "none"
            near = did_you_mean(name, self.names)
            raise RequestError(f"no adapter is called '{name}'{near}; this engine has: {known}", "model")
        return self._index[name]

    def rows(self, adapter_N: Sequence[int] | Iterable[int]) -> AdapterRows:
        """Sort a step's rows by adapter, on the host; ``adapter_N`` holds what ``index`` returned, one a row."""
        places: dict[int, list[int]] = {}
        count = 0
        for count, adapter in enumerate(adapter_N, 1):
            places.setdefault(adapter, []).append(count - 1)
        places.pop(-1, None)
        return AdapterRows(
            tuple(
                (i, None if len(rows) == count else torch.tensor(rows, device=self.device))
                for i, rows in sorted(places.items())
            )
        )

    def add(self, layer: int, name: str, x_NC: Tensor, y_NF: Tensor, rows: AdapterRows) -> None:
        """Add to ``y``, in place, what each row's adapter changes in linear layer ``name`` of ``layer``.

        Args:
            name: one of ``NAMES``.
            x_NC, y_NF: that layer's input and output, in the bank's dtype; ``y`` may be a slice of a wider one.
            rows: of this step.
        """
        for adapter, places in rows.groups:
            for down, up, first in self._packed[adapter].get((layer, name), ()):
                chosen = x_NC if places is None else x_NC.index_select(0, places)
                change = up(down(chosen))
                part = y_NF[:, first : first + up.out_features]
                if places is None:
                    part += change
                else:
                    part.index_add_(0, places, change)
