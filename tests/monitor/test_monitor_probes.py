"""Every probe beside a plain computation of the same figure: own hooks, loops and float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.batch import IGNORE, Batch
from deepseek.models import Transformer
from deepseek.models.config import tiny
from deepseek.monitor.inspect.heads import sampled_rows
from deepseek.monitor.probe_forward import QUIET, SHOWN, dead_share, look
from deepseek.monitor.probe_memory import MemoryProbe, resident, size_of
from deepseek.monitor.probes import Cadence, Groups, Reading, SampledProbe, StepProbe
from deepseek.nn.attention import AttentionConfig
from deepseek.nn.moe import MoEConfig
from deepseek.parallel.memory import activation_checkpoint
from deepseek.precision import Policy, choose, lower
from deepseek.train import OptimConfig, TrainStep, build_optimizer, next_token_loss
from deepseek.train.losses import token_losses

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

FP32 = choose("fp32", torch.device("cpu"))
LENGTH = 48


def make_model(**changes: Any) -> Transformer:
    torch.manual_seed(1)
    model = Transformer(
        tiny(
            vocab_size=64, hidden=16, layers=3, ffn=24, pattern="FLH", ffn_pattern="DEE", max_length=64,
            attention=AttentionConfig(heads=4, kv_heads=2, head_dim=8, window=8, block=8, stride=4, qk_norm=True),
            moe=MoEConfig(experts=4, top_k=2, expert_ffn=8), **changes,
        )
    )  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():  # nothing at zero: every figure has something to say
            p.add_(torch.randn_like(p) * 0.2)
    return model


def packed(rows: int = 4, seed: int = 0) -> Batch:
    """Two documents and some padding in each row."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 64, (rows, LENGTH), generator=random)
    targets = torch.randint(0, 64, (rows, LENGTH), generator=random)
    documents = (
        torch.cat((torch.zeros(20), torch.ones(24), -torch.ones(4))).int().expand(rows, -1).contiguous()
    )
    targets[documents < 0] = IGNORE
    targets[:, 19] = IGNORE
    positions = (
        torch.cat((torch.arange(20), torch.arange(24), torch.arange(4))).int().expand(rows, -1).contiguous()
    )
    n_targets = int((targets != IGNORE).sum())
    return Batch(tokens, targets, documents, positions, n_targets, n_targets)


def make_step(model: Transformer, micro_rows: int = 0, **optim: Any) -> TrainStep:
    optimizer = build_optimizer(model, OptimConfig(**({"lr": 0.01} | optim)))
    return TrainStep(model, next_token_loss, optimizer, FP32, micro_rows=micro_rows)


def figures(reading: Reading) -> dict[str, float]:
    assert len(set(reading.names)) == len(reading.names) == len(reading.values)
    return dict(zip(reading.names, reading.values.tolist()))


def told_by(model: Transformer, batch: Batch, queries: int = 16) -> dict[str, float]:
    found: dict[str, float] = {}
    for names, values in look(model, batch, FP32, queries).figures:
        found |= dict(zip(names, values.tolist()))
    return found


