"""Muon against torch's own and against float64, AdamW against torch's, groups, and state by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from deepseek.errors import CheckpointError, ConfigError
from deepseek.models import Transformer
from deepseek.models.config import tiny
from deepseek.nn.attention import AttentionConfig
from deepseek.nn.moe import MoEConfig
from deepseek.train import OptimConfig, build_optimizer
from deepseek.train import muon as muon_file
from deepseek.train.muon import Muon, orthogonalise
from deepseek.train.optim import Optimizers, is_matrix

SHAPES = [(16, 16), (8, 24), (24, 8), (1, 12)]


def small_model(seed: int = 0, **changes: Any) -> Transformer:
    torch.manual_seed(seed)
    base: dict[str, Any] = {
        "vocab_size": 40, "hidden": 16, "layers": 2, "ffn": 24, "pattern": "LH", "ffn_pattern": "DE",
        "attention": AttentionConfig(heads=2, kv_heads=1, head_dim=8, window=8, block=8, stride=4),
        "moe": MoEConfig(experts=3, top_k=2, expert_ffn=8, shared_experts=1),
    }  # fmt: skip
    return Transformer(tiny(**{**base, **changes}))


def with_gradients(params: list[nn.Parameter], step: int) -> None:
    random = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=random, dtype=p.dtype)


def muon(params: list[nn.Parameter], **options: Any) -> Muon:
    return Muon([{"params": params}], lr=0.02, momentum=0.9, weight_decay=0.1, **options)


def newton_schulz_64(matrix: Tensor, steps: int) -> Tensor:
    """The published iteration on singular values alone: the vectors never change."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_orthogonalise_is_the_published_polynomial_of_the_singular_values(
    shape: tuple[int, int], scale: float
) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * scale
    want = newton_schulz_64(matrix, 5)
    # The normalisation adds 1e-7 to the norm: a relative difference of 1e-7 / norm.
    torch.testing.assert_close(orthogonalise(matrix, 5).double(), want, atol=3e-4, rtol=0)
    torch.testing.assert_close(
        orthogonalise(matrix.double(), 5), want, atol=1e-9 + 1e-6 / float(matrix.norm()), rtol=0
    )


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16)])
def test_five_steps_bring_singular_values_near_one_and_keep_the_vectors(shape: tuple[int, int]) -> None:
    matrix = torch.randn(6, *shape, generator=torch.Generator().manual_seed(2))
    found = orthogonalise(matrix, 5)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.linalg.svdvals(found)[s / s.norm(dim=-1, keepdim=True) > 0.02]
    assert values.min() > 0.6
    assert values.max() < 1.3
    cosine = (found * (u @ v)).sum((-2, -1)) / (found.norm(dim=(-2, -1)) * (u @ v).norm(dim=(-2, -1)))
    assert cosine.min() > 0.97


def test_a_zero_gradient_moves_nothing_but_decay() -> None:
    p = nn.Parameter(torch.randn(4, 4))
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    muon([p]).step()
    torch.testing.assert_close(p.detach(), before * (1 - 0.02 * 0.1))


def test_muon_is_the_formula_in_float64() -> None:
    params = [nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in SHAPES]
    copies = [p.detach().clone() for p in params]
    momenta = [torch.zeros_like(c) for c in copies]
    optimizer = muon(params)
    for step in range(4):
        with_gradients(params, step)
        for copy, momentum, p in zip(copies, momenta, params):
            assert p.grad is not None
            momentum.mul_(0.9).add_(0.1 * p.grad)
            direction = newton_schulz_64(0.1 * p.grad + 0.9 * momentum, 5)
            copy.mul_(1 - 0.02 * 0.1).sub_(0.02 * 0.2 * max(p.shape) ** 0.5 * direction)
        optimizer.step()
        for copy, p in zip(copies, params):
            torch.testing.assert_close(p.detach(), copy, atol=1e-6, rtol=0)


