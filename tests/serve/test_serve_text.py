"""``TextStream`` against an oracle that looks at the whole text again after every character."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek.data import Tokenizer
from deepseek.data.tokenizer import train_tokenizer
from deepseek.serve import SamplingConfig
from deepseek.serve.text import TextStream, _Automaton, begins_text

END, OTHER_END = 0, 5  # <|endoftext|>, <|end|>


class Pieces:
    """A tokenizer whose tokens are any bytes; token 0 is the end token and has no text."""

    special_ids = frozenset({0})

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces, self.vocab_size = [b"", *pieces], 1 + len(pieces)

    def piece(self, token: int, *, skip_special: bool = True) -> bytes:
        return self.pieces[token]


#: Parts of é (2 bytes), € (3) and 😀 (4), bytes that are never UTF-8, and letters that stop texts begin with.
PIECES = [
    b"a", b"b", b"ab", b"abc", b"c\xc3", b"\xa9", b"\xe2\x82", b"\xac", b"\xacb", b"\xf0\x9f", b"\x98\x80a", b"\xff"
]  # fmt: skip
STOPS = ["a", "ab", "abc", "bca", "aab", "b€", "é", "€b", "😀a", "cé", "�", "aaaa", "ba", "c", "abcaa"]


def oracle(
    pieces: Sequence[bytes], tokens: Sequence[int], config: SamplingConfig
) -> tuple[str, str | None, object, int]:
    """Shown text, finish, stop, tokens used; quadratic and plain."""
    data, seen = b"", 0

    def cut(text: str, count: int) -> tuple[str, str, str] | None:
        nonlocal seen
        for end in range(seen + 1, len(text) + 1):
            found = max((s for s in config.stop if text[:end].endswith(s)), key=len, default=None)
            if found and count >= config.min_tokens:
                return text[: end if config.include_stop else end - len(found)], "stop", found
        seen = len(text)
        return None

    def decode(final: bool) -> str:
        text = data.decode("utf-8", "replace")
        if final:
            return text
        for n in (1, 2, 3):  # an unfinished character at the end: some continuation makes it valid
            tail = data[-n:]
            lengths = {0xC3: 2, 0xE2: 3, 0xF0: 4}
            missing = lengths.get(tail[0], 0) - n if len(data) >= n else 0
            whole = (tail + b"\x80" * max(missing, 0)).decode("utf-8", "replace")
            if missing > 0 and "�" not in whole:
                return data[:-n].decode("utf-8", "replace")
        return text

    for count, token in enumerate(tokens, 1):
        if token == 0 and not config.ignore_eos and count > config.min_tokens:
            return data.decode("utf-8", "replace"), "stop", 0, count
        data += pieces[token - 1] if token else b""
        final = count >= config.max_tokens
        if stopped := cut(decode(final), count):
            return *stopped, count
        if final:
            return decode(True), "length", None, count
    return decode(True), None, None, len(tokens)


@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    tokens=st.lists(st.integers(0, len(PIECES)), max_size=25),
    stops=st.lists(st.sampled_from(STOPS), max_size=4, unique=True),
    include=st.booleans(),
    ignore=st.booleans(),
    least=st.integers(0, 5),
    most=st.integers(5, 30),
)
def test_shown_text_is_the_oracles(
    tokens: list[int], stops: list[str], include: bool, ignore: bool, least: int, most: int
) -> None:
    config = SamplingConfig(
        stop=tuple(stops), include_stop=include, ignore_eos=ignore, min_tokens=least, max_tokens=most
    )
    stream = TextStream(Pieces(PIECES), config, (END,))  # type: ignore[arg-type]
    text, finish, stop, used = oracle(PIECES, tokens, config)
    shown, pushed = "", 0
    for token in tokens:
        new = stream.push(token)
        pushed += 1
        shown += new
        assert text.startswith(shown)  # nothing has to be taken back
        if stream.finish:
            break
    if finish is None:  # what was held back comes out when something else ends it
        shown += stream.close("abort")
        if stream.finish == "stop":  # an unfinished character became U+FFFD, and that was a stop text
            assert "�" in stops
            return
        finish = "abort"
    assert (shown, stream.finish, stream.stop, pushed) == (text, finish, stop, used)
    assert stream.text == shown
    assert stream.pushed == pushed
    assert stream.close("abort") == ""


@settings(max_examples=300, deadline=None)
@given(tokens=st.lists(st.integers(1, len(PIECES)), max_size=30))
def test_text_comes_as_early_as_it_can(tokens: list[int]) -> None:
    """Without stop texts every whole character is shown at once; with them, all but a beginning of one."""
    plain = TextStream(Pieces(PIECES), SamplingConfig())  # type: ignore[arg-type]
    held = TextStream(Pieces(PIECES), SamplingConfig(stop=("abcabcabc!", "€€€!")))  # type: ignore[arg-type]
    for token in tokens:
        plain.push(token)
        held.push(token)
        text = plain.text
        longest = max(
            (n for s in ("abcabcabc!", "€€€!") for n in range(len(s)) if text.endswith(s[:n])), default=0
        )
        assert held.text == text[: len(text) - longest]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    return train_tokenizer([text, "naïve café 😀 €uro 漢字"] * 3, 600)


def test_text_of_a_real_tokenizer(trained: Tokenizer) -> None:
    text = "# naïve café: 😀😀 costs 3 €uro, 漢字!\n\n    done()"
    ids = trained.encode(text)
    stream = TextStream(trained, SamplingConfig(), trained.end_ids)
    assert "".join(stream.push(i) for i in [*ids, trained.eos_id]) == text
    assert (stream.finish, stream.stop) == ("stop", trained.eos_id)


def test_stop_text_across_tokens_and_after_a_false_start(trained: Tokenizer) -> None:
    stream = TextStream(trained, SamplingConfig(stop=("\n\n\nEND", "\n\nE!")), trained.end_ids)
    shown = [stream.push(i) for c in "a\n\n\n\nEN\n\n\nENDz" if not stream.finish for i in trained.encode(c)]
    assert "".join(shown) == "a\n\n\n\nEN"
    assert (stream.finish, stream.stop) == ("stop", "\n\n\nEND")
    assert shown[1:4] == ["", "", ""]


def test_a_stop_text_that_begins_in_one_that_is_ignored() -> None:
    config = SamplingConfig(stop=("ab", "bca"), min_tokens=3)
    stream = TextStream(Pieces([b"a", b"b", b"ca"]), config)  # type: ignore[arg-type]
    assert [stream.push(i) for i in (1, 2, 3)] == ["", "a", ""]
    assert (stream.text, stream.stop) == ("a", "bca")


def test_a_stop_text_inside_the_beginning_of_another() -> None:
    stream = TextStream(Pieces([b"a", b"b"]), SamplingConfig(stop=("aabb", "ab")))  # type: ignore[arg-type]
    assert [stream.push(i) for i in (1, 1, 2)] == ["", "", "a"]
    assert (stream.text, stream.stop) == ("a", "ab")


def test_stop_token_ids_and_include_stop(trained: Tokenizer) -> None:
    dot = trained.encode(".")[0]
    for include, text in [(False, "yes"), (True, "yes.")]:
        config = SamplingConfig(stop_token_ids=(dot,), include_stop=include)
        stream = TextStream(trained, config, trained.end_ids)
        for i in [*trained.encode("yes"), dot]:
            stream.push(i)
        assert (stream.text, stream.finish, stream.stop) == (text, "stop", dot)


def test_end_tokens_before_min_tokens_and_ignored_ones(trained: Tokenizer) -> None:
    config = SamplingConfig(min_tokens=2)
    stream = TextStream(trained, config, trained.end_ids)
    a = trained.encode("a")[0]
    assert [stream.push(i) or stream.finish for i in (OTHER_END, a, OTHER_END)] == [None, "a", "stop"]
    stream = TextStream(trained, SamplingConfig(ignore_eos=True, max_tokens=3), trained.end_ids)
    assert [stream.push(i) or stream.finish for i in (END, OTHER_END, END)] == [None, None, "length"]


def sentencepiece() -> Tokenizer:
    """Words with their space in front, bytes for the rest, and the first space stripped: Llama's and Gemma's."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{b:02X}>": 3 + b for b in range(256)}}
    vocab |= {w: 259 + i for i, w in enumerate(["▁", "a", "b", "▁a", "ab", "▁ab"])}
    merges = [("▁", "a"), ("a", "b"), ("▁", "ab")]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    d = tokenizers.decoders
    inner.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    return Tokenizer(inner, eos="</s>", pad=None)


