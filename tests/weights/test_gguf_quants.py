"""Every block format against the package `gguf`, value for value: random bytes, and real quantised numbers."""

import gguf
import numpy as np
import pytest
from gguf_models import write

from deepseek.errors import WeightsError
from deepseek.weights import gguf_quants
from deepseek.weights.gguf import GGUFFile
from deepseek.weights.gguf_quants import FORMATS, OTHERS, dequantise, format_of

TYPES = {number: gguf.GGMLQuantizationType(number) for number in FORMATS}


def unpack(raw: np.ndarray, number: int) -> np.ndarray:
    form = FORMATS[number]
    raw = np.ascontiguousarray(raw).view(np.uint8)
    shape = (raw.shape[0], raw.shape[1] // form.bytes * form.size)
    return dequantise(raw.reshape(-1), form, shape).float().numpy()


@pytest.mark.parametrize("number", FORMATS, ids=lambda n: FORMATS[n].name)
def test_random_bytes_equal_the_gguf_package(number):
    form = FORMATS[number]
    assert (form.name, form.size, form.bytes) == (
        TYPES[number].name, *gguf.GGML_QUANT_SIZES[TYPES[number]]
    )  # fmt: skip
    raw = np.random.default_rng(number).integers(0, 256, (50, 3 * form.bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        theirs = gguf.dequantize(raw, TYPES[number])
    np.testing.assert_array_equal(unpack(raw, number), theirs.reshape(50, -1))


@pytest.mark.parametrize("name", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_what_the_gguf_package_quantises_comes_back(name):
    number = int(gguf.GGMLQuantizationType[name])
    values = np.random.default_rng(1).standard_normal((7, 96)).astype(np.float32)
    raw = gguf.quantize(values, TYPES[number])
    found = unpack(raw, number)
    np.testing.assert_array_equal(found, gguf.dequantize(raw, TYPES[number]))
    assert np.abs(found - values).max() < {"Q4_0": 0.6, "Q4_1": 0.3, "Q5_0": 0.3, "Q5_1": 0.2}.get(name, 0.05)


def test_pieces_equal_the_whole(monkeypatch):
    raw = np.random.default_rng(2).integers(0, 128, (1, 144 * 11), dtype=np.uint8)
    whole = unpack(raw, 12)
    monkeypatch.setattr(gguf_quants, "CHUNK", 512)
    np.testing.assert_array_equal(unpack(raw, 12), whole)


def test_known_types_that_we_do_not_read_are_named():
    assert {n: t.name for n, t in ((n, gguf.GGMLQuantizationType(n)) for n in OTHERS)} == OTHERS
    with pytest.raises(WeightsError, match=r"'x' is IQ2_XXS \(type 16\), which we do not read"):
        format_of(16, "'x'")
    with pytest.raises(WeightsError, match="unknown type 9999"):
        format_of(9999, "'x'")


@pytest.mark.parametrize("kind", gguf.GGMLQuantizationType, ids=lambda kind: kind.name)
def test_every_type_of_the_package_is_read_or_refused_by_name(kind, tmp_path):
    """In a file: the message has the file, the tensor, the type and a way out."""
    size, stored = gguf.GGML_QUANT_SIZES[kind]
    raw, path = np.zeros((2, stored), np.uint8), tmp_path / "m.gguf"
    write(path, "llama", {}, lambda writer: writer.add_tensor("blk.0.x", raw, raw_dtype=kind))
    if int(kind) in FORMATS:
        with GGUFFile(path) as file:
            assert file.get("blk.0.x").shape == (2, size)
        return
    with pytest.raises(WeightsError) as caught:
        GGUFFile(path)
    for word in (str(path), "'blk.0.x'", f"{kind.name} (type {int(kind)})", "llama-quantize"):
        assert word in str(caught.value)
