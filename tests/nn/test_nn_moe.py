"""The sparse layer and its four mechanisms, each against its own formula."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek.errors import ConfigError
from deepseek.nn.moe import DEFAULT_SAMPLE, MoE, MoEConfig, Routing, chosen_mask, coverage, max_violation

QUIET: dict[str, Any] = {"entropy_weight": 0.0, "bias_rate": 0.0, "token_floor": 0.0, "default_decay": 0.0}


def layer(experts: int = 6, top_k: int = 2, hidden: int = 8, seed: int = 0, **options: Any) -> MoE:
    torch.manual_seed(seed)
    moe = MoE(hidden, MoEConfig(experts=experts, top_k=top_k, expert_ffn=5, **options))
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return moe


def assignments(routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
    """Token, expert and gate of every row in use, in the order of the assignments."""
    ends, where = routing.where.ends_E, routing.where
    used = int(ends[-1])
    expert = torch.repeat_interleave(torch.arange(len(ends)), torch.diff(ends, prepend=ends.new_zeros(1)))
    order = where.assignment_R[:used].argsort()
    token, assignment = where.token_R[:used][order].long(), where.assignment_R[:used][order].long()
    return token, expert[order], routing.gate_A[assignment]


def naive(moe: MoE, x: Tensor) -> Tensor:
    """One token at a time, from the definition; ``x [N, C]``."""
    out = []
    for t in x:
        p = (moe.router.weight @ t).softmax(0)
        best = sorted(range(len(p)), key=lambda e: -float((p[e] + moe.router.bias[e]).detach()))[
            : moe.config.top_k
        ]
        total = sum(p[e] for e in best) if moe.config.normalise_gates else 1.0
        y = torch.zeros_like(t)
        for e in best:
            a, b = (t @ moe.gate_up[e]).chunk(2)
            y = y + p[e] / total * ((a * a.sigmoid() * b) @ moe.down[e])
        out.append(y if moe.shared is None else y + moe.shared(t))
    return torch.stack(out)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_layer_equals_the_definition(top_k: int, shared: int, normalise: bool) -> None:
    moe = layer(top_k=top_k, shared_experts=shared, normalise_gates=normalise, **QUIET)
    moe.router.bias.normal_(std=0.1)
    x = torch.randn(2, 9, 8, requires_grad=True)
    out, stats = moe(x)
    want = naive(moe, x.flatten(0, 1)).view_as(x)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    assert stats.chosen_E.sum() == stats.served_E.sum() == 18 * top_k
    leaves = [x, *moe.parameters()]
    weight = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad((out * weight).sum(), leaves),
        torch.autograd.grad((want * weight).sum(), leaves),
        rtol=1e-4,
        atol=1e-5,
    )


def test_gates_sum_to_one_and_belong_to_the_best() -> None:
    moe = layer(**QUIET)
    x = torch.randn(50, 8)
    routing = moe.router(x)
    token, expert, gate = assignments(routing)
    gates = torch.zeros(50).index_add(0, token, gate)
    torch.testing.assert_close(gates, torch.ones(50))
    best = (x @ moe.router.weight.T).topk(2).indices.sort().values
    assert expert.view(50, 2).sort().values.equal(best)


@pytest.mark.parametrize("floor", [0.1, 0.5, 1.0])
def test_floor_serves_every_expert_in_training_only(floor: float) -> None:
    moe = layer(experts=16, token_floor=floor)
    moe.router.bias[3] = 10.0  # everybody wants expert 3, nobody else is sure of anything
    x = torch.randn(1, 100, 8)
    least = math.ceil(floor * 100 * 2 / 16)
    _, stats = moe(x)
    assert stats.served_E.min() >= least
    assert stats.chosen_E.sum() == 200
    routing = moe.router(x[0])
    token, expert, _ = assignments(routing)
    pairs = list(zip(token.tolist(), expert.tolist()))
    assert len(set(pairs)) == len(pairs), "no token twice at one expert"
    moe.eval()
    _, stats = moe(x)
    assert stats.served_E.equal(stats.chosen_E)


def test_floor_picks_the_tokens_that_like_the_expert_best_and_no_padding() -> None:
    moe = layer(experts=4, top_k=1, token_floor=0.5)
    moe.router.bias[:3] = 10.0
    x = torch.randn(40, 8)
    valid = torch.arange(40) < 30
    routing = moe.router(x, valid)
    token, expert, gate = assignments(routing)
    rescued = token[40:][expert[40:] == 3]
    liking = routing.probs_NE[:, 3].masked_fill(~valid, -1)
    assert set(rescued.tolist()) == set(liking.topk(math.ceil(0.5 * 40 / 4)).indices.tolist())
    gates = gate[40:][expert[40:] == 3]
    torch.testing.assert_close(gates, routing.probs_NE[rescued, 3])


def test_every_expert_has_a_gradient_even_when_all_tokens_agree() -> None:
    moe = layer(experts=16)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[0] = 5.0
    moe(torch.rand(1, 64, 8) + 0.5)[0].square().sum().backward()
    assert moe.gate_up.grad is not None
    assert (moe.gate_up.grad.flatten(1).norm(dim=1) > 0).all()


def test_entropy_loss_is_its_formula_and_pushes_towards_uniform() -> None:
    moe = layer(**{**QUIET, "entropy_weight": 0.3})
    x = torch.randn(1, 40, 8)
    loss = moe(x)[1].balance_loss
    mean = (x[0] @ moe.router.weight.T).softmax(-1).mean(0)
    torch.testing.assert_close(loss, 0.3 * ((mean * mean.log()).sum() + math.log(6)))
    (gradient,) = torch.autograd.grad(loss, moe.router.weight)
    with torch.no_grad():
        moe.router.weight -= 0.5 * gradient
    assert moe(x)[1].balance_loss < loss
    with torch.no_grad():
        moe.router.weight.zero_()
    assert abs(float(moe(x)[1].balance_loss.detach())) < 1e-6


def test_padding_is_not_counted() -> None:
    moe = layer()
    x, valid = torch.randn(1, 30, 8), torch.arange(30)[None] < 21
    whole, part = moe.eval()(x, valid)[1], moe(x[:, :21])[1]
    for name in ("balance_loss", "chosen_E", "entropy"):
        torch.testing.assert_close(getattr(whole, name), getattr(part, name))


def test_bias_moves_against_the_load_and_stays_centred() -> None:
    moe = layer(**{**QUIET, "bias_rate": 0.01})
    stats = moe(torch.randn(1, 60, 8))[1]._replace(chosen_E=torch.tensor([40.0, 20, 20, 20, 20, 0]))
    moe.update(stats)
    assert moe.router.bias[0] < 0 < moe.router.bias[5]
    assert moe.router.bias[0] == moe.router.bias.min()
    assert abs(float(moe.router.bias.sum())) < 1e-7
    assert moe.router.bias[1:5].unique().numel() == 1


def test_default_outputs_change_no_value_and_give_the_router_the_surrogate_gradient() -> None:
    """Router gradient = derivative of ``out + Σ_absent p_e · default_e`` with the choice held fixed."""
    on = layer(**{**QUIET, "default_decay": 0.9}).double()
    off = layer(**QUIET).double()
    on.default_EC.normal_()
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    out = on(x)[0]
    torch.testing.assert_close(out, off(x)[0], rtol=0, atol=1e-12)
    target = torch.randn_like(out)
    (gradient,) = torch.autograd.grad((out * target).sum(), on.router.weight)
    chosen = chosen_mask(on.router(x[0]).expert_NK, 6)

    def surrogate(weight: Tensor) -> Tensor:
        p = (x[0] @ weight.T).softmax(-1)
        gates = p * chosen / (p * chosen).sum(-1, keepdim=True)
        y = torch.stack([_expert(on, e, x[0]) for e in range(6)], 1)
        return ((gates[..., None] * y + (p * ~chosen)[..., None] * on.default_EC).sum(1) * target[0]).sum()

    step, weight = 1e-6, on.router.weight.detach()
    for row, column in ((0, 0), (3, 4), (5, 7)):
        bump = torch.zeros_like(weight)
        bump[row, column] = step
        slope = (surrogate(weight + bump) - surrogate(weight - bump)) / (2 * step)
        torch.testing.assert_close(gradient[row, column], slope, rtol=1e-5, atol=1e-7)


def _expert(moe: MoE, e: int, x: Tensor) -> Tensor:
    a, b = (x @ moe.gate_up[e]).chunk(2, -1)
    return (a * a.sigmoid() * b) @ moe.down[e]


def test_default_outputs_are_running_means_and_leave_backward_alone() -> None:
    moe = layer(**{**QUIET, "default_decay": 0.75})
    x = torch.randn(1, 40, 8)
    out, stats = moe(x)
    routing = moe.router(x[0])
    chosen = chosen_mask(routing.expert_NK, 6)
    mean = torch.stack([_expert(moe, e, x[0, chosen[:, e]]).mean(0) for e in range(6)]).nan_to_num()
    moe.update(stats)
    torch.testing.assert_close(moe.default_EC, 0.25 * mean.detach(), rtol=1e-5, atol=1e-6)
    out.sum().backward()  # after the in-place update


def test_a_large_expert_s_average_is_over_an_even_sample_of_its_rows() -> None:
    moe = layer(experts=2, top_k=1, **{**QUIET, "default_decay": 0.5})
    moe.router.bias[1] = 10.0
    tokens = 3 * DEFAULT_SAMPLE
    x = torch.randn(1, tokens, 8)
    _, stats = moe(x)
    assert stats.served_E.tolist() == [0, tokens]
    assert stats.sampled_E.tolist() == [0, DEFAULT_SAMPLE]
    moe.update(stats)
    mean = _expert(moe, 1, x[0, ::3]).mean(0)
    torch.testing.assert_close(moe.default_EC[1], 0.5 * mean.detach(), rtol=1e-4, atol=1e-6)
    assert moe.default_EC[0].abs().max() == 0


def test_an_update_that_does_not_apply_moves_nothing() -> None:
    moe = layer(bias_rate=0.1)
    _, stats = moe(torch.randn(1, 40, 8))
    before = {k: v.clone() for k, v in moe.state_dict().items()}
    moe.update(stats, torch.tensor(False))
    assert all(torch.equal(before[k], v) for k, v in moe.state_dict().items())
    moe.update(stats, torch.tensor(True))
    assert not torch.equal(before["router.bias"], moe.router.bias)
    assert not torch.equal(before["default_EC"], moe.default_EC)


def test_forced_balance_serves_all_experts_alike() -> None:
    moe = layer(experts=6, **QUIET)
    moe.router.force_balance = True
    _, stats = moe(torch.randn(1, 30, 8))
    assert stats.served_E.tolist() == [10] * 6


@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_compiles_without_a_graph_break_and_computes_the_same(floor: float) -> None:
    moe = layer(experts=8, token_floor=floor)
    moe.router.bias[:2] = 5.0
    x, valid = torch.randn(2, 20, 8), torch.arange(40).view(2, 20) < 33
    eager = moe(x, valid)
    (eager[0].square().sum() + eager[1].balance_loss).backward()
    gradients = [p.grad for p in moe.parameters()]
    moe.zero_grad()
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=True)(x, valid)
    (compiled[0].square().sum() + compiled[1].balance_loss).backward()
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close([p.grad for p in moe.parameters()], gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_training_works_in_other_dtypes(dtype: torch.dtype) -> None:
    moe = layer(shared_experts=1).to(dtype)
    out, stats = moe(torch.randn(1, 20, 8, dtype=dtype))
    (out.sum() + stats.balance_loss).backward()
    moe.update(stats)
    assert out.dtype == dtype
    assert all(p.grad is not None and p.grad.isfinite().all() for p in moe.parameters())


def test_load_measures() -> None:
    assert coverage(torch.full((8,), 1 / 8)) == 1
    assert max_violation(torch.full((8,), 1 / 8)) == 0
    one = torch.eye(8)[0]
    assert coverage(one) == 1 / 8
    assert max_violation(one) == 7


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match="top_k=9 must lie between 1 and experts=8"):
        MoEConfig(experts=8, top_k=9)
    with pytest.raises(ConfigError, match=r"token_floor=1\.5"):
        MoEConfig(experts=8, token_floor=1.5)


def _benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "bench_moe_balance.py"
    spec = importlib.util.spec_from_file_location("bench_moe_balance", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_defaults_balance_64_experts_on_skewed_clusters() -> None:
    result = _benchmark().run(1500)
    assert result.coverage >= 0.95
    assert result.max_violation <= 0.4
    assert result.dead == 0
    assert result.least_gradient > 0


@pytest.mark.parametrize(
    ("rule", "want"), [("sign", [-1.0, 1.0, 0.0, 1.0]), ("proportional", [-1.0, 0.5, 0.0, 1.0])]
)
def test_bias_steps(rule: Any, want: list[float]) -> None:
    moe = layer(experts=4, **{**QUIET, "bias_rate": 0.01, "bias_step": rule})
    stats = moe(torch.randn(1, 8, 8))[1]._replace(chosen_E=torch.tensor([100.0, 20, 40, 0]))
    moe.update(stats)
    step = 0.01 * torch.tensor(want)
    torch.testing.assert_close(moe.router.bias, step - step.mean())