def test_the_first_space_of_a_text_is_stripped_and_no_other() -> None:
    tokenizer = sentencepiece()
    ids = [264, 262, 3 + 0xE2, 3 + 0x82, 3 + 0xAC, 263]  # ▁ab ▁a € ab
    assert tokenizer.decode(ids) == "ab a€ab"
    for first, text in [(True, "ab a€ab"), (False, " ab a€ab")]:
        stream = TextStream(tokenizer, SamplingConfig(), tokenizer.end_ids, first=first)
        assert "".join([*(stream.push(i) for i in ids), stream.push(2)]) == text


def test_an_answer_begins_the_text_where_its_prompt_has_none() -> None:
    tokenizer = sentencepiece()
    assert begins_text(tokenizer, [1])
    assert begins_text(tokenizer, [1, 2])
    assert not begins_text(tokenizer, [1, 262])


def test_a_long_answer_costs_the_same_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each character of the answer meets the stop texts once, and what is looked at for a token is bounded."""
    pieces = Pieces([b"ab", b"a"])
    config = SamplingConfig(stop=("a" * 200 + "!", "b" * 50), max_tokens=1_000_000)
    stream = TextStream(pieces, config)  # type: ignore[arg-type]
    steps, longest, step, take = 0, 0, _Automaton.step, TextStream._take

    class Links(list[int]):
        """The automaton's failure links, and how many were followed."""

        followed = 0

        def __getitem__(self, node: Any) -> Any:
            self.followed += 1
            return super().__getitem__(node)

    assert stream._stops is not None
    links = Links(stream._stops._fail)
    monkeypatch.setattr(stream._stops, "_fail", links)

    def counted(self: _Automaton, node: int, character: str) -> int:
        nonlocal steps
        steps += 1
        return step(self, node, character)

    def measured(self: TextStream, new: str) -> str:
        nonlocal longest
        longest = max(longest, len(self._held) + len(new))
        return take(self, new)

    monkeypatch.setattr(_Automaton, "step", counted)
    monkeypatch.setattr(TextStream, "_take", measured)
    count = 40_000
    shown = sum(len(stream.push(1 + i % 2)) for i in range(count))
    assert steps == 3 * count // 2  # the characters of "ab" and "a"
    assert 0 < links.followed <= steps
    assert longest <= 200 + 2
    assert shown > steps - 200
