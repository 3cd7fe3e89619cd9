"""Outputs made the short way are outputs."""

import dataclasses

import pytest

from deepseek.serve.answer import output_of, saying
from deepseek.serve.request import Output


def test_an_output_made_the_short_way_is_an_output() -> None:
    said = saying(Output("a", prompt_tokens=3))
    short, long = output_of(said, "x", (1, 2)), Output("a", "x", (1, 2), prompt_tokens=3)
    assert short == long
    assert dataclasses.asdict(short) == dataclasses.asdict(long)
    assert hash(short) == hash(long)
    assert output_of({**said, "finish": "stop"}, "", ()) == Output("a", prompt_tokens=3, finish="stop")
    assert output_of(said, "y", (4,)) == Output("a", "y", (4,), prompt_tokens=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        short.text = "y"  # type: ignore[misc]
