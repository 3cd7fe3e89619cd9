"""Captured decoding steps, with "capturing" replaced by running again: buffers, padding and sizes must be right."""

import random

import numpy as np
import pytest
import torch
from test_engine import GREEDY, SHAPES, made, plain, texts, tokens_of

from deepseek.ops.paged_attention import backend_for
from deepseek.serve.ahead import DrawnTokens
from deepseek.serve.engine import Engine
from deepseek.serve.engine_config import EngineConfig
from deepseek.serve.graphs import DecodeGraphs, Size, StepBuffers
from deepseek.serve.request import Output, Request
from deepseek.serve.scheduler import Scheduled, Work
from deepseek.serve.tables import HostRows


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_steps_from_buffers_answer_as_the_plain_model(shape: str) -> None:
    loaded, prompts = made(shape), texts(7, seed=2)
    engine = Engine(loaded, EngineConfig(precision="fp32", memory_gib=0.01))
    made_for = []

    def capture(run):  # type: ignore[no-untyped-def]
        made_for.append(run)
        return run

    engine.launcher.graphs = DecodeGraphs(
        engine.decoder, Size(64, engine.decoder.tables.width), engine.vocabulary, capture
    )
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


def test_buffers_hold_what_the_tables_say_however_little_is_sent() -> None:
    """Sequences come, grow, give window pages back and go; compared with the tables written anew."""
    engine = Engine(made("mixed"), EngineConfig(precision="fp32", memory_gib=0.01, page=8, max_running=6))
    decoder, pages, rng = engine.decoder, engine.pages, random.Random(0)
    sizes = [Size(4, 20), Size(8, 20)]
    buffers = {size: StepBuffers(size, 8, decoder.device) for size in sizes}
    whole: dict[Size, list[bool]] = {size: [] for size in sizes}
    live: list[Scheduled] = []
    last: tuple[list[Scheduled], HostRows] | None = None  # of the step before
    followed = 0
    for step in range(200):
        if len(live) < 6 and (not live or rng.random() < 0.2):
            live.append(Scheduled(Request(str(step), (1,)), list(range(rng.randrange(1, 70)))))
        elif live and (rng.random() < 0.1 or max(len(s.tokens) for s in live) > 150):
            gone = max(live, key=lambda s: len(s.tokens))
            live.remove(gone)
            pages.release(gone.pages)
            decoder.tables.leave(gone)
        for s in live:
            s.computed = len(s.tokens)
            s.tokens.append(0)
            pages.grow(s.pages, s.computed + 1)
            pages.settle(s.pages, s.tokens, b"", s.computed)
        some = rng.sample(live, rng.randrange(len(live))) if live and rng.random() < 0.1 else live
        if not some:
            last = None
            continue
        work = [Work(s, s.computed, 1) for s in some]
        if last is not None and last[0] == some:
            host = decoder.tables.host_rows(work, last[1])
            for found, wanted in zip(host, decoder.tables.host_rows(work)):
                assert found is wanted or np.array_equal(found, wanted)
            followed += 1
        else:
            host = decoder.tables.host_rows(work)
        last = (list(some), host)
        size = sizes[len(some) > 4]
        mine = buffers[size]
        before = mine._tables_there
        tokens = [rng.randrange(90) for _ in some]
        if rng.random() < 0.5:
            drawn = torch.tensor([[t, 7] for t in tokens[::-1]], device=decoder.device)
            mine.fill(DrawnTokens(drawn[:, 0], list(range(len(some)))[::-1]), host)
        else:
            mine.fill(tokens, host)
        whole[size].append(not (before == mine._tables_there).all())
        n, rows = len(some), mine.rows
        assert mine.tokens[:n].tolist() == tokens
        assert rows.position_N.tolist() == [s.computed for s in some] + [0] * (size.sequences - n)
        assert rows.length_S.tolist() == [s.computed + 1 for s in some] + [1] * (size.sequences - n)
        for table, slots, kind in (
            (rows.global_SP, rows.global_slot_N, "globals"), (rows.window_SP, rows.window_slot_N, "windows")
        ):  # fmt: skip
            held = [getattr(s.pages, kind) for s in some]
            assert table.tolist() == [h + [0] * (20 - len(h)) for h in held] + [[0] * 20] * (
                size.sequences - n
            )
            wanted = [h[s.computed // 8] * 8 + s.computed % 8 for h, s in zip(held, some)]
            assert slots.tolist() == wanted + [0] * (size.sequences - n)
    assert 50 < followed < 190
    assert any(sent for flags in whole.values() for sent in flags)
    assert not all(sent for flags in whole.values() for sent in flags)


def test_the_smallest_size_that_holds_a_step_is_taken() -> None:
    engine = Engine(made("full"), EngineConfig(precision="fp32", memory_gib=0.01))
    graphs = DecodeGraphs(engine.decoder, Size(40, 200), 90, lambda run: run)
    assert graphs.size_for(1, 1) == (1, 13)
    assert graphs.size_for(5, 14) == (8, 50)
    assert graphs.size_for(33, 51) == (40, 200)
    assert graphs.size_for(41, 1) is None
    assert graphs.size_for(1, 201) is None


def test_static_steps_go_to_the_static_kernels() -> None:
    engine = Engine(made("full"), EngineConfig(precision="fp32", memory_gib=0.01))
    graphs = DecodeGraphs(engine.decoder, Size(4, 5), 90, lambda run: run)
    buffers, _ = graphs._make(Size(2, 5))
    assert backend_for(torch.zeros(2, 4, 8), buffers.rows) == "static"


def test_captured_steps_are_as_exact_as_others() -> None:
    for exact in (False, True):
        engine = Engine(made("full"), EngineConfig(precision="fp32", memory_gib=0.01, deterministic=exact))
        graphs = DecodeGraphs(engine.decoder, Size(4, 5), 90, lambda run: run)
        assert graphs._make(Size(2, 5))[0].rows.exact == exact
