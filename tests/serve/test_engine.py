"""The engine against the plain model, one request at a time; and against itself under every way of being busy."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from deepseek.assemble import Loaded
from deepseek.config import replace
from deepseek.errors import EngineError, RequestError
from deepseek.models import ModelConfig, Transformer
from deepseek.nn.attention import AttentionConfig
from deepseek.nn.moe import MoEConfig
from deepseek.serve.engine import Engine
from deepseek.serve.engine_config import EngineConfig
from deepseek.serve.request import Output, Request
from deepseek.serve.sampler import SamplingConfig

VOCABULARY = 97
HEADS = AttentionConfig(heads=4, kv_heads=2, head_dim=8, window=11, block=8, stride=8)
OVERLAPPING = AttentionConfig(
    heads=4, kv_heads=1, head_dim=8, window=11, block=8, stride=4, pooling="learned", gate="static", qk_norm=True,
    bias=True, full_rope=False,
)  # fmt: skip
EXPERTS = MoEConfig(experts=8, top_k=2, expert_ffn=24)
SHAPES = {
    "full": ("F", HEADS, MoEConfig()),
    "window": ("L", HEADS, MoEConfig()),
    "hybrid": ("H", HEADS, MoEConfig()),
    "mixed": ("LHF", HEADS, EXPERTS),
    "overlapping": ("HLF", OVERLAPPING, MoEConfig(experts=6, top_k=3, expert_ffn=16, shared_experts=1)),
    # Heads of 16 and more are attended to by the native kernels, where they can be compiled.
    "mixed, native": ("LHF", replace(HEADS, head_dim=16), EXPERTS),
    "overlapping, native": ("HLF", replace(OVERLAPPING, head_dim=16), MoEConfig()),
}


def made(shape: str, layers: int = 3) -> Loaded:
    """A model all of whose parameters matter."""
    pattern, attention, moe = SHAPES[shape]
    torch.manual_seed(7)
    model = Transformer(
        ModelConfig(
            vocab_size=VOCABULARY,
            hidden=32,
            layers=layers,
            ffn=48,
            pattern=pattern,
            max_length=160,
            tie_embeddings=False,
            attention=attention,
            moe=moe,
        )
    )
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("norm.weight"):
                p.uniform_(0.5, 1.5)
            else:
                p.normal_(std=0.3 if p.dim() > 1 else 0.1)
    return Loaded(model.eval(), None, Path(shape), None)


def texts(count: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    """Prompts of several lengths, some with common beginnings."""
    g = torch.Generator().manual_seed(seed)
    stem = torch.randint(VOCABULARY, (longest,), generator=g).tolist()
    found = []
    for i in range(count):
        length = int(torch.randint(1, longest, (1,), generator=g))
        own = torch.randint(VOCABULARY, (length,), generator=g).tolist()
        found.append([*stem[: longest - length], *own] if i % 2 else own)
    return found


@torch.no_grad()
def plain(loaded: Loaded, prompt: Sequence[int], tokens: int) -> tuple[list[int], list[torch.Tensor]]:
    """Greedy answer and its logits by the model itself, computing the whole text anew for every token."""
    text, logits = list(prompt), []
    for _ in range(tokens):
        row = loaded.model.logits(loaded.model(torch.tensor([text])).hidden[:, -1])[0]
        logits.append(row)
        text.append(int(row.argmax()))
    return text[len(prompt) :], logits


def serve(
    loaded: Loaded, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, **config: object
) -> tuple[list[list[Output]], Engine]:
    """Every prompt's outputs."""
    engine = Engine(loaded, EngineConfig(**{"precision": "fp32", "memory_gib": 0.01, **config}))
    found: dict[str, list[Output]] = {str(i): [] for i in range(len(prompts))}
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), tuple(prompt), sampling))
    while engine.has_work:
        for output in engine.step():
            found[output.id].append(output)
    assert engine.stats().pages_used == 0
    return list(found.values()), engine


