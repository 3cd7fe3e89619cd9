"""The native CPU kernels against float64, against the model's own modules, and against themselves in other company."""

from __future__ import annotations

import ctypes
import logging
import platform
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from paged_sequences import Case, Pages, make_case
from torch import Tensor

from deepseek.nn.attention import AttentionConfig
from deepseek.ops import native, native_attention
from deepseek.ops.decode_experts import experts_reference
from deepseek.ops.native import compiler
from deepseek.ops.native_attention import NativeAppend
from deepseek.ops.native_experts import NativeExperts
from deepseek.ops.native_linear import Interleaved, NativeLinear, NativeSwiGLU
from deepseek.ops.paged_attention import backend_for

ERROR = {"fp32": 1e-6, "bf16": 6e-3, "int8": 2.5e-2}
VARIANTS = {"native": compiler.TARGET}
if platform.machine() == "x86_64" and torch.backends.cpu.get_cpu_capability() != "DEFAULT":
    VARIANTS |= {"avx2": ("-march=x86-64-v3", "-O1"), "sse2": ("-march=x86-64", "-O1")}


def make(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.fixture(scope="module")
def libraries() -> dict[str, ctypes.CDLL]:
    """The kernels compiled for this processor, and for processors that have less."""
    if not native.available():
        pytest.skip("no C++ compiler here")
    found = {}
    for name, flags in VARIANTS.items():
        lib = ctypes.CDLL(str(compiler.build(flags)))
        for function, arguments in native.SIGNATURES.items():
            getattr(lib, function).argtypes, getattr(lib, function).restype = arguments, None
        found[name] = lib
    return found


@pytest.fixture(params=list(VARIANTS))
def variant(
    request: pytest.FixtureRequest, libraries: dict[str, ctypes.CDLL], monkeypatch: pytest.MonkeyPatch
) -> str:
    """Everything made in this test calls this library."""
    lib = libraries[request.param]
    monkeypatch.setattr(native, "function", lambda name: getattr(lib, name))
    monkeypatch.setattr(native, "library", lambda: lib)
    return str(request.param)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def formats() -> list[str]:
    return ["fp32", "bf16", *(["int8"] if native.has("int8") else [])]


def norm64(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.double(), weight.shape, weight.double(), eps)


@pytest.mark.parametrize(("inputs", "outputs"), [(200, 300), (33, 7), (1, 1), (512, 64), (70, 80)])
def test_linear(variant: str, threads: int, inputs: int, outputs: int) -> None:
    weight, bias, gain = make(0, outputs, inputs), make(1, outputs), make(2, inputs).abs() + 0.1
    for format in formats():
        linear = NativeLinear.pack(weight, bias, format)
        plain = NativeLinear.pack(weight, None, format)
        for rows in (1, 2, 5, 6, 7, 12, 64, 301):
            x, residual = make(rows, rows, inputs), make(rows + 1, rows, outputs)
            want = residual + F.linear(norm64(x, gain, 1e-5), weight.double(), bias.double())
            assert distance(linear.fused(x, (gain, 1e-5), residual), want) < ERROR[format]
            assert distance(plain(x), F.linear(x.double(), weight.double())) < ERROR[format]


def test_other_dtypes_and_strides_are_taken_as_they_are(variant: str) -> None:
    linear = NativeLinear.pack(make(0, 30, 40), None, "fp32")
    x, gain, residual = make(1, 5, 40).bfloat16(), make(2, 40).bfloat16(), make(3, 30, 5).T
    y = linear.fused(x, (gain, 1e-6), residual)
    assert y.dtype == torch.bfloat16
    assert y.equal(linear.fused(x.float(), (gain.float(), 1e-6), residual.contiguous()).bfloat16())
    assert linear(x[:, :]).equal(linear(torch.cat((x, x), 1)[:, :40]))


def test_a_row_is_the_same_in_any_company(variant: str, threads: int) -> None:
    weight, gain = make(0, 300, 200), make(2, 200)
    up, down = make(3, 2 * 72, 200), make(4, 200, 72)
    x = make(5, 301, 200)
    x[7] *= 1000
    for format in formats():
        linear, swiglu = (
            NativeLinear.pack(weight, None, format),
            NativeSwiGLU(up, None, down, None, format),
        )
        experts = NativeExperts(
            make(6, 9, 200), make(7, 9), make(8, 9, 200, 2 * 40), make(9, 9, 40, 200), 3, True, format
        )
        whole = linear.fused(x, (gain, 1e-6)), swiglu(x, (gain, 1e-6), x), *experts(x, (gain, 1e-6), x)
        for n in (1, 2, 3, 4, 5, 6, 7, 13, 64):
            for first in (0, 5, 301 - n):
                some = x[first : first + n]
                part = (
                    linear.fused(some, (gain, 1e-6)), swiglu(some, (gain, 1e-6), some),
                    *experts(some, (gain, 1e-6), some),
                )  # fmt: skip
                for got, want in zip(part, whole):
                    assert got.equal(want[first : first + n]), (format, n, first)


def test_threads_change_nothing() -> None:
    linear = NativeLinear.pack(make(0, 300, 200), None, "bf16")
    before, x = torch.get_num_threads(), make(1, 50, 200)
    try:
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(linear(x))
    finally:
        torch.set_num_threads(before)
    assert found[0].equal(found[1])
    assert found[0].equal(found[2])


@pytest.mark.parametrize(("hidden", "ffn"), [(64, 96), (40, 33), (16, 5)])
def test_swiglu(variant: str, hidden: int, ffn: int) -> None:
    up, up_bias, down, bias = (
        make(0, 2 * ffn, hidden),
        make(1, 2 * ffn),
        make(2, hidden, ffn),
        make(3, hidden),
    )
    for format in formats():
        layer = NativeSwiGLU(up, up_bias, down, bias, format)
        assert isinstance(layer.gate_up, Interleaved)
        for rows in (1, 7, 50):
            x, residual, gain = make(4, rows, hidden), make(5, rows, hidden), make(6, hidden)
            h = norm64(x, gain, 1e-5)
            gate_up = F.linear(h, up.double(), up_bias.double())
            a, b = gate_up.chunk(2, -1)
            want = residual + F.linear(F.silu(a) * b, down.double(), bias.double())
            assert distance(layer(x, (gain, 1e-5), residual), want) < 3 * ERROR[format]
            assert distance(layer.gate_up(h.float()), gate_up) < ERROR[format]


@pytest.mark.parametrize(("experts", "top_k", "normalise"), [(8, 2, True), (33, 5, False), (1, 1, True)])
def test_experts(variant: str, threads: int, experts: int, top_k: int, normalise: bool) -> None:
    hidden, ffn = 48, 40
    router, bias = make(0, experts, hidden), make(1, experts) / 10
    up, down = make(2, experts, hidden, 2 * ffn) / 7, make(3, experts, ffn, hidden) / 6
    for format in formats():
        layer = NativeExperts(router, bias, up, down, top_k, normalise, format)
        for rows in (1, 3, 40, 200):
            x, residual, gain = make(4, rows, hidden), make(5, rows, hidden), make(6, hidden)
            want = experts_reference(
                norm64(x, gain, 1e-5), *(t.double() for t in (router, bias, up, down)), top_k, normalise
            )
            y, expert, gate = layer(x, (gain, 1e-5), residual)
            assert expert.equal(want[1].to(expert.dtype))
            torch.testing.assert_close(gate.double(), want[2].double(), rtol=1e-5, atol=1e-6)
            assert distance(y - residual, want[0].double()) < 4 * ERROR[format]


def test_experts_that_nobody_chose_are_not_read() -> None:
    layer = NativeExperts(torch.zeros(4, 16), torch.tensor([0.0, 9, 0, 5]), *_experts(4), 2, True, "fp32")
    _, expert, _ = layer(make(0, 20, 16))
    assert expert.equal(torch.tensor([[1, 3]]).expand(20, 2))
    layer.up.data.view(4, -1)[0] = float("nan")
    layer.down.data.view(4, -1)[2] = float("nan")
    assert layer(make(0, 20, 16))[0].isfinite().all()


def _experts(count: int) -> tuple[Tensor, Tensor]:
    return make(1, count, 16, 2 * 24), make(2, count, 24, 16)


def test_what_is_not_finite_stays_so_and_stays_in_its_row(variant: str) -> None:
    x = make(0, 8, 16)
    x[3, 2], x[5, 0] = float("nan"), float("inf")
    gain = torch.ones(16)
    layer = NativeExperts(make(1, 4, 16), torch.zeros(4), *_experts(4), 2, True, "bf16")
    y = layer(x, (gain, 1e-6), x)[0]
    z = NativeLinear.pack(make(3, 20, 16), None, "bf16").fused(x, (gain, 1e-6))
    for found in (y, z):
        assert (~found.isfinite()).any(1).nonzero().flatten().tolist() == [3, 5]


# --- attention --------------------------------------------------------------------------------------------------------

SIZES = {"heads": 6, "kv_heads": 2, "head_dim": 16}
SHAPES = [
    AttentionConfig(**SIZES, window=12, block=4, stride=4),
    AttentionConfig(**SIZES, window=7, block=6, stride=2, pooling="learned", gate="static"),
    AttentionConfig(**SIZES, window=5, block=24, stride=8, pooling="learned"),
    AttentionConfig(heads=3, kv_heads=3, head_dim=32, window=33, block=8, stride=4, full_rope=False),
    AttentionConfig(heads=20, kv_heads=1, head_dim=16, window=1, block=1, stride=1),
    AttentionConfig(heads=4, kv_heads=1, head_dim=128, window=500, block=16, stride=16),
    AttentionConfig(heads=2, kv_heads=2, head_dim=80, window=70, block=32, stride=16),
]
LENGTHS = [1, 5, 70, 33, 129, 200, 64]


def native_takes(case: Case) -> bool:
    pages = Pages(case, page=16)
    return backend_for(case.q[0], pages.rows([(0, 1)]), pages.k) == "native"


@pytest.mark.parametrize("kind", ["F", "L", "H"])
def test_processors_with_less(variant: str, kind: str) -> None:
    for config in (SHAPES[1], SHAPES[6]):
        case = make_case(kind, config, [40, 90])
        for s, y in enumerate(Pages(case, page=16).run(0)):
            torch.testing.assert_close(
                y.double(), case.to("cpu", torch.float64).whole(s), rtol=1e-5, atol=1e-5
            )
            case.to("cpu", torch.float32)


@pytest.mark.parametrize("config", SHAPES, ids=range(len(SHAPES)))
@pytest.mark.parametrize("kind", ["F", "L", "H"])
def test_any_steps_give_what_the_whole_row_gives(kind: str, config: AttentionConfig) -> None:
    for seed in range(2):
        case = make_case(kind, config, LENGTHS, seed)
        assert native_takes(case)
        pages = Pages(case, page=(16, 32)[seed], seed=seed)
        found = pages.run(seed, most=(40, 90)[seed], padding=seed)
        exact = case.to("cpu", torch.float64)
        for s, y in enumerate(found):
            torch.testing.assert_close(y.double(), exact.whole(s), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["F", "L", "H"])
def test_bf16_pages_are_near_the_whole_row(variant: str, threads: int, kind: str) -> None:
    case = make_case(kind, SHAPES[0], [70, 33]).to("cpu", torch.bfloat16)
    assert native_takes(case)
    found, want = Pages(case, page=16).run(0), case.to("cpu", torch.float64)
    for s, y in enumerate(found):
        assert distance(y, want.whole(s)) < 1e-2


def test_rows_that_see_much_larger_scores_later() -> None:
    case = make_case("F", SHAPES[3], [200])
    case.k[0][150:] *= 40  # the running maximum moves far in the last blocks
    exact = case.to("cpu", torch.float64).whole(0)
    (y,) = Pages(case.to("cpu", torch.float32), page=16).run(0)
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 48, 128])
def test_append_norms_turns_and_writes(variant: str, dim: int, dtype: torch.dtype) -> None:
    n, heads, kv_heads, page = 20, 6, 2, 8
    qkv, gain = make(0, n, (heads + 2 * kv_heads) * dim), make(1, heads + kv_heads, dim)
    angle = make(2, n, dim // 2)
    slot = torch.randperm(40, generator=torch.Generator().manual_seed(3))[:n]
    k, v, raw = (torch.zeros(5, page, kv_heads, dim, dtype=dtype) for _ in range(3))
    want_pages = [p.clone() for p in (k, v, raw)]
    x = qkv.view(n, -1, dim).clone()
    normed = F.rms_norm(x[:, : heads + kv_heads], (dim,), None, 1e-5) * gain
    cos, sin = angle.cos(), angle.sin()
    a, b = normed.chunk(2, -1)
    turned = torch.cat((a * cos[:, None] - b * sin[:, None], b * cos[:, None] + a * sin[:, None]), -1)
    for pages, value in zip(want_pages, (turned[:, heads:], x[:, heads + kv_heads :], normed[:, heads:])):
        pages.flatten(0, 1)[slot] = value.to(dtype)
    append = NativeAppend(heads, k, v, raw, (gain, 1e-5))
    rope = torch.cat((cos, cos), 1)[:, None].contiguous(), torch.cat((-sin, sin), 1)[:, None].contiguous()
    q = append(qkv, rope, slot)
    torch.testing.assert_close(q, turned[:, :heads], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(qkv.view(n, -1, dim)[:, : heads + kv_heads], normed, rtol=1e-5, atol=1e-5)
    for got, want in zip((k, v, raw), want_pages):
        torch.testing.assert_close(
            got.float(), want.float(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
        )
    plain = NativeAppend(heads, k, v, None, None)(qkv, None, slot)
    assert plain.equal(qkv.view(n, -1, dim)[:, :heads])


def test_heads_that_the_kernels_do_not_take() -> None:
    assert not native_attention.takes(torch.zeros(1, 8, 2, 24), 4)
    assert not native_attention.takes(torch.zeros(1, 8, 2, 16, dtype=torch.float64), 4)
    assert not native_attention.takes(torch.zeros(1, 8, 1, 16), 33)


# --- building ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache directory, and nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._load.cache_clear()
    yield tmp_path / "deepseek"
    native._load.cache_clear()


def test_without_a_compiler_serving_takes_plain_torch(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        assert not native.available()
        assert not native.available()
    assert len(caplog.records) == 1
    assert "no C++ compiler" in caplog.text


def test_a_compiler_that_fails_says_why(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "cxx"
    broken.write_text("#!/bin/sh\necho 'cannot find omp.h' >&2; [ \"$1\" = --version ]\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert not native.available()
    assert "cannot find omp.h" in caplog.text
    assert list(fresh.iterdir()) == []


def test_nothing_is_loaded_from_where_others_can_write(fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    fresh.mkdir()
    fresh.chmod(fresh.stat().st_mode | stat.S_IWOTH)
    assert not native.available()
    assert "somebody else" in caplog.text


def test_processes_that_compile_at_once_and_those_that_come_later(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cxx, calls = tmp_path / "cxx", tmp_path / "calls"
    cxx.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = --version ] || {{ echo x >> {calls}; while [ "$1" != -o ]; do shift; done; echo made > "$2"; }}\n'
    )
    cxx.chmod(0o755)
    monkeypatch.setenv("CXX", str(cxx))
    found: list[Path] = []
    workers = [threading.Thread(target=lambda: found.append(compiler.build())) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    count = len(calls.read_text().split())
    assert compiler.build() == found[0]
    assert {p.read_text() for p in found} == {"made\n"}
    assert [p.name for p in fresh.iterdir()] == [found[0].name]
    assert len(calls.read_text().split()) == count <= 4 * (1 + len(list(compiler.SOURCES.glob("*.cpp"))))


def test_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_NATIVE", "0")
    assert not native.available()
    assert not native.has("bf16")
