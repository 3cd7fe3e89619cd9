"""``sample`` against a slow reference in fp64 and transformers' processors; that batching, candidates and drafts
change nothing; bad rows; how often a row's tokens are drawn.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek.errors import RequestError
from deepseek.serve import SamplingConfig, distribution, sampling, ways
from deepseek.serve.sampling import Sampled, SamplingState, sample, sample_drafts
from deepseek.serve.token_logprobs import prompt_logprobs

V = 500
ENDS = (3, 4)


def rows_of(count: int, seed: int = 0, scale: float = 3.0, vocabulary: int = V) -> torch.Tensor:
    return torch.randn(count, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def state_of(
    config: SamplingConfig, tokens: Sequence[int] = (), *, seed: int = 7, vocabulary: int = V, **more: Any
) -> SamplingState:
    state = SamplingState(config, [1, 2, 3, 2], seed, vocabulary, end_ids=ENDS, **more)
    for token in tokens:
        state.accept(token)
    return state


def random_config(dice: random.Random) -> SamplingConfig:
    """Every option off as often as on."""

    def maybe(off: Any, *on: Any) -> Any:
        return dice.choice(on) if dice.random() < 0.5 else off

    return SamplingConfig(
        temperature=maybe(1.0, 0.0, 0.2, 0.7, 1.6),
        top_k=maybe(0, 1, 5, 50, 300, 9999),
        top_p=maybe(1.0, 0.01, 0.6, 0.95, 0.9999),
        min_p=maybe(0.0, 0.02, 0.3, 1.0),
        repetition_penalty=maybe(1.0, 0.8, 1.3),
        presence_penalty=maybe(0.0, -1.0, 1.5),
        frequency_penalty=maybe(0.0, -0.5, 0.7),
        logit_bias=maybe({}, {5: 4.0, 3: -100.0, 17: 0.5}),
        min_tokens=maybe(0, 4, 90),
        stop_token_ids=maybe((), (11, 12)),
        ignore_eos=maybe(False, True),
        logprobs=maybe(None, 0, 3, 20),
    )


def target(
    logits: torch.Tensor, config: SamplingConfig, prompt: Sequence[int], told: Sequence[int]
) -> np.ndarray:
    """Slow and plain, in fp64, one token after the other: the probabilities that tokens are drawn with."""
    c, x = config, logits.double().tolist()
    for token in set(prompt) | set(told):
        x[token] = x[token] / c.repetition_penalty if x[token] > 0 else x[token] * c.repetition_penalty
    for token in set(told):
        x[token] -= c.presence_penalty + c.frequency_penalty * list(told).count(token)
    for token, bias in c.logit_bias.items():
        x[token] += bias
    if len(told) < c.min_tokens:
        for token in (*c.stop_token_ids, *(() if c.ignore_eos else ENDS)):
            x[token] = -math.inf
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    if c.temperature == 0:
        return np.eye(len(x))[order[0]]
    p = np.exp((np.array(x) - x[order[0]]) / c.temperature)
    if c.top_k:
        p[order[c.top_k :]] = 0
    p /= p.sum()
    before, kept = 0.0, []
    for token in order:
        if before >= c.top_p and c.top_p < 1:
            break
        kept.append(token)
        before += p[token]
    nucleus = np.zeros_like(p)
    nucleus[kept] = p[kept]
    nucleus[nucleus < c.min_p * nucleus.max()] = 0
    return nucleus / nucleus.sum()


@pytest.mark.parametrize("seed", range(150))
def test_a_mixed_batch_draws_what_the_slow_reference_draws(seed: int) -> None:
    """The reference's inverse distribution function, at the same random number, gives the same token."""
    dice = random.Random(seed)
    logits = rows_of(6, seed)
    told = [[dice.choice([2, 3, 5, 17, 90]) for _ in range(dice.randrange(6))] for _ in range(6)]
    states = [state_of(random_config(dice), tokens, seed=seed) for tokens in told]
    for row, state, tokens, found in zip(logits, states, told, sample(logits, states)):
        c = state.config
        p = target(row, c, [1, 2, 3, 2], tokens)
        assert p[found.token] > 0, c
        if c.temperature == 0 or c.top_k == 1:
            assert found.token == p.argmax()
            continue
        sorts = c.top_k > 0 or c.top_p < 1
        order = np.lexsort((np.arange(V), -p)) if sorts else np.arange(V)
        upto, at = p[order].cumsum(), order.tolist().index(found.token)
        u = state.uniform(len(tokens))
        assert upto[at] - p[found.token] - 1e-5 <= u <= upto[at] + 1e-5, c


