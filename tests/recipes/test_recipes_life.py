"""What comes after training: loading, evaluating, exporting, talking; from what lies on the disk."""

from __future__ import annotations

import gzip
import lzma
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from recipe_runs import events, smallest, write_corpus

from deepseek.assemble import Run, build, load, load_weights, pick_device
from deepseek.batch import Batch
from deepseek.config import replace, to_toml
from deepseek.data import prepare
from deepseek.errors import CheckpointError, ConfigError, DataError, RunError, WeightsError
from deepseek.nn.moe import MoEConfig
from deepseek.recipes import export as export_module
from deepseek.recipes.evaluate import compress_held_out, evaluate_run, held_out_texts
from deepseek.recipes.export import export
from deepseek.recipes.pretrain import PretrainConfig, pretrain, read_config
from deepseek.serve import load as load_language_model
from deepseek.weights import checkpoint

REAL = Path(__file__).read_text(encoding="utf-8") + "naïve café 你好 🙂\r\n\t  <|endoftext|> ½ e\u0301"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("life")


@pytest.fixture(scope="module")
def config(folder: Path) -> PretrainConfig:
    config = smallest(
        write_corpus(folder / "corpus"), data={"cache": str(folder / "cache")}, train={"steps": 6}
    )
    return replace(config, checkpoint=replace(config.checkpoint, every=3, keep_last=0))


@pytest.fixture(scope="module")
def run(config: PretrainConfig, folder: Path) -> Path:
    pretrain(config, folder / "run")
    return folder / "run"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def probe(config: PretrainConfig) -> torch.Tensor:
    return torch.randint(0, 300, (2, 50), generator=torch.Generator().manual_seed(1))


def test_a_run_a_checkpoint_and_an_export_load_as_the_same_model(
    run: Path, config: PretrainConfig, tmp_path: Path
) -> None:
    newest, at_six, at_three = load(run), load(run / "step-000006"), load(run / "step-000003")
    exported = load(export(run, tmp_path / "hf").path)
    assert [newest.step, at_six.step, at_three.step, exported.step] == [6, 6, 3, None]
    assert newest.path == at_three.path == run
    ids = probe(config)
    with torch.no_grad():
        logits = [m.model.logits(m.model(ids).hidden) for m in (newest, at_six, at_three, exported)]
    assert not any(m.model.training for m in (newest, at_six, at_three, exported))
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2], atol=1e-3)
    torch.testing.assert_close(logits[3], logits[0], atol=1e-5, rtol=1e-5)
    for loaded in (newest, exported):
        assert loaded.tokenizer is not None
        assert loaded.tokenizer.encode(REAL) == prepare(config.data).tokenizer.encode(REAL)


def test_every_tensor_of_the_checkpoint_is_in_the_loaded_model(run: Path) -> None:
    saved, loaded = checkpoint.load(run).model, load(run).model.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[k], loaded[k]) for k in saved)
    assert any("router.bias" in k and saved[k].any() for k in saved)


def test_buffers_that_no_checkpoint_holds_are_filled(config: PretrainConfig, tmp_path: Path) -> None:
    moe = MoEConfig(experts=4, top_k=2, expert_ffn=8, default_decay=0.0)
    config = replace(config, model=replace(config.model, moe=moe), train=replace(config.train, steps=1))
    pretrain(config, tmp_path / "run")
    loaded = load(tmp_path / "run")
    assert not any(t.is_meta for t in [*loaded.model.parameters(), *loaded.model.buffers()])
    with torch.no_grad():
        assert loaded.model(probe(config)).hidden.isfinite().all()
    loaded.model.train()
    loaded.model(probe(config)).hidden.sum().backward()


def test_what_cannot_be_loaded_is_named(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run at .*cpoy.*did you mean 'copy'"):
        load(tmp_path / "cpoy")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"no config\.toml"):
        load(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="no checkpoint of step 4; it has: step-000003, step-000006"):
        load(copy / "step-000004")
    (copy / "step-000006" / "manifest.json").unlink()
    for path in (copy, copy / "step-000006"):
        with pytest.raises(CheckpointError, match=r"newest intact checkpoint is step-000003"):
            load(path)
    shutil.rmtree(copy / "step-000003")
    shutil.rmtree(copy / "step-000006")
    with pytest.raises(RunError, match="has no checkpoint yet"):
        load(copy)