def tokens_of(outputs: Sequence[Output]) -> list[int]:
    return [t for o in outputs for t in o.tokens]


GREEDY = SamplingConfig(temperature=0, max_tokens=24, logprobs=0)
WAYS = {
    "together": {},
    "one at a time": {"max_running": 1},
    "small chunks": {"max_step_tokens": 7, "max_running": 7},
    "no prefix cache": {"prefix_cache": False},
    "speculation": {"speculate": 5},
    "speculation in small chunks": {"speculate": 3, "max_step_tokens": 5, "max_running": 3},
}


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_greedy_answers_are_the_plain_models(shape: str) -> None:
    loaded, prompts = made(shape), texts(8)
    wanted = [plain(loaded, prompt, GREEDY.max_tokens) for prompt in prompts]
    for way, config in WAYS.items():
        found, _ = serve(loaded, prompts, GREEDY, **config)
        assert [tokens_of(o) for o in found] == [tokens for tokens, _ in wanted], way
    logprobs = [p for o in found for out in o for p in out.logprobs]
    exact = [row.double().log_softmax(-1).max() for _, rows in wanted for row in rows]
    torch.testing.assert_close(
        torch.tensor([p.logprob for p in logprobs]), torch.stack(exact).float(), atol=2e-4, rtol=2e-4
    )


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_deterministic_answers_are_equal_to_the_last_bit(shape: str) -> None:
    loaded, prompts = made(shape), texts(6, seed=3)
    sampling = SamplingConfig(temperature=1.0, top_p=0.9, seed=5, max_tokens=12, logprobs=3)

    def run(**config: object) -> list[object]:
        found, _ = serve(loaded, prompts, sampling, deterministic=True, **config)
        return [(tokens_of(o), [p for out in o for p in out.logprobs]) for o in found]

    first = run()
    for way, config in WAYS.items():
        assert run(**config) == first, way
    alone = [serve(loaded, [p], sampling, deterministic=True)[0][0] for p in prompts]
    assert [(tokens_of(o), [p for out in o for p in out.logprobs]) for o in alone] == first


def test_too_little_memory_preempts_and_changes_nothing() -> None:
    loaded, prompts = made("full"), texts(8, seed=9, longest=70)
    sampling = SamplingConfig(temperature=0, max_tokens=80)
    roomy, _ = serve(loaded, prompts, sampling)
    layout = Engine(loaded, EngineConfig(precision="fp32", memory_gib=0.01)).pages.layout
    tight, engine = serve(
        loaded, prompts, sampling, memory_gib=8 * layout.global_bytes / 2**30, max_running=12
    )
    assert engine.stats().preemptions > 0
    assert [tokens_of(o) for o in tight] == [tokens_of(o) for o in roomy]


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_a_preempted_request_goes_on_with_the_same_bits(shape: str) -> None:
    loaded, prompts = made(shape), texts(4, seed=9, longest=50)
    sampling = SamplingConfig(temperature=0.8, seed=1, max_tokens=20, logprobs=1)

    def run(every: int, **config: object) -> list[tuple[list[int], list[object]]]:
        options = {"precision": "fp32", "memory_gib": 0.01, "deterministic": True, "max_step_tokens": 24}
        # Preempted from outside, as here, is who has no step in flight, and a GPU runs ahead by default.
        engine = Engine(loaded, EngineConfig(max_running=4, ahead=False, **options, **config))
        found: dict[str, list[Output]] = {str(i): [] for i in range(len(prompts))}
        for i, prompt in enumerate(prompts):
            engine.add(Request(str(i), tuple(prompt), sampling))
        for step in range(10_000):
            if not engine.has_work:
                break
            if every and step % every == every - 1 and engine.scheduler.running:
                victim = engine.scheduler.running[-1]
                engine.scheduler._preempt(victim)
                engine.decoder.tables.leave(victim)
            for output in engine.step():
                found[output.id].append(output)
        assert not engine.has_work
        return [(tokens_of(o), [p for out in o for p in out.logprobs]) for o in found.values()]

    calm = run(0)
    assert run(5) == calm
    assert run(4, prefix_cache=False) == calm


