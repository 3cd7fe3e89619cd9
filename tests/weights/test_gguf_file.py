"""The container: equal to the package `gguf`'s reader; damaged, lying and hostile files are one-line errors."""

import contextlib
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from gguf_models import smollm2, write
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.errors import WeightsError
from deepseek.weights.gguf import GGUFFile

VALUES = np.arange(64 * 3, dtype=np.float32).reshape(3, 64)


def every_type(writer):
    for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{name}")(f"x.{name}", 7)
    writer.add_float32("x.float32", 0.5)
    writer.add_float64("x.float64", 0.25)
    writer.add_bool("x.bool", True)
    writer.add_string("x.string", "é\n🙂")
    writer.add_array("x.strings", ["a", "", "ß"])
    writer.add_array("x.numbers", [1, -2, 3])
    writer.add_array("x.flags", [True, False])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    weights = {
        "a.weight": VALUES,
        "b.weight": VALUES[:1],
        "c": VALUES[0],
        "d": np.ones((2, 3, 4), np.float16),
    }
    return write(tmp_path_factory.mktemp("g") / "small.gguf", "test", weights, every_type)


def read_all(path) -> None:
    with GGUFFile(path) as file:
        for name in file.names:
            assert file.get(name).shape == file.places[name].shape


def damaged(tmp_path, data: bytes) -> WeightsError:
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(WeightsError) as caught:
        read_all(path)
    assert "\n" not in str(caught.value)
    return caught.value


def test_metadata_and_tensors(small):
    with GGUFFile(small) as file:
        got = {key.removeprefix("x."): value for key, value in file.metadata.items() if key.startswith("x.")}
        assert got == {
            "uint8": 7, "int8": 7, "uint16": 7, "int16": 7, "uint32": 7, "int32": 7, "uint64": 7, "int64": 7,
            "float32": 0.5, "float64": 0.25, "bool": True, "string": "é\n🙂", "strings": ["a", "", "ß"],
            "numbers": [1, -2, 3], "flags": [True, False],
        }  # fmt: skip
        assert got["bool"] is True
        assert file.names == ["a.weight", "b.weight", "c", "d"]
        np.testing.assert_array_equal(file.get("a.weight"), VALUES)
        assert file.get("d").shape == (2, 3, 4)
        with pytest.raises(WeightsError, match=r"no tensor 'a.weigth' \(did you mean 'a.weight'"):
            file.get("a.weigth")


@pytest.mark.slow
def test_every_tensor_of_the_real_file():
    path = smollm2()
    reader = gguf.GGUFReader(path)
    with GGUFFile(path) as file:
        assert len(file.names) == len(reader.tensors) == 272
        for tensor in reader.tensors:
            theirs = gguf.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(file.get(tensor.name).numpy(), theirs.reshape(tensor.shape[::-1]))
        for key, field in reader.fields.items():
            if not key.startswith("GGUF."):
                assert file.metadata[key] == field.contents(), key


def test_truncated_at_every_place(small, tmp_path):
    whole = small.read_bytes()
    for size in range(0, len(whole) - 20, 7):  # up to 31 bytes of padding may be missing at the end
        damaged(tmp_path, whole[:size])


def test_versions_and_other_files(small, tmp_path):
    whole = small.read_bytes()
    assert "big-endian" in str(damaged(tmp_path, b"GGUF" + struct.pack(">I", 3) + whole[8:]))
    assert "of version 1" in str(damaged(tmp_path, b"GGUF" + struct.pack("<I", 1) + whole[8:]))
    assert "not a GGUF file" in str(damaged(tmp_path, b"PK\3\4" + whole[4:]))
    with pytest.raises(WeightsError, match="is not there"):
        GGUFFile(tmp_path / "none.gguf")
    with pytest.raises(WeightsError, match="cannot read"):
        GGUFFile(tmp_path)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(tensors: int, keys: list[bytes]) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(keys)) + b"".join(keys)


