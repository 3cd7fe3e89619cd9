"""The block formats of GGUF tensors and the numbers they stand for.

A quantised row is a sequence of blocks; a block holds a few small integers, one or two half-precision scales
and, for the "K" formats, 8 or 16 sub-blocks with small integer scales of their own. Every format is one
function from raw blocks ``[n, block bytes]`` to values ``[n, block size]`` in fp32, over all blocks at once.
What each computes, with ``q`` the stored integer:

    Q4_0 Q5_0 Q8_0   d·(q − 8), d·(q − 16), d·q            32 values a block
    Q4_1 Q5_1        d·q + m                                32
    Q2_K Q4_K Q5_K   (d·scale)·q − (dmin·min)               256, sub-blocks of 16 (Q2_K) or 32
    Q3_K Q6_K        (d·scale)·(q − 4), (d·scale)·(q − 32)   256, sub-blocks of 16
    IQ4_NL IQ4_XS    d·table[q], (d·(scale − 32))·table[q]   32; 256, sub-blocks of 32

Layouts: ggml's ``ggml-common.h`` (https://github.com/ggml-org/ggml), and the GGUF document in its ``docs``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deepseek.errors import WeightsError

Bytes = npt.NDArray[np.uint8]
Whole = npt.NDArray[np.integer[Any]]
Values = npt.NDArray[np.float32]

CHUNK = 1 << 21  #: values made at a time; bounds the memory beyond the result
SUPER = 256  #: values in a block of the K formats

#: What the sixteen codes of IQ4_NL and IQ4_XS stand for.
CODES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8
)  # fmt: skip


class Format(NamedTuple):
    """One type of tensor in a file.

    Attributes:
        name: as ggml calls it. size, bytes: values in a block, and its bytes.
        dtype: of the tensor that is read. unpack: blocks to values; ``None`` for plain numbers.
    """

    name: str
    size: int
    bytes: int
    dtype: torch.dtype = torch.float32
    unpack: Callable[[Bytes], Values] | None = None


def dequantise(raw: Bytes, form: Format, shape: tuple[int, ...]) -> Tensor:
    """The tensor that ``raw`` bytes are, of ``shape``; fp32 for block formats, else as it is stored.

    Beyond the result, memory holds ``CHUNK`` values.
    """
    if form.unpack is None:
        return torch.from_numpy(raw.copy()).view(form.dtype).reshape(shape)
    out = np.empty(raw.size // form.bytes * form.size, np.float32)
    blocks, step = raw.reshape(-1, form.bytes), CHUNK // form.size
    with np.errstate(all="ignore"):  # a scale may be inf or nan: then so are the values
        for at in range(0, len(blocks), step):
            part = blocks[at : at + step]
            out[at * form.size : (at + len(part)) * form.size] = form.unpack(part).reshape(-1)
    return torch.from_numpy(out).reshape(shape)


def _half(blocks: Bytes, at: int) -> Values:
    """The half-precision number at byte ``at`` of every block, ``[n, 1]``."""
    return blocks[:, at : at + 2].copy().view("<f2").astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """Low halves of the bytes, then high halves: ``[..., k]`` → ``[..., 2k]``."""
    return np.concatenate([packed & 15, packed >> 4], -1)


def _bits(packed: Bytes, shifts: tuple[int, ...], mask: int) -> Bytes:
    """``(packed >> shift) & mask`` for every shift: ``[..., k]`` → ``[..., shifts, k]``."""
    amounts = np.array(shifts, np.uint8)[:, None]
    return (packed[..., None, :] >> amounts) & np.uint8(mask)


def _fifth_bits(blocks: Bytes, at: int) -> Whole:
    """Bit j of the 32-bit word at byte ``at``, in the place of a fifth bit, ``[n, 32]``."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << 4


def _q4_0(blocks: Bytes) -> Values:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.int8) - 8).astype(np.float32)


def _q4_1(blocks: Bytes) -> Values:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).astype(np.float32) + _half(blocks, 2)


def _q5_0(blocks: Bytes) -> Values:
    q = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return _half(blocks, 0) * (q.astype(np.int8) - 16).astype(np.float32)


def _q5_1(blocks: Bytes) -> Values:
    q = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return _half(blocks, 0) * q.astype(np.float32) + _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Values:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _affine(scale: Values, q: Whole, low: Values) -> Values:
    """``scale·q − low`` for sub-blocks: ``scale`` and ``low`` ``[n, s]``, ``q`` ``[n, SUPER]``."""
    parts = q.reshape(len(q), scale.shape[1], -1).astype(np.float32)
    return (scale[..., None] * parts - low[..., None]).reshape(-1, SUPER)


def _centred(scale: Values, q: Whole, centre: int) -> Values:
    """``scale·(q − centre)`` for sub-blocks of 16."""
    parts = (q.reshape(len(q), 16, 16).astype(np.int8) - centre).astype(np.float32)
    return (scale[..., None] * parts).reshape(-1, SUPER)


