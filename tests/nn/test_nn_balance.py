"""The dual of the assignment problem, the response to drift and the source's gate, each against something slower."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deepseek.nn
from deepseek.errors import ConfigError
from deepseek.nn.balance import (
    DRIFT_BOOST,
    DRIFT_SAMPLE,
    DRIFT_STEPS,
    DUAL_DAMPING,
    DUAL_SAMPLE,
    DriftResponse,
    DynamicGate,
    LoadBalancer,
    dual_gap,
    input_moments,
    shift_statistic,
)
from deepseek.nn.moe import MoE, MoEConfig, RoutingStats, max_violation


def probabilities(tokens: int, experts: int, seed: int = 0) -> Tensor:
    """Routers' output with a favourite."""
    random = torch.Generator().manual_seed(seed)
    favour = torch.linspace(2, 0, experts, dtype=torch.float64)
    return (torch.randn(tokens, experts, generator=random, dtype=torch.float64) + favour).softmax(-1)


def load_of(probs: Tensor, bias: Tensor, top_k: int) -> Tensor:
    chosen = (probs + bias).topk(top_k, dim=-1).indices
    return torch.bincount(chosen.flatten(), minlength=probs.shape[1]).double()


def layer(**options: Any) -> MoE:
    torch.manual_seed(0)
    moe = MoE(8, MoEConfig(**{"experts": 8, "top_k": 2, "expert_ffn": 4, "token_floor": 0.0, **options}))
    for p in moe.parameters():
        nn.init.normal_(p, std=0.4)
    return moe


# --- dual -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_dual_gap_gives_each_expert_its_share_when_it_alone_moves(top_k: int) -> None:
    probs, bias = probabilities(600, 6), torch.tensor([0.1, -0.1, 0, 0.05, 0, 0], dtype=torch.float64)
    gap = dual_gap(probs, bias, top_k)
    for e in range(6):
        moved = bias.clone()
        moved[e] += gap[e]
        assert load_of(probs, moved, top_k)[e] == 600 * top_k // 6


def test_dual_gap_counts_no_padding() -> None:
    probs, valid = probabilities(500, 6), torch.rand(500, generator=torch.Generator().manual_seed(1)) < 0.7
    bias = torch.zeros(6, dtype=torch.float64)
    torch.testing.assert_close(dual_gap(probs, bias, 2, valid), dual_gap(probs[valid], bias, 2))
    assert dual_gap(probs, bias, 2, torch.zeros_like(valid)).abs().max() == 0


def test_dual_gap_of_many_tokens_is_that_of_an_even_sample() -> None:
    probs, bias = probabilities(3 * DUAL_SAMPLE, 4), torch.zeros(4, dtype=torch.float64)
    assert dual_gap(probs, bias, 1).equal(dual_gap(probs[::3], bias, 1))
    assert dual_gap(probs[:50], bias, 4).abs().max() == 0  # every token takes every expert


def test_dual_steps_reach_the_optimum_of_the_assignment_problem() -> None:
    """Any bias bounds the optimum from above (weak duality); a slow sub-gradient descent finds how far down it goes."""
    probs = probabilities(60, 6)

    def bound(bias: Tensor) -> float:
        return float((probs + bias).topk(2).values.sum() - 20 * bias.sum())

    slow, least = torch.zeros(6, dtype=torch.float64), bound(torch.zeros(6))
    for step in range(3000):
        slow += 0.1 / (step + 10) * (20 - load_of(probs, slow, 2)).sign()
        least = min(least, bound(slow))
    bias = torch.zeros(6, dtype=torch.float64)
    assert max_violation(load_of(probs, bias, 2) / 120) > 0.9
    for _ in range(200):
        bias += DUAL_DAMPING * dual_gap(probs, bias, 2)
    assert max_violation(load_of(probs, bias, 2) / 120) <= 0.101  # two tokens
    assert bound(bias) == pytest.approx(least, rel=1e-3)
    assert least < 0.97 * bound(torch.zeros(6))


@pytest.mark.parametrize(("rate", "want"), [(1.0, 1.0), (1e-4, 0.0)])
def test_layer_moves_its_bias_towards_the_dual_solution(rate: float, want: float) -> None:
    moe = layer(bias_step="dual", bias_rate=rate)
    x = torch.randn(1, 200, 8)
    stats = moe(x)[1]
    gap = dual_gap(moe.router(x[0]).probs_NE, moe.router.bias, 2)
    step = DUAL_DAMPING * gap if want else (DUAL_DAMPING * gap).clamp(-1e-3, 1e-3)
    moe.update(stats)
    torch.testing.assert_close(moe.router.bias, (step - step.mean()).detach())


