"""Running ahead changes no answer, leaves nothing in flight or taken, and never looks at a result before its time."""

from __future__ import annotations

import asyncio
import random
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import save_tiny
from fake_device import Event, Readback, attach
from test_engine import SHAPES, VOCABULARY, made, plain, texts

from deepseek.assemble import Loaded, load
from deepseek.models import ModelConfig, Transformer
from deepseek.serve import sampling
from deepseek.serve.ahead import InFlight
from deepseek.serve.client import LocalClient
from deepseek.serve.engine import Engine
from deepseek.serve.engine_config import EngineConfig
from deepseek.serve.graphs import StepBuffers
from deepseek.serve.request import Output, Request
from deepseek.serve.sampler import Grammar, SamplingConfig

BASE = {"precision": "fp32", "memory_gib": 0.01, "device": "cpu"}


def engine_of(loaded: Loaded, ahead: bool, **config: Any) -> Engine:
    return Engine(loaded, EngineConfig(**{**BASE, "ahead": ahead, **config}))


def flat(vocabulary: int) -> Loaded:
    """A model whose nuclei are larger than a first look at its logits."""
    torch.manual_seed(3)
    model = Transformer(
        ModelConfig(vocab_size=vocabulary, hidden=32, layers=2, ffn=48, pattern="LF", max_length=96)
    )
    return Loaded(model.eval(), None, Path("flat"), None)


WIDE = SamplingConfig(temperature=1.0, top_p=0.97, max_tokens=15, logprobs=1)  #: of ``flat``: a second look


def check_empty(engine: Engine) -> None:
    """Nothing is live, in flight, or held."""
    assert not engine._live
    assert not engine._timed
    assert engine._flight is None
    assert not engine.scheduler.running
    assert not engine.scheduler._promised
    assert not engine.decoder.tables._place
    for pool in (engine.pages.globals, engine.pages.windows):
        assert pool.used == 0
        assert not any(pool._references)
        assert sorted([*pool._fresh, *pool._idle]) == list(range(1, pool.count + 1))


def drive(
    engine: Engine,
    requests: Sequence[Request],
    arrivals: Sequence[int] = (),
    aborts: dict[int, str] | None = None,
) -> dict[str, list[Output]]:
    """Every request's outputs; request ``i`` comes before step ``arrivals[i]``, ``aborts[step]`` goes before that."""
    found: dict[str, list[Output]] = {r.id: [] for r in requests}
    arrivals = arrivals or [0] * len(requests)
    for step in range(10_000):
        for request, at in zip(requests, arrivals):
            if at == step:
                engine.add(request)
        if aborts and step in aborts:
            engine.abort(aborts[step])
        if not engine.has_work and step >= max(arrivals):
            break
        for output in engine.step():
            found[output.id].append(output)
    assert not engine.has_work
    check_empty(engine)
    return found


def said(outputs: Sequence[Output]) -> tuple[Any, ...]:
    """All that a client learns of its answer, but for how it came in pieces."""
    last = outputs[-1]
    return (
        [t for o in outputs for t in o.tokens], "".join(o.text for o in outputs),
        [p for o in outputs for p in o.logprobs], last.finish, last.stop, last.error,
    )  # fmt: skip


def tokens_of(outputs: Sequence[Output]) -> list[int]:
    return [t for o in outputs for t in o.tokens]


def mixed(prompts: Sequence[Sequence[int]], seed: int = 0, **more: Any) -> list[Request]:
    """Requests of several lengths and kinds, all of which can be followed."""
    rng, found = random.Random(seed), []
    for i, prompt in enumerate(prompts):
        kind = rng.choice(
            [
                {"temperature": 0},
                {"temperature": 0.9, "top_p": 1.0},
                {"temperature": 1.1, "top_p": 0.9, "top_k": 20},
                {"temperature": 0.8, "top_p": 1.0, "min_tokens": 7},
                {"temperature": 0, "logit_bias": {3: 2.0, 7: -100.0}},
                {"temperature": 1.0, "top_p": 1.0, "min_p": 0.02},
            ]
        )
        ends = tuple(rng.sample(range(VOCABULARY), 12)) if rng.random() < 0.6 else ()
        options = {
            "max_tokens": rng.randint(1, 24),
            "seed": i,
            "stop_token_ids": ends,
            "logprobs": rng.choice([None, 0, 2]),
        }
        found.append(Request(str(i), tuple(prompt), SamplingConfig(**{**kind, **options, **more})))
    return found


