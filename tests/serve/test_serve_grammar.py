"""Answers under a grammar match it, judged by other programs: ``jsonschema_rs``, ``re``, ``json``; drafts roll back;
hostile grammars are refused in time.
"""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek.data import Tokenizer
from deepseek.data.tokenizer import train_tokenizer
from deepseek.errors import ConfigError, MissingExtraError, RequestError
from deepseek.serve import SamplingConfig
from deepseek.serve.grammar import Grammars
from deepseek.serve.grammar_trial import Trial
from deepseek.serve.sampler import Grammar
from deepseek.serve.sampling import SamplingState, sample, sample_drafts
from deepseek.serve.text import TextStream

pytest.importorskip("llguidance")
SPECIAL = 6  # ids of special tokens


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")  # it does not change
    return train_tokenizer([text, '{"a": [1, 2, true, null], "b": "€"}' * 20], 500)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.vocab_size)


def closing(tokenizer: Tokenizer) -> torch.Tensor:
    """Logits that like to come to an end, so that random answers do."""
    bonus = torch.zeros(tokenizer.vocab_size)
    bonus[list(tokenizer.end_ids)] = 30.0
    for text, size in [('"', 9.0), ("}", 9.0), ("]", 9.0), (":", 5.0), ("0", 3.0)]:
        bonus[tokenizer.encode(text)] = size
    for token in range(tokenizer.vocab_size):
        if tokenizer.piece(token)[:1] in b" \n\r\t":
            bonus[token] -= 3
    return bonus


def answers(
    tokenizer: Tokenizer,
    grammars: Grammars,
    grammar: Grammar,
    seeds: list[int],
    most: int = 300,
    **options: Any,
) -> list[TextStream]:
    """Random answers of one batch, from random logits."""
    config = SamplingConfig(
        **{"temperature": 1.0, "top_p": 1.0, "max_tokens": most, "grammar": grammar, **options}
    )
    size = tokenizer.vocab_size
    states = [
        SamplingState(config, [0], seed, size, grammars.state(grammar), end_ids=tokenizer.end_ids)
        for seed in seeds
    ]
    streams = [TextStream(tokenizer, config, tokenizer.end_ids) for _ in seeds]
    noise, bonus = torch.Generator().manual_seed(seeds[0]), closing(tokenizer)
    while live := [i for i, stream in enumerate(streams) if stream.finish is None]:
        logits = torch.randn(len(live), size, generator=noise) * 3 + bonus
        for i, found in zip(live, sample(logits, [states[i] for i in live])):
            assert found.token >= 0, found.error
            states[i].accept(found.token)
            streams[i].push(found.token)
    return streams


# ---- JSON

NAMES = st.sampled_from(["a", "b", "name", "x y", "é"])
LEAVES = st.one_of(
    st.sampled_from([{"type": "string"}, {"type": "boolean"}, {"type": "null"}, {"type": "integer"}]),
    st.builds(lambda a, b: {"type": "integer", "minimum": min(a, b), "maximum": max(a, b)},
              st.integers(-50, 50), st.integers(-50, 50)),
    st.builds(lambda a, b: {"type": "string", "minLength": min(a, b), "maxLength": max(a, b)},
              st.integers(0, 6), st.integers(0, 6)),
    st.builds(lambda values: {"enum": values},
              st.lists(st.one_of(st.text(max_size=5), st.integers(), st.none()), min_size=1, max_size=4)),
    st.sampled_from([{"type": "string", "pattern": "^[a-c]{1,3}-[0-9]+$"}, {"type": "number", "minimum": 0.5},
                     {"type": "string", "format": "date"}, {"const": {"k": [1, "é"]}}]),
)  # fmt: skip