def test_statistics_of_micro_batches_add_up() -> None:
    """Two halves' gaps average; their moments are those of both."""
    moe = layer(bias_step="dual", drift_response=True)
    a, b = torch.randn(1, 30, 8), torch.randn(1, 30, 8)
    both = RoutingStats(*(s + t for s, t in zip(moe(a)[1], moe(b)[1])))
    gaps = [dual_gap(moe.router(x[0]).probs_NE, moe.router.bias, 2) for x in (a, b)]
    torch.testing.assert_close(both.gap_E / 60, torch.stack(gaps).mean(0))
    torch.testing.assert_close(both.moments_ED, moe(torch.cat((a, b), 1))[1].moments_ED)


def test_other_rules_carry_nothing() -> None:
    stats = layer()(torch.randn(1, 30, 8))[1]
    assert stats.gap_E.numel() == stats.moments_ED.numel() == 0
    assert not any("drift" in name for name in layer().state_dict())


# --- drift ----------------------------------------------------------------------------------------------------------


def test_moments_are_those_of_an_even_sample_of_valid_rows() -> None:
    moe = layer(experts=4, top_k=1)
    moe.router.bias[2] = 10.0
    x, valid = torch.randn(3 * DRIFT_SAMPLE, 8), torch.arange(3 * DRIFT_SAMPLE) % 2 == 0
    where = moe.router(x).where
    found = input_moments(x, where.token_R, where.ends_E, valid)
    rows = x[::3][valid[::3]]
    torch.testing.assert_close(
        found[2], torch.cat((torch.tensor([float(len(rows))]), rows.sum(0), rows.square().sum(0)))
    )
    assert found[[0, 1, 3]].abs().max() == 0


def test_shift_statistic_is_the_divergence_of_gaussians() -> None:
    past, now = torch.randn(5000, 3).double(), (torch.randn(4000, 3) * 1.3 + 0.4).double()

    def moments(x: Tensor) -> Tensor:
        return torch.cat((x.new_tensor([float(len(x))]), x.sum(0), x.square().sum(0)))[None]

    p, q = (torch.distributions.Normal(x.mean(0), x.std(0, correction=0)) for x in (now, past))
    want = 4000 * torch.distributions.kl_divergence(p, q).mean()
    torch.testing.assert_close(shift_statistic(moments(now), moments(past)), want, rtol=5e-3, atol=0)
    assert shift_statistic(moments(past), moments(past)).abs() < 1e-4


def stream(steps: int, seed: int, shift_at: int = -1) -> list[float]:
    """The factors that a stream of four experts' inputs causes."""
    random, drift, factors = torch.Generator().manual_seed(seed), DriftResponse(4, 6), list[float]()
    for step in range(steps):
        x = torch.randn(4, 40, 6, generator=random) + torch.arange(4.0)[:, None, None]
        if 0 <= shift_at <= step:
            x[:, :12] += 1.0  # 30% of the rows
        count = torch.full((4, 1), 40.0)
        factors.append(float(drift.update(torch.cat((count, x.sum(1), x.square().sum(1)), 1))))
    return factors


def test_an_abrupt_shift_raises_the_rate_at_once_and_for_a_while() -> None:
    factors = stream(400, 0, shift_at=200)
    assert set(factors[:200]) == {1.0}
    first = factors.index(DRIFT_BOOST)
    assert first <= 202
    assert factors[first : first + DRIFT_STEPS] == [DRIFT_BOOST] * DRIFT_STEPS
    assert factors[-50:] == [1.0] * 50


def test_false_alarms_are_rare() -> None:
    alarms = sum(stream(1000, seed).count(DRIFT_BOOST) for seed in range(4))
    assert alarms <= DRIFT_STEPS * 2  # at most two in 4,000 steps


def test_drift_state_resumes_and_waits_for_apply() -> None:
    torch.manual_seed(0)
    one, other, x = layer(drift_response=True), layer(drift_response=True), torch.randn(3, 1, 40, 8)
    one.update(one(x[0])[1])
    before = {k: v.clone() for k, v in one.state_dict().items()}
    one.update(one(x[1])[1], torch.tensor(False))
    assert all(torch.equal(before[k], v) for k, v in one.state_dict().items())
    other.load_state_dict(before)
    for moe in (one, other):
        for batch in x:
            moe.update(moe(batch)[1], torch.tensor(True))
    assert all(torch.equal(other.state_dict()[k], v) for k, v in one.state_dict().items())
    assert one.drift is not None
    assert not torch.equal(one.drift.moments_ED, before["drift.moments_ED"])


