"""Captured decoding steps, with "capturing" replaced by running again: buffers, padding and sizes must be right."""

import pytest
import torch
from test_engine import GREEDY, SHAPES, made, plain, texts, tokens_of

from deepseek.ops.paged_attention import backend_for
from deepseek.serve.engine import Engine
from deepseek.serve.engine_config import EngineConfig
from deepseek.serve.graphs import DecodeGraphs, Size
from deepseek.serve.request import Output, Request


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_steps_from_buffers_answer_as_the_plain_model(shape: str) -> None:
    loaded, prompts = made(shape), texts(7, seed=2)
    engine = Engine(loaded, EngineConfig(precision="fp32", memory_gib=0.01))
    made_for = []

    def capture(run):  # type: ignore[no-untyped-def]
        made_for.append(run)
        return run

    engine.graphs = DecodeGraphs(engine.decoder, Size(64, engine.decoder.tables.width), capture)
    found: dict[str, list[Output]] = {str(i): [] for i in range(len(prompts))}
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), tuple(prompt), GREEDY))
        for output in engine.step():  # so that few and many run at once
            found[output.id].append(output)
    while engine.has_work:
        for output in engine.step():
            found[output.id].append(output)
    assert len(made_for) > 2
    wanted = [plain(loaded, prompt, GREEDY.max_tokens)[0] for prompt in prompts]
    assert [tokens_of(o) for o in found.values()] == wanted
    for cache in engine.decoder.caches:
        assert all(bool(torch.isfinite(t).all()) for t in cache if t is not None)


def test_the_smallest_size_that_holds_a_step_is_taken() -> None:
    engine = Engine(made("full"), EngineConfig(precision="fp32", memory_gib=0.01))
    graphs = DecodeGraphs(engine.decoder, Size(40, 200), lambda run: run)
    assert graphs.size_for(1, 1) == (1, 13)
    assert graphs.size_for(5, 14) == (8, 50)
    assert graphs.size_for(33, 51) == (40, 200)
    assert graphs.size_for(41, 1) is None
    assert graphs.size_for(1, 201) is None


def test_static_steps_go_to_the_static_kernels() -> None:
    engine = Engine(made("full"), EngineConfig(precision="fp32", memory_gib=0.01))
    graphs = DecodeGraphs(engine.decoder, Size(4, 5), lambda run: run)
    buffers, _ = graphs._make(Size(2, 5))
    assert backend_for(torch.zeros(2, 4, 8), buffers.rows) == "static"


def test_captured_steps_are_as_exact_as_others() -> None:
    for exact in (False, True):
        engine = Engine(made("full"), EngineConfig(precision="fp32", memory_gib=0.01, deterministic=exact))
        graphs = DecodeGraphs(engine.decoder, Size(4, 5), lambda run: run)
        assert graphs._make(Size(2, 5))[0].rows.exact == exact
