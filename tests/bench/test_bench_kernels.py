"""What a trace says: times by kernel and kind, and the share of the span that none covers."""

import pytest
import torch

from deepseek.bench.kernels import from_trace, kind_of, profile


def event(name: str, start: float, duration: float, cat: str = "kernel") -> dict[str, object]:
    return {"cat": cat, "name": name, "ts": start, "dur": duration}


def test_idle_is_what_no_kernel_covers() -> None:
    found = from_trace([
        event("nvjet_tst_128x256", 0, 40), event("triton_poi_fused_add_0", 30, 20),  # overlap: 0…50 is busy
        event("nvjet_tst_128x256", 70, 20), event("Memcpy DtoH", 95, 5, "gpu_memcpy"),
        event("cudaLaunchKernel", 0, 1000, "cuda_runtime"), {"name": "a marker", "ph": "i"},
    ])  # fmt: skip
    assert found.span == pytest.approx(100e-6)
    assert found.busy == pytest.approx(75e-6)
    assert found.idle_share == pytest.approx(0.25)
    first = found.kernels[0]
    assert (first.name, first.calls, first.kind) == ("nvjet_tst_128x256", 2, "matmul")
    assert {row["kind"]: round(row["ms"], 6) for row in found.by_kind()} == {
        "matmul": 0.06, "memory-bound": 0.02, "copy": 0.005,
    }  # fmt: skip
    assert sum(row["share %"] for row in found.top()) == pytest.approx(100)


def test_an_empty_trace_has_no_idle_share() -> None:
    assert from_trace([]).idle_share is None


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("void flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma", "attention"),
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NNT", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matmul"),
        (
            "void cutlass::device_kernel<GemmUniversal<cutlass::gemm::GroupProblemShape<cute::tuple",
            "grouped matmul",
        ),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("void at::native::radixSortKVInPlace", "routing and indexing"),
        ("triton_red_fused__to_copy_mul_pow_3", "memory-bound"),
        ("ncclDevKernel_AllReduce_Sum_f32", "communication"),
        ("Memset (Device)", "copy"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_on_a_cpu_operators_stand_for_kernels() -> None:
    x = torch.randn(32, 32)
    found = profile(lambda: x @ x, torch.device("cpu"), calls=3)
    assert {k.name: k.calls for k in found.kernels}["aten::mm"] == 3
    assert found.idle_share is None