@pytest.mark.parametrize("seed", range(40))
def test_a_row_draws_the_same_alone_in_any_batch_and_with_any_candidates(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice = random.Random(seed)
    count = dice.choice([2, 7, 33])
    logits = rows_of(count, seed, scale=dice.choice([0.1, 1.0, 4.0])).bfloat16()  # bf16: many ties
    states = [state_of(random_config(dice), [5] * dice.randrange(4), seed=i) for i in range(count)]
    together = sample(logits, states)
    for i in dice.sample(range(count), 2):
        assert sample(logits[i : i + 1], [states[i]]) == [together[i]]
    order = dice.sample(range(count), count)
    assert sample(logits[order], [states[i] for i in order]) == [together[i] for i in order]
    for first, second in [(1, 3), (20, 100)]:
        monkeypatch.setattr(ways, "CANDIDATES", first)
        monkeypatch.setattr(ways, "WIDER", second)
        assert sample(logits, states) == together


def test_weights_do_not_depend_on_where_a_row_lies() -> None:
    """Vectorised loops treat the last few numbers of a block differently; the exponential must not."""
    logits = rows_of(9, vocabulary=1003)
    best, heat = logits.amax(-1), torch.full((9,), 0.7)
    whole = distribution.weights(logits, best, heat)
    for i in range(9):
        for rows in (slice(i, i + 1), slice(i, None)):
            part = distribution.weights(logits[rows], best[rows], heat[rows])
            assert torch.equal(part[0], whole[i])


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.4])
@pytest.mark.parametrize("bias", [{}, {9: -100.0, 10: 5.0}])
def test_scores_are_those_of_transformers(penalty: float, bias: dict[int, float]) -> None:
    pytest.importorskip("transformers")
    from transformers import MinNewTokensLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor
    from transformers.generation import SequenceBiasLogitsProcessor

    prompt, told = [1, 2, 3, 2], [5, 5, 9]
    config = SamplingConfig(repetition_penalty=penalty, logit_bias=bias, min_tokens=4)
    state = state_of(config, told)
    logits = rows_of(1)
    ids = torch.tensor([prompt + told])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    if bias:
        expected = SequenceBiasLogitsProcessor([[[k], v] for k, v in bias.items()])(ids, expected)
    expected = MinNewTokensLengthLogitsProcessor(len(prompt), 4, list(ENDS), device="cpu")(ids, expected)
    torch.testing.assert_close(sampling._edited(logits, [sampling._row(state, 3)]), expected)
    assert torch.equal(logits, rows_of(1))  # the engine's logits stay as they are


@pytest.mark.parametrize("min_p", [0.01, 0.2, 1.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (20, 0.9)])
def test_min_p_is_that_of_transformers(min_p: float, top_k: int, top_p: float) -> None:
    pytest.importorskip("transformers")
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits, ids = rows_of(8), torch.zeros(8, 1, dtype=torch.long)
    scores = TemperatureLogitsWarper(1.5)(ids, logits)
    if top_k:
        scores = TopPLogitsWarper(top_p)(ids, TopKLogitsWarper(top_k)(ids, scores))
    scores = MinPLogitsWarper(min_p)(ids, scores)
    filters = distribution.Filters(
        torch.full((8,), 1.5), torch.full((8,), top_k or V),
        torch.full((8,), top_p if top_p < 1 else 2.0, dtype=torch.float64), torch.full((8,), min_p),
    )  # fmt: skip
    torch.testing.assert_close(distribution.probabilities(logits, filters), scores.softmax(-1))


@pytest.mark.parametrize(
    "options",
    [{}, {"min_p": 0.1}, {"top_k": 8}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.9, "temperature": 1.7},
     {"presence_penalty": 1.0, "repetition_penalty": 1.5}],
)  # fmt: skip
def test_draws_follow_the_target(options: dict[str, Any]) -> None:
    """Pearson's chi-square of 8,000 places of one seed; 99.99% of right samplers stay below."""
    from scipy.stats import chi2

    config = SamplingConfig(**{"temperature": 1.0, "top_p": 1.0, **options})
    row, told = rows_of(1, scale=1.0, vocabulary=20), [6, 6, 8]
    state = state_of(config, told, vocabulary=20)
    counts = Counter[int]()
    for start in range(0, 8000, 500):
        found = sample(row.expand(500, -1), [state] * 500, range(start, start + 500))
        counts.update(s.token for s in found)
    p = target(row[0], config, [1, 2, 3, 2], told)
    drawn = np.array([counts[i] for i in range(20)])
    assert not drawn[p == 0].any()
    expected = 8000 * p[p > 0]
    statistic = float(((drawn[p > 0] - expected) ** 2 / expected).sum())
    assert statistic < chi2.ppf(0.9999, len(expected) - 1)


