"""Taking a part out gives the loss of a model that never had it, and gives the model back as it was."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from inspect_models import batch, config, loss, model

from deepseek.errors import ConfigError
from deepseek.monitor.inspect import ablate as module
from deepseek.monitor.inspect.ablate import Replay, ablate, ablate_all
from deepseek.monitor.inspect.examine import attentions, examine


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_head_taken_out_is_a_head_whose_output_weights_are_zero(
    layer: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kept:
        monkeypatch.setattr(module, "KEPT_BYTES", 0)
    made, given = model(), batch()
    found = ablate(Replay(made, given), layer, head=2)
    without = copy.deepcopy(made)
    attentions(without)[layer].output.weight.data[:, 16:24] = 0
    assert found.loss == pytest.approx(loss(made, given), abs=2e-6)
    assert found.ablated_loss == pytest.approx(loss(without, given), abs=2e-6)
    assert abs(found.delta) > 1e-4
    assert found.delta == found.ablated_loss - found.loss


def test_the_mean_of_a_head_is_over_everything_but_padding() -> None:
    made, given = model(), batch()
    seen = []
    attentions(made)[1].output.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    loss(made, given)
    mean = seen[0][..., :8][given.documents >= 0].mean(0)
    without = copy.deepcopy(made)
    output = attentions(without)[1].output
    added = output.weight[:, :8].detach() @ mean
    output.weight.data[:, :8] = 0
    output.register_forward_hook(lambda m, args, out: out + added)
    assert ablate(Replay(made, given), 1, head=0, mode="mean").ablated_loss == pytest.approx(
        loss(without, given), abs=2e-6
    )


def test_an_expert_taken_out_says_nothing_or_is_not_chosen() -> None:
    made, given = model(), batch()
    replay = Replay(made, given)
    for expert in range(3):
        silent, avoided = copy.deepcopy(made), copy.deepcopy(made)
        silent.moe_layers()[2].down.data[expert] = 0
        avoided.moe_layers()[2].router.bias[expert] = -100
        assert ablate(replay, 2, expert=expert).ablated_loss == pytest.approx(loss(silent, given), abs=2e-6)
        found = ablate(replay, 2, expert=expert, mode="reroute")
        assert found.ablated_loss == pytest.approx(loss(avoided, given), abs=2e-6)


def test_the_mean_answer_of_an_expert() -> None:
    made, given, expert = model(config(layers=1)), batch(), 1
    moe = made.moe_layers()[0]
    seen = []
    moe.router.register_forward_hook(lambda m, args, out: seen.append((args[0].detach(), out)))
    loss(made, given)
    x, routing = seen[0]
    gates = routing.gate_A.view_as(routing.expert_NK)
    answer = torch.zeros(len(x), 32)
    for n in range(len(x)):
        gate, up = (x[n] @ moe.gate_up[expert]).chunk(2)
        answer[n] = (torch.nn.functional.silu(gate) * up) @ moe.down[expert]
    chose = [(n, k) for n in range(len(x)) for k in range(2) if int(routing.expert_NK[n, k]) == expert]
    mean = torch.stack([answer[n] for n, _ in chose]).mean(0)
    change = torch.zeros(len(x), 32)
    for n, k in chose:
        change[n] = gates[n, k] * (mean - answer[n])
    without = copy.deepcopy(made)
    without.moe_layers()[0].router._forward_hooks.clear()
    ffn = without.moe_layers()[0]
    ffn.register_forward_hook(lambda m, args, out: (out[0] + change.detach().view_as(out[0]), out[1]))
    found = ablate(Replay(made, given), 0, expert=expert, mode="mean")
    assert found.ablated_loss == pytest.approx(loss(without, given), abs=2e-6)


def test_the_model_is_given_back_as_it_was() -> None:
    made, given = model(), batch()
    made.train()
    before = {name: t.clone() for name, t in made.state_dict().items()}
    replay = Replay(made, given)
    for mode in ("zero", "mean", "reroute"):
        ablate(replay, 0, expert=0, mode=mode)  # type: ignore[arg-type]
    ablate(replay, 0, head=0)
    examine(made, given)
    assert all(torch.equal(t, before[name]) for name, t in made.state_dict().items())
    assert made.training
    assert all(p.requires_grad and p.grad is None for p in made.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in made.modules())


def test_the_error_is_the_spread_over_rows() -> None:
    """Against the same figure from many batches: the standard error says how much a delta varies."""
    made = model()
    deltas, errors = [], []
    for seed in range(40):
        found = ablate(Replay(made, batch(rows=8, seed=100 + seed)), 1, head=1)
        deltas.append(found.delta)
        errors.append(found.error)
    spread = torch.tensor(deltas).std()
    assert 0.6 < float(torch.tensor(errors).mean() / spread) < 1.6
    assert math.isnan(ablate(Replay(made, batch(rows=1)), 1, head=1).error)


def test_all_parts_in_turn_with_progress() -> None:
    seen: list[tuple[int, int]] = []
    made = model(config(experts=3))
    found = ablate_all(Replay(made, batch(rows=2)), progress=lambda done, of: seen.append((done, of)))
    assert len(found) == 3 * 4 + 3 * 3
    assert seen == [(i + 1, 21) for i in range(21)]
    assert {(a.layer, a.head, a.expert) for a in found if a.head is None} == {
        (layer, None, e) for layer in range(3) for e in range(3)
    }


def test_first_order_removal_is_the_slope_of_the_loss() -> None:
    """``removal`` is minus the derivative of the loss by the size of a head's output, measured by differences."""
    made, given = model(config(experts=0)), batch()
    _, layers = examine(made, given)
    for layer, head in ((0, 0), (1, 3), (2, 2)):
        losses = []
        for factor in (0.98, 1.02):
            scaled = copy.deepcopy(made).double()
            attentions(scaled)[layer].output.weight.data[:, head * 8 : head * 8 + 8] *= factor
            losses.append(loss(scaled, given))
        slope = (losses[1] - losses[0]) / 0.04
        assert float(layers[layer].removal[head]) == pytest.approx(-slope, rel=0.02, abs=2e-5)


@pytest.mark.parametrize(
    ("layer", "part", "told"),
    [
        (9, {"head": 0}, "layers 0 to 2"),
        (0, {"head": 7}, "heads 0 to 3"),
        (0, {"expert": 7}, "experts 0 to 5"),
        (0, {}, "name one part"),
        (0, {"head": 0, "expert": 0}, "name one part"),
        (0, {"head": 0, "mode": "reroute"}, "not for heads"),
        (0, {"expert": 0, "mode": "half"}, "not known"),
    ],
)
def test_what_cannot_be_taken_out(layer: int, part: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        ablate(Replay(model(), batch(rows=2)), layer, **part)  # type: ignore[arg-type]


def test_a_dense_layer_has_no_experts() -> None:
    with pytest.raises(ConfigError, match="no experts"):
        ablate(Replay(model(config(experts=0)), batch(rows=2)), 1, expert=0)