@pytest.mark.parametrize("shape", ["mixed", "window"])
def test_a_second_request_finds_its_prompt_in_the_cache(shape: str) -> None:
    loaded = made(shape)
    engine = Engine(loaded, EngineConfig(precision="fp32", memory_gib=0.01))
    prompt = tuple(texts(1, seed=2)[0] * 3)[:100]
    answers, cached = [], []
    for name in "ab":
        engine.add(Request(name, prompt, GREEDY))
        outputs = list(
            itertools.chain.from_iterable(iter(lambda: engine.step() if engine.has_work else [], []))
        )
        answers.append(tokens_of(outputs))
        cached.append(outputs[-1].cached_tokens)
    assert answers[0] == answers[1]
    assert cached == [0, 96]


def test_prompt_logprobs_are_the_plain_models() -> None:
    loaded, prompt = made("mixed"), texts(1, seed=4)[0]
    sampling = SamplingConfig(temperature=0, max_tokens=1, prompt_logprobs=2)
    (outputs,), _ = serve(loaded, [prompt], sampling, max_step_tokens=9, max_running=9)
    found = outputs[0].prompt_logprobs
    assert found is not None
    assert found[0] is None
    with torch.no_grad():
        logits = loaded.model.logits(loaded.model(torch.tensor([prompt])).hidden)[0]
    wanted = logits.log_softmax(-1)[range(len(prompt) - 1), prompt[1:]]
    torch.testing.assert_close(
        torch.tensor([p.logprob for p in found[1:] if p]), wanted, atol=1e-4, rtol=1e-4
    )
    assert [p.token for p in found[1:] if p] == prompt[1:]
    assert all(len(p.top) == 2 for p in found[1:] if p)


def test_an_embedding_is_the_mean_of_the_hidden_states() -> None:
    loaded, prompt = made("mixed"), texts(1, seed=4)[0]
    engine = Engine(
        loaded, EngineConfig(precision="fp32", memory_gib=0.01, max_step_tokens=16, max_running=4)
    )
    engine.add(Request("e", tuple(prompt), embed=True))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    (output,) = outputs
    with torch.no_grad():
        mean = loaded.model(torch.tensor([prompt])).hidden[0].mean(0)
    wanted = torch.nn.functional.normalize(mean, dim=0)
    torch.testing.assert_close(torch.tensor(output.embedding), wanted, atol=1e-5, rtol=1e-4)
    assert output.finish == "stop"
    assert engine.stats().pages_used == 0


def test_traces_tell_which_experts_and_branches_worked() -> None:
    loaded, prompt = made("mixed"), texts(1, seed=4)[0]
    engine = Engine(loaded, EngineConfig(precision="fp32", memory_gib=0.01))
    engine.add(Request("t", tuple(prompt), SamplingConfig(temperature=0, max_tokens=3), trace=True))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    traces = [trace for o in outputs for trace in o.traces]
    assert len(traces) == 3
    seen: dict[int, torch.Tensor] = {}
    for layer, moe in loaded.model.moe_layers().items():
        moe.router.register_forward_hook(lambda _m, _i, out, layer=layer: seen.update({layer: out.expert_NK}))
    gates = []
    with torch.no_grad():
        for end in range(3):
            stats = loaded.model(torch.tensor([[*prompt, *tokens_of(outputs)[:end]]])).layers
            assert stats[1].gate_H is not None
            gates.append(stats)
            for layer, experts in traces[end].experts:
                assert {e for e, _ in experts} == set(seen[layer][-1].tolist())
                assert sum(g for _, g in experts) == pytest.approx(1, abs=1e-5)
    assert [layer for layer, _ in traces[0].gates] == [1]
    assert all(0 < share < 1 for _, share in traces[0].gates)


