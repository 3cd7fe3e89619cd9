"""How calls are read out of an answer, however it is cut into pieces; and what forces them."""

import itertools
import json
from typing import Any

import pytest

from deepseek.serve.server.errors import ApiError
from deepseek.serve.server.tools import ToolPlan

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
]  # fmt: skip


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