def _q2_k(blocks: Bytes) -> Values:
    scales = blocks[:, :16]
    q = _bits(blocks[:, 16:80].reshape(-1, 2, 32), (0, 2, 4, 6), 3)
    scale = _half(blocks, 80) * (scales & 15).astype(np.float32)
    low = _half(blocks, 82) * (scales >> 4).astype(np.float32)
    return _affine(scale, q.reshape(-1, SUPER), low)


def _q3_k(blocks: Bytes) -> Values:
    high = _bits(blocks[:, :32], tuple(range(8)), 1).reshape(-1, SUPER)
    q = _bits(blocks[:, 32:96].reshape(-1, 2, 32), (0, 2, 4, 6), 3).reshape(-1, SUPER)
    packed = blocks[:, 96:108]  # 16 scales: four low bits in bytes 0-7, two high bits in bytes 8-11
    scales = _nibbles(packed[:, :8]) | (_bits(packed[:, 8:], (0, 2, 4, 6), 3).reshape(-1, 16) << 4)
    scale = _half(blocks, 108) * (scales.astype(np.int8) - 32).astype(np.float32)
    return _centred(scale, q | (high << 2), 4)


def _scales_and_mins(packed: Bytes) -> tuple[Values, Values]:
    """Eight 6-bit scales and eight 6-bit minima from 12 bytes.

    Bytes 0-3 and 4-7 hold the first four of each in their low six bits; their top two bits belong to the last
    four, whose low four bits are in bytes 8-11 (scale below, minimum above).
    """
    first, second, last = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = np.concatenate([first & 63, (last & 15) | (first >> 6 << 4)], 1)
    low = np.concatenate([second & 63, (last >> 4) | (second >> 6 << 4)], 1)
    return scale.astype(np.float32), low.astype(np.float32)


def _q4_k(blocks: Bytes) -> Values:
    scale, low = _scales_and_mins(blocks[:, 4:16])
    q = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, SUPER)
    return _affine(_half(blocks, 0) * scale, q, _half(blocks, 2) * low)


def _q5_k(blocks: Bytes) -> Values:
    scale, low = _scales_and_mins(blocks[:, 4:16])
    q = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, SUPER)
    high = _bits(blocks[:, 16:48], tuple(range(8)), 1).reshape(-1, SUPER)
    return _affine(_half(blocks, 0) * scale, q | (high << 4), _half(blocks, 2) * low)


def _q6_k(blocks: Bytes) -> Values:
    low = blocks[:, :128].reshape(-1, 2, 64)
    q = np.stack([low & 15, low >> 4], 2).reshape(-1, SUPER)
    high = _bits(blocks[:, 128:192].reshape(-1, 2, 32), (0, 2, 4, 6), 3).reshape(-1, SUPER)
    scale = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return _centred(scale, q | (high << 4), 32)


def _iq4_nl(blocks: Bytes) -> Values:
    return _half(blocks, 0) * CODES[_nibbles(blocks[:, 2:])].astype(np.float32)


def _iq4_xs(blocks: Bytes) -> Values:
    high = blocks[:, 2:4].copy().view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], 2).reshape(-1, 8)
    scale = _half(blocks, 0) * ((low | (high.astype(np.uint8) << 4)).astype(np.int8) - 32).astype(np.float32)
    values = CODES[_nibbles(blocks[:, 8:].reshape(-1, 8, 16))].astype(np.float32)
    return (scale[..., None] * values).reshape(-1, SUPER)


#: By the number that a file gives the type.
FORMATS: dict[int, Format] = {
    0: Format("F32", 1, 4),
    1: Format("F16", 1, 2, torch.float16),
    2: Format("Q4_0", 32, 18, unpack=_q4_0),
    3: Format("Q4_1", 32, 20, unpack=_q4_1),
    6: Format("Q5_0", 32, 22, unpack=_q5_0),
    7: Format("Q5_1", 32, 24, unpack=_q5_1),
    8: Format("Q8_0", 32, 34, unpack=_q8_0),
    10: Format("Q2_K", SUPER, 84, unpack=_q2_k),
    11: Format("Q3_K", SUPER, 110, unpack=_q3_k),
    12: Format("Q4_K", SUPER, 144, unpack=_q4_k),
    13: Format("Q5_K", SUPER, 176, unpack=_q5_k),
    14: Format("Q6_K", SUPER, 210, unpack=_q6_k),
    20: Format("IQ4_NL", 32, 18, unpack=_iq4_nl),
    23: Format("IQ4_XS", SUPER, 136, unpack=_iq4_xs),
    30: Format("BF16", 1, 2, torch.bfloat16),
}
#: Types that exist but that we do not read, so that the error can name them.
OTHERS = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
    40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


def format_of(number: int, where: str) -> Format:
    """The row of ``FORMATS``. Raises ``WeightsError`` that names the tensor, its type, and what to do."""
    if number not in FORMATS:
        known = ", ".join(f.name for f in FORMATS.values())
        named = f"{OTHERS[number]} (type {number})" if number in OTHERS else f"of the unknown type {number}"
        raise WeightsError(
            f"{where} is {named}, which we do not read; take a file of the model made of {known}, or make one: "
            "llama-quantize --allow-requantize FILE NEW Q8_0"
        )
    return FORMATS[number]
