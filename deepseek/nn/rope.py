"""Rotary position embedding (arXiv 2104.09864), in the half-split layout that Llama and its kin use, and its scalings.

Pair i of a head turns by ``position · θ^(−2i/D)``. A model trained on ``original_length`` positions is taken further by
making pairs turn more slowly (``RopeScaling``). ``inverse_frequencies`` is the only place that knows how; training,
generation and serving all take their tables from here.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Literal

import torch
from torch import Tensor

from deepseek.config import configclass
from deepseek.errors import ConfigError
from deepseek.ops.rotary import rotated

#: The options that each type reads; any other must keep its default.
READS = {
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_length", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_length", "beta_fast", "beta_slow", "truncate", "attention_factor"),
    "factors": ("factors",),
}


@configclass
class RopeScaling:
    """How rotary frequencies differ from those of the training length. With f a pair's own frequency:

    * ``linear``: f / factor for every pair (arXiv 2306.15595).
    * ``llama3``: pairs with more than ``high_freq_factor`` turns in ``original_length`` positions keep f, those with
      fewer than ``low_freq_factor`` get f / factor, those between a blend (Llama 3.1, arXiv 2407.21783 and its code).
    * ``yarn``: likewise between ``beta_fast`` and ``beta_slow`` turns, blended evenly by pair number; cosines and sines
      are multiplied by an attention factor (arXiv 2309.00071).
    * ``factors``: f / factors[i], one number a pair: what a GGUF file says about any of these.
    """

    type: Literal["none", "linear", "llama3", "yarn", "factors"] = "none"
    factor: float = 1.0  # how many times longer the text may be
    original_length: int = 0  # positions before scaling; llama3 and yarn need it
    low_freq_factor: float = 1.0  # llama3: turns in original_length
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn: turns in original_length
    beta_slow: float = 1.0
    truncate: bool = True  # yarn: the blend begins and ends at whole pairs
    attention_factor: float | None = None  # yarn: "none" derives it, 0.1 ln(factor) + 1
    factors: tuple[float, ...] = ()

    def check(self) -> None:
        reads = READS[self.type]
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name not in ("type", *reads) and value != option.default:
                types = ", ".join(t for t, names in READS.items() if option.name in names)
                raise ConfigError(
                    f"rope_scaling.{option.name}={value!r} does nothing with type={self.type!r}; "
                    f"it belongs to {types}"
                )
        if self.factor < 1:
            raise ConfigError(f"rope_scaling.factor={self.factor} must be at least 1")
        if "original_length" in reads and self.original_length < 1:
            raise ConfigError(
                f"rope_scaling.original_length={self.original_length} must be at least 1 with "
                f"type={self.type!r}: the positions the model was trained on before scaling"
            )
        for less, more in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if not 0 < getattr(self, less) < getattr(self, more):
                raise ConfigError(
                    f"rope_scaling.{less}={getattr(self, less)} must be positive and less than "
                    f"{more}={getattr(self, more)}"
                )
        if self.attention_factor is not None and self.attention_factor <= 0:
            raise ConfigError(f"rope_scaling.attention_factor={self.attention_factor} must be positive")
        if self.type == "factors" and not (self.factors and all(f > 0 for f in self.factors)):
            raise ConfigError(
                f"rope_scaling.factors has {len(self.factors)} numbers, the least {min(self.factors, default=0)}; "
                "give one positive number for each pair of a head"
            )

    def check_head(self, head_dim: int, theta: float) -> None:
        """Raises ``ConfigError`` where a head of ``head_dim`` with base ``theta`` cannot be scaled so."""
        if self.type == "factors" and len(self.factors) != head_dim // 2:
            raise ConfigError(
                f"rope_scaling.factors has {len(self.factors)} numbers; head_dim={head_dim} has {head_dim // 2} pairs"
            )
        if self.type == "yarn" and theta <= 1:
            raise ConfigError(f"rope_theta={theta} must be more than 1 with rope_scaling.type='yarn'")

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.type != "yarn":
            return 1.0
        return yarn_magnitude(self.factor) if self.attention_factor is None else self.attention_factor

    @property
    def reach(self) -> int:
        """The positions YaRN takes the model to, ``original_length · factor``; 0 for other types."""
        return min(int(self.original_length * self.factor), 2**31 - 1) if self.type == "yarn" else 0


def yarn_magnitude(factor: float, slope: float = 1.0) -> float:
    """YaRN's attention factor, ``0.1 slope ln(factor) + 1``; 1 for a text that is no longer than before."""
    return 0.1 * slope * math.log(factor) + 1.0 if factor > 1 else 1.0


PLAIN = RopeScaling()


def inverse_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling = PLAIN, device: torch.device | str = "cpu"
) -> Tensor:
    """Radians per position of every pair, fp32 ``[head_dim / 2]``."""
    half = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    own = 1.0 / theta ** (half / head_dim)  # rounds as public checkpoints' code does
    if scaling.type == "none":
        return own
    if scaling.type == "factors":
        return own / torch.tensor(scaling.factors, device=device, dtype=torch.float32)
    slow = own / scaling.factor
    if scaling.type == "linear":
        return slow
    if scaling.type == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = scaling.original_length / (2 * math.pi / own)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
    else:
        first, last = _blended_pairs(head_dim, theta, scaling)
        keep = 1 - ((half / 2 - first) / (last - first)).clamp(0, 1)
    return (1 - keep) * slow + keep * own


def _blended_pairs(head_dim: int, theta: float, scaling: RopeScaling) -> tuple[float, float]:
    """The pairs at which YaRN's blend begins and ends."""

    def pair(turns: float) -> float:
        """The pair, fractional, that makes so many turns in the original length."""
        return head_dim * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    return first, last + 0.001 if first == last else last


def rope_table(
    positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling = PLAIN
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for ``positions [..., T]`` times ``magnitude``, fp32 ``[..., T, head_dim / 2]`` each."""
    angle = positions[..., None].float() * inverse_frequencies(head_dim, theta, scaling, positions.device)
    if scaling.magnitude == 1:
        return angle.cos(), angle.sin()
    return angle.cos() * scaling.magnitude, angle.sin() * scaling.magnitude


_tables: dict[tuple[int, int, float, RopeScaling, torch.device], tuple[Tensor, Tensor]] = {}


def counted_rope_table(
    length: int, head_dim: int, theta: float, device: torch.device, scaling: RopeScaling = PLAIN
) -> tuple[Tensor, Tensor]:
    """``rope_table`` of positions ``0 … length − 1``; the last few are kept, as every training step asks for one."""
    if torch.compiler.is_compiling() or device.type == "meta":
        return rope_table(torch.arange(length, device=device), head_dim, theta, scaling)
    key = length, head_dim, theta, scaling, device
    if key not in _tables:
        while len(_tables) >= 8:
            del _tables[next(iter(_tables))]
        with torch.inference_mode(False):  # a table made in inference mode could not be used in training
            _tables[key] = rope_table(torch.arange(length, device=device), head_dim, theta, scaling)
    return _tables[key]


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate ``x [B, H, T, D]`` by a table ``[T, D/2]`` or ``[B, 1, T, D/2]``, computed in fp32 at least.

    The result lies in memory as ``[B, T, H, D]``, the layout of the projections: attention kernels answer in the layout
    of the query, and nothing has to be copied on the way in or out.
    """
    return rotated(x.transpose(1, 2), *table).transpose(1, 2)