def test_a_token_without_probability_is_never_drawn() -> None:
    """Not even at the random number 0, where it comes first."""
    scores = torch.tensor([[-math.inf, 1.0, 0.0, -math.inf]])
    filters = distribution.Filters(
        torch.ones(1), torch.full((1,), 4), torch.full((1,), 2.0, dtype=torch.float64), None
    )
    for uniform in (0.0, 1 - 2.0**-53):
        u = torch.tensor([uniform], dtype=torch.float64)
        assert int(distribution.draw_all(scores, filters, u)) == (1 if uniform == 0 else 2)
        assert int(distribution.draw_best(scores, filters, u, 1)[0]) in (1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_knowing_the_likeliest_token_changes_nothing(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    scores = (3 * torch.randn(50, 40, generator=generator)).round(decimals=1).to(dtype)  # with equal ones
    scores[7, 3:] = -math.inf
    heat, p = torch.linspace(0.1, 2.0, 50), torch.full((50,), 2.0, dtype=torch.float64)
    filters = distribution.Filters(heat, torch.full((50,), 40), p, torch.full((50,), 0.01))
    uniform = torch.rand(50, dtype=torch.float64, generator=generator)
    wanted = distribution.draw_all(scores, filters, uniform)
    assert torch.equal(distribution.draw_all(scores, filters, uniform, scores.argmax(-1)), wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a GPU with the CPU")
def test_a_gpu_draws_what_the_cpu_draws() -> None:
    """Exponentials differ in the last bit: a random number between the two sums comes once in millions."""
    dice = random.Random(0)
    logits = rows_of(200, vocabulary=3000)
    states = [state_of(random_config(dice), [5, 6], seed=i, vocabulary=3000) for i in range(200)]
    here, there = sample(logits, states), sample(logits.cuda(), states)
    assert [s.token for s in here] == [s.token for s in there]
    assert [s.logprobs and s.logprobs.rank for s in here] == [s.logprobs and s.logprobs.rank for s in there]
    alone = [sample(logits[i : i + 1].cuda(), [states[i]])[0].token for i in range(0, 200, 10)]
    assert alone == [s.token for s in there][::10]


def test_seeds_and_places_are_independent() -> None:
    flat = torch.zeros(1, 1000)
    config = SamplingConfig(temperature=1.0, top_p=1.0)

    def answer(seed: int) -> list[int]:
        state = state_of(config, seed=seed, vocabulary=1000)
        return [s.token for s in sample(flat.expand(200, -1), [state] * 200, range(200))]

    assert answer(0) == answer(0)
    answers = [answer(seed) for seed in (0, 1, 2**63 - 1)]
    for a, b in [answers[:2], answers[1:]]:
        assert sum(x == y for x, y in zip(a, b)) < 5  # 0.2 expected
    assert len(set(answers[0])) > 150  # 181 expected
    backwards = [state_of(config, seed=0).uniform(place) for place in (199, 63, 64, 0)]
    state = state_of(config, seed=0)
    assert backwards == [[state.uniform(i) for i in range(200)][i] for i in (199, 63, 64, 0)]
    for place, count in ((0, 200), (60, 16), (63, 1), (64, 130), (5, 3)):
        some = state_of(config, seed=0).uniforms(place, count)
        assert some.tolist() == [state.uniform(i) for i in range(place, place + count)]


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(3, V)
    logits[:, [40, 41, 77]] = 2.0
    logits[1, 0], logits[2, 5] = -0.0, 0.0
    greedy, two, few = (
        SamplingConfig(temperature=t, top_k=k, logprobs=4) for t, k in [(0, 0), (1, 2), (1, 3)]
    )
    found = sample(logits, [state_of(greedy), state_of(two), state_of(few)])
    assert found[0].token == 40
    assert found[1].token in (40, 41)
    assert found[2].token in (40, 41, 77)
    for s in found:
        assert s.logprobs is not None
        assert [token for token, _ in s.logprobs.top] == [40, 41, 77, 0]
        assert s.logprobs.rank == [40, 41, 77].index(s.token) + 1


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 1.0}, {"top_k": 5}, {}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bad_rows_are_told_and_hurt_no_other(options: dict[str, Any], dtype: torch.dtype) -> None:
    logits = rows_of(6).to(dtype)
    good = sample(logits, [state_of(SamplingConfig(**options)) for _ in range(6)])
    bad = logits.clone()
    bad[0, 9], bad[2, 9], bad[4] = math.nan, math.inf, -math.inf
    bad[5, 100:] = -math.inf  # that one is fine
    config = SamplingConfig(**options, logprobs=2, presence_penalty=0.5)
    for states in (
        [state_of(SamplingConfig(**options)) for _ in range(6)],
        [state_of(config) for _ in range(6)],
    ):
        found = sample(bad, states)
        assert [s.token < 0 for s in found] == [True, False, True, False, True, False]
        assert [found[i].token for i in (1, 3)] == [good[i].token for i in (1, 3)]
        assert all("not finite" in found[i].error and found[i].logprobs is None for i in (0, 2, 4))
        assert found[5].token < 100


def test_a_row_whose_every_token_is_forbidden_is_told() -> None:
    config = SamplingConfig(min_tokens=5, max_tokens=9, stop_token_ids=tuple(range(V)))
    assert "forbidden" in sample(rows_of(1), [state_of(config)])[0].error


@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e30, 3e38])
@pytest.mark.parametrize("temperature", [1e-5, 1.0, 1e6])
def test_huge_logits_and_cold_temperatures(scale: float, temperature: float) -> None:
    logits = rows_of(4, scale=1.0)
    logits = logits / logits.abs().max() * scale
    for options in ({"top_p": 1.0}, {"top_p": 0.9}, {"top_k": 30}):
        found = sample(logits, [state_of(SamplingConfig(temperature=temperature, **options))] * 4, range(4))
        assert all(0 <= s.token < V for s in found)
        if scale > 1e3 * temperature:
            assert [s.token for s in found] == logits.argmax(-1).tolist()


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = rows_of(5).bfloat16()
    config = SamplingConfig(
        temperature=0.1, top_k=3, repetition_penalty=1.9, logit_bias={8: 100.0}, logprobs=6
    )
    expected = logits.double().log_softmax(-1)
    for row, s in zip(expected, sample(logits, [state_of(config)] * 5, range(5))):
        assert s.token == 8
        assert s.logprobs is not None
        assert s.logprobs.token == 8
        assert s.logprobs.logprob == pytest.approx(float(row[8]), abs=1e-5)
        ranked = sorted(range(V), key=lambda i: (-float(row[i]), i))
        assert s.logprobs.rank == ranked.index(8) + 1
        assert [i for i, _ in s.logprobs.top] == ranked[:6]
        assert [p for _, p in s.logprobs.top] == pytest.approx([float(row[i]) for i in ranked[:6]], abs=1e-5)


