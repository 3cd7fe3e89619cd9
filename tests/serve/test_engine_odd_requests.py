"""Requests of every kind side by side, with deadlines that pass and clients that go: each ends, and no page is left."""

import random
from pathlib import Path
from typing import Any

import torch
from fake_client import tokenizer

from deepseek.assemble import Loaded
from deepseek.models import ModelConfig, Transformer
from deepseek.nn.attention import AttentionConfig
from deepseek.nn.moe import MoEConfig
from deepseek.serve.engine import Engine
from deepseek.serve.engine_config import EngineConfig
from deepseek.serve.request import Request
from deepseek.serve.sampler import Grammar, SamplingConfig

GRAMMARS = (None, None, Grammar(kind="json"), Grammar(kind="choice", text='["a", "bb"]'))


def engine(max_step_tokens: int = 0) -> Engine:
    torch.manual_seed(0)
    words = tokenizer()
    config = ModelConfig(
        vocab_size=words.vocab_size, hidden=32, layers=3, ffn=48, pattern="LHF", max_length=96,
        attention=AttentionConfig(heads=2, kv_heads=1, head_dim=16, window=32, block=16, stride=16),
        moe=MoEConfig(experts=4, top_k=2, expert_ffn=16),
    )  # fmt: skip
    loaded = Loaded(Transformer(config).eval(), words, Path("tiny"), None)
    return Engine(
        loaded,
        EngineConfig(
            memory_gib=0.02, max_running=8, precision="fp32", device="cpu", max_step_tokens=max_step_tokens
        ),
    )


def request(number: int, rng: random.Random, size: int) -> Request:
    options: dict[str, Any] = {
        "max_tokens": rng.randint(1, 20), "logprobs": rng.choice([None, 0, 5]), "temperature": rng.choice([0, 1]),
        "prompt_logprobs": rng.choice([None, None, 3]), "grammar": rng.choice(GRAMMARS), "top_k": rng.choice([0, 5]),
        "stop": rng.choice([(), ("e ", "x")]), "frequency_penalty": rng.choice([0, 2]), "seed": rng.choice([None, 5]),
    }  # fmt: skip
    prompt = tuple(rng.randrange(6, size) for _ in range(rng.randint(1, 70)))
    return Request(
        str(number), prompt, SamplingConfig(**options), priority=rng.choice([0, 0, -5]),
        deadline=rng.choice([None, None, 0.001, 0.05]), embed=rng.random() < 0.2, trace=rng.random() < 0.2,
    )  # fmt: skip


def test_odd_requests_end_and_leave_nothing() -> None:
    served, rng = engine(), random.Random(0)
    live: set[str] = set()
    ends: dict[str, int] = {}
    for number in range(150):
        served.add(request(number, rng, 300))
        live.add(str(number))
        if rng.random() < 0.05:
            gone = rng.choice(sorted(live))
            assert served.abort(gone)
            live.discard(gone)
        for output in served.step() if len(live) > 10 else []:
            if output.finish is not None:
                live.discard(output.id)
                ends[output.finish] = ends.get(output.finish, 0) + 1
    for _ in range(5000):
        if not served.has_work:
            break
        live -= {o.id for o in served.step() if o.finish is not None}
    assert not live
    assert "error" not in ends
    assert served.stats().pages_used == 0


def test_an_embedding_of_more_than_a_page() -> None:
    served = engine()
    served.add(Request("a", tuple(range(6, 86)), embed=True))
    outputs = [o for _ in range(5) for o in served.step()]
    assert [o.finish for o in outputs] == ["stop"]
    assert outputs[0].embedding is not None
    assert served.stats().pages_used == 0


def test_a_prompt_preempted_half_way_is_read_once() -> None:
    """Embeddings and log-probabilities of a prompt whose first chunks were computed, lost and computed again."""
    rng = random.Random(1)
    stem = tuple(rng.randrange(6, 300) for _ in range(80))
    wanted = [
        Request("embed", stem, embed=True),
        Request("score", stem, SamplingConfig(max_tokens=2, temperature=0.0, prompt_logprobs=1)),
    ]
    for asked in wanted:
        found = []
        for interrupted in (False, True):
            served = engine(max_step_tokens=24)
            served.add(asked)
            outputs = [*served.step(), *served.step()]
            if interrupted:
                (sequence,) = served.scheduler.running
                served.scheduler._preempt(sequence)
                served.decoder.tables.leave(sequence)
                # Another request computes the same beginning meanwhile, further than the first had come.
                served.add(Request("other", stem, SamplingConfig(max_tokens=1), priority=-1))
            while served.has_work:
                outputs += served.step()
            found.append([o for o in outputs if o.id == asked.id])
        plain, again = found
        if asked.embed:
            assert plain[-1].embedding
            assert again[-1].embedding
            torch.testing.assert_close(torch.tensor(again[-1].embedding), torch.tensor(plain[-1].embedding))
        else:
            (first,), (second,) = ([o.prompt_logprobs for o in one if o.prompt_logprobs] for one in found)
            assert len(first) == len(second) == len(stem)
            values = [[t.logprob for t in one if t is not None] for one in (first, second)]
            torch.testing.assert_close(torch.tensor(values[1]), torch.tensor(values[0]), rtol=1e-4, atol=1e-4)
