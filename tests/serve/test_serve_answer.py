"""Outputs made the short way are outputs."""

import dataclasses

import pytest

from deepseek.serve.answer import output_of
from deepseek.serve.request import Output


def test_an_output_made_the_short_way_is_an_output() -> None:
    short = output_of("a", text="x", tokens=(1, 2), prompt_tokens=3)
    assert short == Output("a", "x", (1, 2), prompt_tokens=3)
    assert dataclasses.asdict(short) == dataclasses.asdict(Output("a", "x", (1, 2), prompt_tokens=3))
    assert hash(short) == hash(Output("a", "x", (1, 2), prompt_tokens=3))
    assert output_of("b") == Output("b")
    with pytest.raises(dataclasses.FrozenInstanceError):
        short.text = "y"  # type: ignore[misc]
