"""How calls are read out of an answer, however it is cut into pieces; and what forces them."""

import itertools
import json
import random
from typing import Any

import pytest
import tokenizers
from fake_client import INFO, tokenizer

from deepseek.data import Tokenizer
from deepseek.serve.sampling_config import SamplingConfig
from deepseek.serve.server.chat import call_id
from deepseek.serve.server.errors import ApiError
from deepseek.serve.server.served import Served
from deepseek.serve.server.tools import ToolPlan
from deepseek.serve.text import TextStream

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": None,
        "strict": None,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "at": {"$ref": "#/$defs/time"}},
            "required": ["city"],
            "$defs": {"time": {"type": "string"}},
        },
    },
}
TIME = {
    "type": "function",
    "function": {"name": "time", "description": None, "strict": None, "parameters": None},
}


def plan(choice: Any = None, tools: Any = (WEATHER, TIME), parallel: bool = True) -> ToolPlan:
    return ToolPlan.of({"tools": list(tools), "tool_choice": choice, "parallel_tool_calls": parallel})


def read(plan: ToolPlan, pieces: list[str]) -> tuple[str, list[tuple[str, Any]]]:
    """The text and the calls of an answer that comes in ``pieces``."""
    parser, text, calls = plan.parser(), "", list[list[str]]()
    for event in [*itertools.chain.from_iterable(parser.push(p) for p in pieces), *parser.finish()]:
        if event.kind == "text":
            text += event.text
        elif event.kind == "call":
            calls.append([event.text, ""])
        else:
            calls[-1][1] += event.text
    return text, [(name, json.loads(arguments)) for name, arguments in calls]


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern <3"}}\n</tool_call>'
ANSWERS: list[tuple[str, str, list[tuple[str, Any]]]] = [
    ("Just text, 1 < 2.", "Just text, 1 < 2.", []),
    ("  spaces stay ", "  spaces stay ", []),
    (CALL, "", [("weather", {"city": "Bern <3"})]),
    ("Let me see. " + CALL + CALL, "Let me see. ", [("weather", {"city": "Bern <3"})] * 2),
    (CALL.removesuffix("</tool_call>"), "", [("weather", {"city": "Bern <3"})]),
    ("<tool_call>no JSON</tool_call>", "<tool_call>no JSON</tool_call>", []),
    ('<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
     '<tool_call>{"name": "rm", "arguments": {}}</tool_call>', []),
    ("<tool_c", "<tool_c", []),
    ('{"name": "time", "parameters": {}}', "", [("time", {})]),
    ('[{"name": "time", "arguments": {}}]', "", [("time", {})]),
    ('{"answer": 5}', '{"answer": 5}', []),
    # Llama 3.1: several with ';' between, and behind its mark; code behind the mark is no call
    ('{"name": "time", "parameters": {}}; {"name": "weather", "parameters": {"city": "Bern"}}', "",
     [("time", {}), ("weather", {"city": "Bern"})]),
    ('<|python_tag|>{"name": "weather", "parameters": {"city": "Bern"}}', "", [("weather", {"city": "Bern"})]),
    ('<|python_tag|>{"type": "function", "name": "time", "parameters": {}};{"name": "time", "parameters": {}}', "",
     [("time", {})] * 2),
    ("<|python_tag|>print({1: 2})", "print({1: 2})", []),
    # Mistral: a list behind its mark, and since 2503 names and arguments with marks between
    ('[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Bern"}}, {"name": "time", "arguments": {}}]', "",
     [("weather", {"city": "Bern"}), ("time", {})]),
    ('Sure. [TOOL_CALLS][{"name": "time", "arguments": {}}] Wait.', "Sure.  Wait.", [("time", {})]),
    ('[TOOL_CALLS]weather[ARGS]{"city": "[TOOL"}[TOOL_CALLS]time[CALL_ID]abc[ARGS]{}', "",
     [("weather", {"city": "[TOOL"}), ("time", {})]),
    ('[TOOL_CALLS]time{}', "", [("time", {})]),
    ('[TOOL_CALLS]rm[ARGS]{}', "rm[ARGS]{}", []),
    ("[link](x) and [TOOL", "[link](x) and [TOOL", []),
    ("[1, 2, 3]", "[1, 2, 3]", []),
    # Qwen3-Coder: parameters by name, their values by their schema
    ("<tool_call>\n<function=weather>\n<parameter=city>\nBern <3\n</parameter>\n</function>\n</tool_call>", "",
     [("weather", {"city": "Bern <3"})]),
    ("On it.\n<tool_call><function=time></function></tool_call>\n<tool_call><function=time></tool_call>", "On it.\n",
     [("time", {})] * 2),
    ("<function=weather><parameter=city>Bern</parameter><parameter=at>5</parameter></function>", "",
     [("weather", {"city": "Bern", "at": "5"})]),
    ("<function=weather><parameter=city>Bern\n<parameter=at>\n\n1\n2\n", "",
     [("weather", {"city": "Bern", "at": "\n1\n2"})]),
    ('<function=weather>{"city": "Bern"}</function>', "", [("weather", {"city": "Bern"})]),
    ("<function=rm></function> a <b>", "<function=rm></function> a <b>", []),
    ("<function=time>null</function>", "<function=time>null</function>", []),
    ("[TOOL_CALLS][]", "[]", []),
    ("<function=weather><parameter=city</function>", "<function=weather><parameter=city</function>", []),
    ('<tool_call>{"name": "time", "arguments": {"x": NaN}}</tool_call>',
     '<tool_call>{"name": "time", "arguments": {"x": NaN}}</tool_call>', []),
    ('<tool_call>{"name": "time", "arguments": {"x": "\\ud800"}}</tool_call>', "", [("time", {"x": "\ud800"})]),
    ("<tool_call>" + "[" * 5000 + "</tool_call>", "<tool_call>" + "[" * 5000 + "</tool_call>", []),
]  # fmt: skip


