"""Tokenizers in GGUF metadata against `transformers`' own classes for the same vocabulary, and SmolLM2's."""

import json

import gguf
import numpy as np
import pytest
import tokenizers
import transformers
from gguf_models import smollm2, write
from tokenizers import Regex, models, pre_tokenizers, trainers

from deepseek.data import Tokenizer
from deepseek.errors import WeightsError
from deepseek.weights.gguf_tokenizer import CUTS, load_gguf_tokenizer

TEXTS = [
    "def f(x):\n    return x  # I'll say it's DON'T\n\n\n\tx = 3.14159 + 2024\r\n  y",
    "Smørrebrød, naïve café, 中文字符 и кириллица, עברית ۱۲۳ ½ ²",
    "🙂👩\u200d👩\u200d👧 \u200b\u00a0  \u3000end ",
    "", " ", "  \n ", "a", "\x00\x01", "e\u0301 vs \u00e9", "<|im_start|>", "words words words 12345678",
]  # fmt: skip
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def trained(pattern: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(TEXTS * 4, trainer)
    model = json.loads(inner.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def write_tokenizer(path, vocab, merges=(), *, model="gpt2", pre="", more=lambda writer: None, **types):
    tokens = sorted(vocab, key=vocab.__getitem__)

    def fill(writer):
        writer.add_tokenizer_model(model)
        if pre:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([types.get(t, 3 if t in SPECIAL else 1) for t in tokens])
        if merges:
            writer.add_token_merges([" ".join(pair) for pair in merges])
        writer.add_eos_token_id(vocab.get("<|im_end|>", 2))
        writer.add_bos_token_id(1)
        more(writer)

    return write(path, "llama", {"x": np.ones(4, np.float32)}, fill)


def equal(ours: Tokenizer, theirs, texts=TEXTS):
    for text in texts:
        expected = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, special=True) == expected, text
        if not any(s in text for s in SPECIAL):
            assert ours.encode(text) == expected


@pytest.mark.parametrize(
    ("pre", "reference"),
    [
        ("qwen2", transformers.Qwen2Tokenizer),
        ("gpt-2", transformers.GPT2Tokenizer),
        ("", transformers.GPT2Tokenizer),
    ],
)
def test_equal_to_the_class_of_transformers(pre, reference, tmp_path):
    vocab, merges = trained(CUTS[pre or "default"].patterns[0])
    theirs = reference(vocab=vocab, merges=merges, additional_special_tokens=SPECIAL)
    ours = load_gguf_tokenizer(write_tokenizer(tmp_path / "t.gguf", vocab, merges, pre=pre))
    equal(ours, theirs)
    assert not ours.add_bos
    assert ours.end_ids == {0, 2}
    ours.save(tmp_path / "saved")
    named = json.loads((tmp_path / "saved/tokenizer_config.json").read_text())["tokenizer_class"]
    assert named == ("Qwen2Tokenizer" if pre == "qwen2" else "PreTrainedTokenizerFast")
    equal(ours, transformers.AutoTokenizer.from_pretrained(tmp_path / "saved"))


def test_llama_3(tmp_path):
    """Digits in threes; a piece that is a token is one, whatever the merges say; text begins with the start token."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    pattern = TikTokenConverter().pattern
    vocab, merges = trained(pattern)
    vocab = {**vocab, "zqx": len(vocab)}  # a token that no merges make
    theirs = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    ours = load_gguf_tokenizer(write_tokenizer(tmp_path / "t.gguf", vocab, merges, pre="llama-bpe"))
    for text in [*TEXTS, "zqx", "12345"]:
        assert ours.encode(text) == theirs.encode(text).ids
    assert ours.encode("zqx") == [vocab["zqx"]]
    assert ours.prefix == (1,)
    assert ours.prompt("zqx") == [1, vocab["zqx"]]


@pytest.mark.parametrize(
    ("pre", "like"), [("smaug-bpe", "llama-bpe"), ("dbrx", "llama-bpe"), ("deepseek-r1-qwen", "qwen2")]
)
def test_names_of_the_same_cut(pre, like, tmp_path):
    """llama.cpp has one pattern for both. Merges decide what is a token; a start token has to be asked for."""
    vocab, merges = trained(CUTS[like].patterns[0])
    vocab = {**vocab, "zqx": len(vocab)}
    path = write_tokenizer(tmp_path / "t.gguf", vocab, merges, pre=pre)
    ours, other = (load_gguf_tokenizer(p) for p in (
        path, write_tokenizer(tmp_path / "u.gguf", vocab, merges, pre=like)
    ))  # fmt: skip
    for text in TEXTS:
        if "\u0301" not in text:  # composed by one of them
            assert ours.encode(text) == other.encode(text)
    assert len(ours.encode("zqx")) > 1
    assert ours.prefix == ()
    asked = lambda writer: writer.add_add_bos_token(True)  # noqa: E731
    asking = load_gguf_tokenizer(write_tokenizer(path, vocab, merges, pre=pre, more=asked))
    assert asking.prefix == (1,)


def test_digits_of_smollm_stand_alone(tmp_path):
    """As the model's own tokenizer cuts them; `transformers` reads this GGUF rule as plain GPT-2."""
    vocab, merges = trained(CUTS["gpt-2"].patterns[0])
    ours = load_gguf_tokenizer(write_tokenizer(tmp_path / "t.gguf", vocab, merges, pre="smollm"))
    assert [ours.decode([i]) for i in ours.encode("a 2024")][-4:] == list("2024")
    theirs = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    theirs.pre_tokenizer = pre_tokenizers.Sequence(  # SmolLM2's tokenizer.json
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False, use_regex=True)]
    )
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text).ids


