"""The state of every global random generator, as JSON: a resumed run draws what it would have drawn."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch

from deepseek.errors import CheckpointError


def rng_state() -> dict[str, Any]:
    """States of ``random``, NumPy's global generator, torch on the CPU, and every accelerator device."""
    version, words, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [str(legacy[0]), [int(w) for w in legacy[1]], *map(_number, legacy[2:])],
        "torch": _encode(torch.get_rng_state()),
    }
    if (kind := _accelerator()) is not None:
        state["accelerator"] = {"kind": kind, "devices": [_encode(s) for s in _device_states(kind)]}
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what ``rng_state`` returned, before or after a trip through JSON.

    Devices that this process does not have are left out, and devices that the saved state lacks are left
    alone.

    Raises:
        CheckpointError: the state is malformed.
    """
    try:
        version, words, gauss = state["python"]
        name, keys, *rest = state["numpy"]
        cpu = _decode(state["torch"])
        random.setstate((version, tuple(words), gauss))
        np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(cpu)
        saved = state.get("accelerator")
        if saved is not None and saved["kind"] == _accelerator():
            _set_device_states(saved["kind"], [_decode(s) for s in saved["devices"]])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"the saved random state cannot be restored: {error!r}") from error


def _accelerator() -> str | None:
    device = torch.accelerator.current_accelerator(check_available=True)
    return None if device is None else device.type


def _device_states(kind: str) -> list[torch.Tensor]:
    module: Any = torch.get_device_module(kind)
    if kind == "mps":  # one device, and its functions take no index
        return [module.get_rng_state()]
    return [module.get_rng_state(i) for i in range(torch.accelerator.device_count())]


def _set_device_states(kind: str, states: list[torch.Tensor]) -> None:
    module: Any = torch.get_device_module(kind)
    if kind == "mps":
        module.set_rng_state(states[0])
        return
    for i, state in enumerate(states[: torch.accelerator.device_count()]):
        module.set_rng_state(state, i)


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)


def _number(value: Any) -> int | float:
    return value if isinstance(value, int) else float(value)