def joint64(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


def group_of(name: str) -> str:
    return name.split(".")[1] if name.startswith("blocks.") else name.split(".")[0].replace("norm", "head")


# --- every step -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_rows", [0, 3])
def test_gradient_norms_of_layers_and_the_figures_of_routers(micro_rows: int) -> None:
    model, batch = make_model(), packed()
    other = copy.deepcopy(model)
    parts = list(batch.split(micro_rows or batch.rows))
    stats = []
    for part in parts:
        loss = next_token_loss(other, part)
        loss.total.backward()
        stats.append([layer.routing for layer in loss.layers])
    wanted: dict[str, list[Tensor]] = {}
    for name, p in other.named_parameters():
        assert p.grad is not None
        wanted.setdefault(group_of(name), []).append(p.grad)
    step = make_step(model, micro_rows)
    result = step(batch)
    told = figures(StepProbe(step)(result))
    assert [n for n in told if n.endswith("grad_norm")] == [
        f"layer/{g}/grad_norm" for g in ("embedding", "0", "1", "2", "head")
    ]
    for group, grads in wanted.items():
        assert told[f"layer/{group}/grad_norm"] == pytest.approx(joint64(grads), rel=1e-5)
    whole = math.sqrt(sum(told[f"layer/{g}/grad_norm"] ** 2 for g in wanted))
    assert whole == pytest.approx(float(result.grad_norm), rel=1e-6)
    for i in (1, 2):
        chosen = sum(s[i].chosen_E.double() for s in stats)  # type: ignore[union-attr]
        load = (chosen / chosen.sum()).tolist()
        assert told[f"router/{i}/max_vio"] == pytest.approx(max(load) * 4 - 1, abs=1e-6)
        assert told[f"router/{i}/coverage"] == pytest.approx(sum(min(x, 0.25) for x in load), abs=1e-6)
        assert told[f"router/{i}/dead"] == sum(x < 0.025 for x in load)
        entropy = sum(float(s[i].entropy) * p.rows / batch.rows for s, p in zip(stats, parts))  # type: ignore[union-attr]
        assert told[f"router/{i}/entropy"] == pytest.approx(entropy, rel=1e-5)


def test_a_dead_expert_is_counted_and_a_nan_stays_in_its_layer() -> None:
    model, batch = make_model(), packed()
    model.moe_layers()[2].router.bias[1] = -100.0
    step = make_step(model)
    told = figures(StepProbe(step)(step(batch)))
    assert (told["router/1/dead"], told["router/2/dead"]) == (0.0, 1.0)
    groups = Groups(model, step.parameters)
    norms = torch.ones(len(step.parameters))
    place = next(i for i, (n, _) in enumerate(model.named_parameters()) if n.startswith("blocks.1."))
    norms[place] = math.nan
    assert [math.isnan(x) for x in groups.joint(norms).tolist()] == [False, False, True, False, False]


def test_parameters_in_any_order_find_their_group() -> None:
    model = make_model()
    ordered = list(model.parameters())
    mixed = ordered[::2] + ordered[1::2]
    norms = {p: float(i + 1) for i, p in enumerate(ordered)}
    straight, crooked = Groups(model, ordered), Groups(model, mixed)
    a = dict(zip(straight.names, straight.joint(torch.tensor([norms[p] for p in ordered])).tolist()))
    b = dict(zip(crooked.names, crooked.joint(torch.tensor([norms[p] for p in mixed])).tolist()))
    assert a == pytest.approx(b)


def test_a_parameter_without_a_gradient_has_a_norm_of_zero() -> None:
    model, batch = make_model(), packed()
    model.blocks[0].requires_grad_(True)
    step = make_step(model)
    unused = torch.nn.Parameter(torch.ones(3))
    step.parameters.insert(2, unused)
    norms = step(batch).gradient_norms
    assert norms is not None
    assert norms[2] == 0
    assert (norms > 0).sum() == len(step.parameters) - 1


# --- sampled steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_weight_norms_and_update_ratios_of_small_weights_are_exact(optimizer: str) -> None:
    model, batch = make_model(), packed()
    step = make_step(model, name=optimizer)
    probe = SampledProbe(step)
    before = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    probe.prepare()
    step(batch)
    told = figures(probe(batch)[0])
    after = {n: p.detach().double() for n, p in model.named_parameters()}
    for group in ("embedding", "0", "1", "2", "head"):
        names = [n for n in after if group_of(n) == group]
        moved, was = joint64([after[n] - before[n] for n in names]), joint64([before[n] for n in names])
        assert told[f"layer/{group}/weight_norm"] == pytest.approx(
            joint64([after[n] for n in names]), rel=1e-6
        )
        assert told[f"layer/{group}/update_ratio"] == pytest.approx(moved / was, rel=1e-4)
    assert not [n for n in figures(probe(batch)[0]) if n.endswith("update_ratio")]  # nothing was prepared


def test_the_update_ratio_of_a_large_weight_is_estimated_from_a_sample() -> None:
    model = make_model()
    model.embedding = torch.nn.Embedding(4096, 16)
    step = make_step(model)
    probe = SampledProbe(step)
    probe.prepare()
    before = model.embedding.weight.detach().double().clone()
    with torch.no_grad():
        model.embedding.weight.add_(torch.randn_like(model.embedding.weight) * 0.03)
    told = figures(probe(packed())[0])
    wanted = joint64([model.embedding.weight.double() - before]) / joint64([before])
    assert told["layer/embedding/update_ratio"] == pytest.approx(wanted, rel=0.05)
    assert told["layer/0/update_ratio"] == 0.0


def test_weights_kept_in_bf16_are_measured_by_their_fp32_masters() -> None:
    model, batch = make_model(), packed()
    policy = Policy("bf16", torch.bfloat16, 1.0, "", masters=True)
    optimizer = build_optimizer(
        model, OptimConfig(lr=1e-5, name="adamw", weight_decay=0.0), lower(model, policy)
    )
    step = TrainStep(model, next_token_loss, optimizer, policy)
    probe = SampledProbe(step)
    masters = {optimizer.names[p]: m for p, m in optimizer.masters.items()}
    before = {n: masters.get(n, p).detach().double().clone() for n, p in model.named_parameters()}
    probe.prepare()
    step(batch)
    reading, seen = probe(batch)
    told = figures(reading)
    names = [n for n in before if group_of(n) == "0"]
    moved = joint64([masters.get(n, dict(model.named_parameters())[n]).double() - before[n] for n in names])
    assert told["layer/0/update_ratio"] == pytest.approx(
        moved / joint64([before[n] for n in names]), rel=1e-2
    )
    assert 0 < told["layer/0/update_ratio"] < 1e-3  # far below what bf16 can hold
    assert seen.losses.dtype == torch.float32
    assert all(math.isfinite(value) for value in told.values())
    memory = MemoryProbe(step)(batch)
    assert memory["memory/optimizer"] > 2 * memory["memory/weights"]  # masters and two moments


def test_activations_after_every_block() -> None:
    model, batch = make_model(), packed(2)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, out: Any) -> None:
            seen[name] = (out[0] if isinstance(out, tuple) else out).double()

        return hook

    told = told_by(model, batch)
    model.eval()
    model.embedding.register_forward_hook(keep("embedding"))
    model.norm.register_forward_hook(keep("head"))
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(keep(str(i)))
    with torch.no_grad():
        model(batch.tokens, batch.documents, batch.positions)
    for name, x in seen.items():
        assert told[f"layer/{name}/activation_rms"] == pytest.approx(
            float(x.square().mean().sqrt()), rel=1e-5
        )
        assert told[f"layer/{name}/activation_max"] == pytest.approx(float(x.abs().max()), rel=1e-5)


