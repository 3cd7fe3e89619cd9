"""The engine as a GPU has it, every kernel of it, in Triton's interpreter: its answers are the plain model's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_engine import EXPERTS, HEADS, SHAPES, made, plain, texts, tokens_of

pytest.importorskip("triton")

from deepseek.ops import triton
from deepseek.ops.decode_experts import DeviceExperts
from deepseek.ops.packed_linear import TritonLinear
from deepseek.serve.engine import Engine
from deepseek.serve.engine_config import EngineConfig
from deepseek.serve.graphs import DecodeGraphs, Size
from deepseek.serve.request import Output, Request
from deepseek.serve.sampler import SamplingConfig

GREEDY = SamplingConfig(temperature=0, max_tokens=5, logprobs=0)
WIDE = {  # what models have; the interpreter takes too long for them
    "full, 64": ("F", replace(HEADS, head_dim=64), EXPERTS),
    "all, 128": ("LHF", replace(HEADS, head_dim=128), EXPERTS),
}


@pytest.mark.slow
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    "shape", ["full", "hybrid", "mixed", "overlapping, native", *(WIDE if torch.cuda.is_available() else ())]
)
def test_answers_by_the_kernels_are_the_plain_models(
    shape: str, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setattr(triton, "_interpreted", True)
    monkeypatch.setattr("test_engine.SHAPES", SHAPES | WIDE)
    loaded, prompts = made(shape), texts(3, seed=4, longest=24)
    engine = Engine(loaded, EngineConfig(precision="fp32", memory_gib=0.01, deterministic=exact))
    layer = engine.decoder.layers[-1]
    assert isinstance(layer.qkv, TritonLinear)
    assert layer.experts is None or isinstance(layer.experts._layer, DeviceExperts)
    most = Size(8, engine.decoder.tables.width)
    engine.launcher.graphs = engine.launcher.graphs or DecodeGraphs(
        engine.decoder, most, engine.vocabulary, lambda run: run
    )
    found: dict[str, list[Output]] = {str(i): [] for i in range(len(prompts))}
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), tuple(prompt), GREEDY))
        found_now = engine.step()  # so that one and several run at once, and prompts beside answers
        for output in found_now:
            found[output.id].append(output)
    while engine.has_work:
        for output in engine.step():
            found[output.id].append(output)
    wanted = [plain(loaded, prompt, GREEDY.max_tokens) for prompt in prompts]
    assert [tokens_of(o) for o in found.values()] == [tokens for tokens, _ in wanted]
    logprobs = torch.tensor([p.logprob for o in found.values() for out in o for p in out.logprobs])
    exact_ones = torch.stack([row.double().log_softmax(-1).max() for _, rows in wanted for row in rows])
    torch.testing.assert_close(logprobs.double(), exact_ones, atol=2e-4, rtol=2e-4)