def test_a_config_changed_by_hand_is_named(copy: Path) -> None:
    config = read_config(copy / "config.toml")
    wrong = replace(config, model=replace(config.model, hidden=24))
    (copy / "config.toml").write_text(to_toml(wrong))
    with pytest.raises(
        CheckpointError, match=r"does not fit this model.*of another shape.*config\.toml changed"
    ):
        load(copy)
    (copy / "config.toml").write_text("[data]\n")
    with pytest.raises(RunError, match=r"no \[model\] table"):
        load(copy)
    (copy / "config.toml").write_text("[model\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(copy)


def test_a_damaged_weights_file_is_refused(copy: Path) -> None:
    weights = copy / "step-000006" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*step-000003"):
        load(copy)


def test_weights_that_do_not_fit_are_counted(run: Path, config: PretrainConfig) -> None:
    model = build(replace(config.model, vocab_size=320, layers=3), seed=0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"tensors missing \(first: blocks\.2\."):
        load_weights(model, checkpoint.load(run))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_runs_are_also_found_by_name(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = run.parent / "home"
    home.mkdir()
    (home / "runs").symlink_to(run.parent)
    monkeypatch.chdir(home)
    assert load("run").step == 6
    assert Run.open("run").model_config() == read_config(run / "config.toml").model


@pytest.mark.parametrize("name", ["warp", "cuda:99", "meta", "cpu!"])
def test_a_device_that_is_not_here_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.device"):
        pick_device(name)


def test_devices_by_name() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    assert pick_device("auto").type == (accelerator.type if accelerator else "cpu")


def test_a_numbered_device_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton starts kernels on the current device, whatever their tensors lie on."""
    current: list[int] = []
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda")
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "set_device_index", current.append)
    for name in ("auto", "cuda", "cpu"):
        pick_device(name)
    assert not current
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert current == [1]


def test_a_seed_makes_weights_a_function_of_the_config(config: PretrainConfig) -> None:
    first, second, other = (build(config.model, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_evaluating_a_run_gives_what_training_told_last(run: Path, config: PretrainConfig) -> None:
    last = [e for e in events(run) if e["event"] == "evaluate"][-1]
    found = evaluate_run(run, "cpu")
    assert found.step == 6
    assert found.model.bits_per_byte == pytest.approx(last["bits_per_byte"], rel=1e-6)
    assert (found.model.tokens, found.model.bytes) == (last["tokens"], last["bytes"])
    earlier = evaluate_run(run / "step-000003", "cpu", compressors=False)
    assert earlier.step == 3
    assert earlier.model.bits_per_byte > found.model.bits_per_byte
    assert earlier.compressors == []


def test_compressors_see_exactly_the_bytes_of_the_held_out_files(run: Path, config: PretrainConfig) -> None:
    corpus = prepare(config.data)
    assert corpus.held_out is not None
    sources = {corpus.held_out.provenance(i)[1] for i in range(len(corpus.held_out))}
    root = Path(config.data.sources[0].path)
    originals = [(root / Path(name).name).read_bytes() for name in sorted(sources)]
    texts = held_out_texts(corpus)
    assert sorted(texts) == sorted(originals)
    assert (
        sum(map(len, texts))
        == corpus.held_out.n_bytes
        == evaluate_run(run, "cpu", compressors=False).model.bytes
    )
    found = {(c.name, c.how): c.bits_per_byte for c in compress_held_out(corpus)}
    size = sum(map(len, texts))
    assert found["gzip -9", "each file"] == pytest.approx(
        8 * sum(len(gzip.compress(t, 9)) for t in texts) / size
    )
    assert found["xz -9", "one archive"] == pytest.approx(
        8 * len(lzma.compress(b"".join(texts), preset=9)) / size
    )
    assert found["gzip -9", "one archive"] < found["gzip -9", "each file"]


def test_evaluating_on_a_corpus_that_has_changed_is_refused(config: PretrainConfig, tmp_path: Path) -> None:
    own = smallest(write_corpus(tmp_path / "corpus"), train={"steps": 1})
    pretrain(own, tmp_path / "run")
    text = "completely different words that a tokenizer would merge in another way " * 200
    (tmp_path / "corpus" / "new.txt").write_text(text)
    with pytest.raises(DataError, match=r"corpus of .* has changed"):
        evaluate_run(tmp_path / "run", "cpu")
    without = replace(own, data=replace(own.data, held_out=0.0))
    with pytest.raises(DataError, match="no held-out"):
        held_out_texts(prepare(without.data, tmp_path / "cache"))


def test_an_export_is_read_by_transformers_alone(run: Path, config: PretrainConfig, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    done = export(run, tmp_path / "hf")
    assert done.loaded_with == "transformers.AutoModelForCausalLM"
    assert done.max_logit_difference is not None
    assert done.max_logit_difference < 1e-5
    ours = load_language_model(run, device="cpu")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = ours.tokenizer.encode(REAL)
    # transformers parses special tokens in text unless it is told not to.
    assert theirs(REAL, split_special_tokens=True)["input_ids"] == ids
    assert theirs.decode(ids, clean_up_tokenization_spaces=False) == REAL == ours.tokenizer.decode(ids)
    assert theirs.eos_token_id == ours.tokenizer.eos_id
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    prompt = ours.prompt_ids("alpha beta def")
    want = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=20,
        do_sample=False, pad_token_id=ours.tokenizer.pad_id,
    )[0, len(prompt) :].tolist()  # fmt: skip
    assert ours.complete("alpha beta def", temperature=0, max_tokens=20).tokens == [
        t for t in want if t != ours.tokenizer.eos_id
    ]


def test_an_export_goes_beside_the_run_unless_told_and_in_the_format_asked_for(copy: Path) -> None:
    done = export(copy, dtype="bf16", check=False)
    assert done.path == copy / "export"
    assert (done.max_logit_difference, done.loaded_with) == (None, "")
    stored = safetensors.torch.load_file(done.path / "model.safetensors")
    assert {t.dtype for name, t in stored.items() if "embed" in name} == {torch.bfloat16}
    checked = export(copy / "step-000003", copy.parent / "low", dtype="bf16")
    assert checked.max_logit_difference is not None
    assert 0 < checked.max_logit_difference < 0.1
    with pytest.raises(WeightsError, match="fp8"):
        export(copy, dtype="fp8")


def test_an_export_that_reads_back_different_is_an_error(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wrong in (0.5, float("nan")):
        monkeypatch.setattr(export_module, "compare", lambda model, directory, wrong=wrong: (wrong, "me"))
        with pytest.raises(WeightsError, match="do not use it"):
            export(run, tmp_path / f"hf{wrong}")


def test_a_trained_model_talks(run: Path) -> None:
    model = load_language_model(run, device="cpu", precision="fp32")
    text = model.generate("alpha beta", seed=0, max_tokens=20)
    assert text == "".join(model.stream("alpha beta", seed=0, max_tokens=20))
    batch = Batch.from_rows(torch.tensor([model.prompt_ids("alpha beta gamma delta")]))
    assert batch.n_targets > 3
    with pytest.raises(ConfigError, match="precision_mode"):
        load_language_model(run, device="cpu", precision="fp7")