def bigger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def thing(properties: dict[str, Any], needed: list[str], closed: bool) -> dict[str, Any]:
        schema = {
            "type": "object",
            "properties": properties,
            "required": [n for n in needed if n in properties],
        }
        return schema | ({"additionalProperties": False} if closed else {})

    return st.one_of(
        st.builds(thing, st.dictionaries(NAMES, inner, max_size=3), st.lists(NAMES, unique=True), st.booleans()),
        st.builds(lambda items, a, b: {"type": "array", "items": items, "minItems": min(a, b), "maxItems": max(a, b)},
                  inner, st.integers(0, 3), st.integers(0, 3)),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
    )  # fmt: skip


SCHEMAS = st.recursive(LEAVES, bigger, max_leaves=5)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(schema=SCHEMAS, seed=st.integers(0, 1000))
def test_a_finished_answer_validates(
    tokenizer: Tokenizer, grammars: Grammars, schema: Any, seed: int
) -> None:
    validator = pytest.importorskip("jsonschema_rs").validator_for(schema, validate_formats=True)
    grammar = Grammar(kind="json_schema", text=json.dumps(schema))
    for stream in answers(tokenizer, grammars, grammar, [seed, seed + 1], 200):
        if stream.finish == "stop":
            validator.validate(json.loads(stream.text))


@pytest.mark.parametrize("big", [2**53 + 1, 2**63 - 2**55 + 1, -(2**62) + 1])
def test_limits_that_fp64_cannot_hold(tokenizer: Tokenizer, grammars: Grammars, big: int) -> None:
    schema = {
        "properties": {"maximum": {"minimum": big, "maximum": big + abs(big) // 1000}},
        "required": ["maximum"],
    }
    schema["properties"]["maximum"]["type"] = "integer"
    grammar = Grammar(kind="json_schema", text=json.dumps({"type": "object", **schema}))
    done = [
        json.loads(s.text) for s in answers(tokenizer, grammars, grammar, [1, 2, 3]) if s.finish == "stop"
    ]
    assert done
    assert all(big <= d["maximum"] <= big + abs(big) // 1000 for d in done)


@pytest.mark.parametrize("big", [2**53 + 1, 2**63 - 1, 2**64, -(10**30)])
def test_values_that_llguidance_would_change(grammars: Grammars, big: int) -> None:
    for key in ("const", "enum"):
        with pytest.raises(RequestError, match="use a string"):
            grammars.state(Grammar(kind="json_schema", text=json.dumps({key: [{"x": big}]})))
    if big > 2**63:
        with pytest.raises(RequestError, match="beyond 64 bits"):
            grammars.state(Grammar(kind="json_schema", text=json.dumps({"type": "integer", "minimum": big})))


def test_random_answers_do_finish(tokenizer: Tokenizer, grammars: Grammars) -> None:
    """Or the test above would test nothing."""
    schema = {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"type": "integer"}}},
        "required": ["a"],
    }
    grammar = Grammar(kind="json_schema", text=json.dumps(schema))
    streams = answers(tokenizer, grammars, grammar, list(range(40)))
    assert sum(s.finish == "stop" for s in streams) >= 30


def test_any_json_object(tokenizer: Tokenizer, grammars: Grammars) -> None:
    streams = answers(tokenizer, grammars, Grammar(kind="json"), list(range(30)))
    done = [json.loads(s.text) for s in streams if s.finish == "stop"]
    assert len(done) >= 15
    assert all(isinstance(x, dict) for x in done)


# ---- other kinds


@pytest.mark.parametrize(
    "pattern",
    [r"[a-z]{1,9}@[a-z]{1,9}\.(com|org)", r"([0-9]{1,3}\.){3}[0-9]{1,3}", r"€?[^\n]{0,9}é", r"<\|end\|>x"],
)
def test_regular_expressions(tokenizer: Tokenizer, grammars: Grammars, pattern: str) -> None:
    streams = answers(tokenizer, grammars, Grammar(kind="regex", text=pattern), list(range(20)))
    done = [s.text for s in streams if s.finish == "stop"]
    assert len(done) >= 10
    assert all(re.fullmatch(pattern, text) for text in done)


