"""Options that cannot be used are refused by name."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest

from deepseek.errors import ConfigError
from deepseek.serve import SamplingConfig
from deepseek.serve.sampling_config import LONGEST_STOPS, MOST_LOGPROBS, MOST_STOPS, Grammar


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"temperature": -0.1}, "temperature"), ({"temperature": math.inf}, "temperature"),
        ({"temperature": math.nan}, "temperature"), ({"top_p": 0.0}, "top_p"), ({"top_p": 1.01}, "top_p"),
        ({"top_p": math.nan}, "top_p"), ({"min_p": -0.1}, "min_p"), ({"min_p": 1.1}, "min_p"),
        ({"top_k": -1}, "top_k"), ({"top_k": 2**40}, "top_k"), ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"), ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"), ({"frequency_penalty": math.nan}, "frequency_penalty"),
        ({"seed": -1}, "seed"), ({"seed": 2**63}, "seed"), ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"), ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"logprobs": -1}, "logprobs"), ({"logprobs": MOST_LOGPROBS + 1}, "logprobs"),
        ({"prompt_logprobs": MOST_LOGPROBS + 1}, "prompt_logprobs"), ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: 100.5}}, "logit_bias"), ({"logit_bias": {1: math.nan}}, "logit_bias"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids"), ({"stop": "END"}, "stop"), ({"stop": ("",)}, "stop"),
        ({"stop": ("a",) * (MOST_STOPS + 1)}, "stop"), ({"stop": ("a" * (LONGEST_STOPS + 1),)}, "stop"),
        ({"topk": 3}, "top_k"),
    ],
)  # fmt: skip
def test_the_option_that_is_wrong_is_named(wrong: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        SamplingConfig(**wrong)


def test_the_ends_of_every_range_are_allowed() -> None:
    config = SamplingConfig(
        temperature=0, top_p=1.0, min_p=1.0, presence_penalty=-2, frequency_penalty=2, repetition_penalty=100,
        seed=2**63 - 1, max_tokens=1, min_tokens=1, logprobs=0, prompt_logprobs=MOST_LOGPROBS,
        logit_bias={0: -100, 1: 100}, stop=("a",) * MOST_STOPS, grammar=Grammar(kind="choice", text='["a"]'),
    )  # fmt: skip
    assert pickle.loads(pickle.dumps(config)) == config