def followed(engine: Engine) -> list[int]:
    """Grows by the rows of every step that was launched ahead."""
    rows, follow = [], engine.scheduler.follow

    def told(going: Any) -> Any:
        work = follow(going)
        if work:
            rows.append(len(work))
        return work

    engine.scheduler.follow = told  # type: ignore[method-assign]
    return rows


def launched(engine: Engine) -> list[int]:
    """Grows by the rows of every step."""
    rows, host_rows = [], engine.decoder.tables.host_rows

    def told(work: Any, *before: Any) -> Any:
        rows.append(sum(w.rows for w in work))
        return host_rows(work, *before)

    engine.decoder.tables.host_rows = told  # type: ignore[method-assign]
    return rows


@pytest.mark.parametrize(
    ("shape", "prefix_cache"), [*((shape, True) for shape in sorted(SHAPES)), ("mixed", False)]
)
def test_answers_are_the_same_to_the_last_bit(shape: str, prefix_cache: bool) -> None:
    loaded, prompts = made(shape), texts(9, seed=4, longest=40)
    requests, rng = mixed(prompts), random.Random(2)
    arrivals = [rng.randrange(30) for _ in requests]
    found = []
    for ahead in (False, True):
        engine = engine_of(loaded, ahead, deterministic=True, prefix_cache=prefix_cache, max_running=4)
        rows = followed(engine)
        found.append({id: said(o) for id, o in drive(engine, requests, arrivals).items()})
        assert bool(rows) == ahead
    assert found[0] == found[1]
    assert {answer[3] for answer in found[0].values()} == {"stop", "length"}