def softmax64(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~mask, -math.inf).softmax(-1).nan_to_num(0.0)


def rotate64(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """``[T, D]`` in the half-split layout."""
    half = x.shape[-1] // 2
    angle = positions.double()[:, None] / theta ** (torch.arange(half).double() / half)
    a, b = x[:, :half], x[:, half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


@torch.no_grad()
def test_heads_of_full_and_window_layers_by_whole_attention_matrices_in_fp64() -> None:
    model, batch, queries = make_model(), packed(2), 16
    told = told_by(model, batch, queries)
    inputs: dict[int, Tensor] = {}
    model.eval()
    for i in (0, 1):
        model.blocks[i].attention.register_forward_pre_hook(  # type: ignore[union-attr, operator]
            lambda module, args, i=i: inputs.__setitem__(i, args[0].double())
        )
    model(batch.tokens, batch.documents, batch.positions)
    assert batch.documents is not None
    assert batch.positions is not None
    rows, T, D = sampled_rows(LENGTH, queries, torch.device("cpu")), LENGTH, 8
    t = torch.arange(T)
    for i, window in ((0, T), (1, 8)):
        layer: Any = copy.deepcopy(model.blocks[i].attention).double()
        for h in range(4):
            found: dict[str, list[float]] = {"entropy": [], "sink": [], "max": [], "out": []}
            for b in range(2):
                x, ids, places = inputs[i][b], batch.documents[b], batch.positions[b]
                q = layer.query_norm(layer.query(x).view(T, 4, D)[:, h])
                k = layer.key_norm(layer.key(x).view(T, 2, D)[:, h // 2])
                v = layer.value(x).view(T, 2, D)[:, h // 2]
                scores = rotate64(q, places, 1e4) @ rotate64(k, places, 1e4).T / math.sqrt(D)
                apart = t[:, None] - t[None]
                mask = (apart >= 0) & (apart < window) & (ids[:, None] == ids[None])
                p = softmax64(scores, mask)
                out = p @ v @ layer.output.weight[:, h * D : (h + 1) * D].T
                for r in rows.tolist():
                    if ids[r] < 0:
                        continue
                    first = int((ids == ids[r]).nonzero()[0])
                    found["entropy"].append(float(-torch.xlogy(p[r], p[r]).sum()))
                    found["sink"].append(float(p[r, first]))
                    found["max"].append(float(scores[r][mask[r]].max()))
                    found["out"].append(float(out[r].square().mean()))
            mean = {name: sum(values) / len(values) for name, values in found.items()}
            assert told[f"attention/{i}/{h}/entropy"] == pytest.approx(mean["entropy"], rel=1e-4)
            assert told[f"attention/{i}/{h}/sink"] == pytest.approx(mean["sink"], rel=1e-4)
            assert told[f"attention/{i}/{h}/max_logit"] == pytest.approx(max(found["max"]), rel=1e-4)
            assert told[f"attention/{i}/{h}/output_norm"] == pytest.approx(math.sqrt(mean["out"]), rel=1e-4)


def test_the_heads_of_a_hybrid_layer_are_told_apart() -> None:
    model, batch = make_model(), packed(2)
    with torch.no_grad():  # head 3 adds nothing; head 2 uses the pooled branch only
        model.blocks[2].attention.output.weight[:, 24:32] = 0.0  # type: ignore[union-attr, index, operator]
        model.blocks[2].attention.gate_bias[2] = 50.0  # type: ignore[union-attr, index, operator]
    told = told_by(model, batch)
    assert told["attention/2/3/output_norm"] == 0.0
    assert min(told[f"attention/2/{h}/output_norm"] for h in (0, 1, 2)) > 0
    assert told["attention/2/2/sink"] > max(told[f"attention/2/{h}/sink"] for h in (0, 1, 3))


def test_units_that_never_answer_are_counted() -> None:
    inner = torch.randn(3, 50, 10)
    inner[1, :, 4] = 0.0
    inner[2, :, :5] = inner[2].square().mean().sqrt() * QUIET * 0.1
    assert dead_share(inner).tolist() == pytest.approx([0.0, 0.1, 0.5])
    model, batch = make_model(), packed()
    before = told_by(model, batch)
    assert (
        before["layer/0/dead_units"] == before["layer/1/dead_units"] == before["expert/1/2/dead_units"] == 0.0
    )
    with torch.no_grad():
        model.blocks[0].ffn.gate_up.weight[:6] = 0.0  # type: ignore[union-attr, index, operator]
        model.moe_layers()[1].gate_up[2, :, 8:10] = 0.0  # two of eight "up" columns of expert 2
    told = told_by(model, batch)
    assert told["layer/0/dead_units"] == pytest.approx(6 / 24)
    assert [told[f"expert/1/{e}/dead_units"] for e in range(4)] == pytest.approx([0, 0, 2 / 8, 0])
    assert told["layer/1/dead_units"] == pytest.approx(2 / 32)
    assert batch.tokens.numel() > SHOWN


def test_biases_and_weights_of_experts() -> None:
    model = make_model()
    moe = model.moe_layers()[2]
    moe.router.bias.copy_(torch.tensor([0.1, -0.2, 0.3, -0.2]))
    step = make_step(model)
    told = figures(SampledProbe(step)(packed())[0])
    assert [told[f"expert/2/{e}/bias"] for e in range(4)] == pytest.approx([0.1, -0.2, 0.3, -0.2])
    for e in range(4):
        assert told[f"expert/2/{e}/weight_norm"] == pytest.approx(
            joint64([moe.gate_up[e], moe.down[e]]), rel=1e-6
        )


def test_losses_of_tokens() -> None:
    model, batch = make_model(), packed()
    seen = look(model, batch, FP32)
    other = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        hidden = other(batch.tokens, batch.documents, batch.positions).hidden
        wanted = F.cross_entropy(
            other.logits(hidden).flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="none"
        )
    assert torch.allclose(seen.losses.double().flatten(), wanted, atol=1e-4)
    assert (seen.losses[batch.targets == IGNORE] == 0).all()
    many = token_losses(other, hidden.flatten(0, 1), batch.targets.flatten())
    assert torch.allclose(many, wanted, atol=1e-12)


def test_rows_take_turns() -> None:
    model, batch = make_model(), packed(3)
    probe = SampledProbe(make_step(model), rows=1)
    firsts = [probe(batch)[1].first_row for _ in range(4)]
    assert firsts == [0, 1, 2, 0]
    assert probe(batch)[1].losses.shape == (1, LENGTH)
    whole = SampledProbe(make_step(model), rows=8)(batch)[1]
    assert whole.losses.shape == (3, LENGTH)


# --- beside training ------------------------------------------------------------------------------------------------


def test_a_look_changes_nothing_and_leaves_no_hook() -> None:
    model, batch = make_model(), packed()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    look(model, batch, FP32)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_compiled_blocks_are_looked_at_eagerly_and_not_compiled_again() -> None:
    model, batch = make_model(), packed()
    wanted = told_by(model, batch)
    calls = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(len(inputs))
        return graph.forward

    for block in model.blocks:
        block.compile(backend=backend)
    model(batch.tokens, batch.documents, batch.positions)
    compiled = len(calls)
    assert compiled
    assert told_by(model, batch) == pytest.approx(wanted, rel=1e-6)
    model(batch.tokens, batch.documents, batch.positions)
    assert len(calls) == compiled


@pytest.mark.parametrize("mode", ["blocks", "sqrt", "selective"])
def test_recomputed_blocks_are_looked_at_once(mode: str) -> None:
    model, batch = make_model(), packed()
    wanted = told_by(model, batch)
    activation_checkpoint(model, mode)
    step = make_step(model)
    assert told_by(model, batch) == pytest.approx(wanted, rel=1e-6)
    found = look(model, batch, FP32)
    names = [name for own, _ in found.figures for name in own]
    assert len(names) == len(set(names))
    step(batch)


# --- memory ---------------------------------------------------------------------------------------------------------


def test_memory_by_class_is_what_the_tensors_take() -> None:
    model, batch = make_model(), packed()
    step = make_step(model, name="adamw")
    step(batch)
    told = MemoryProbe(step)(batch)
    weights = sum(4 * p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert told["memory/weights"] == weights + buffers
    assert told["memory/gradients"] == weights
    assert told["memory/optimizer"] == 2 * weights + 4 * len(
        list(model.parameters())
    )  # two moments, a count each
    assert told["memory/rss"] == pytest.approx(resident(), rel=0.05)
    small = MemoryProbe(make_step(model, micro_rows=1, name="adamw"))
    step.micro_rows = 1
    small.step.gradient_bytes = 1
    assert 0.15 < small(batch)["memory/activations"] / told["memory/activations"] < 0.35  # one row of four
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("micro_rows", [0, 1])
def test_activations_counted_in_a_step_are_those_of_a_micro_batch_alone(micro_rows: int) -> None:
    batch, weights, alone = packed(), [], 0.0
    for counted in (False, True):
        torch.manual_seed(0)
        step = make_step(make_model(), micro_rows=micro_rows, name="adamw")
        probe = MemoryProbe(step)
        step(batch)
        inner = step.loss_fn
        if counted:
            probe.prepare()
            probe.prepare()
            step(batch)
            assert step.loss_fn is inner
            assert probe(batch)["memory/activations"] == alone
            probe.prepare()
            assert step.loss_fn is inner  # once is enough
        else:
            alone = probe(batch)["memory/activations"]
            step(batch)
        weights.append([p.detach().clone() for p in step.parameters])
    assert alone > 0
    assert all(torch.equal(a, b) for a, b in zip(*weights))


def test_views_of_one_storage_count_once() -> None:
    x = torch.zeros(100)
    assert size_of([x, x[:10], x.view(10, 10)]) == 400


# --- how often ------------------------------------------------------------------------------------------------------


def test_the_cadence_keeps_to_its_share_of_the_time() -> None:
    cadence = Cadence(overhead=0.01)
    cadence.begin(100)
    assert cadence.every == 2
    spent = steps = 0.0
    probes = 0
    for step in range(101, 3101):
        if cadence.due(step):
            cost = 0.05 if probes else 0.5  # the first call warms up
            cadence.took(cost)
            cadence.done(step)
            spent, probes = spent + cost, probes + 1
        cadence.step(0.1)
        steps += 0.1
    assert cadence.every == 50
    assert spent / steps < 0.012
    assert probes > 50
    short = Cadence(overhead=0.001)
    short.begin(0, steps=300)
    seen = []
    for step in range(1, 301):
        if short.due(step):
            short.took(0.05)
            short.done(step)
            seen.append(step)
        short.step(0.1)
    assert seen[:3] == [2, 10, 40]
    assert len(seen) >= 10, "a short run has curves, too"
    fixed = Cadence(overhead=0.01, every=7)
    assert [s for s in range(1, 30) if fixed.due(s)] == [7, 14, 21, 28]
