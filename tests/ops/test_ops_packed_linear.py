"""Weight formats of the serving engine: against fp64 products, and row by row against each other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.errors import ConfigError
from deepseek.models import Transformer
from deepseek.models.config import tiny
from deepseek.nn.moe import MoEConfig
from deepseek.ops import int8_linear, native, packed_linear
from deepseek.ops.experts import swiglu
from deepseek.ops.packed_linear import PackedLinear, PackedSwiGLU, formats, pack_linear, rows_agree
from deepseek.registry import register_op

pytestmark = pytest.mark.usefixtures("cpu_kernels")
CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}
ERROR = {"fp32": 1e-6, "bf16": 5e-3, "int8": 2e-2}


def make(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(200, 300), (576, 512), (33, 7)])
@pytest.mark.parametrize("format", ["fp32", "bf16", "int8"])
def test_equals_a_wide_product(format: str, inputs: int, outputs: int, bias: bool, exact: bool) -> None:
    weight, b = make(0, outputs, inputs), make(1, outputs) if bias else None
    linear = pack_linear(weight, b, format, CPU, exact=exact)
    assert (linear.in_features, linear.out_features) == (inputs, outputs)
    for rows in (1, 2, 5, 64):
        x = make(rows, rows, inputs)
        y = linear(x.to(DTYPES[format]))
        assert y.dtype == DTYPES[format]
        assert y.shape == (rows, outputs)
        want = F.linear(x.double(), weight.double(), None if b is None else b.double())
        assert distance(y, want) < ERROR[format]


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(("inputs", "outputs"), [(33, 7), (64, 48), (96, 704), (1536, 576), (5632, 64)])
def test_exact_rows_do_not_depend_on_the_others(format: str, inputs: int, outputs: int, threads: int) -> None:
    dtype = DTYPES[format]
    linear = pack_linear(make(0, outputs, inputs), None, format, CPU, exact=True)
    assert not isinstance(linear, packed_linear.OneDNNLinear)  # its sums may depend on the number of rows
    x = make(1, 140, inputs).to(dtype)
    x[3] *= 1000  # a loud neighbour
    whole = linear(x)
    order = torch.randperm(140, generator=torch.Generator().manual_seed(2))
    assert linear(x[order]).equal(whole[order])
    for rows in (1, 2, 3, 6, 15, 16, 33, 65, 139):
        for first in (0, 1, 140 - rows):
            assert linear(x[first : first + rows]).equal(whole[first : first + rows]), (rows, first)


@pytest.mark.parametrize("inputs", [576, 2048])
def test_exact_rows_are_the_same_on_one_thread_and_two(inputs: int) -> None:
    linear, x = pack_linear(make(0, 256, inputs), None, "fp32", CPU, exact=True), make(1, 9, inputs)
    before, results = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(linear(x))
    torch.set_num_threads(before)
    assert results[0].equal(results[1])


@pytest.mark.parametrize("amx", [False, True])
def test_exact_products_are_ours_with_amx_too(monkeypatch: pytest.MonkeyPatch, amx: bool) -> None:
    """oneDNN is the faster one in bf16 there, and adds up a row in another order for some numbers of rows."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    for format, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        ours = native.has("bf16") if format == "bf16" else native.available()
        linear = pack_linear(make(0, 100, 3000), None, format, CPU, exact=True)
        assert isinstance(linear, packed_linear.RowwiseLinear) == (not ours)
        layer = PackedSwiGLU(make(0, 64, 96), None, make(1, 96, 32), None, format, CPU, exact=True)
        assert (layer.native is not None) == ours
        x = make(2, 20, 96).to(dtype)
        assert layer(x)[7:8].equal(layer(x[7:8]))
    if native.has("bf16") and packed_linear.has_onednn(torch.bfloat16):
        fast = pack_linear(make(0, 100, 3000), None, "bf16", CPU)
        assert isinstance(fast, packed_linear.OneDNNLinear) == amx


def test_what_computes_rows_one_by_one_agrees_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows_agree(packed_linear.RowwiseLinear(make(0, 100, 3001), None), torch.float32)
    monkeypatch.setenv("DEEPSEEK_NATIVE", "0")
    monkeypatch.setattr(packed_linear, "has_onednn", lambda _: False)
    assert type(pack_linear(make(0, 10, 30), None, "bf16", CPU)) is packed_linear.PlainLinear

    class Uneven(packed_linear.PlainLinear):
        """One row is computed another way, as by a product of a matrix and a vector."""

        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x) * (1 + 1e-6 * (len(x) == 1))

    assert not rows_agree(Uneven(make(0, 100, 3000), None), torch.float32)  # or the check could not fail