def test_sentencepiece(tmp_path):
    inner = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    inner.train_from_iterator([t for t in TEXTS if t.isascii()] * 4, trainer)
    model = json.loads(inner.to_str())["model"]
    vocab, merges = model["vocab"], [tuple(m) for m in model["merges"]]
    order = {a + b: i for i, (a, b) in enumerate(merges)}

    def more(writer):
        tokens = sorted(vocab, key=vocab.__getitem__)
        writer.add_token_scores([-float(order.get(t, 10_000)) for t in tokens])

    types = {"<unk>": 2, "<s>": 3, "</s>": 3} | dict.fromkeys(bytes_, 6)
    path = write_tokenizer(tmp_path / "t.gguf", vocab, model="llama", more=more, **types)
    ours = load_gguf_tokenizer(path)
    theirs = transformers.LlamaTokenizer(vocab=vocab, merges=merges)
    equal(ours, theirs, [t for t in TEXTS if t and not t.startswith(" ")])
    for text in TEXTS:
        assert ours.decode(ours.encode(text)) == text, text
    assert ours.prefix == (1,)
    assert ours.end_ids == {2}


def test_user_defined_tokens_are_text_and_control_tokens_are_not(tmp_path):
    vocab, merges = trained(CUTS["gpt-2"].patterns[0])
    vocab |= {"<tool_call>": len(vocab), "<|eot_id|>": len(vocab) + 1}

    def more(writer):
        writer.add_eot_token_id(vocab["<|eot_id|>"])
        writer.add_add_bos_token(True)
        writer.add_chat_template(
            [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "y"}]
        )

    types = {"<tool_call>": 4, "<|eot_id|>": 3}
    ours = load_gguf_tokenizer(write_tokenizer(tmp_path / "t.gguf", vocab, merges, more=more, **types))
    call, turn = vocab["<tool_call>"], vocab["<|eot_id|>"]
    assert ours.encode("<tool_call><|eot_id|>", special=True) == [call, turn]
    assert ours.decode([call, turn]) == "<tool_call>"
    assert ours.end_ids == {0, 2, turn}
    assert (ours.bos_id, ours.prefix, ours.chat_templates) == (1, (1,), {"default": "x", "tool_use": "y"})
    ours.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert (again.end_ids, again.prefix, again.chat_templates) == (
        ours.end_ids,
        ours.prefix,
        ours.chat_templates,
    )
    assert again.fingerprint == ours.fingerprint


def test_what_is_refused(tmp_path):
    vocab, merges = trained(CUTS["gpt-2"].patterns[0])

    def refused(words, vocab=vocab, merges=merges, **options):
        with pytest.raises(WeightsError, match=words) as caught:
            load_gguf_tokenizer(write_tokenizer(tmp_path / "t.gguf", vocab, merges, **options))
        assert "\n" not in str(caught.value)

    refused(r"tokenizer.ggml.pre is 'gpt-3'; we know default, .*did you mean", pre="gpt-3")
    refused("tokenizer.ggml.model is 'rwkv'; we know 'gpt2' and 'llama'", model="rwkv")
    refused("makes 1 tokens that are not in the vocabulary, e.g. 'abc'", merges=[*merges, ("a", "bc")])
    refused("each is two tokens and a space", merges=[("a", "b c")])
    refused("eos_token_id is 99999; the tokenizer has", more=lambda w: w.add_eot_token_id(5) or w.add_uint32(
        "tokenizer.ggml.padding_token_id", 5) or w.kv_data[0].update(
            {"tokenizer.ggml.eos_token_id": gguf.gguf_writer.GGUFValue(99999, gguf.GGUFValueType.UINT32)}))  # fmt: skip


def test_a_file_without_a_tokenizer(tmp_path):
    assert load_gguf_tokenizer(write(tmp_path / "t.gguf", "llama", {"x": np.ones(4, np.float32)})) is None


@pytest.mark.slow
def test_smollm2_equals_transformers():
    path = smollm2()
    ours = load_gguf_tokenizer(path)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    equal(ours, theirs, [t for t in TEXTS if "½" not in t])
    # transformers reads the rule "smollm" as plain GPT-2; this is the model's own tokenizer.json:
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False, use_regex=True)]
    )
    equal(ours, theirs)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (1, 2, 2)
    assert not ours.add_bos
    assert ours.end_ids == {0, 2}
    assert theirs.chat_template == ours.chat_templates["default"]
    text = TEXTS[0] + TEXTS[1]
    stream = ours.stream()
    assert "".join(stream.push(i) for i in ours.encode(text)) + stream.finish() == text
