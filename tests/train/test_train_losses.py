"""Cross-entropy against torch's, micro-batches against the whole, in values and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.batch import IGNORE, Batch
from deepseek.models import Transformer
from deepseek.models.config import tiny
from deepseek.nn.attention import AttentionConfig
from deepseek.nn.moe import MoEConfig
from deepseek.ops import cross_entropy
from deepseek.train.losses import cross_entropy_sum, next_token_loss

V, C, N = 23, 7, 37


def case(ignored: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, C, generator=random).requires_grad_()
    weight = torch.randn(V, C, generator=random).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=random)
    targets[torch.rand(N, generator=random) < ignored] = IGNORE
    return hidden, weight, targets


@pytest.mark.parametrize("rows", [N, N + 1, 5, 1])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
def test_chunked_and_whole_cross_entropy_are_torchs_with_gradients(
    rows: int, ignored: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES_CPU", rows * V * 4)
    hidden, weight, targets = case(ignored)
    found = cross_entropy_sum(hidden, weight, targets)
    got = torch.autograd.grad(found, (hidden, weight))

    wide_hidden, wide_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    want = F.cross_entropy(wide_hidden @ wide_weight.T, targets, ignore_index=-100, reduction="sum")
    expected = torch.autograd.grad(want, (wide_hidden, wide_weight))
    torch.testing.assert_close(found.double(), want, atol=1e-4, rtol=1e-6)
    for g, e in zip(got, expected):
        torch.testing.assert_close(g.double(), e, atol=1e-5, rtol=1e-5)
    if ignored == 1.0:
        assert found == 0
        assert not any(g.any() for g in got)


def test_chunks_never_hold_more_logits_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = F.linear

    def spy(x: Tensor, weight: Tensor) -> Tensor:
        out = real(x, weight)
        seen.append(out.numel())
        return out

    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES_CPU", 4 * V * 4)
    monkeypatch.setattr(cross_entropy.F, "linear", spy)
    hidden, weight, targets = case()
    cross_entropy_sum(hidden, weight, targets).backward()
    assert max(seen) == 4 * V
    assert sum(seen) == N * V  # computed once, and not again in backward


def test_logits_of_bf16_states_are_summed_in_fp32() -> None:
    hidden, weight, targets = case(0.0)
    hidden, weight = hidden.detach().bfloat16(), weight.detach().bfloat16()
    low = cross_entropy_sum(hidden, weight, targets)
    assert low.dtype == torch.float32
    want = F.cross_entropy((hidden @ weight.T).double(), targets, reduction="sum", ignore_index=-100)
    assert float(low) == pytest.approx(float(want), rel=1e-5)


def model(**moe: Any) -> Transformer:
    torch.manual_seed(1)
    built = Transformer(
        tiny(
            vocab_size=30,
            hidden=16,
            layers=2,
            ffn=24,
            pattern="LH",
            attention=AttentionConfig(heads=2, kv_heads=1, head_dim=8, window=4, block=4, stride=2),
            moe=MoEConfig(experts=4, top_k=2, expert_ffn=8, **moe),
        )
    )
    with torch.no_grad():
        for p in built.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return built.double()


def packed(rows: int = 5, length: int = 12) -> Batch:
    """Packed documents, padding, and rows with very different numbers of targets."""
    random = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 30, (rows, length), generator=random)
    documents = torch.zeros(rows, length, dtype=torch.int32)
    positions = torch.arange(length, dtype=torch.int32).repeat(rows, 1)
    documents[:, 7:], positions[:, 7:] = 1, positions[:, :5]
    documents[0, 9:] = -1
    documents[-1, 2:] = -1
    targets = torch.randint(0, 30, (rows, length), generator=random)
    targets[documents < 0] = IGNORE
    counted = int((targets != IGNORE).sum())
    return Batch(tokens, targets, documents, positions, n_targets=counted, n_bytes=2 * counted)


def gradients(net: Transformer, batch: Batch, rows: int) -> tuple[float, float, dict[str, Tensor]]:
    net.zero_grad()
    total = loss = 0.0
    for part in batch.split(rows):
        found = next_token_loss(net, part)
        found.total.backward()
        total, loss = total + float(found.total.detach()), loss + float(found.cross_entropy)
    return total, loss, {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_micro_batches_add_up_to_the_whole_even_when_the_last_is_smaller(rows: int) -> None:
    """Without the token floor and the balance loss, which look at a forward pass as a whole, exactly."""
    net, batch = model(token_floor=0.0, entropy_weight=0.0), packed()
    total, loss, whole = gradients(net, batch, 5)
    assert total == pytest.approx(loss)
    part_total, part_loss, parts = gradients(net, batch, rows)
    assert part_total == pytest.approx(total, rel=1e-6)
    assert part_loss == pytest.approx(loss, rel=1e-6)
    assert parts.keys() == whole.keys()
    for name, g in whole.items():
        torch.testing.assert_close(
            parts[name], g, atol=1e-6 * float(g.abs().max()) + 1e-9, rtol=1e-5, msg=name
        )


def test_the_loss_is_the_mean_over_all_targets_of_the_batch() -> None:
    net, batch = model(), packed()
    net.eval()
    with torch.no_grad():
        hidden = net(batch.tokens, batch.documents, batch.positions).hidden
        logp = (hidden @ net.head_weight.T).log_softmax(-1)
    nats = [
        -float(logp[b, t, batch.targets[b, t]])
        for b in range(batch.rows)
        for t in range(12)
        if batch.targets[b, t] != IGNORE
    ]
    assert len(nats) == batch.n_targets
    assert float(next_token_loss(net, batch).cross_entropy) == pytest.approx(
        math.fsum(nats) / len(nats), rel=1e-5
    )


def test_each_passes_balance_loss_counts_by_its_share_of_the_targets() -> None:
    net, batch = model(entropy_weight=0.5), packed()
    for rows in (5, 2):
        total = expected = 0.0
        for part in batch.split(rows):
            found = next_token_loss(net, part)
            share = int((part.targets != IGNORE).sum()) / batch.n_targets
            inner = [layer.routing for layer in found.layers if layer.routing is not None]
            assert len(inner) == 2
            expected += float(found.cross_entropy) + share * sum(
                float(r.balance_loss.detach()) for r in inner
            )
            total += float(found.total.detach())
        assert total == pytest.approx(expected, rel=1e-6)
        assert total > float(found.cross_entropy)


def test_a_batch_without_any_target_is_finite_and_moves_nothing() -> None:
    net, batch = model(), packed(2)
    empty = Batch(batch.tokens, torch.full_like(batch.targets, IGNORE), batch.documents, batch.positions)
    found = next_token_loss(net, empty)
    assert found.total == 0
    found.total.backward()
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())
