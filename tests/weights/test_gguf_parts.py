"""Models in several GGUF files, cut by the package `gguf`: read as one, whichever part is named; never half."""

import json
import shutil

import pytest
import torch
from gguf_models import make, write_model

from deepseek import assemble
from deepseek.errors import WeightsError
from deepseek.recipes.import_model import import_model
from deepseek.weights.convert import load_hf, save_hf
from deepseek.weights.gguf import GGUFFile
from deepseek.weights.gguf_parts import GGUFParts, model_name, part_paths
from deepseek.weights.gguf_tokenizer import load_gguf_tokenizer

IDS = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(0))


def words(writer):
    """A tokenizer of 64 tokens."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([chr(33 + i) for i in range(62)] + ["!!", "<end>"])
    writer.add_token_types([1] * 63 + [3])
    writer.add_token_merges(["! !"])
    writer.add_eos_token_id(63)


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """The same model whole and in parts of 5 tensors."""
    directory, model = tmp_path_factory.mktemp("g"), make("llama")
    write_model(directory / "whole.gguf", model)
    write_model(directory / "m.gguf", model, split=5)
    (directory / "parts").mkdir()
    for path in sorted(directory.glob("m-*.gguf")):
        path.rename(directory / "parts" / path.name)
    return directory


@pytest.fixture
def parts(cut, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(cut / "parts", tmp_path / "parts")


def logits(path):
    with torch.no_grad():
        model = assemble.load(path).model
        return model.logits(model(IDS).hidden)


def refused(path, *words):
    with pytest.raises(WeightsError) as caught:
        assemble.load(path)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_any_part_and_the_directory_are_the_whole_model(cut):
    paths = sorted((cut / "parts").glob("*.gguf"))
    assert [p.name for p in paths] == [f"m-0000{i}-of-00005.gguf" for i in range(1, 6)]
    whole = logits(cut / "whole.gguf")
    for path in (paths[0], paths[2], paths[-1], cut / "parts"):
        assert torch.equal(logits(path), whole)
    with GGUFParts(paths[3]) as found, GGUFFile(cut / "whole.gguf") as file:
        assert sorted(found.names) == sorted(file.names)
        assert found.path == paths[0]
        with pytest.raises(WeightsError, match=r"no tensor 'output.weigh' \(did you mean 'output.weight'"):
            found.get("output.weigh")


def test_import_and_export(cut, tmp_path):
    """The run is called like the model, and says of which files it is made."""
    done = import_model(cut / "parts/m-00002-of-00005.gguf", tmp_path / "run")
    told = json.loads((tmp_path / "run/events.jsonl").read_text().splitlines()[0])
    assert sorted(told["files"]) == [f"m-0000{i}-of-00005.gguf" for i in range(1, 6)]
    assert done.format == "gguf"
    assert torch.equal(logits(tmp_path / "run"), logits(cut / "whole.gguf"))
    save_hf(assemble.load(cut / "parts").model, tmp_path / "hf")
    assert load_hf(tmp_path / "hf").config == assemble.load(cut / "whole.gguf").model.config


def test_names():
    from pathlib import Path

    assert model_name(Path("a/Llama-3.1-8B.Q4-00001-of-00003.gguf")) == "Llama-3.1-8B.Q4"
    assert model_name(Path("a/Llama-3.1-8B.gguf")) == "Llama-3.1-8B"
    for name in ("m.gguf", "m-00000-of-00000.gguf", "m-00003-of-00002.gguf", "m-1-of-2.gguf"):
        assert part_paths(Path(name)) == [Path(name)]


def test_a_missing_part_is_named(parts):
    (parts / "m-00003-of-00005.gguf").unlink()
    for path in (parts, parts / "m-00001-of-00005.gguf"):
        refused(path, "m-00003-of-00005.gguf is not there", "in 5 parts, and 1 of them are missing")
    (parts / "m-00001-of-00005.gguf").unlink()
    refused(parts, "m-00001-of-00005.gguf is not there", "2 of them are missing")


def test_parts_in_the_wrong_order(parts):
    (parts / "m-00003-of-00005.gguf").rename(parts / "x")
    (parts / "m-00002-of-00005.gguf").rename(parts / "m-00003-of-00005.gguf")
    (parts / "x").rename(parts / "m-00002-of-00005.gguf")
    refused(
        parts, "m-00002-of-00005.gguf is named as part 2 of 5, but its split.no is 2 and its split.count 5"
    )


def test_a_part_without_its_name(parts):
    shutil.copy(parts / "m-00002-of-00005.gguf", parts.parent / "alone.gguf")
    refused(parts.parent / "alone.gguf", "one of 5 parts (split.count)", "llama-gguf-split --merge")


def test_parts_of_other_models(parts, cut, tmp_path):
    shutil.copy(cut / "whole.gguf", parts / "m-00002-of-00005.gguf")
    refused(parts, "m-00002-of-00005.gguf is named as part 2 of 5, but its split.no is None")
    other = tmp_path / "other"
    other.mkdir()
    write_model(other / "m.gguf", make("llama", attention_bias=True), split=6)
    assert len(list(other.glob("*"))) == 5
    shutil.copy(other / "m-00002-of-00005.gguf", parts / "m-00002-of-00005.gguf")
    refused(parts, "m-00002-of-00005.gguf belongs to another model", "is 29 in one and 21 in the other")


def test_a_tensor_in_two_parts_and_a_wrong_total(parts):
    path = parts / "m-00004-of-00005.gguf"
    with GGUFFile(parts / "m-00002-of-00005.gguf") as first, GGUFFile(path) as file:
        taken, own = next((a, b) for a in first.names for b in file.names if len(a) == len(b))
    data = path.read_bytes()
    path.write_bytes(data.replace(own.encode(), taken.encode()))
    refused(parts, f"m-00004-of-00005.gguf has the tensor '{taken}', and so has", "m-00002-of-00005.gguf")
    path.write_bytes(data)
    for part in parts.iterdir():
        whole = part.read_bytes()
        key = b"split.tensors.count" + (5).to_bytes(4, "little")
        at = whole.index(key) + len(key)
        part.write_bytes(whole[:at] + (22).to_bytes(4, "little") + whole[at + 4 :])
    refused(parts, "split.tensors.count is 22, but its 5 parts hold 21 tensors")


def test_a_damaged_part_is_named(parts):
    path = parts / "m-00004-of-00005.gguf"
    path.write_bytes(path.read_bytes()[:-200])
    refused(parts, "m-00004-of-00005.gguf is damaged")


def test_two_models_in_parts_in_one_directory(parts):
    shutil.copy(parts / "m-00001-of-00005.gguf", parts / "n-00001-of-00001.gguf")
    refused(parts, "holds 6 GGUF files; name one")


def test_the_tokenizer_is_in_the_first_part(tmp_path):
    write_model(tmp_path / "t.gguf", make("llama"), words, split=8)
    last = sorted(tmp_path.glob("t-*.gguf"))[-1]
    found = load_gguf_tokenizer(last)
    assert found is not None
    assert found.encode("AB") == [32, 33]
    assert assemble.load_tokenizer(last).encode("AB") == [32, 33]
