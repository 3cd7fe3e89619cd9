"""Generation against a loop without a cache, against transformers, and as text: stops, streams, characters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek.assemble import Loaded
from deepseek.data import Tokenizer, train_tokenizer
from deepseek.errors import ConfigError, DataError, WeightsError
from deepseek.events import MemorySink, attached
from deepseek.models import Transformer
from deepseek.models.config import tiny
from deepseek.nn.attention import AttentionConfig
from deepseek.nn.moe import MoEConfig
from deepseek.serve import LanguageModel, Message, SamplingConfig
from deepseek.weights.convert import load_hf

TEXT = "the quick brown fox jumps over the lazy dog; naïve café 你好，世界 🙂🙃 " * 20


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT], 320)


def network(
    pattern: str, experts: int, vocab: int = 320, max_length: int = 64, **changes: Any
) -> Transformer:
    torch.manual_seed(0)
    net = Transformer(
        tiny(
            vocab_size=vocab, hidden=32, layers=2, ffn=48, pattern=pattern, max_length=max_length,
            attention=AttentionConfig(heads=4, kv_heads=2, head_dim=8, window=8, block=8, stride=4, qk_norm=True),
            moe=MoEConfig(experts=experts, top_k=2, expert_ffn=16), **changes,
        )
    )  # fmt: skip
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    return net.eval()


def language_model(net: Transformer, tokenizer: Tokenizer | None) -> LanguageModel:
    return LanguageModel(Loaded(net, tokenizer, Path("somewhere"), None))


@torch.no_grad()
def naive(net: Transformer, ids: list[int], n: int, limit: int, eos: Sequence[int]) -> list[int]:
    """The whole text through the model for every token."""
    out: list[int] = []
    while len(out) < n:
        logits = net.logits(net(torch.tensor([ids + out])).hidden[0, -1])[:limit]
        token = int(logits.argmax())
        if token in eos:
            break
        out.append(token)
    return out


@pytest.mark.parametrize("pattern", ["F", "L", "H", "LH", "HF"])
@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("prompt", [1, 7, 8, 20])
def test_greedy_is_the_loop_without_a_cache(
    pattern: str, experts: int, prompt: int, tokenizer: Tokenizer
) -> None:
    net = network(pattern, experts)
    model = language_model(net, tokenizer)
    ids = torch.randint(6, 300, (prompt,), generator=torch.Generator().manual_seed(prompt)).tolist()
    found = model.complete(ids, temperature=0, max_tokens=30)
    ends = (tokenizer.eos_id, tokenizer.token_id("<|end|>"))
    assert found.tokens == naive(net, ids, 30, tokenizer.vocab_size, ends)
    assert len(set(found.tokens)) > 1
    assert found.text == tokenizer.decode(found.tokens)


def test_greedy_is_transformers_generate_on_a_llama(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    model = language_model(load_hf(tmp_path, dtype=torch.float32), Tokenizer.load(tmp_path))
    ids = model.prompt_ids("the lazy naïve fox")
    want = theirs.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=40,
        do_sample=False, pad_token_id=1,
    )[0, len(ids) :].tolist()  # fmt: skip
    found = model.complete("the lazy naïve fox", temperature=0, max_tokens=40)
    assert found.tokens == [t for t in want if t != 0]
    assert len(set(want)) > 5


def test_a_seed_repeats_and_streams_are_the_text(tokenizer: Tokenizer) -> None:
    model = language_model(network("LH", 4), tokenizer)
    texts = set()
    for seed in range(6):
        options: dict[str, Any] = {"temperature": 1.0, "seed": seed, "max_tokens": 40}
        pieces = list(model.stream("the fox", **options))
        text = model.generate("the fox", **options)
        assert "".join(pieces) == text
        assert text == model.generate("the fox", SamplingConfig(**options))
        assert len(pieces) > 1
        texts.add(text)
    assert len(texts) == 6


class Scripted(LanguageModel):
    """Says what it is told, so that what happens to the text can be seen."""

    def __init__(self, tokenizer: Tokenizer, script: Sequence[int], max_length: int = 64) -> None:
        super().__init__(Loaded(network("F", 0, max_length=max_length), tokenizer, Path("somewhere"), None))
        self.script = script

    def tokens(self, ids: Sequence[int], sampling: SamplingConfig) -> Iterator[int]:
        return cycle([*self.script, self.tokenizer.eos_id])


def bytewise(tokenizer: Tokenizer, text: str) -> list[int]:
    """``text`` as one token a byte: characters and stop texts are cut everywhere."""
    table = {tokenizer.piece(i): i for i in range(tokenizer.vocab_size) if len(tokenizer.piece(i)) == 1}
    return [table[bytes([b])] for b in text.encode()]


SAID = "naïve café 你好，世界 🙂🙃 STOP the rest"
STOPS: list[tuple[tuple[str, ...], str]] = [
    ((), SAID),
    (("STOP",), "naïve café 你好，世界 🙂🙃 "),
    (("rest", "STOP the"), "naïve café 你好，世界 🙂🙃 "),
    (("🙃",), "naïve café 你好，世界 🙂"),
    (("世界 🙂",), "naïve café 你好，"),
    (("n",), ""),
    (("restless", "STOPP", "the resting"), SAID),
    (("rest",), SAID[:-4]),
    (("é 你好，世界 🙂🙃 STOP the rest",), "naïve caf"),
]


@pytest.mark.parametrize(("stop", "shown"), STOPS)
@pytest.mark.parametrize("pieces", ["bytes", "tokens"])
def test_a_stop_text_ends_the_answer_and_is_never_shown(
    stop: tuple[str, ...], shown: str, pieces: str, tokenizer: Tokenizer
) -> None:
    script = bytewise(tokenizer, SAID) if pieces == "bytes" else tokenizer.encode(SAID)
    model = Scripted(tokenizer, script, max_length=256)
    done = model.complete("hi", stop=stop, max_tokens=200)
    assert (done.text, done.finish_reason) == (shown, "stop")
    streamed = list(model.stream("hi", stop=stop, max_tokens=200))
    assert "".join(streamed) == shown
    assert "�" not in "".join(streamed)
    assert all(streamed)  # no empty pieces


def test_text_streams_as_soon_as_it_cannot_become_a_stop(tokenizer: Tokenizer) -> None:
    model = Scripted(tokenizer, bytewise(tokenizer, "aSTO bé🙂"), max_length=256)
    assert list(model.stream("x", stop=("STOP",), max_tokens=200)) == ["a", "STO ", "b", "é", "🙂"]


@pytest.mark.parametrize("n", range(1, 12))
@pytest.mark.parametrize("stop", [(), ("zzz",)])
def test_a_character_cut_by_the_token_limit_is_one_replacement(
    n: int, stop: tuple[str, ...], tokenizer: Tokenizer
) -> None:
    model = Scripted(tokenizer, bytewise(tokenizer, "é你🙂é你🙂"), max_length=256)
    done = model.complete("x", max_tokens=n, stop=stop)
    assert done.text == "é你🙂é你🙂".encode()[:n].decode(errors="replace")
    assert (len(done.tokens), done.finish_reason) == (n, "length")
    assert "".join(model.stream("x", max_tokens=n, stop=stop)) == done.text


@pytest.mark.parametrize("stop", [(), ("zzz",)])
def test_a_character_left_open_at_the_end_of_text_is_one_replacement(
    stop: tuple[str, ...], tokenizer: Tokenizer
) -> None:
    model = Scripted(tokenizer, bytewise(tokenizer, "ab🙂")[:-1])
    assert model.complete("x", stop=stop).text == "ab�"


def test_the_answer_is_as_long_as_max_tokens_or_the_models_length_allow(tokenizer: Tokenizer) -> None:
    model = Scripted(tokenizer, bytewise(tokenizer, "a" * 100), max_length=64)
    ids = list(range(10, 30))
    assert len(model.complete(ids, max_tokens=5).tokens) == 5
    assert len(model.complete(ids, max_tokens=1000).tokens) == 44
    assert len(model.complete(list(range(63)), max_tokens=1000).tokens) == 1
    real = language_model(network("H", 4), tokenizer)
    done = real.complete(ids, max_tokens=1000, seed=0)
    assert len(done.tokens) == 44 or done.finish_reason == "stop"


def test_the_end_of_text_and_the_end_of_a_turn_end_an_answer(tokenizer: Tokenizer) -> None:
    for end in ("<|endoftext|>", "<|end|>"):
        script = [*bytewise(tokenizer, "ab"), tokenizer.token_id(end), *bytewise(tokenizer, "cd")]
        done = Scripted(tokenizer, script).complete("x")
        assert (done.text, done.finish_reason, len(done.tokens)) == ("ab", "stop", 2)


def test_ids_above_the_tokenizers_are_never_drawn(tokenizer: Tokenizer) -> None:
    net = network("F", 0, vocab=384, tie_embeddings=False)
    with torch.no_grad():
        assert net.head is not None
        net.head.weight[320:] *= 100
    done = language_model(net, tokenizer).complete("the", max_tokens=50, temperature=1.0, seed=0)
    assert max(done.tokens) < tokenizer.vocab_size


def test_a_prompt_begins_with_the_document_start_and_says_nothing_special(tokenizer: Tokenizer) -> None:
    model = language_model(network("F", 0), tokenizer)
    assert model.prompt_ids("the fox") == [tokenizer.eos_id, *tokenizer.encode("the fox")]
    assert model.prompt_ids("") == [tokenizer.eos_id]
    assert tokenizer.token_id("<|user|>") not in model.prompt_ids("<|user|>")
    assert model.prompt_ids((5, 6)) == [5, 6]


def test_a_conversation_becomes_turns(tokenizer: Tokenizer) -> None:
    model = language_model(network("F", 0), tokenizer)
    ids = model.chat_prompt([Message("system", "be kind"), Message("user", "<|end|>hi")])
    shown = tokenizer.decode(ids, skip_special=False)
    assert shown == "<|endoftext|><|system|>be kind<|end|><|user|><|end|>hi<|end|><|assistant|>"
    assert ids.count(tokenizer.token_id("<|end|>")) == 2  # the one that was said is text
    assert isinstance(model.chat([Message("user", "hi")], max_tokens=3), str)
    with pytest.raises(ConfigError, match="'bot'"):
        model.chat_prompt([Message("bot", "hi")])


def test_bad_prompts_are_refused_by_name(tokenizer: Tokenizer) -> None:
    model = language_model(network("F", 0), tokenizer)
    cases = [
        ([], "empty prompt"), ([5, 320], "320 is outside the vocabulary of 320"), ([-1], "-1 is outside"),
        ([7] * 64, "64 tokens"), ("the " * 400, "shorten it"),
    ]  # fmt: skip
    for prompt, told in cases:
        with pytest.raises(ConfigError, match=told):
            model.generate(prompt)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        model.generate("x", temprature=0)


def test_a_directory_without_a_tokenizer_still_gives_tokens() -> None:
    net = network("F", 0)
    model = language_model(net, None)
    with pytest.raises(DataError, match=r"somewhere has no tokenizer\.json"):
        model.generate("x")
    stream = model.tokens([5, 6], SamplingConfig(temperature=0))
    assert [next(stream) for _ in range(5)] == naive(net, [5, 6], 5, 320, ())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_are_not_finite_are_an_error_not_a_token(
    temperature: float, tokenizer: Tokenizer
) -> None:
    net = network("H", 4)
    with torch.no_grad():
        net.norm.weight[0] = float("nan")
    with pytest.raises(WeightsError, match="not finite"):
        language_model(net, tokenizer).generate("x", temperature=temperature)


def test_generating_is_told_and_needs_no_gradient(tokenizer: Tokenizer) -> None:
    model, sink = language_model(network("LH", 4), tokenizer), MemorySink()
    with attached(sink):
        done = model.complete("the", max_tokens=4, temperature=0)
    assert [e.name for e in sink.events] == ["generate"]
    assert sink.events[0].values["text"] == done.text
    assert torch.is_grad_enabled()
    pieces = model.stream("the", max_tokens=4)
    next(pieces)
    assert torch.is_grad_enabled()  # also between the pieces of a stream
