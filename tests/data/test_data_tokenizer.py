"""The tokenizer: round trips, byte counts, equality of the fast lane with the library, and other people's
files.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.data import SourceConfig, Tokenizer, open_source, train_tokenizer
from deepseek.data.fast_lane import PATTERN, FastLane, ascii_pattern
from deepseek.errors import ConfigError, DataError

TEXTS = [d.text for d in open_source(SourceConfig()).sample(600_000)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 1024)


# Blanks, ends of lines, controls that Python and Oniguruma class differently, characters of many scripts.
ODD = " \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x00\x7f\x85\xa0'_0123456789aZé中½Ⅷ٣\u0301\u2028\u3000🙂"
AWKWARD = st.text(st.one_of(st.sampled_from(ODD), st.characters(exclude_categories=["Cs"])), max_size=60)
ASCII = st.text(st.sampled_from(" \t\n\r\x0b\x0c\x1c\x1fabzAZ019_'\".,(){}:=#-\\/"), max_size=80)


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(AWKWARD, ASCII, st.text()))
def test_round_trip_and_byte_counts(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.token_bytes[ids].sum()) == len(text.encode())
    assert not tokenizer.special_ids & set(ids)


@settings(max_examples=500, deadline=None)
@given(text=st.one_of(AWKWARD, ASCII, st.lists(st.one_of(AWKWARD, ASCII), max_size=6).map("\n".join)))
def test_the_fast_lane_equals_the_library(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer._fast is not None
    assert tokenizer.encode(text) == tokenizer._inner.encode(text, add_special_tokens=False).ids


def test_real_files(tokenizer: Tokenizer) -> None:
    texts = [d.text for d in open_source(SourceConfig()).sample(2_000_000)]
    assert any(not t.isascii() for t in texts)
    theirs = tokenizer._inner.encode_batch(texts, add_special_tokens=False)
    for text, ids, other in zip(texts, tokenizer.encode_batch(texts), theirs):
        assert ids.dtype == np.int32
        assert ids.tolist() == other.ids
        assert int(tokenizer.token_bytes[ids].sum()) == len(text.encode())
        assert tokenizer.decode(ids) == text


def test_decode_equals_the_library(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("naïve — 中文 🙂\n    return x")
    for stop in range(len(ids)):
        assert tokenizer.decode(ids[:stop]) == tokenizer._inner.decode(ids[:stop])


def test_indentation_and_digits(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode(" " * 8)) == 1
    pieces = ascii_pattern(PATTERN)
    assert pieces is not None
    assert pieces.findall("        return x12345") == ["       ", " return", " x", "123", "45"]
    assert pieces.findall("if a:\n\n    b'self'") == ["if", " a", ":\n\n", "   ", " b", "'self", "'"]


def test_special_tokens_come_only_when_asked(tokenizer: Tokenizer) -> None:
    assert (tokenizer.eos_id, tokenizer.pad_id) == (0, 1)
    assert [tokenizer.token_id(t) for t in ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")] == [
        2,
        3,
        4,
        5,
    ]
    text = "a<|endoftext|>b"
    assert 0 not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode(text, special=True)
    assert ids.count(0) == 1
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, skip_special=False) == text
    assert 0 not in tokenizer.encode(text)
    with pytest.raises(DataError, match=r"did you mean '<\|user\|>'"):
        tokenizer.token_id("<|usr|>")


@settings(max_examples=100, deadline=None)
@given(text=AWKWARD)
def test_streaming_never_shows_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    stream = tokenizer.stream()
    shown = ""
    for token in tokenizer.encode(text):
        shown += stream.push(token)
        assert text.startswith(shown)
    assert shown + stream.finish() == text


def test_streaming_a_broken_character(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    lead = tokenizer.encode("🙂")[0]
    assert stream.push(lead) == ""
    assert stream.finish() == "\ufffd"


def test_training_is_deterministic_and_saves(tokenizer: Tokenizer, tmp_path: Path) -> None:
    again = train_tokenizer(TEXTS, 1024)
    assert again.fingerprint == tokenizer.fingerprint
    assert train_tokenizer(TEXTS, 1000).fingerprint != tokenizer.fingerprint
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.vocab_size, loaded.eos_id, loaded.pad_id) == (1024, 0, 1)
    assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert (loaded.token_bytes == tokenizer.token_bytes).all()


def test_transformers_reads_what_we_save(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    text = TEXTS[1] + "naïve 中文 🙂"
    assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (0, 1)
    assert theirs.decode(tokenizer.encode(text)) == text


def test_a_foreign_tokenizer_of_metaspace_pieces(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    inner.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    inner.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", "<s>", "</s>", *fallback], show_progress=False
    )
    inner.train_from_iterator([t[:2000] for t in TEXTS[:20]], trainer)
    state = json.loads(inner.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer._fast is None
    assert tokenizer.eos_id == tokenizer.pad_id == 2
    text = "def f(x): return x  # 中文"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.token_bytes[ids].sum()) == len(text.encode())


def test_damaged_and_missing_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer at"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(DataError, match="is not a tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
    with pytest.raises(DataError, match="no end-of-text token"):
        Tokenizer.load(tmp_path)


def test_impossible_requests(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="256 bytes and 6 special tokens need 262"):
        train_tokenizer(TEXTS, 200)
    with pytest.raises(DataError, match="no text"):
        train_tokenizer([], 300)
    for text in ("a\ud800", "\ud800"):
        with pytest.raises(DataError, match="surrogate"):
            tokenizer.encode(text)
    with pytest.raises(DataError, match="outside the vocabulary of 1024"):
        tokenizer.decode([5000])


@pytest.mark.parametrize(
    "pattern",
    [
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{PATTERN}",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    ],
)
def test_other_patterns_take_the_lane_for_ascii(tokenizer: Tokenizer, pattern: str) -> None:
    spec = json.loads(tokenizer._inner.to_str())
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": pattern}
    inner = tokenizers.Tokenizer.from_str(json.dumps(spec))
    lane = FastLane.of(inner)
    assert lane is not None
    text = "I'Ll don't 'self'  x\n\n\t y1234 \x1c z\r\n" + TEXTS[0]
    for sample in (text, text + " é 中文  x"):
        assert lane.encode_batch([sample])[0].tolist() == inner.encode(sample, add_special_tokens=False).ids


def test_what_cannot_be_translated_keeps_to_the_library() -> None:
    assert ascii_pattern(r"\p{Lu}+|.") is None
    assert ascii_pattern(r"[\S]+") is None
    assert ascii_pattern(r"(a)|b") is None
    assert ascii_pattern(r"\w+") is None