def test_choice(tokenizer: Tokenizer, grammars: Grammars) -> None:
    allowed = ["yes", "no", "yes, but", 'a\n"b"', "€😀", "\\x"]
    grammar = Grammar(kind="choice", text=json.dumps(allowed))
    found = answers(tokenizer, grammars, grammar, list(range(60)))
    assert {s.finish for s in found} == {"stop"}
    assert {s.text for s in found} <= set(allowed)
    assert len({s.text for s in found}) >= 4


def test_lark(tokenizer: Tokenizer, grammars: Grammars) -> None:
    lark = 'start: term ("+" term)*\nterm: NUMBER | "(" start ")"\nNUMBER: /[1-9][0-9]{0,2}/'
    streams = answers(tokenizer, grammars, Grammar(kind="lark", text=lark), list(range(30)))
    done = [s.text for s in streams if s.finish == "stop"]
    assert len(done) >= 10
    assert all(isinstance(eval(text, {"__builtins__": {}}), int) for text in done)


def test_special_tokens_are_no_text(tokenizer: Tokenizer, grammars: Grammars) -> None:
    state = grammars.state(Grammar(kind="regex", text=r"(.|\n)*"))
    bits = np.unpackbits(state.mask().view(np.uint8), bitorder="little")
    assert [i for i in range(SPECIAL) if bits[i]] == sorted(tokenizer.end_ids)


# ---- with the other options


def test_an_end_token_comes_only_where_the_answer_may_end(tokenizer: Tokenizer, grammars: Grammars) -> None:
    """Not before min_tokens, unless nothing else may come; and with a grammar it is never ignored."""
    text = Grammar(kind="regex", text="a{1,40}")
    for stream in answers(tokenizer, grammars, text, list(range(10)), min_tokens=5):
        assert stream.pushed > 5
    short = Grammar(kind="choice", text='["a"]')
    for stream in answers(tokenizer, grammars, short, [1, 2], min_tokens=5, ignore_eos=True):
        assert (stream.text, stream.finish) == ("a", "length" if stream.pushed >= 300 else "stop")


@pytest.mark.parametrize("seed", range(12))
def test_drafts_change_no_answer(tokenizer: Tokenizer, grammars: Grammars, seed: int) -> None:
    """Right drafts, wrong ones, and ones that the grammar forbids; penalties on."""
    dice, size = random.Random(seed), tokenizer.vocab_size
    schema = {
        "type": "object",
        "properties": {"ab": {"type": "string"}, "n": {"type": "integer"}},
        "required": ["ab"],
    }
    grammar = Grammar(kind="json_schema", text=json.dumps(schema))
    config = SamplingConfig(
        temperature=dice.choice([0.0, 1.0]), grammar=grammar, frequency_penalty=0.5, logprobs=1, max_tokens=60
    )
    bonus = closing(tokenizer)

    def logits(tokens: list[int]) -> torch.Tensor:
        noise = torch.Generator().manual_seed(hash(tuple(tokens)) % 2**31)
        return torch.randn(size, generator=noise) * 3 + bonus

    def start() -> SamplingState:
        return SamplingState(config, [0], seed, size, grammars.state(grammar), end_ids=tokenizer.end_ids)

    state, expected = start(), []
    while len(expected) < 60 and not (state.tokens and state.tokens[-1] in state.ends):
        expected += sample(logits(state.tokens)[None], [state])
        state.accept(expected[-1].token)
    state, found = start(), []
    while len(found) < len(expected):
        draft = [s.token for s in expected[len(found) :]][: dice.randrange(8)]
        if draft and dice.random() < 0.6:
            draft[dice.randrange(len(draft))] = dice.randrange(size)
        rows = torch.stack([logits([*state.tokens, *draft[:k]]) for k in range(len(draft) + 1)])
        found += sample_drafts(rows, [(state, draft)])[0]
        for s in found[len(state.tokens) :]:
            state.accept(s.token)
    assert found[: len(expected)] == expected