def place(name: str, shape, kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HOSTILE = {
    "a string of 2^63 bytes": (header(0, [struct.pack("<Q", 1 << 63) + b"\0" * 9]), "needs 9223372036854775808 bytes"),
    "2^60 keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60) + b"\0" * 64, "1152921504606846976 keys"),
    "2^60 tensors": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0) + b"\0" * 64, "1152921504606846976 tensors"),
    "an array of 2^62 strings": (header(0, [text("k") + struct.pack("<IIQ", 9, 8, 1 << 62)]), "items of 'k'"),
    "a wide array": (header(0, [text("k") + struct.pack("<IIQ", 9, 12, 1 << 50)]), "items of 'k'"),
    "arrays in arrays": (header(0, [text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9]), "deep"),
    "an unknown type": (header(0, [text("k") + struct.pack("<I", 77)]), "unknown type 77"),
    "items of an unknown type": (header(0, [text("k") + struct.pack("<IIQ", 9, 77, 0)]), "unknown type 77"),
    "a key twice": (header(0, [text("k") + struct.pack("<IB", 0, 1)] * 2), "twice"),
    "a key that is not UTF-8": (header(0, [struct.pack("<Q", 1) + b"\xff" + b"\0" * 8]), "not UTF-8"),
    "nine dimensions": (header(1, []) + text("t") + struct.pack("<I", 9) + b"\0" * 99, "9 dimensions"),
    "no dimensions": (header(1, []) + text("t") + struct.pack("<I", 0) + b"\0" * 99, "0 dimensions"),
    "a size of zero": (header(1, []) + place("t", (0, 4), 0, 0) + b"\0" * 99, "[4, 0]"),
    "2^120 numbers": (header(1, []) + place("t", (1 << 40, 1 << 40, 1 << 40), 0, 0) + b"\0" * 99, "is said to lie"),
    "half a block": (header(1, []) + place("t", (33,), 2, 0) + b"\0" * 99, "multiples of 32"),
    "an offset beyond the end": (header(1, []) + place("t", (4,), 0, 1 << 62) + b"\0" * 99, "is said to lie"),
    "an offset between": (header(1, []) + place("t", (4,), 0, 5) + b"\0" * 99, "multiples of 32"),
    "tensors over each other": (
        header(2, []) + place("t", (4,), 0, 0) + place("u", (4,), 0, 0) + b"\0" * 99, "is said to lie",
    ),
    "a tensor twice": (
        header(2, []) + place("t", (4,), 0, 0) + place("t", (4,), 0, 32) + b"\0" * 99, "twice",
    ),
    "an alignment of 7": (
        header(0, [text("general.alignment") + struct.pack("<II", 4, 7)]), "power of two",
    ),
    "an alignment of 0": (
        header(0, [text("general.alignment") + struct.pack("<II", 4, 0)]), "power of two",
    ),
    "an alignment that is text": (
        header(0, [text("general.alignment") + struct.pack("<I", 8) + text("32")]), "power of two",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name, tmp_path):
    data, words = HOSTILE[name]
    tracemalloc.start()
    try:
        assert words in str(damaged(tmp_path, data))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_text_that_is_not_utf8_in_a_value_harms_nobody(tmp_path):
    path = tmp_path / "odd.gguf"
    path.write_bytes(header(0, [text("k") + struct.pack("<IQ", 8, 2) + b"a\xff"]))
    with GGUFFile(path) as file:
        assert file.metadata == {"k": "a\ufffd"}


@settings(max_examples=1000, deadline=None)
@given(st.data())
def test_any_change_is_read_or_refused(small, tmp_path_factory, data):
    """Bytes overwritten, removed or inserted anywhere: a file, or a ``WeightsError``; nothing else, and no memory."""
    whole = bytearray(small.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        new = data.draw(
            st.one_of(st.binary(max_size=9), st.integers(0, 2**64 - 1).map(lambda n: struct.pack("<Q", n)))
        )
        whole[at : at + data.draw(st.integers(0, 9))] = new
    path = tmp_path_factory.getbasetemp() / "fuzzed.gguf"
    path.write_bytes(bytes(whole))
    tracemalloc.start()
    try:
        with contextlib.suppress(WeightsError):
            read_all(path)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 << 20


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 5), st.integers(0, 5))
def test_random_bytes_after_a_good_beginning(tmp_path_factory, data, tensors, keys):
    path = tmp_path_factory.getbasetemp() / "random.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + data)
    with contextlib.suppress(WeightsError):
        read_all(path)