def test_muon_agrees_with_torch_as_far_as_bf16_goes() -> None:
    """torch iterates in bf16; the update of each step has a root mean square of about 0.2 · lr."""
    ours = [nn.Parameter(torch.randn(s)) for s in SHAPES]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    mine = muon(ours)
    reference = torch.optim.Muon(
        theirs, lr=0.02, momentum=0.9, weight_decay=0.1, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(5):
        with_gradients(ours, step)
        with_gradients(theirs, step)
        before = [p.detach().clone() for p in ours]
        mine.step()
        reference.step()
        for p, q, start in zip(ours, theirs, before):
            moved = (p - start).detach()
            assert float((p - q).detach().norm() / moved.norm()) < 0.03 * (step + 1)
            torch.testing.assert_close(mine.state[p]["momentum"], reference.state[q]["momentum_buffer"])


def test_experts_in_one_tensor_move_like_matrices_of_their_own() -> None:
    stack = nn.Parameter(torch.randn(3, 12, 20))
    single = [nn.Parameter(m.clone()) for m in stack.detach()]
    other = nn.Parameter(torch.randn(12, 20))  # of the same shape: goes through the same batch
    together, apart = muon([stack, other]), muon(single)
    for step in range(3):
        random = torch.Generator().manual_seed(step)
        gradient = torch.randn(3, 12, 20, generator=random)
        gradient[1] *= 1e3  # a loud expert must not silence the others
        stack.grad, other.grad = gradient.clone(), torch.randn(12, 20, generator=random)
        for p, g in zip(single, gradient):
            p.grad = g.clone()
        together.step()
        apart.step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in single]))


def test_every_parameter_is_in_exactly_one_group_and_muon_has_the_hidden_matrices_only() -> None:
    model = small_model(tie_embeddings=False)
    optimizer = build_optimizer(model, OptimConfig(embedding_lr=4.0, lr=1e-3))
    named = dict(model.named_parameters())
    names = {p: n for n, p in named.items()}
    listed = [names[p] for g in optimizer.param_groups for p in g["params"]]
    assert sorted(listed) == sorted(named)
    in_muon = {names[p] for g in optimizer.parts[0].param_groups for p in g["params"]}
    for name, p in named.items():
        outside = name.startswith(("embedding", "head")) or any(
            part in name for part in ("norm", "router", "gate.weight", "gate_bias", "sink")
        )
        assert (name in in_muon) == (p.dim() >= 2 and not outside), name
        assert is_matrix(name, p) == (name in in_muon)
    assert {"blocks.1.ffn.gate_up", "blocks.1.ffn.down", "blocks.1.ffn.shared.down.weight"} <= in_muon
    assert any(n.endswith("router.weight") for n in named)
    assert any(n.endswith("gate.weight") for n in named)
    rates = {names[p]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    decay = {names[p]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert rates["embedding.weight"] == rates["head.weight"] == 4e-3
    assert {r for n, r in rates.items() if not n.startswith(("embedding", "head"))} == {1e-3}
    assert all(decay[n] == 0 for n, p in named.items() if p.dim() < 2)


def test_adamw_is_torchs_step_by_step() -> None:
    ours, theirs = small_model(), small_model()
    config = OptimConfig(
        name="adamw", lr=0.01, betas=(0.8, 0.95), weight_decay=0.3, eps=1e-6, embedding_lr=0.5
    )
    optimizer = build_optimizer(ours, config)
    assert len(optimizer.parts) == 1
    groups = []
    for name, p in theirs.named_parameters():
        embedding = name.startswith(("embedding", "head"))
        rate = 0.005 if embedding else 0.01
        groups.append(
            {"params": [p], "lr": rate, "weight_decay": 0.3 if p.dim() > 1 and not embedding else 0.0}
        )
    reference = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-6)
    for step in range(5):
        with_gradients(list(ours.parameters()), step)
        with_gradients(list(theirs.parameters()), step)
        optimizer.step()
        reference.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, atol=2e-6, rtol=1e-5, msg=name)


def trained(model: Transformer, config: OptimConfig, steps: range) -> Optimizers:
    optimizer = build_optimizer(model, config)
    advance(model, optimizer, steps)
    return optimizer


def advance(model: Transformer, optimizer: Optimizers, steps: range) -> None:
    for step in steps:
        with_gradients(list(model.parameters()), step)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["muon", "adamw", "adafactor"])
