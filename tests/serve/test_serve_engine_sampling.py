"""The engine with every sampling option at once: batching, chunks and speculation change no answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deepseek.assemble import Loaded
from deepseek.data.tokenizer import train_tokenizer
from deepseek.models import ModelConfig, Transformer
from deepseek.nn.attention import AttentionConfig
from deepseek.serve import SamplingConfig
from deepseek.serve.engine import Engine
from deepseek.serve.engine_config import EngineConfig
from deepseek.serve.request import Request
from deepseek.serve.sampling_config import Grammar

pytest.importorskip("llguidance")
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
}
LOOP = "abab" * 6
REQUESTS = [
    (LOOP, SamplingConfig(temperature=0, max_tokens=30)),
    (LOOP, SamplingConfig(temperature=1.0, top_p=1.0, seed=5, max_tokens=30, logprobs=2)),
    (LOOP, SamplingConfig(temperature=1.2, top_k=7, top_p=0.9, seed=6, max_tokens=30, repetition_penalty=1.2)),
    ("the", SamplingConfig(temperature=0, frequency_penalty=0.4, presence_penalty=0.2, max_tokens=30, logprobs=0)),
    ("x y", SamplingConfig(temperature=0.9, min_p=0.05, seed=7, max_tokens=30, min_tokens=20, logit_bias={40: 3.0})),
    (LOOP, SamplingConfig(temperature=1.0, seed=8, max_tokens=60, grammar=Grammar(kind="choice", text='["no","yes"]'))),
    ("json", SamplingConfig(
        temperature=1.0, seed=9, max_tokens=60, grammar=Grammar(kind="json_schema", text=json.dumps(SCHEMA)),
        frequency_penalty=0.3)),
    ("12", SamplingConfig(temperature=0, max_tokens=60, grammar=Grammar(kind="regex", text="(ab){12}c"))),
    ("stop", SamplingConfig(temperature=1.0, seed=10, max_tokens=40, stop=("e", "th"), include_stop=True)),
]  # fmt: skip


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    tokenizer = train_tokenizer([text], 320)
    torch.manual_seed(3)
    attention = AttentionConfig(heads=4, kv_heads=2, head_dim=8, window=11, block=8, stride=8)
    model = Transformer(
        ModelConfig(
            vocab_size=320, hidden=32, layers=2, ffn=48, pattern="LF", max_length=160, attention=attention
        )
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.3)
    return Loaded(model.eval(), tokenizer, Path("tiny"), None)


def answers(loaded: Loaded, **config: object) -> list[tuple[object, ...]]:
    engine = Engine(
        loaded, EngineConfig(**{"precision": "fp32", "memory_gib": 0.01, "deterministic": True, **config})
    )
    assert loaded.tokenizer is not None
    for i, (prompt, sampling) in enumerate(REQUESTS):
        engine.add(Request(str(i), tuple(loaded.tokenizer.prompt(prompt)), sampling))
    found: list[tuple[object, ...]] = [("", (), (), None, None)] * len(REQUESTS)
    for _ in range(2000):
        if not engine.has_work:
            break
        for o in engine.step():
            text, tokens, logprobs, _, _ = found[int(o.id)]
            found[int(o.id)] = (text + o.text, tokens + o.tokens, logprobs + o.logprobs, o.finish, o.stop)
    stats = engine.stats()
    assert stats.pages_used == 0
    if config.get("speculate"):
        assert 0 < stats.accepted <= stats.drafted
    return found


def test_no_way_of_being_busy_changes_an_answer(loaded: Loaded) -> None:
    expected = answers(loaded, max_running=1)
    for config in ({}, {"speculate": 6}, {"speculate": 3, "max_step_tokens": 6, "max_running": 4}):
        assert answers(loaded, **config) == expected
    texts = [str(a[0]) for a in expected]
    assert texts[5] in ("no", "yes")
    assert texts[7] == "ab" * 12 + "c"
    if expected[6][3] == "stop":
        assert set(json.loads(texts[6])) == {"a", "b"}
    assert [len(expected[i][2]) for i in (0, 1, 3)] == [0, len(expected[1][1]), len(expected[3][1])]
    assert len(expected[4][1]) > 20
    assert expected[8][3] == "length" or texts[8].endswith(("e", "th"))