def test_every_cut_of_every_answer_reads_the_same() -> None:
    rng = random.Random(1)
    for answer, text, calls in ANSWERS:
        for _ in range(30):
            at = sorted(rng.randrange(len(answer) + 1) for _ in range(rng.randrange(12)))
            pieces = [answer[i:j] for i, j in zip([0, *at], [*at, len(answer)])]
            assert read(plan(), pieces) == (text, calls), pieces


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<function=", "</function>", "<parameter=", "</parameter>", "[TOOL_CALLS]", "[ARGS]",
    "<|python_tag|>", "weather", "time", "city", "text", ">", "{", "}", "[", "]", '"', ":", ",", ";", " ", "\n",
    "<tool", '{"name": "weather", "arguments": {"city": "x"}}',
    '{"name": "time", "parameters": {}}', "null", "NaN", "é😀", "\\",
    "{}", "[]",
]  # fmt: skip


def test_random_answers_read_the_same_however_they_are_cut_and_lose_nothing() -> None:
    rng = random.Random(3)
    for _ in range(1500):
        answer = "".join(rng.choices(FRAGMENTS, k=rng.randrange(1, 25)))
        at = sorted(rng.randrange(len(answer) + 1) for _ in range(4))
        pieces = [answer[i:j] for i, j in zip([0, *at], [*at, len(answer)])]
        text, calls = read(plan(), [answer])
        assert read(plan(), pieces) == (text, calls)
        assert read(plan(), list(answer)) == (text, calls)
        if not calls:
            for mark in ("[TOOL_CALLS]", "<|python_tag|>"):
                answer, text = answer.replace(mark, ""), text.replace(mark, "")
            assert "".join(text.split()) == "".join(answer.split())


@pytest.mark.parametrize(
    ("kind", "written", "value"),
    [
        ("integer", "5", 5),
        ("number", " 2.5 ", 2.5),
        ("boolean", "True", True),
        ("string", "true", "true"),
        (["integer", "null"], "None", None),
        (["string", "null"], "null", None),
        ("string", "null", "null"),
        ("object", '{"a": [1]}', {"a": [1]}),
        ("array", "[1,", "[1,"),
        ("integer", "five", "five"),
        ("number", "NaN", "NaN"),
        (None, "5", "5"),
    ],
)
def test_parameters_without_quotes_get_the_type_of_their_schema(kind: Any, written: str, value: Any) -> None:
    schemas = [{"type": kind} if kind else {}]
    if isinstance(kind, list):
        schemas.append({"anyOf": [{"type": k} for k in kind]})
    for schema in schemas:
        function = {"name": "f", "parameters": {"type": "object", "properties": {"x": schema}}}
        answer = f"<function=f><parameter=x>\n{written}\n</parameter></function>"
        assert read(plan(tools=[{"type": "function", "function": function}]), [answer]) == (
            "",
            [("f", {"x": value})],
        )