@pytest.mark.parametrize(
    ("shape", "fast"), [*((shape, False) for shape in sorted(SHAPES)), ("mixed", True), ("full", True)]
)
def test_nothing_is_read_or_overwritten_before_its_time(
    shape: str, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured steps on a device that runs as late as it may, or as early."""
    loaded, prompts = made(shape), texts(14, seed=6)
    requests, rng = mixed(prompts, seed=3), random.Random(5)
    arrivals = [rng.randrange(25) for _ in requests]
    wanted = {
        id: tokens_of(o)
        for id, o in drive(engine_of(loaded, False, max_running=6), requests, arrivals).items()
    }
    engine = engine_of(loaded, True, max_running=6)
    queue, rows = attach(engine, monkeypatch, fast), followed(engine)
    Event.waits = 0
    found = drive(engine, requests, arrivals)
    assert {id: tokens_of(o) for id, o in found.items()} == wanted
    assert len(set(rows)) > 2
    assert len(engine.launcher.graphs._made) > 1  # type: ignore[union-attr]
    assert queue.depth > 4  # a step and the next one's launch were waiting at once
    assert Event.waits == 0  # nobody waited for memory to copy from


@pytest.mark.parametrize("spoilt", ["no wait for tokens", "one set of pinned memory", "logits not kept"])
def test_the_fake_device_shows_what_comes_too_early(spoilt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests with it would see of an engine that is careless."""
    kept = spoilt == "logits not kept"
    loaded, option = (
        (flat(1000), WIDE) if kept else (made("full"), replace(WIDE, temperature=0.0, logprobs=None))
    )
    request = Request("a", (1, 2, 3), replace(option, seed=1))
    wanted = tokens_of(drive(engine_of(loaded, False), [request])["a"])
    engine = engine_of(loaded, True)
    attach(engine, monkeypatch, fast=kept)
    if spoilt == "no wait for tokens":
        monkeypatch.setattr(Readback, "patient", False)
    elif spoilt == "one set of pinned memory":
        monkeypatch.setattr(Event, "patient", False)
        whole = StepBuffers.__init__

        def one(buffers: Any, *args: Any) -> None:
            whole(buffers, *args)
            buffers._hosts[1] = buffers._hosts[0]

        monkeypatch.setattr(StepBuffers, "__init__", one)
    else:
        monkeypatch.setattr(sampling._Draw, "keep", lambda draw: None)
    try:
        found = tokens_of(drive(engine, [request])["a"])
    except (IndexError, RuntimeError):
        return
    assert found != wanted


def test_what_ends_unforeseen_has_a_row_too_many_and_nothing_else() -> None:
    """Ends at many places of a page: rows in flight write behind what the prefix cache keeps."""
    loaded, prompt = made("mixed"), tuple(texts(1, seed=2)[0][:9])
    answer, _ = plain(loaded, prompt, 22)
    ends = [end for end in (4, 5, 6, 7, 8, 12, 13, 14, 15, 21) if answer.index(answer[end]) == end]
    assert len(ends) > 5
    for end in ends:
        engine = engine_of(loaded, True, page=8)
        rows = launched(engine)
        request = Request(
            "a", prompt, SamplingConfig(temperature=0, max_tokens=60, stop_token_ids=(answer[end],))
        )
        assert tokens_of(drive(engine, [request])["a"]) == answer[: end + 1]
        assert sum(rows) == len(prompt) + end + 1  # the last of them was for nobody
        again = Request("b", (*prompt, *answer[: end + 1]), SamplingConfig(temperature=0, max_tokens=8))
        (*_, last) = outputs = drive(engine, [again])["b"]
        assert tokens_of(outputs) == plain(loaded, again.prompt, 8)[0]
        assert last.cached_tokens == (len(prompt) + end) // 8 * 8


def test_ends_in_sight_cost_no_row() -> None:
    loaded, prompts = made("full"), texts(7, seed=1)
    requests = [
        Request(str(i), tuple(p), SamplingConfig(temperature=0, max_tokens=1 + 3 * i))
        for i, p in enumerate(prompts)
    ]
    counts = []
    for ahead in (False, True):
        engine = engine_of(loaded, ahead)
        rows = launched(engine)
        drive(engine, requests)
        counts.append(rows)
    assert counts[0] == counts[1]


def test_too_little_memory_preempts_and_changes_nothing() -> None:
    loaded, prompts = made("full"), texts(8, seed=9, longest=70)
    requests = [
        Request(str(i), tuple(p), SamplingConfig(temperature=0, max_tokens=80)) for i, p in enumerate(prompts)
    ]
    layout = Engine(loaded, EngineConfig(**BASE)).pages.layout
    found = []
    for ahead, pages in ((False, 1000), (True, 8), (True, 12)):
        engine = engine_of(loaded, ahead, memory_gib=pages * layout.global_bytes / 2**30, max_running=12)
        rows = followed(engine)
        found.append([tokens_of(o) for o in drive(engine, requests).values()])
        assert (engine.stats().preemptions > 0) == ahead
        assert bool(rows) == ahead
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("device", ["cpu", "fake"])
def test_aborts_and_deadlines_at_any_moment(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, prompts, rng = made("mixed"), texts(10, seed=1), random.Random(0)
    whole = {i: plain(loaded, p, 12)[0] for i, p in enumerate(prompts)}
    engine = engine_of(loaded, True, max_running=6)
    if device == "fake":
        attach(engine, monkeypatch)
    rows, live, ended = followed(engine), dict[str, list[int]](), dict[str, int]()
    for turn in range(150):
        for _ in range(rng.choice([0, 0, 1])):
            deadline = rng.choice([None, None, 1e6])
            name = f"{turn % 10}-{turn}"
            engine.add(
                Request(
                    name,
                    tuple(prompts[turn % 10]),
                    SamplingConfig(temperature=0, max_tokens=12),
                    deadline=deadline,
                )
            )
            live[name] = []
        for output in engine.step() if engine.has_work else []:
            live[output.id] += output.tokens
            if output.finish:
                tokens = live.pop(output.id)
                assert tokens == whole[int(output.id[0])][: len(tokens)]
                assert output.finish == "timeout" or len(tokens) == 12
                ended[output.finish] = ended.get(output.finish, 0) + 1
        while live and rng.random() < 0.04:
            name = rng.choice(sorted(live))
            assert engine.abort(name)
            tokens = live.pop(name)
            assert tokens == whole[int(name[0])][: len(tokens)]
        if engine._timed and rng.random() < 0.1:
            next(iter(engine._timed.values())).arrival -= 2e6
    for name in list(live):
        assert engine.abort(name)
    assert not engine.has_work
    check_empty(engine)
    assert rows
    assert ended["length"] > 5
    assert ended["timeout"] > 2


def test_bad_weights_end_one_request_and_no_other() -> None:
    loaded = made("full")
    with torch.no_grad():
        loaded.model.embedding.weight[5] = float("nan")
    engine = engine_of(loaded, True)
    good = SamplingConfig(temperature=0, max_tokens=9)
    forced = replace(good, logit_bias={5: 100.0}, min_tokens=3)
    requests = [Request("bad", (1, 2), forced), Request("good", (1, 2), good)]
    found = drive(engine, requests)
    assert {name: o[-1].finish for name, o in found.items()} == {"bad": "error", "good": "length"}
    assert tokens_of(found["bad"]) == [5]
    assert tokens_of(found["good"]) == plain(loaded, (1, 2), 9)[0]


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(save_tiny(tmp_path_factory.mktemp("ahead") / "model", pattern="LHF"))


STOPPING = SamplingConfig(temperature=1.0, top_p=1.0, max_tokens=40, stop=("e", "th", "qu"))


@pytest.mark.parametrize(
    "sampling",
    [
        STOPPING,
        replace(STOPPING, include_stop=True, logprobs=2),
        replace(STOPPING, min_tokens=12, ignore_eos=True),
    ],
    ids=["stop texts", "included", "not before"],
)
def test_stop_texts(spoken: Loaded, sampling: SamplingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    requests = [
        Request(
            str(i), tuple(rng.randrange(6, 320) for _ in range(rng.randint(1, 50))), replace(sampling, seed=i)
        )
        for i in range(10)
    ]
    arrivals = [rng.randrange(20) for _ in requests]
    found = []
    for ahead in (False, True):
        engine = engine_of(spoken, ahead, max_running=4, deterministic=True)
        rows = followed(engine)
        found.append({id: said(o) for id, o in drive(engine, requests, arrivals).items()})
        assert bool(rows) == ahead
    assert found[0] == found[1]
    assert "stop" in {answer[3] for answer in found[0].values()}


HOST = {
    "penalties": {"sampling": {"repetition_penalty": 1.3, "frequency_penalty": 0.2}},
    "grammar": {"sampling": {"grammar": Grammar(kind="regex", text="[a-z ]{5,20}")}},
    "speculation": {"config": {"speculate": 4}},
    "trace": {"request": {"trace": True}},
}


@pytest.mark.parametrize("what", sorted(HOST))
def test_what_needs_the_host_is_not_run_ahead(spoken: Loaded, what: str) -> None:
    """While such a request runs; those beside it go on ahead once it has ended."""
    if what == "grammar":
        pytest.importorskip("llguidance")
    some = HOST[what]
    ordinary = SamplingConfig(temperature=0, max_tokens=60, ignore_eos=True)
    special = SamplingConfig(**{"temperature": 0, "max_tokens": 15, **some.get("sampling", {})})
    requests = [
        Request("special", (17, 20, 30), special, **some.get("request", {})),
        Request("ordinary", (9, 12, 80, 45), ordinary),
    ]
    found = []
    for ahead in (False, True):
        engine = engine_of(spoken, ahead, deterministic=True, **some.get("config", {}))
        rows = followed(engine)
        found.append({id: said(o) for id, o in drive(engine, requests, [0, 2]).items()})
        assert set(rows) == ({1} if ahead and what != "speculation" else set())
    assert found[0] == found[1]


def test_a_prompt_that_waits_is_not_kept_waiting() -> None:
    """An arrival is in the first step that is planned after it came; with no place for it, the others run ahead."""
    loaded, prompts = made("full"), texts(3, seed=5)
    engine = engine_of(loaded, True, max_running=2)
    rows = followed(engine)
    long, short = SamplingConfig(temperature=0, max_tokens=40), SamplingConfig(temperature=0, max_tokens=20)
    engine.add(Request("a", tuple(prompts[0]), long))
    for _ in range(4):
        engine.step()
    assert len(rows) == 4
    engine.add(Request("b", tuple(prompts[1]), short))
    engine.step()  # what was in flight; the next one has the prompt in it
    assert len(rows) == 4
    assert {o.id for o in engine.step()} == {"a", "b"}
    engine.add(Request("c", tuple(prompts[2]), long))
    before = len(rows)
    for _ in range(10):
        assert {o.id for o in engine.step()} == {"a", "b"}
    assert len(rows) == before + 10
    while engine.has_work:
        engine.step()
    check_empty(engine)


@pytest.mark.parametrize("device", ["cpu", "slow", "fast"])
def test_a_token_that_takes_a_second_look_is_gone_on_from(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, prompts = flat(1000), texts(5, seed=2, longest=30)
    requests = [
        Request(str(i), tuple(p), replace(WIDE, seed=i, temperature=1.0 if i % 2 else 0.0))
        for i, p in enumerate(prompts)
    ]
    wanted = {id: tokens_of(o) for id, o in drive(engine_of(loaded, False), requests).items()}
    engine = engine_of(loaded, True)
    if device != "cpu":
        attach(engine, monkeypatch, fast=device == "fast")
    dropped, discard = [], engine._discard
    monkeypatch.setattr(
        engine, "_discard", lambda s: (dropped.append(s) if s.request.id in engine._live else 0, discard(s))
    )
    assert {id: tokens_of(o) for id, o in drive(engine, requests).items()} == wanted
    assert len(dropped) > 10


def test_generate_leaves_nothing_in_flight() -> None:
    loaded, prompts = made("window"), texts(4, seed=3)
    engine = engine_of(loaded, True)
    stop = plain(loaded, prompts[0], 5)[0][-1]
    for _ in range(2):
        done = engine.generate(prompts, SamplingConfig(temperature=0, max_tokens=12, stop_token_ids=(stop,)))
        assert done[0].finish_reason == "stop"
        assert not engine.has_work
        check_empty(engine)


def test_automatic_is_off_without_graphs() -> None:
    loaded = made("full")
    assert not Engine(loaded, EngineConfig(**BASE)).ahead
    assert Engine(loaded, EngineConfig(**BASE, ahead=True)).ahead


def test_the_step_loop_keeps_nothing_back(spoken: Loaded) -> None:
    """Every stream has its end while no other request comes, and an idle loop has nothing in flight."""
    engine, rng = engine_of(spoken, True, max_running=4), random.Random(3)
    prompts = [tuple(rng.randrange(6, 320) for _ in range(rng.randint(1, 40))) for _ in range(12)]
    option = SamplingConfig(temperature=0, max_tokens=20, stop=("e",))
    wanted = engine_of(spoken, False).generate(prompts, option)

    async def test() -> None:
        async with LocalClient(engine) as client:

            async def one(i: int) -> list[Output]:
                found = []
                async for output in client.generate(Request(str(i), prompts[i], option)):
                    found.append(output)
                    if i % 4 == 3 and len(found) == 3:
                        break  # the client goes: an abort
                return found

            for group in (range(12), [0], [1]):
                for i, outputs in zip(group, await asyncio.gather(*map(one, group))):
                    text = "".join(o.text for o in outputs)
                    assert wanted[i].text.startswith(text)
                    assert text == wanted[i].text or not outputs[-1].finish
                for _ in range(2000):
                    if not engine.has_work and not client.stats().running:
                        break
                    await asyncio.sleep(0.01)
                check_empty(engine)

    asyncio.run(test())


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="compares a GPU that runs ahead with one that does not"
)
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_a_gpu_that_runs_ahead_answers_the_same_and_is_not_waited_for(shape: str) -> None:
    loaded, prompts = made(shape), texts(14, seed=6)
    requests, rng = mixed(prompts, seed=3), random.Random(5)
    arrivals = [rng.randrange(25) for _ in requests]
    engines = [
        engine_of(loaded, ahead, device="cuda", memory_gib=0.05, max_running=6) for ahead in (False, True)
    ]
    found = [{id: tokens_of(o) for id, o in drive(e, requests, arrivals).items()} for e in engines]
    assert found[0] == found[1]
    engine, rows = engines[1], followed(engines[1])
    follow = engine._follow
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this mode is new and may miss something
        torch.cuda.set_sync_debug_mode("default")

    def strict(flight: InFlight) -> InFlight | None:
        torch.cuda.set_sync_debug_mode("error")  # captured and compiled it is already
        try:
            return follow(flight)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    engine._follow = strict  # type: ignore[method-assign]
    again = {id: tokens_of(o) for id, o in drive(engine, requests, arrivals).items()}
    assert again == found[0]
    assert rows