def test_aborts_at_any_moment_leave_nothing_behind() -> None:
    loaded = made("mixed")
    engine = Engine(loaded, EngineConfig(precision="fp32", memory_gib=0.01, speculate=3, max_step_tokens=32))
    chance = torch.Generator().manual_seed(0)
    prompts = texts(20, seed=1)
    live: list[str] = []
    for turn in range(150):
        for _ in range(int(torch.randint(3, (1,), generator=chance))):
            name = f"{turn}-{len(live)}"
            engine.add(Request(name, tuple(prompts[turn % 20]), SamplingConfig(max_tokens=9, seed=turn)))
            live.append(name)
        for output in engine.step():
            if output.finish:
                live.remove(output.id)
        while live and torch.rand((), generator=chance) < 0.4:
            assert engine.abort(live.pop(int(torch.randint(len(live), (1,), generator=chance))))
    for name in live:
        assert engine.abort(name)
    assert not engine.abort("never there")
    while engine.has_work:  # a step in flight, of a GPU
        assert not engine.step()
    assert engine.stats().pages_used == 0


def test_a_deadline_ends_a_request_with_what_it_has() -> None:
    engine = Engine(made("full"), EngineConfig(precision="fp32", memory_gib=0.01))
    engine.add(Request("late", (1, 2, 3), deadline=0.0))
    (output,) = engine.step()
    assert output.finish == "timeout"
    assert not engine.has_work


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request("a", ()), "empty prompt"),
        (Request("a", (1, VOCABULARY)), f"token id {VOCABULARY} is outside the vocabulary of {VOCABULARY}"),
        (Request("a", (1,) * 160), "160 tokens"),
        (Request("a", (1,), adapter="none"), "no adapter is called 'none'"),
        (Request("a", (1,), SamplingConfig(stop=("x",))), "need a tokenizer"),
    ],
)
def test_what_can_never_be_served_is_refused(request_: Request, words: str) -> None:
    engine = Engine(made("full"), EngineConfig(precision="fp32", memory_gib=0.01))
    with pytest.raises(RequestError, match=words):
        engine.add(request_)
    assert not engine.has_work


def test_bad_weights_end_one_request_and_no_other() -> None:
    loaded = made("full")
    with torch.no_grad():
        loaded.model.embedding.weight[5] = float("nan")
    engine = Engine(loaded, EngineConfig(precision="fp32", memory_gib=0.01))
    engine.add(Request("bad", (1, 5), GREEDY))
    engine.add(Request("good", (1, 2), GREEDY))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert {o.id: o.finish for o in outputs if o.finish} == {"bad": "error", "good": "length"}
    assert "weights" in next(o.error for o in outputs if o.id == "bad")


def test_every_request_has_the_adapter_it_asked_for(tmp_path: Path) -> None:
    """Two LoRA adapters and the bare model in one batch, against models with the products merged in."""
    from safetensors.torch import save_file

    loaded, prompts = made("mixed"), texts(6, seed=8)
    merged, directories = {}, {}
    for seed, name in enumerate(("red", "blue")):
        torch.manual_seed(seed)
        model, tensors = made("mixed").model, {}
        for layer, module, rank in ((0, "query", 3), (1, "value", 3), (2, "output", 3)):
            linear = getattr(model.blocks[layer].attention, module)  # type: ignore[union-attr]
            a, b = torch.randn(rank, linear.in_features), torch.randn(linear.out_features, rank)
            with torch.no_grad():
                linear.weight += 2 * (b @ a) * 0.5**2
            stem = f"base_model.model.model.blocks.{layer}.attention.{module}"
            tensors |= {f"{stem}.lora_A.weight": a * 0.5, f"{stem}.lora_B.weight": b * 0.5}
        directory = tmp_path / name
        directory.mkdir()
        save_file(tensors, directory / "adapter_model.safetensors")
        options = {
            "peft_type": "LORA",
            "r": 3,
            "lora_alpha": 6,
            "target_modules": ["query", "value", "output"],
        }
        (directory / "adapter_config.json").write_text(json.dumps(options))
        merged[name], directories[name] = Loaded(model, None, tmp_path, None), str(directory)
    engine = Engine(loaded, EngineConfig(precision="fp32", memory_gib=0.01, adapters=directories))
    asked = [None, "red", "blue", "red", None, "blue"]
    for i, (prompt, name) in enumerate(zip(prompts, asked)):
        engine.add(Request(str(i), tuple(prompt), GREEDY, adapter=name))
    found: dict[str, list[int]] = {str(i): [] for i in range(6)}
    while engine.has_work:
        for output in engine.step():
            found[output.id] += output.tokens
    for i, (prompt, name) in enumerate(zip(prompts, asked)):
        assert found[str(i)] == plain(merged.get(name or "", loaded), prompt, GREEDY.max_tokens)[0], name
    # The cache of one adapter is nobody else's: the same prompt, asked of another, is computed anew.
    engine.add(Request("again", tuple(prompts[1]), GREEDY, adapter="blue"))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert tokens_of(outputs) == plain(merged["blue"], prompts[1], GREEDY.max_tokens)[0]


