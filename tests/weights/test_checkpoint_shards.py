"""Our writer against the safetensors library's reader, and the other way round."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from deepseek.errors import CheckpointError
from deepseek.weights.checkpoint import CheckpointConfig, Checkpointer, load
from deepseek.weights.shards import DTYPES, HostBuffers, read_tensors, untie, write_group, write_tensors


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.dtype, plain.shape, bytes(plain.reshape(-1).view(torch.uint8).numpy())


def every_kind() -> dict[str, Tensor]:
    torch.manual_seed(0)
    raw = torch.randint(0, 256, (4, 16), dtype=torch.uint8)
    kinds = {str(d): raw.view(d) for d in DTYPES if d is not torch.bool}
    kinds["bool"] = raw > 99
    kinds |= {f"0-dim {d}": torch.ones((), dtype=d) for d in DTYPES}
    kinds["empty"] = torch.empty(0, 3)
    kinds["nan payload"] = torch.tensor([0x7FC12345], dtype=torch.int32).view(torch.float32)
    kinds["transposed"] = torch.randn(3, 5).t()
    kinds["strided"] = torch.randn(9)[::2]
    kinds["expanded"] = torch.randn(1, 4).expand(3, 4)
    kinds["conjugated"] = torch.randn(3, dtype=torch.complex64).conj()
    kinds["parameter"] = torch.nn.Parameter(torch.randn(3))
    return kinds


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = every_kind()
    record = write_tensors(tmp_path / "a.safetensors", tensors)
    assert record.size == (tmp_path / "a.safetensors").stat().st_size
    read = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert {k: bits(v) for k, v in read.items()} == {k: bits(v) for k, v in tensors.items()}


def test_we_write_the_very_bytes_of_the_library(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3), "a": torch.arange(5), "c": torch.ones(3, dtype=torch.bool)}
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    write_tensors(tmp_path / "ours.safetensors", tensors)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_every_dtype_and_layout_survives_a_checkpoint(tmp_path: Path, asynchronous: bool) -> None:
    tensors = every_kind()
    with Checkpointer(tmp_path, CheckpointConfig(asynchronous=asynchronous)) as writer:
        writer.save(1, tensors={"model": tensors, "nothing": {}}, state={})
    read = load(tmp_path)
    assert {k: bits(v) for k, v in read.model.items()} == {k: bits(v) for k, v in tensors.items()}
    assert read.tensors["nothing"] == {}


def test_tied_tensors_are_written_once_and_tied_again(tmp_path: Path) -> None:
    weight = torch.randn(100, 10)
    flat = torch.arange(6.0)
    tensors = {"embed": weight, "head": weight, "transposed": weight.t(), "left": flat[:4], "right": flat[2:]}
    with Checkpointer(tmp_path) as writer:
        path = writer.save(1, tensors={"model": tensors}, state={})
    read = load(tmp_path).model
    assert {k: bits(v) for k, v in read.items()} == {k: bits(v) for k, v in tensors.items()}
    assert read["embed"].data_ptr() == read["head"].data_ptr()
    assert read["left"].data_ptr() != read["right"].data_ptr()
    assert (path / "model.safetensors").stat().st_size < 2 * weight.nbytes + 2000


def test_large_groups_are_cut_into_shards_with_the_hub_index(tmp_path: Path) -> None:
    tensors = {f"layer.{i}": torch.full((10,), float(i)) for i in range(7)} | {"big": torch.ones(100)}
    records = write_group(tmp_path, "model", untie("model", tensors), limit=100)
    shards = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert shards == [f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)]
    assert set(records) == {*shards, "model.safetensors.index.json"}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for key, file in index["weight_map"].items():
        assert torch.equal(safetensors.torch.load_file(tmp_path / file)[key], tensors[key])
    with Checkpointer(tmp_path / "run", shard_bytes=100) as writer:
        writer.save(1, tensors={"model": tensors}, state={})
    read = load(tmp_path / "run").model
    assert {k: bits(v) for k, v in read.items()} == {k: bits(v) for k, v in tensors.items()}


def test_host_buffers_follow_a_change_of_shape_and_dtype() -> None:
    buffers = HostBuffers()
    for tensor in (torch.ones(3), torch.ones(3) * 2, torch.ones(4), torch.ones(4, dtype=torch.int64)):
        copy = buffers.copy({"m": untie("m", {"w": tensor})})["m"].tensors["w"]
        assert bits(copy) == bits(tensor)
        assert copy.data_ptr() != tensor.data_ptr()


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    for raw in (b"", b"\x80\x04pickle", b"\xff" * 100, b"\x02" + bytes(7) + b"[]"):
        (tmp_path / "x.safetensors").write_bytes(raw)
        with pytest.raises(CheckpointError, match="not a readable safetensors file"):
            read_tensors(tmp_path / "x.safetensors")