def test_state_by_name_through_a_file_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    config = OptimConfig(name=name)  # type: ignore[arg-type]
    straight = small_model()
    trained(straight, config, range(6))

    first = small_model()
    optimizer = trained(first, config, range(3))
    safetensors.torch.save_file(optimizer.state_dict(), tmp_path / "o.safetensors")
    second = small_model(seed=9)
    second.load_state_dict(first.state_dict())
    again = build_optimizer(second, config)
    again.load_state_dict(safetensors.torch.load_file(tmp_path / "o.safetensors"))
    assert again.state_dict().keys() == optimizer.state_dict().keys()
    advance(second, again, range(3, 6))
    for (key, p), q in zip(straight.named_parameters(), second.parameters()):
        assert torch.equal(p, q), key


def test_loading_replaces_what_was_there_and_shares_no_memory() -> None:
    model = small_model()
    optimizer = trained(model, OptimConfig(), range(2))
    saved = {k: v.clone() for k, v in optimizer.state_dict().items()}
    advance(model, optimizer, range(2, 4))
    optimizer.load_state_dict(saved)
    advance(model, optimizer, range(4, 5))
    for key, value in optimizer.state_dict().items():
        assert not torch.equal(value, saved[key]), key
    optimizer.load_state_dict({})
    assert optimizer.state_dict() == {}


def damaged(state: dict[str, Tensor]) -> dict[str, tuple[dict[str, Tensor], str]]:
    """What can be wrong with a state, and what the message must name."""
    matrix = next(k for k in state if k.endswith("|momentum"))
    vector = next(k for k in state if k.endswith("|exp_avg"))
    without = {k: v for k, v in state.items() if k != vector}
    return {
        "unknown parameter": ({**state, "nobody|momentum": torch.zeros(2)}, "nobody"),
        "shape": ({**state, matrix: torch.zeros(5, 5)}, "(5, 5)"),
        "scalar": ({**state, matrix: torch.zeros(())}, matrix),
        "missing": (without, vector.partition("|")[0]),
        "extra": ({**state, matrix.replace("momentum", "exp_avg"): state[matrix]}, "exp_avg"),
        "no key": ({**state, "embedding.weight": torch.zeros(2)}, ""),
    }


@pytest.mark.parametrize("what", ["unknown parameter", "shape", "scalar", "missing", "extra", "no key"])
def test_a_state_that_does_not_fit_is_refused_before_anything_changes(what: str) -> None:
    optimizer = trained(small_model(), OptimConfig(), range(1))
    before = {k: v.clone() for k, v in optimizer.state_dict().items()}
    state, named = damaged(before)[what]
    with pytest.raises(CheckpointError) as error:
        optimizer.load_state_dict(state)
    assert named in str(error.value)
    after = optimizer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize(("old", "new"), [("muon", "adamw"), ("adamw", "muon")])
def test_another_optimizers_state_is_refused(old: Any, new: Any) -> None:
    state = trained(small_model(), OptimConfig(name=old), range(1)).state_dict()
    with pytest.raises(CheckpointError, match=r"optim\.name"):
        build_optimizer(small_model(), OptimConfig(name=new)).load_state_dict(state)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0}, {"lr": float("nan")}, {"betas": (0.9,)}, {"betas": (0.9, 1.0)}, {"eps": -1.0},
        {"weight_decay": -0.1}, {"momentum": 1.0}, {"newton_schulz_steps": 0}, {"embedding_lr": -1.0},
    ],
)  # fmt: skip
def test_constants_that_cannot_be_used_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        OptimConfig(**wrong)


def test_chunks_of_bounded_memory_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when a bank of experts is larger than a chunk, and when one matrix is."""

    def moved() -> list[Tensor]:
        random = torch.Generator().manual_seed(0)
        params = [
            nn.Parameter(torch.randn(s, generator=random)) for s in [(5, 8, 12), (8, 12), (12, 8), (8, 12)]
        ]
        optimizer = muon(params)
        for step in range(2):
            with_gradients(params, step)
            optimizer.step()
        return [p.detach() for p in params]

    whole, sizes = moved(), list[int]()
    real = muon_file.orthogonalise
    monkeypatch.setattr(muon_file, "orthogonalise", lambda x, n: (sizes.append(x.numel()), real(x, n))[1])
    for limit, largest in ((200, 192), (50, 96)):
        monkeypatch.setattr(muon_file, "CHUNK", limit)
        sizes.clear()
        for a, b in zip(moved(), whole):
            torch.testing.assert_close(a, b)
        assert max(sizes) == largest