def test_every_row_gets_as_many_logprobs_as_it_asks() -> None:
    states = [state_of(SamplingConfig(logprobs=n)) for n in (None, 0, 3, 20)]
    found = [s.logprobs for s in sample(rows_of(4), states)]
    assert [None if x is None else len(x.top) for x in found] == [None, 0, 3, 20]
    small = sample(rows_of(1, vocabulary=8), [state_of(SamplingConfig(logprobs=20), vocabulary=8)])[
        0
    ].logprobs
    assert small is not None
    assert len(small.top) == 8


def test_prompt_logprobs() -> None:
    logits, following = rows_of(3), [9, 0, 499]
    expected = logits.double().log_softmax(-1)
    for row, token, found in zip(expected, following, prompt_logprobs(logits, following, 2)):
        assert (found.token, len(found.top)) == (token, 2)
        assert found.logprob == pytest.approx(float(row[token]), abs=1e-5)
        assert found.top[0][0] == int(row.argmax())
    assert [p.top for p in prompt_logprobs(logits, following, 0)] == [()] * 3


def test_a_bias_for_a_token_that_is_not_there_is_refused() -> None:
    with pytest.raises(RequestError, match="token 500") as caught:
        state_of(SamplingConfig(logit_bias={500: 1.0}))
    assert caught.value.param == "logit_bias"


