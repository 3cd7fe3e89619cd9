"""Planted bad heads and experts are found and named; a healthy model is left alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from inspect_models import batch, config, loss, model

from deepseek.models import Transformer
from deepseek.monitor.inspect.examine import attentions, cosines, examine
from deepseek.monitor.inspect.experts import examine_experts, suspect_experts
from deepseek.monitor.inspect.suspects import rank_heads, suspect_heads, unusual


def spoil(made: Transformer, kind: str, layer: int, head: int) -> None:
    attention, own = attentions(made)[layer], slice(head * 8, head * 8 + 8)
    other = slice((head ^ 1) * 8, (head ^ 1) * 8 + 8)  # the other head of its key
    query, output = attention.query.weight.data, attention.output.weight.data
    if kind == "duplicated":
        query[own], output[:, own] = query[other].clone(), output[:, other].clone()
    elif kind == "saturated":
        query[own] *= 40
    elif kind == "noisy":
        query[own] += torch.randn(query[own].shape) * query[own].std() * 4
        output[:, own] += torch.randn(output[:, own].shape) * output[:, own].std() * 4
    elif kind == "dead":
        output[:, own] *= 1e-3
    elif kind == "broken":
        query[own.start, 0] = math.nan


@pytest.mark.parametrize("kind", ["duplicated", "saturated", "noisy", "dead"])
def test_a_planted_head_is_found_and_named(kind: str) -> None:
    for seed in range(6):
        made = model(config("LF"), seed=seed)
        layer, head = seed % 3, (seed * 7 + 1) % 4
        spoil(made, kind, layer, head)
        ranked = rank_heads(examine(made, batch())[1])
        first = [(s.layer, s.head) for s in ranked[:2]]
        assert (layer, head) in first
        found = ranked[first.index((layer, head))]
        assert found.score >= 1
        # Noise on the queries makes the logits larger, too: both names are right.
        assert found.kind in ((kind, "saturated") if kind == "noisy" else (kind,))
        assert found.why.startswith(found.kind)


def test_a_head_that_is_not_finite_does_not_hide_the_others() -> None:
    made = model(config("LF"))
    spoil(made, "duplicated", 0, 1)
    spoil(made, "broken", 2, 3)
    ranked = suspect_heads(examine(made, batch(), gradient=False)[1])
    assert (ranked[0].kind, ranked[0].layer, ranked[0].head) == ("broken", 2, 3)
    assert {(s.layer, s.head) for s in ranked if s.kind == "duplicated"} == {(0, 0), (0, 1)}


def test_a_healthy_model_has_few_suspects() -> None:
    flagged = [
        s for seed in range(8) for s in suspect_heads(examine(model(config("LF"), seed=seed), batch())[1])
    ]
    assert len(flagged) <= 3  # of 96 random heads


def test_examining_by_parts_is_examining_at_once() -> None:
    made, given = model(), batch(rows=6)
    once, parts = examine(made, given, rows=6), examine(made, given, rows=2)
    assert once[0] == pytest.approx(parts[0], rel=1e-6)
    assert once[0] == pytest.approx(loss(made, given), abs=2e-6)
    for a, b in zip(once[1], parts[1]):
        torch.testing.assert_close(a.removal, b.removal, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(a.statistics.entropy, b.statistics.entropy)
        torch.testing.assert_close(a.statistics.max_logit, b.statistics.max_logit)


def test_z_scores_leave_the_head_itself_out() -> None:
    usual = torch.tensor([1.0, 1.1, 0.9, 1.0])
    figures = [usual, usual + 5, torch.tensor([1.0, 9.0, 1.1, 0.9])]
    found = unusual(figures, 0.1)
    assert float(found.layer[2][1]) > 10
    assert float(found.layer[1].abs().max()) < 3  # usual in its layer
    assert float(found.layer[0][0]) == pytest.approx(0.0, abs=1e-6)  # the others' median is its own value
    alone = unusual([torch.tensor([1.0]), torch.tensor([2.0])], 0.1)
    assert all(x.isfinite().all() for x in (*alone.layer, *alone.model))


def test_cosines_are_torchs_own() -> None:
    x = torch.randn(5, 9)
    wanted = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)
    torch.testing.assert_close(cosines(x @ x.T), wanted)
    assert float(cosines(torch.zeros(2, 2))[0, 1]) == 0


def test_expert_figures_are_counts_of_the_routing() -> None:
    made, given = model(), batch()
    seen = []
    moe = made.moe_layers()[1]
    moe.router.register_forward_hook(lambda m, args, out: seen.append(out))
    loss(made, given)
    valid = (given.documents >= 0).flatten()
    chosen, probs = seen[0].expert_NK[valid], seen[0].probs_NE[valid].detach()
    found = examine_experts(made, given, rows=2)[1]
    counts = [sum(int(e) == i for row in chosen.tolist() for e in row) for i in range(6)]
    assert found.choices == sum(counts)
    assert found.load.tolist() == pytest.approx([c / sum(counts) for c in counts])
    assert found.entropy == pytest.approx(float(-(probs * probs.log()).sum(-1).mean()), rel=1e-5)
    assert found.coverage == pytest.approx(sum(min(c / sum(counts), 1 / 6) for c in counts))
    assert found.max_vio == pytest.approx(max(counts) / sum(counts) * 6 - 1, rel=1e-5)


@pytest.mark.parametrize("kind", ["never chosen", "mute", "copy", "copy in another order"])
def test_a_planted_expert_is_found(kind: str) -> None:
    for seed in range(6):
        made = model(seed=seed)
        layer, expert = seed % 3, (seed * 5 + 2) % 6
        other, moe = (expert + 1 + seed % 5) % 6, made.moe_layers()[layer]
        with torch.no_grad():
            if kind == "never chosen":
                moe.router.bias[expert] = -5
            elif kind == "mute":
                moe.down[expert] *= 1e-4
            else:
                order = torch.randperm(8) if "order" in kind else torch.arange(8)
                gate, up = moe.gate_up[other].chunk(2, -1)
                moe.gate_up[expert] = torch.cat((gate[:, order], up[:, order]), -1)
                moe.down[expert] = moe.down[other][order]
        found = suspect_experts(examine_experts(made, batch(rows=12)))
        named = {(s.layer, s.expert): s for s in found[:2]}
        assert (layer, expert) in named
        why = named[layer, expert].why
        assert (f"expert {other}" in why) if "copy" in kind else why.startswith(("dead", "mute"))


def test_healthy_experts_are_no_suspects() -> None:
    found = [
        s for seed in range(6) for s in suspect_experts(examine_experts(model(seed=seed), batch(rows=12)))
    ]
    assert [s for s in found if s.kind == "duplicated"] == []
    assert len(found) <= 2


def test_a_dense_model_has_no_experts() -> None:
    assert examine_experts(copy.deepcopy(model(config(experts=0))), batch(rows=2)) == []