def test_drift_response_multiplies_the_bias_rate() -> None:
    moe, x = layer(drift_response=True, bias_rate=0.01, bias_step="sign"), torch.randn(1, 40, 8)
    assert moe.drift is not None
    moe.drift.watch[-1] = 10.0
    stats = moe(x)[1]._replace(chosen_E=torch.tensor([20.0, 0, 20, 0, 20, 0, 20, 0]))
    moe.update(stats)
    torch.testing.assert_close(moe.router.bias, 0.05 * torch.tensor([-1.0, 1, -1, 1, -1, 1, -1, 1]))


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["proportional", "dual"])
def test_balance_returns_after_a_shift_and_sooner_with_the_response(rule: str) -> None:
    """F13: 30% of the tokens change abruptly; MaxVio is back below 0.5 within 200 steps."""
    path = Path(__file__).parents[2] / "benchmarks" / "bench_moe_balance.py"
    spec = importlib.util.spec_from_file_location("bench_moe_balance", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fixed, response = (
        module.run_drift(500, bias_step=rule, drift_response=response) for response in (False, True)
    )
    assert fixed.worst > 1
    assert response.false_alarms == 0
    assert response.delay <= 5
    assert response.steps <= 200
    assert response.steps < fixed.steps


@pytest.mark.parametrize("padded", [False, True])
def test_compiles_without_a_graph_break(padded: bool) -> None:
    moe, x = layer(bias_step="dual", drift_response=True), torch.randn(1, 40, 8)
    valid = torch.arange(40)[None] < 33 if padded else None
    torch.testing.assert_close(
        torch.compile(moe, backend="aot_eager", fullgraph=True)(x, valid), moe(x, valid)
    )
    stats = moe(x, valid)[1]
    torch.compile(moe.update, backend="aot_eager", fullgraph=True)(stats, torch.tensor(True))
    assert moe.router.bias.abs().max() > 0


def test_a_drift_response_without_a_bias_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"bias rate, which is 0\.0"):
        MoEConfig(experts=4, drift_response=True, bias_rate=0.0)


# --- the source's gate ----------------------------------------------------------------------------------------------

SNIPPET = """
class DynamicGate(nn.Module):
    def __init__(self, num_experts, input_dim):
        super().__init__()
        self.gate = nn.Linear(input_dim, num_experts)
        self.load_balancer = LoadBalancer(num_experts)
    def forward(self, x):
        logits = self.gate(x)
        probs = F.softmax(logits, dim=-1)
        adjusted_probs = self.load_balancer(probs)
        return adjusted_probs
"""


def test_the_source_s_snippet_runs_and_is_our_gate() -> None:
    names: dict[str, Any] = {"nn": deepseek.nn, "F": deepseek.nn.functional, "LoadBalancer": LoadBalancer}
    exec(SNIPPET, names)
    theirs, ours, x = names["DynamicGate"](4, 8), DynamicGate(4, 8), torch.randn(2, 10, 8)
    ours.load_state_dict(theirs.state_dict())
    for _ in range(3):
        torch.testing.assert_close(theirs(x), ours(x))
    assert ours.load_balancer.bias.abs().max() > 0


@pytest.mark.parametrize("top_k", [0, 1])
def test_gate_learns_to_use_all_experts_alike(top_k: int) -> None:
    torch.manual_seed(0)
    gate = DynamicGate(4, 8, top_k=top_k, rate=0.03)
    with torch.no_grad():
        gate.gate.bias.copy_(torch.tensor([2.0, 0, 0, -2]))

    def load() -> Tensor:
        probs = gate(torch.randn(4000, 8))
        return F.one_hot(probs.argmax(-1), 4).double().mean(0) if top_k else probs.double().mean(0).detach()

    gate.eval()
    assert max_violation(load()) > 1
    assert gate.load_balancer.bias.abs().max() == 0
    gate.train()
    for _ in range(400):
        gate(torch.randn(400, 8))
    gate.eval()
    assert max_violation(load()) < 0.2


def test_gate_s_probabilities_sum_to_one_and_the_gradient_reaches_it() -> None:
    gate, x = DynamicGate(5, 8), torch.randn(3, 7, 8, requires_grad=True)
    out = gate(x)
    torch.testing.assert_close(out.sum(-1), torch.ones(3, 7))
    (out * torch.randn_like(out)).sum().backward()
    assert gate.gate.weight.grad is not None
    assert gate.gate.weight.grad.norm() > 0
    assert x.grad is not None
    balancer = LoadBalancer(5).double().eval()
    balancer.bias.normal_()
    probs = torch.rand(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(balancer, probs)
    assert LoadBalancer(5)(torch.full((5,), 0.2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_bad_balancers_are_refused() -> None:
    with pytest.raises(ConfigError, match="top_k=5"):
        LoadBalancer(4, top_k=5)
