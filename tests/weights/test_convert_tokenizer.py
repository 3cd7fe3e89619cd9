"""The tokenizer of an exported directory: equal ids under `AutoTokenizer`, special tokens, chat template."""

import json

import pytest
import torch

from deepseek.config import replace
from deepseek.data.tokenizer import train_tokenizer
from deepseek.errors import WeightsError
from deepseek.models import ModelConfig, Transformer
from deepseek.nn.attention import AttentionConfig
from deepseek.nn.moe import MoEConfig
from deepseek.weights.convert import save_hf

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

TEXTS = [
    "class MoE(nn.Module):\n    def forward(self, x):\n        return {'self': x, 'k': 12345678}\n" * 3,
    "It's what they'll say: don't, I'd've; 3.14159 2026-11-22   and  \t tabs\r\n\r\n\n",
    "é e\u0301 漢字 emoji 👩‍👩‍👧 ﬁ Ω \u00a0nbsp  trailing   ",
    "",
    " ",
]
DENSE = ModelConfig(
    vocab_size=400, hidden=32, layers=2, ffn=48, pattern="F",
    attention=AttentionConfig(heads=4, kv_heads=2, head_dim=8),
)  # fmt: skip
QK = replace(DENSE.attention, qk_norm=True)
SHAPES = {
    "llama": DENSE,
    "mistral": replace(DENSE, pattern="L"),
    "qwen3": replace(DENSE, attention=QK),
    "mixtral": replace(DENSE, moe=MoEConfig(experts=4, expert_ffn=16)),
    "qwen3_moe": replace(DENSE, moe=MoEConfig(experts=4, expert_ffn=16), attention=QK),
    "deepseek_hybrid": replace(DENSE, pattern="LH"),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "tokenizer"
    made = train_tokenizer(TEXTS, 400)
    made.save(directory)
    return made, directory


@pytest.mark.parametrize("name", SHAPES)
def test_auto_tokenizer_gives_our_ids(name, tokenizer, tmp_path):
    ours, directory = tokenizer
    exported = save_hf(Transformer(SHAPES[name]), tmp_path / "m", directory)
    assert exported.model_type == name
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    for text in TEXTS:
        assert theirs(text).input_ids == ours.encode(text)
        assert theirs.decode(theirs(text).input_ids) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 0, 1)
    assert theirs.model_max_length == DENSE.max_length


def test_qwen2_is_not_written_with_a_tokenizer_it_would_misread(tokenizer, tmp_path):
    ours, directory = tokenizer
    model = Transformer(replace(DENSE, attention=replace(DENSE.attention, bias=True)))
    assert save_hf(model, tmp_path / "bare").model_type == "qwen2"
    exported = save_hf(model, tmp_path / "m", directory)
    assert exported.model_type == "deepseek_hybrid"
    assert "Qwen2Tokenizer" in exported.reason
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert [theirs(t).input_ids for t in TEXTS] == [ours.encode(t) for t in TEXTS]


def test_chat_template(tokenizer, tmp_path):
    ours, directory = tokenizer
    save_hf(Transformer(DENSE), tmp_path / "m", directory)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|endoftext|><|system|>Be kind.<|end|><|user|>Hi<|end|><|assistant|>"
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == ours.encode(text, special=True)
    save_hf(Transformer(DENSE), tmp_path / "m", directory, chat_template="{{ messages[0].content }}!")
    other = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert other.apply_chat_template(messages, tokenize=False) == "Be kind.!"


def test_generation_config(tokenizer, tmp_path):
    _, directory = tokenizer
    save_hf(Transformer(DENSE), tmp_path / "m", directory, generation={"temperature": 0.7, "do_sample": True})
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "m")
    assert (generation.eos_token_id, generation.pad_token_id, generation.bos_token_id) == ([0, 5], 1, 0)
    assert (generation.temperature, generation.do_sample) == (0.7, True)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "m")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 0, 1)


def test_a_foreign_tokenizer_keeps_its_settings(tokenizer, tmp_path):
    made, _ = tokenizer
    made.save(tmp_path / "t")
    path = tmp_path / "t/tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": {"content": "<|end|>"}, "x": 1}))
    (tmp_path / "t/chat_template.jinja").write_text("theirs")
    save_hf(Transformer(DENSE), tmp_path / "m", tmp_path / "t")
    assert json.loads((tmp_path / "m/config.json").read_text())["eos_token_id"] == 5
    assert json.loads((tmp_path / "m/tokenizer_config.json").read_text())["x"] == 1
    assert (tmp_path / "m/chat_template.jinja").read_text() == "theirs"


def test_without_a_tokenizer_no_ids_are_invented(tmp_path):
    save_hf(Transformer(DENSE), tmp_path / "m")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "m")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)


def test_what_is_no_tokenizer(tokenizer, tmp_path):
    ours, directory = tokenizer
    small = Transformer(replace(DENSE, vocab_size=300))
    with pytest.raises(
        WeightsError, match=f"token id {ours.vocab_size - 1}, but the model's vocab_size is 300"
    ):
        save_hf(small, tmp_path / "m", directory)
    with pytest.raises(WeightsError, match=r"no tokenizer\.json"):
        save_hf(small, tmp_path / "m", tmp_path)
    for text in ("{", "[]", "{}", '{"model": 3}', '{"model": {"vocab": {}}, "added_tokens": [1]}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(WeightsError, match=r"tokenizer\.json"):
            save_hf(small, tmp_path / "m", tmp_path)
    assert not (tmp_path / "m").exists()


def test_generation_stops_at_our_end_of_text(tokenizer, tmp_path):
    """Plain `transformers`, from our files alone: text in, tokens out, ended by our end token."""
    _, directory = tokenizer
    model = Transformer(DENSE)
    with torch.no_grad():
        model.norm.weight.zero_()  # all logits are equal, so the first token, id 0, is the likeliest
    save_hf(model, tmp_path / "m", directory)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    inputs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")("class", return_tensors="pt")
    out = loaded.generate(**inputs, max_new_tokens=8)
    assert out[0, inputs.input_ids.shape[1] :].tolist() == [0]