def test_forced_tokens_are_a_draft(tokenizer: Tokenizer, grammars: Grammars) -> None:
    schema = {"type": "object", "properties": {"temperature_in_degrees": {"type": "integer"}}, "required": [
        "temperature_in_degrees"], "additionalProperties": False}  # fmt: skip
    state = grammars.state(Grammar(kind="json_schema", text=json.dumps(schema)))
    for character in '{"':
        state.accept(tokenizer.encode(character)[0])
    before = state.mask()
    assert tokenizer.decode(state.forced()).startswith("temperature_in")
    assert np.array_equal(state.mask(), before)
    for token in (draft := state.forced()):
        state.accept(token)
    assert draft
    assert not state.error
    free = grammars.state(Grammar(kind="regex", text="[a-z]*"))
    assert free.forced() == []


# ---- what is refused


def many(count: int) -> str:
    return json.dumps({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(count)}})


HOSTILE = {
    "deep": ("json_schema", '{"type":"array","items":' * 200 + "{}" + "}" * 200),
    "many properties": ("json_schema", many(3000)),
    "wide rows": ("json_schema", many(700)),
    "product": ("json_schema", json.dumps({"allOf": [
        {"anyOf": [{"properties": {f"p{i}{j}": {"pattern": f"^a{{{j}}}b"}}} for j in range(4)]} for i in range(12)]})),
    "crashes llguidance": ("json_schema", json.dumps({"const": -(2**63)})),
    "crashes it in Lark": ("lark", f'start: %json {{"const": {-(2**63)}}}'),
    "chain of rules": ("lark", "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(6000)) + '\nr6000: "a"'),
    "chain of objects": ("json_schema", json.dumps({"$ref": "#/$defs/a0", "$defs": {"a1000": {"type": "null"}, **{
        f"a{i}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}, "required": ["x"]}
        for i in range(1000)}}})),
    "eleven seconds, 1.8 GB": ("regex", "a?" * 20_000 + "a" * 20_000),
    "repeated names": ("json_schema", '{"type": "object", "minProperties": 3, "required": ["a"]}'),
    "other host": ("json_schema", '{"$ref": "http://example.com/schema.json"}'),
    "file": ("json_schema", '{"$ref": "file:///etc/passwd"}'),
    "itself": ("json_schema", '{"$ref": "#"}'),
    "not implemented": ("json_schema", '{"not": {"type": "string"}}'),
    "impossible": ("json_schema", "false"),
    "wrong type": ("json_schema", '{"type": 3}'),
    "parentheses": ("regex", "(" * 5000 + "a" + ")" * 5000),
    "look-around": ("regex", "(?=a)b"),
    "not closed": ("regex", "(a"),
    "surrogate": ("regex", "\ud800"),
    "left recursion only": ("lark", "start: start"),
    "unknown rule": ("lark", "start: other"),
    "no Lark": ("lark", "{{{"),
    "surrogates": ("choice", '["\\ud800"]'),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_and_wrong_grammars_are_refused(
    grammars: Grammars, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is tried once, in a process whose time is limited, and known the second time."""
    tried, error = [], Trial.error
    monkeypatch.setattr(Trial, "error", lambda *given: tried.append(given) or error(*given))
    kind, text = HOSTILE[name]
    grammar = Grammar(kind=kind, text=text)  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(RequestError, match="cannot be used") as caught:
            grammars.state(grammar)
        assert len(tried) <= 1
        assert caught.value.param == "grammar"
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("kind", "text"),
    [("regex", ".*a.{20}b.{20}"), ("regex", "(.*a){200}.{200}"), ("regex", "((a{1,1000}){1,1000}){1,1000}"),
     ("lark", 'start: s\ns: s s s | s s | "a" | '), ("json_schema", '{"type": "array", "minItems": 1000000000}'),
     ("json_schema", json.dumps({"enum": [f"v{i}" for i in range(9000)]}))],
)  # fmt: skip
def test_hard_grammars_cost_a_bounded_time_a_token(
    tokenizer: Tokenizer, grammars: Grammars, kind: Any, text: str
) -> None:
    """Milliseconds of this thread alone; the bound is for what would take minutes."""
    state, dice, slowest = grammars.state(Grammar(kind=kind, text=text)), random.Random(0), 0.0
    for _ in range(60):
        began = time.thread_time()
        mask = state.mask()
        slowest = max(slowest, time.thread_time() - began)
        bits = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        if state.error or state.over:
            break
        state.accept(int(dice.choice(bits.tolist())))
    assert slowest < 20.0


def test_a_trial_goes_on_after_a_grammar_that_ended_its_process() -> None:
    trial = Trial()
    source, limits = '{"grammars": [{"json_schema": %s}]}', {"max_grammar_size": 10_000}
    for _ in range(2):
        assert trial.error(source % '{"type": "integer"}', limits) == ""
        assert "fails at it" in trial.error(source % json.dumps({"const": -(2**63)}), limits)
    assert "Unimplemented" in trial.error(source % '{"not": {}}', limits)
    child = trial._child
    assert child is not None
    trial.close()
    assert child.returncode is not None
    assert trial.error(source % "{}", limits) == ""  # another one starts
    trial.close()


def test_a_grammar_that_breaks_ends_its_own_row_only(tokenizer: Tokenizer, grammars: Grammars) -> None:
    grammar = Grammar(kind="regex", text="abc")
    config = SamplingConfig(grammar=grammar, logprobs=0)
    good, bad = (
        SamplingState(
            config, [0], 1, tokenizer.vocab_size, grammars.state(grammar), end_ids=tokenizer.end_ids
        )
        for _ in range(2)
    )
    bad.accept(tokenizer.encode("z")[0])
    found = sample(torch.zeros(2, tokenizer.vocab_size), [good, bad])
    assert found[0].token >= 0
    assert found[1].token == -1
    assert "grammar cannot go on" in found[1].error


def test_the_newest_grammars_are_kept(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepseek.serve.grammar.KEPT", 3)
    grammars, compiled = Grammars(tokenizer, tokenizer.vocab_size), list[str]()
    compile = grammars._compile
    monkeypatch.setattr(grammars, "_compile", lambda g: compiled.append(g.text) or compile(g))
    for text in "abcabdabc":
        grammars.state(Grammar(kind="regex", text=text))
    assert "".join(compiled) == "abcdc"  # a and b were used again before d pushed the oldest out
    assert len(grammars._known) == 3


def test_states_of_one_grammar_do_not_meet(tokenizer: Tokenizer, grammars: Grammars) -> None:
    grammar = Grammar(kind="regex", text="a(b|c)d")
    one, two = grammars.state(grammar), grammars.state(grammar)
    before = two.mask()
    for character in "ab":
        one.accept(tokenizer.encode(character)[0])
    assert np.array_equal(two.mask(), before)
    assert not one.error


@pytest.mark.parametrize(
    ("kind", "text"),
    [("json", "{}"), ("json_schema", ""), ("json_schema", "{"), ("json_schema", "[1]"), ("json_schema", "[" * 9000),
     ("choice", "[]"), ("choice", '["a", 1]'), ("choice", '[""]'), ("choice", "a|b"), ("regex", ""), ("lark", ""),
     ("regex", "a" * 200_000), ("yaml", "x")],
)  # fmt: skip
def test_texts_that_are_no_grammar(kind: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=r"grammar|kind"):
        Grammar(kind=kind, text=text)


def test_llguidance_is_optional(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match=r"deepseek-framework\[serve\]"):
        Grammars(tokenizer, tokenizer.vocab_size).state(Grammar(kind="json"))