class _Watch(TorchDispatchMode):
    """Counts operations that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.").partition(".")[0]
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"):
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[tuple[int, ...]] = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(tuple(self.shape)) or cpu(self))
    states = [state_of(random_config(random.Random(i)), [5, 6]) for i in range(30)]
    rows = [sampling._row(state, 2) for state in states]
    with _Watch() as watch:
        sampling._launch(rows_of(30), rows, 20, V)
    assert not watch.waits
    sample(rows_of(30), states)
    assert len(copies) <= 3  # more than once only for rows whose nucleus was larger than the candidates
    copies.clear()
    sample(rows_of(30, scale=9.0), states)
    assert len(copies) == 1


# ---- drafts


class Model:
    """Logits that depend on everything before them."""

    def __init__(self, scale: float = 2.5) -> None:
        self.scale = scale

    def __call__(self, tokens: Sequence[int]) -> torch.Tensor:
        seed = hash(tuple(tokens[-3:])) % 2**31  # of integers: the same every time
        return torch.randn(40, generator=torch.Generator().manual_seed(seed)) * self.scale


def one_by_one(model: Model, state: SamplingState, most: int) -> list[Sampled]:
    answer = []
    while len(answer) < most:
        found = sample(model(state.tokens)[None], [state])[0]
        answer.append(found)
        if found.token < 0 or found.token in state.ends:
            break
        state.accept(found.token)
    return answer


def small_config(dice: random.Random) -> SamplingConfig:
    c = random_config(dice)
    return SamplingConfig(**{**vars(c), "stop_token_ids": (11,), "max_tokens": 128})


@pytest.mark.parametrize("seed", range(60))
def test_drafts_change_no_answer(seed: int) -> None:
    """Three requests, drafts right for a random length, then wrong: token by token what ``sample`` gives."""
    dice, model = random.Random(seed), Model()
    configs = [small_config(dice) for _ in range(3)]
    expected = [one_by_one(model, state_of(c, vocabulary=40, seed=i), 40) for i, c in enumerate(configs)]
    states = [state_of(c, vocabulary=40, seed=i) for i, c in enumerate(configs)]
    answers: list[list[Sampled]] = [[], [], []]
    steps = 0
    while live := [i for i in range(3) if len(answers[i]) < len(expected[i])]:
        steps += 1
        requests, logits = [], []
        for i in live:
            coming = [s.token for s in expected[i][len(answers[i]) :]][: dice.randrange(6)]
            draft = [t for t in coming if t >= 0]
            if draft and dice.random() < 0.6:
                draft[dice.randrange(len(draft))] = dice.randrange(40)
            requests.append((states[i], draft))
            logits += [model([*states[i].tokens, *draft[:k]]) for k in range(len(draft) + 1)]
        before = [list(state.tokens) for state, _ in requests]
        found = sample_drafts(torch.stack(logits), requests)
        assert before == [list(state.tokens) for state, _ in requests]
        for i, sampled in zip(live, found):
            assert sampled
            answers[i] += sampled
            for s in sampled:
                if s.token >= 0:
                    states[i].accept(s.token)
    for got, wanted in zip(answers, expected):
        assert got[: len(wanted)] == wanted
    assert steps <= max(map(len, expected))


def test_an_end_token_ends_the_draft() -> None:
    logits = torch.zeros(4, V)
    logits[[0, 1, 2, 3], [9, 3, 9, 9]] = 5.0  # 3 is an end token
    state = state_of(SamplingConfig(temperature=0))
    assert [s.token for s in sample_drafts(logits, [(state, [9, 3, 9])])[0]] == [9, 3]
    state = state_of(SamplingConfig(temperature=0, ignore_eos=True))
    assert [s.token for s in sample_drafts(logits, [(state, [9, 3, 9])])[0]] == [9, 3, 9, 9]


def test_a_bad_row_ends_the_draft() -> None:
    logits = torch.zeros(3, V)
    logits[:, 9] = 5.0
    logits[1] = math.nan
    found = sample_drafts(logits, [(state_of(SamplingConfig(temperature=0)), [9, 9])])[0]
    assert [s.token for s in found] == [9, -1]


def test_no_rows() -> None:
    assert sample(torch.zeros(0, V), []) == []
    assert sample_drafts(torch.zeros(0, V), []) == []


def test_counts_undo_what_a_draft_added() -> None:
    config = SamplingConfig(repetition_penalty=1.2, frequency_penalty=0.5)
    state = state_of(config, [9, 9, 8])
    counts = state.counts

    def seen() -> Iterator[tuple[int, float]]:
        updates = counts.updates()
        yield from zip(updates.ids.tolist(), updates.amounts.tolist())

    before = list(seen())
    draft = [9, 77, 1, 77, *range(100, 300)]
    mark = counts.mark()
    for token in draft:
        counts.add(token)
    assert dict(seen())[77] == 1.0
    counts.remove(draft, mark)
    assert list(seen()) == before
    counts.add(77)
    assert dict(seen())[77] == 0.5
