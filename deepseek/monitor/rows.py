"""Events as rows: what each event says in numbers, under the names of the catalogue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepseek.events import Event

Row = dict[str, Any]
#: Events that say something in numbers; of others only the step and the time matter, if anything.
MEASURED = frozenset({"train", "evaluate", "probe", "ranks", "data"})


def read_tensors(events: Sequence[Event]) -> None:
    """Replace the tensors in the events' values by arrays: one copy from each device for all of them."""
    found: dict[torch.device, list[tuple[Tensor, Any, Any]]] = {}
    for event in events:
        _open(event.values, found)
    for device, tensors in found.items():
        if device.type == "cpu":
            for tensor, place, key in tensors:
                place[key] = _array(tensor.detach())
            continue
        with torch.no_grad():
            flat = torch.cat([t.detach().reshape(-1).to(torch.float32) for t, _, _ in tensors]).cpu().numpy()
        at = 0
        for tensor, place, key in tensors:
            place[key] = flat[at : at + tensor.numel()].reshape(tensor.shape)
            at += tensor.numel()


def _array(tensor: Tensor) -> Any:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _open(place: Any, found: dict[torch.device, list[tuple[Tensor, Any, Any]]]) -> None:
    """Note the tensors in a dict or list, each with its place; containers are copied, as other sinks hold the same."""
    for key, value in list(place.items() if isinstance(place, dict) else enumerate(place)):
        if isinstance(value, Tensor):
            found.setdefault(value.device, []).append((value, place, key))
        elif isinstance(value, dict) or (isinstance(value, (list, tuple)) and value and _holds(value[0])):
            place[key] = dict(value) if isinstance(value, dict) else list(value)
            _open(place[key], found)


def _holds(value: Any) -> bool:
    """Whether a list that begins with ``value`` may hold tensors."""
    return isinstance(value, (Tensor, dict, list, tuple))


class RowMaker:
    """Turns events, whose tensors were read, into rows. It learns from the 'run' event which layers have experts."""

    def __init__(self) -> None:
        self._expert_layers: list[int] = []
        self._names: dict[tuple[str, int, int], list[str]] = {}

    def __call__(self, event: Event) -> Row:
        """The values of ``event`` by series; empty if it has none."""
        if event.name == "run":
            layers = event.values.get("expert_layers")
            self._expert_layers = [int(i) for i in layers] if isinstance(layers, (list, tuple)) else []
        make = getattr(self, f"_{event.name}", None) if event.name in MEASURED else None
        return {} if make is None else make(event.values)

    def _train(self, values: Mapping[str, Any]) -> Row:
        row = _scalars("train/", values)
        seconds = _scalars("", values.get("seconds", {}))
        if seconds:
            # An accelerator's laps are not told apart: 'step' is all that it computed.
            row |= {f"time/{'compute' if k == 'step' else k}": v for k, v in seconds.items()}
            row["time/step"] = sum(seconds.values())
        for i, shares in enumerate(values.get("load") or []):
            layer = self._expert_layers[i] if i < len(self._expert_layers) else i
            row.update(zip(self._named("expert/{}/{}/load", layer, len(shares)), _listed(shares)))
        for layer, gates in (values.get("gates") or {}).items():
            row.update(zip(self._named("attention/{}/{}/gate", int(layer), len(gates)), _listed(gates)))
        return row

    def _named(self, pattern: str, layer: int, count: int) -> list[str]:
        key = (pattern, layer, count)
        if key not in self._names:
            self._names[key] = [pattern.format(layer, i) for i in range(count)]
        return self._names[key]

    def _evaluate(self, values: Mapping[str, Any]) -> Row:
        return _scalars("eval/", values)

    def _probe(self, values: Mapping[str, Any]) -> Row:
        """``series``: numbers by name. ``names`` and ``values``: the same as two lists."""
        row = _scalars("", values.get("series", {}))
        names = values.get("names")
        if names is not None:
            row.update(zip(names, _listed(values["values"])))
        return row

    def _ranks(self, values: Mapping[str, Any]) -> Row:
        row: Row = {}
        for key, name in (("seconds", "step_seconds"), ("data", "data_seconds"), ("memory", "memory")):
            row.update({f"rank/{r}/{name}": v for r, v in enumerate(_listed(values.get(key, [])))})
        return row

    def _data(self, values: Mapping[str, Any]) -> Row:
        row: Row = {}
        for source, figures in (values.get("sources") or {}).items():
            row |= _scalars(f"data/{_part(source)}/", figures)
        return row


def _part(name: str) -> str:
    """A name as one part of a path."""
    return str(name).replace("/", "_") or "_"


def _scalars(prefix: str, values: Mapping[str, Any]) -> Row:
    """The numbers among ``values``; what is none is left out."""
    row: Row = {}
    for key, value in values.items():
        if isinstance(value, (np.ndarray, np.generic)) and value.size == 1:
            value = value.item()
        if isinstance(value, (bool, int, float)):
            row[prefix + key] = value
    return row


def _listed(values: Any) -> list[Any]:
    return values.tolist() if isinstance(values, np.ndarray) else list(values)