def test_int8_is_the_plain_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias, x = make(0, 130, 300), make(1, 130), make(2, 20, 300)
    x[4] = 0
    x[5] *= 1e4
    reference = int8_linear.Int8Reference(weight, bias)
    want = F.linear(x, weight, bias)
    for exact in (False, True):
        got = pack_linear(weight, bias, "int8", CPU, exact=exact)(x)
        assert got[4].equal(bias)
        for row in (0, 5):
            assert distance(got[row], want[row].double()) < 1.5 * distance(
                reference(x)[row], want[row].double()
            )
    monkeypatch.setenv("DEEPSEEK_NATIVE", "0")
    assert isinstance(pack_linear(weight[:, :1], bias, "int8", CPU), int8_linear.Int8Reference)
    monkeypatch.setattr(int8_linear, "has_fbgemm", lambda: False)
    assert isinstance(pack_linear(weight, bias, "int8", CPU), int8_linear.Int8Reference)


def test_int8_weights_are_a_quarter(cpu_kernels: str) -> None:
    weight = make(0, 256, 1024)
    sizes = {format: pack_linear(weight, None, format, CPU).nbytes for format in ("fp32", "bf16", "int8")}
    each = 8 if cpu_kernels == "native" and native.has("int8") else 4  # a scale, and in our kernels a sum
    assert sizes["int8"] == 256 * 1024 + each * 256
    assert (sizes["fp32"], sizes["bf16"]) == (4 * 256 * 1024, 2 * 256 * 1024)


def test_swiglu(cpu_kernels: str) -> None:
    gate_up, down, x = make(0, 2 * 96, 64), make(1, 64, 96), make(2, 5, 64)
    bias, out_bias = make(3, 2 * 96), make(4, 64)
    layer = PackedSwiGLU(gate_up, bias, down, out_bias, "fp32", CPU)
    want = F.linear(swiglu(F.linear(x, gate_up, bias)), down, out_bias)
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)
    assert layer.nbytes == gate_up.nbytes + down.nbytes
    residual, norm = make(5, 5, 64), (make(6, 64), 1e-5)
    torch.testing.assert_close(
        layer.fused(x, norm, residual), residual + layer(F.rms_norm(x, (64,), *norm)), rtol=1e-5, atol=1e-3
    )
    assert layer.fused(x).equal(layer(x))


def test_what_cannot_be_had_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'int8'"):
        pack_linear(make(0, 4, 4), None, "int9", CPU)
    with pytest.raises(ConfigError, match="'int8' is for CPUs"):
        pack_linear(make(0, 4, 4), None, "int8", "meta")
    with pytest.raises(ConfigError, match="bit-identical only by our Triton kernels"):
        pack_linear(make(0, 4, 4), None, "bf16", "meta", exact=True)


def test_an_extension_adds_a_format(cpu_kernels: str) -> None:
    class Doubled(PackedLinear):
        def __init__(self, weight: Tensor) -> None:
            self.weight = weight

        def __call__(self, x_NC: Tensor) -> Tensor:
            return 2 * F.linear(x_NC, self.weight)

    name = f"doubled-in-a-test-{cpu_kernels}"
    register_op("packed_linear", name)(lambda weight, bias, device, exact: Doubled(weight))
    assert name in formats()
    weight, x = make(0, 4, 4), make(1, 2, 4)
    assert pack_linear(weight, None, name, CPU)(x).equal(2 * F.linear(x, weight))


@pytest.mark.parametrize(("format", "bound"), [("fp32", 1e-5), ("bf16", 2e-2), ("int8", 6e-2)])
def test_a_models_logits_survive_the_format(format: str, bound: float) -> None:
    torch.manual_seed(0)
    model = Transformer(tiny(vocab_size=128, layers=2, moe=MoEConfig())).eval()
    tokens = torch.randint(0, 128, (1, 48))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.08)
        want = model.logits(model(tokens).hidden)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                packed = pack_linear(module.weight, module.bias, format, CPU)

                def forward(x: Tensor, packed: PackedLinear = packed) -> Tensor:
                    return packed(x.flatten(0, -2).to(DTYPES[format])).view(*x.shape[:-1], -1).to(x.dtype)

                module.forward = forward  # type: ignore[method-assign]
        got = model.logits(model(tokens).hidden)
    assert distance(got, want.double()) < bound
    assert float((got.argmax(-1) == want.argmax(-1)).float().mean()) > 0.9
