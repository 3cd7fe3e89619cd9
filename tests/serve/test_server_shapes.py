"""What is read, and what its JSON Schema says: held together by a validator that nobody here wrote."""

from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.serve.server import schemas
from deepseek.serve.server.errors import ApiError
from deepseek.serve.server.shapes import (
    DEEPEST,
    Anything,
    Flag,
    Integer,
    ListOf,
    MapOf,
    Number,
    Record,
    Shape,
    Text,
    either,
    needed,
    optional,
    tagged,
)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([0.5, 1.0, -0.0, 1e300, 2**60])
    | st.sampled_from(["", "a", "auto", "text", "1", "stop"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b", "1", "type", "role"]), inner, max_size=3)
    ),
    max_leaves=6,
)

SHAPES: list[Shape] = [
    Text(1, 3),
    Text(choices=("auto", "stop")),
    Flag(),
    Number(0, 1),
    Number(0, 2, above=True),
    Integer(-1, 2),
    ListOf(Integer(0, 2), 1, 2),
    ListOf(Text(1)),
    MapOf(Number(0, 1), schemas.TokenId(), "^[0-9]{1,9}$", 2),
    Anything(),
    Anything(object_only=True),
    Record({"a": needed(Integer(0, 2)), "b": optional(Text(), "x"), "type": optional(ListOf(Flag()))}),
    tagged("type", {"text": {}, "auto": {"a": needed(Number())}}),
    either("…", Text(), ListOf(Text()), Record({"a": optional(Flag())})),
    schemas.Stop(),
    schemas.Prompt(),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: type(s).__name__)
def test_a_value_is_read_exactly_when_its_schema_allows_it(shape: Shape) -> None:
    validator = jsonschema_rs.Draft202012Validator(shape.schema())

    @settings(max_examples=150, deadline=None, database=None)
    @given(JSON)
    def check(value: Any) -> None:
        try:
            shape.read(value, "it")
            accepted = True
        except ApiError:
            accepted = False
        assert accepted == validator.is_valid(value), value

    check()


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "prompt", "prompt is missing"),
        ({"prompt": 5}, "prompt", "must be a string, a list"),
        ({"prompt": []}, "prompt", "0 items"),
        ({"prompt": ["a", 1]}, "prompt[1]", "must be a string, not 1"),
        ({"prompt": [1, -1]}, "prompt[1]", "at least 0"),
        ({"prompt": [1, True]}, "prompt[1]", "integer, not True"),
        ({"prompt": [[1], []]}, "prompt[1]", "0 items"),
        ({"prompt": "a", "max_token": 3}, "max_token", "did you mean 'max_tokens'?"),
        ({"prompt": "a", "suffix": "x"}, "suffix", "unknown field 'suffix'"),
        ({"prompt": "a", "n": True}, "n", "must be an integer, not True"),
        ({"prompt": "a", "n": 0}, "n", "at least 1 and at most 128"),
        ({"prompt": "a", "temperature": 2.5}, "temperature", "at most 2"),
        ({"prompt": "a", "top_p": 0}, "top_p", "above 0"),
        ({"prompt": "a", "stop": [""]}, "stop[0]", "at least 1 character"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "a name in logit_bias", "token id"),
        ({"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias.5", "at most 100"),
        ({"prompt": "a", "stream_options": {"x": 1}}, "stream_options.x", "unknown field 'x' in stream_options"),
        ({"prompt": "a", "seed": 1e30}, "seed", "at most"),
    ],
)  # fmt: skip
def test_errors_name_the_field_and_the_way_out(body: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        schemas.COMPLETION.read(body)
    assert caught.value.param == param
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "robot", "content": "x"}, "messages[0].role"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        (
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}],
            },
            "messages[0].content[0]",
        ),
        ({"role": "tool", "content": "x"}, "messages[0].tool_call_id"),
        ("hello", "messages[0]"),
    ],
)
def test_messages_that_are_none(message: Any, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        schemas.CHAT.read({"messages": [message]})
    assert caught.value.param is not None
    assert caught.value.param.startswith(param)


def test_defaults_and_nulls_are_the_same() -> None:
    bare = schemas.COMPLETION.read({"prompt": "a"})
    assert bare == schemas.COMPLETION.read({"prompt": "a", **dict.fromkeys(set(bare) - {"prompt"})})
    assert (bare["temperature"], bare["top_p"], bare["max_tokens"], bare["n"]) == (1.0, 1.0, 16, 1)


def test_a_deep_value_is_refused_and_a_shallow_one_is_not() -> None:
    deep: Any = {}
    for _ in range(DEEPEST - 2):
        deep = {"a": [deep]} if len(str(deep)) % 2 else {"a": deep}
    Anything().read({"a": {"b": [1]}}, "x")
    for _ in range(DEEPEST):
        deep = [deep]
    with pytest.raises(ApiError, match="nested more than"):
        Anything().read(deep, "x")