def test_marks_that_are_special_tokens_are_seen_where_calls_may_come() -> None:
    inner = tokenizers.Tokenizer.from_str(tokenizer()._inner.to_str())
    inner.add_special_tokens(["[TOOL_CALLS]", "[ARGS]", "[INST]"])
    words = Tokenizer(inner)
    served = Served.of(INFO, "m", words, None)
    marks = {words.token_id("[TOOL_CALLS]"), words.token_id("[ARGS]")}
    assert set(served.call_marks) == marks
    assert served.short_call_ids
    ids = [words.token_id("[TOOL_CALLS]"), *words.encode("time"), words.token_id("[ARGS]"), *words.encode("{}"),
           words.token_id("[INST]")]  # fmt: skip
    shown = TextStream(words, SamplingConfig(shown_ids=served.call_marks))
    assert "".join(shown.push(i) for i in ids) == "[TOOL_CALLS]time[ARGS]{}"
    hidden = TextStream(words, SamplingConfig())
    assert "".join(hidden.push(i) for i in ids) == "time{}"
    plain = Served.of(INFO, "m", tokenizer(), None)
    assert plain.call_marks == ()
    assert (len(call_id(True)), call_id(True).isalnum()) == (9, True)
    assert not plain.short_call_ids


@pytest.mark.parametrize(("answer", "text", "calls"), ANSWERS)
@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_auto_finds_calls_and_leaves_text(answer: str, text: str, calls: list[Any], size: int) -> None:
    pieces = [answer[i : i + size] for i in range(0, len(answer), size)]
    assert read(plan(), pieces) == (text, calls)


def test_text_before_a_call_streams_at_once() -> None:
    parser = plan().parser()
    assert [e.text for e in parser.push("Hello <")] == ["Hello "]
    assert [e.text for e in parser.push("b>")] == ["<b>"]


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_required_reads_a_list_of_calls(size: int) -> None:
    answer = '[{"name": "weather", "arguments": {"city": "a}\\"{"}}, {"name": "time", "arguments": {}}]'
    pieces = [answer[i : i + size] for i in range(0, len(answer), size)]
    assert read(plan("required"), pieces) == ("", [("weather", {"city": 'a}"{'}), ("time", {})])
    assert read(plan("required"), [answer[:20]])[1] == []


def test_named_streams_the_arguments_as_they_come() -> None:
    named = plan({"type": "function", "function": {"name": "weather"}})
    parser = named.parser()
    kinds = [(e.kind, e.text) for p in ('{"ci', 'ty": ', '"x"}') for e in parser.push(p)]
    assert kinds == [
        ("call", "weather"),
        ("arguments", '{"ci'),
        ("arguments", 'ty": '),
        ("arguments", '"x"}'),
    ]
    grammar = named.grammar()
    assert grammar is not None
    assert json.loads(grammar.text) == WEATHER["function"]["parameters"]  # type: ignore[index]


def test_the_grammar_of_required_allows_each_tool_and_moves_definitions() -> None:
    import jsonschema_rs

    grammar = plan("required", parallel=False).grammar()
    assert grammar is not None
    valid = jsonschema_rs.Draft202012Validator(json.loads(grammar.text)).is_valid
    weather = {"name": "weather", "arguments": {"city": "Bern", "at": "noon"}}
    assert valid([weather])
    assert valid([{"name": "time", "arguments": {}}])
    assert not valid([{"name": "weather", "arguments": {"city": "Bern", "at": 12}}])
    assert not valid([weather, weather])
    assert not valid([])
    assert not valid([{"name": "rm", "arguments": {}}])


@pytest.mark.parametrize(
    ("choice", "tools", "words"),
    [
        ("required", (), "needs tools"),
        ({"type": "function", "function": {"name": "rm"}}, (WEATHER,), "tools are: weather"),
        (None, (TIME, TIME), "same name"),
    ],
)
def test_choices_that_cannot_be_met(choice: Any, tools: Any, words: str) -> None:
    with pytest.raises(ApiError, match=words):
        plan(choice, tools)


def test_none_hides_the_tools() -> None:
    assert plan("none").tools == ()
    assert read(plan("none"), [CALL]) == (CALL, [])
