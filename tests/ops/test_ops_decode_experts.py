"""The expert layer of a serving step: against one assignment at a time, and against the model's own layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepseek.errors import ConfigError
from deepseek.nn.moe import MoE, MoEConfig
from deepseek.ops.decode_experts import DeviceExperts, PackedExperts, experts_reference
from deepseek.ops.experts import route
from deepseek.ops.packed_linear import PackedSwiGLU

pytestmark = pytest.mark.usefixtures("cpu_kernels")
CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}
ERROR = {"fp32": 1e-5, "bf16": 1e-2, "int8": 4e-2}
C, F = 96, 40


def layer(experts: int = 8, top_k: int = 2, shared: int = 0, normalise: bool = True) -> MoE:
    torch.manual_seed(experts + top_k)
    config = MoEConfig(
        experts=experts, top_k=top_k, expert_ffn=F, shared_experts=shared, normalise_gates=normalise
    )
    moe = MoE(C, config).eval()
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_(0, 0.1)
        moe.router.bias.normal_(0, 0.05)
    return moe


def pack(moe: MoE, format: str, exact: bool = False) -> PackedExperts:
    c, s = moe.config, moe.shared
    shared = s and PackedSwiGLU(s.gate_up.weight, None, s.down.weight, None, format, CPU, exact=exact)
    return PackedExperts(
        moe.router.weight, moe.router.bias, moe.gate_up, moe.down, c.top_k, c.normalise_gates, format, CPU,
        shared=shared, exact=exact,
    )  # fmt: skip


def rows(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, C, generator=torch.Generator().manual_seed(seed))


def distance(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("experts", "top_k", "normalise"), [(8, 2, True), (3, 1, False), (16, 5, True)])
@pytest.mark.parametrize("format", ["fp32", "bf16", "int8"])
def test_equals_one_assignment_at_a_time(
    format: str, experts: int, top_k: int, normalise: bool, exact: bool
) -> None:
    moe = layer(experts, top_k, normalise=normalise)
    packed = pack(moe, format, exact)
    for n in (1, 2, 7, 40):
        x = rows(n, n).to(DTYPES[format])
        out, expert, gate = packed(x)
        want = experts_reference(
            x.float(), moe.router.weight, moe.router.bias, moe.gate_up, moe.down, top_k, normalise
        )
        assert out.dtype == x.dtype
        assert expert.equal(want[1].to(expert.dtype))
        torch.testing.assert_close(gate, want[2], rtol=1e-4, atol=1e-5)
        assert distance(out, want[0]) < ERROR[format]


@pytest.mark.parametrize("shared", [0, 1])
def test_equals_the_models_layer_and_its_router(shared: int, cpu_kernels: str) -> None:
    moe = layer(shared=shared)
    packed = pack(moe, "fp32")
    for n in (1, 5, 300):
        x = rows(n)
        out, expert, gate = packed(x)
        with torch.no_grad():
            torch.testing.assert_close(out, moe(x[None])[0][0], rtol=1e-4, atol=1e-5)
            _, want_expert, want_gate = route(x, moe.router.weight, moe.router.bias, 2, True)
        assert expert.equal(want_expert.to(expert.dtype))
        if cpu_kernels == "torch":
            assert gate.equal(want_gate)
        torch.testing.assert_close(gate, want_gate)


def test_experts_that_nobody_chose_and_one_that_everybody_chose() -> None:
    moe = layer(experts=8, top_k=1)
    moe.router.bias[3] = 10.0
    x = rows(20)
    out, expert, _ = pack(moe, "fp32")(x)
    assert bool((expert == 3).all())
    want = experts_reference(x, moe.router.weight, moe.router.bias, moe.gate_up, moe.down, 1, True)
    assert distance(out, want[0]) < 1e-5


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (33, 5)])
@pytest.mark.parametrize("format", ["fp32", "bf16", "int8"])
def test_exact_rows_do_not_depend_on_the_others(format: str, experts: int, top_k: int) -> None:
    moe = layer(experts, top_k, shared=1)
    packed = pack(moe, format, exact=True)
    x = rows(90).to(DTYPES[format])
    x[7] *= 100
    whole = packed(x)
    for n in (1, 2, 3, 5, 8, 17, 64):
        for first in (0, 5, 90 - n):
            part = packed(x[first : first + n])
            for got, want in zip(part, whole):
                assert got.equal(want[first : first + n]), (n, first)


def test_the_path_of_accelerators_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_NATIVE", "0")
    moe = layer()
    device = DeviceExperts(
        moe.router.weight, moe.router.bias, moe.gate_up, moe.down, 2, True, "fp32", CPU, exact=False
    )
    host = pack(moe, "fp32")
    for n in (1, 50):
        with torch.no_grad():
            out, expert, gate = device(rows(n))
        want = host(rows(n))
        torch.testing.assert_close(out, want[0], rtol=1e-4, atol=1e-5)
        assert expert.equal(want[1].to(expert.dtype))
        torch.testing.assert_close(gate, want[2])
    assert device.experts_nbytes == host.experts_nbytes
    with pytest.raises(ConfigError, match="not 'int8'"):
        DeviceExperts(
            moe.router.weight, moe.router.bias, moe.gate_up, moe.down, 2, True, "int8", "meta", False
        )
    with pytest.raises(ConfigError, match="bit-identical rows need"):
        DeviceExperts(
            moe.router.weight, moe.router.bias, moe.gate_up, moe.down, 2, True, "fp32", "meta", True
        )
