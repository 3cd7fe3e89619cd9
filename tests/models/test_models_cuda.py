"""The same model on a GPU: equal to the CPU in fp32, trainable in bf16, compiled or not."""

import pytest
import torch

from deepseek.batch import Batch
from deepseek.config import replace
from deepseek.models import Transformer
from deepseek.models.config import tiny
from deepseek.precision import choose
from deepseek.train import OptimConfig, TrainStep, build_optimizer, next_token_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def batch(rows: int = 4, length: int = 128) -> Batch:
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 512, (rows, length + 1), generator=random)
    documents = (torch.arange(length) >= length // 3).int().expand(rows, length).contiguous()
    positions = torch.where(
        documents == 1, torch.arange(length) - length // 3 - 1, torch.arange(length)
    ).clamp(min=0)
    made = Batch.from_rows(tokens)
    return Batch(made.tokens, made.targets, documents, positions.int(), made.n_targets, made.n_bytes)


def model(**changes: object) -> Transformer:
    torch.manual_seed(0)
    made = Transformer(replace(tiny(vocab_size=512, pattern="FLH"), **changes))
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return made


def test_logits_and_gradients_equal_the_cpu() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    here, there = model(), model().cuda()
    for each, rows in ((here, batch()), (there, batch().to("cuda"))):
        next_token_loss(each, rows).total.backward()
    for (name, a), b in zip(here.named_parameters(), there.parameters()):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(b.grad.cpu(), a.grad, atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("compiled", [False, True])
def test_bf16_training_lowers_the_loss(compiled: bool) -> None:
    made = model().cuda()
    if compiled:
        for block in made.blocks:
            block.compile()
    optimizer = build_optimizer(made, OptimConfig(lr=3e-3))
    step = TrainStep(made, next_token_loss, optimizer, choose("bf16", torch.device("cuda")))
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"]
    losses = [float(step(batch().to("cuda")).loss) for _ in range(20)]
    assert losses[-1] < losses[0] - 0.5
    assert all(p.dtype == torch.float32 for p in made.parameters())


def test_cached_decoding_equals_the_whole_row() -> None:
    made = model().cuda().eval()
    tokens = batch().tokens[:1].cuda()
    with torch.no_grad():
        whole = made(tokens).hidden
        cache, parts = made.new_cache(), []
        for chunk in tokens.split([50, 1, 1, 40, 36], dim=1):
            parts.append(made(chunk, cache=cache).hidden)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-3)
