"""Time FlashAttention-4 as ``deepseek.ops.flash_attention`` calls it beside what runs without it, on this GPU.

    python benchmarks/bench_flash.py                # whole rows, packed documents and windows; about a minute
    python benchmarks/bench_flash.py --quick        # a quarter of the rows

Forward with backward, by CUDA graphs, with the values a slice of one product as in training. TFLOP/s count the pairs of
a query and a key that attend to each other, in two products forward and five backward. Errors are of row 0 and the
first key head, against fp32. The package needs ``flash-attn-4`` on the path: unpacked to a directory DIR, that is
``PYTHONPATH=DIR:DIR/nvidia_cutlass_dsl/dsl_packages``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
import traceback
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

if not torch.cuda.is_available():
    sys.exit("error: this needs a CUDA GPU of capability 9.0 or 10.0, and flash-attn-4")

from deepseek.bench.timing import graph_seconds
from deepseek.ops import flash_attention
from deepseek.ops.attention import document_spans, window_attention_kernel

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
SHAPES = ((8, 4096, 16, 4, 128), (16, 4096, 16, 4, 64))  #: B, T, H, K, D


def inputs(B: int, T: int, H: int, K: int, D: int) -> list[Tensor]:
    """q, k, v ``[B, heads, T, D]``: q and k as the rotation leaves them, v a slice of the projections' product."""
    torch.manual_seed(0)
    q, k = (torch.randn(B, T, n, D, device="cuda").bfloat16() for n in (H, K))
    product = torch.randn(B, T, (H + 2 * K) * D, device="cuda").bfloat16()
    v = product[..., (H + K) * D :].unflatten(-1, (K, D))
    return [x.transpose(1, 2).requires_grad_() for x in (q, k, v)]


def milliseconds(work: Callable[[], object]) -> float:
    """GPU time of one call, the best of five replays of a graph."""
    return 1e3 * min(graph_seconds(work, repeats=8))


def exact(leaves: list[Tensor], do: Tensor, seen: Tensor) -> list[Tensor]:
    """Output and gradients of row 0 and the first key head, in fp32."""
    group = leaves[0].shape[1] // leaves[1].shape[1]
    q, k, v = (
        x.detach()[:1, :n].float().requires_grad_() for x, n in zip(leaves, (group, 1, 1), strict=True)
    )
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
    out = scores.softmax(-1) @ v
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), do[:1, :group].float())]


def case(name: str, attend: Attend, leaves: list[Tensor], do: Tensor, want: list[Tensor], pairs: int) -> None:
    """One line: times, TFLOP/s, errors. A failure is told, and the next case goes on."""
    H, D = leaves[0].shape[1], leaves[0].shape[3]
    try:
        began = time.time()
        out = attend(*leaves)
        got = [out.detach(), *torch.autograd.grad(out, leaves, do)]
        torch.cuda.synchronize()
        first = time.time() - began
        with torch.no_grad():
            forward = milliseconds(lambda: attend(*leaves))
        both = milliseconds(lambda: torch.autograd.grad(attend(*leaves), leaves, do))
        errors = [
            float((a[:1, : b.shape[1]].float() - b).abs().max()) for a, b in zip(got, want, strict=True)
        ]
        flops = 4 * pairs * H * D / 1e9
        print(
            f"  {name:26} forward {forward:7.3f} ms {flops / forward:6.1f} TFLOP/s, with backward {both:7.3f} ms "
            f"{3.5 * flops / both:6.1f} TFLOP/s, backward alone {both - forward:7.3f} ms; first call {first:5.2f} s; "
            f"max errors out {errors[0]:.1e} dq {errors[1]:.1e} dk {errors[2]:.1e} dv {errors[3]:.1e}",
            flush=True,
        )
    except Exception as error:
        print(f"  {name:26} FAILED: {type(error).__name__}: {str(error)[:1000]}", flush=True)
        traceback.print_exc(limit=-3)


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def flash(offsets: Tensor | None = None, window: int | None = None, deterministic: bool = False) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = (x.transpose(1, 2) for x in (q, k, v))
        return flash_attention.flash_forward(*rows, offsets, window, deterministic)[0].transpose(1, 2)

    return attend


def triton(documents: Tensor | None, window: int) -> Attend:
    spans = None if documents is None else document_spans(documents)
    return lambda q, k, v: window_attention_kernel(q, k, v, window, spans)


def offsets_of(documents: Tensor) -> Tensor:
    """As training has them: as many slots a row as the fullest row needs, rounded up to a power of two."""
    T = documents.shape[1]
    new = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    slots = 1 << (int(new.sum(1).max()) - 1).bit_length()
    starts = torch.where(new, torch.arange(T, device="cuda"), T).sort(1).values[:, :slots]
    return flash_attention.document_offsets(starts.int(), T)


def packed(B: int, T: int, mean: int) -> Tensor:
    """``[B, T]`` ids of documents of ``mean`` positions on average."""
    return (torch.rand(B, T, device="cuda") < 1 / mean).long().cumsum(1).int()


def shape(B: int, T: int, H: int, K: int, D: int) -> None:
    print(f"[{B}, {T}, {H} heads of {D}, {K} key heads] bf16 causal", flush=True)
    leaves = inputs(B, T, H, K, D)
    do = torch.randn(B, T, H, D, device="cuda").bfloat16().transpose(1, 2)
    t = torch.arange(T, device="cuda")
    causal = t[:, None] >= t
    want, pairs = exact(leaves, do, causal), B * T * (T + 1) // 2
    case("cuDNN SDPA", cudnn, leaves, do, want, pairs)
    case("FlashAttention-4", flash(), leaves, do, want, pairs)
    case("  deterministic", flash(deterministic=True), leaves, do, want, pairs)
    for mean in (512, 2048):
        documents = packed(B, T, mean)
        same = documents[0][:, None] == documents[0]
        offsets = offsets_of(documents)
        sizes = offsets.long().diff()
        pairs = int((sizes * (sizes + 1) // 2).sum())
        want = exact(leaves, do, causal & same)
        print(f"  documents of {mean}: {int((sizes > 0).sum())} in {len(sizes)} slots", flush=True)
        case("  ours (Triton)", triton(documents, T), leaves, do, want, pairs)
        case("  FlashAttention-4", flash(offsets), leaves, do, want, pairs)
    for window in (128, 1024):
        want = exact(leaves, do, causal & (t[:, None] - t < window))
        pairs = B * (window * (window + 1) // 2 + max(T - window, 0) * window)
        print(f"  a window of {window}", flush=True)
        case("  ours (Triton)", triton(None, window), leaves, do, want, pairs)
        case("  FlashAttention-4", flash(window=window), leaves, do, want, pairs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    )
    try:
        print("flash-attn-4", importlib.metadata.version("flash-attn-4"))
    except importlib.metadata.PackageNotFoundError:
        print("flash-attn-4 has no metadata on the path")
    for _, _, H, K, D in SHAPES:
        for documents in (False, True):
            began = time.time()
            found = flash_attention.usable(
                torch.device("cuda", 0), torch.bfloat16, D, H // K, packed=documents
            )
            print(
                f"usable, heads of {D}, documents={documents}: {found} ({time.time() - began:.1f} s)",
                flush=True,
            )
    for B, *rest in SHAPES:
        try:
            shape(B // 4 if quick else B, *rest)
        except Exception:
            traceback.print_exc()


if __name__ == "__main__":
    main()