@pytest.mark.parametrize(("precision", "close"), [("bf16", 0.1), ("int8", 0.1)])
def test_narrow_formats_stay_near(precision: str, close: float) -> None:
    """Median distance of the prompt tokens' log-probabilities from the plain model's, along the same text."""
    loaded, prompts = made("mixed"), texts(6, seed=5)
    sampling = SamplingConfig(temperature=0, max_tokens=1, prompt_logprobs=0)
    device = "cpu" if precision == "int8" else "auto"
    found, _ = serve(loaded, prompts, sampling, precision=precision, device=device)
    distances = []
    for prompt, outputs in zip(prompts, found):
        with torch.no_grad():
            logits = loaded.model.logits(loaded.model(torch.tensor([prompt])).hidden)[0]
        wanted = logits.log_softmax(-1)[range(len(prompt) - 1), prompt[1:]]
        got = torch.tensor([p.logprob for p in outputs[0].prompt_logprobs or () if p])
        distances.append((got - wanted).abs())
    assert torch.cat(distances).median() < close


def test_generate_answers_all_or_nothing() -> None:
    engine = Engine(made("full"), EngineConfig(precision="fp32", memory_gib=0.01))
    prompts = texts(3, seed=3)
    whole = engine.generate(prompts, SamplingConfig(temperature=0, max_tokens=6))
    assert [done.tokens for done in whole] == [plain(made("full"), p, 6)[0] for p in prompts]
    # A token that ends an answer is no part of it, as in ``LanguageModel.complete``.
    end = whole[0].tokens[3]
    first = whole[0].tokens.index(end)
    (cut,) = engine.generate(prompts[:1], SamplingConfig(temperature=0, max_tokens=6, stop_token_ids=(end,)))
    assert (cut.tokens, cut.finish_reason) == (whole[0].tokens[:first], "stop")
    with pytest.raises(RequestError, match="empty prompt"):
        engine.generate([prompts[0], []])
    assert not engine.has_work
    engine.add(Request("somebody's", tuple(prompts[0])))
    with pytest.raises(EngineError, match="1 requests are on their way"):
        engine.generate(prompts)
    assert engine.abort("somebody's")


def test_the_option_that_names_a_token_outside_the_vocabulary_is_told() -> None:
    engine = Engine(made("full"), EngineConfig(precision="fp32", memory_gib=0.01))
    for name, sampling in (
        ("logit_bias", SamplingConfig(logit_bias={VOCABULARY: 1.0})),
        ("stop_token_ids", SamplingConfig(stop_token_ids=(VOCABULARY,))),
    ):
        with pytest.raises(RequestError, match="outside the vocabulary") as told:
            engine.add(Request("a", (1, 2), sampling))
        assert told.value.param == name
