"""FlashAttention-4 (the package ``flash-attn-4``, Hopper GPUs and newer) as one operation for autograd and compile.

Optional: the extra ``flash``. Where it is installed and takes the inputs, layers over whole rows run through it in
place of torch's own attention. Before it is believed, the kernels that a model needs are compiled (seconds, once a
process) and compared with float64 on a small problem; a package that cannot be imported, compiled or trusted is told
once in the log, and torch's attention goes on. ``DEEPSEEK_FLASH=0`` turns it off; ``DEEPSEEK_FLASH=1`` makes it an
error when a CUDA device cannot have it, and uses it in torch's deterministic mode too, by its deterministic backward.

Shape letters: B rows, T positions, H query heads, K key/value heads (K divides H), D head size, N documents.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.ops.optional import OptionalKernels

CAPABILITIES = ((9, 0), (10, 0))
HEAD_DIMS = (64, 96, 128)
DTYPES = (torch.bfloat16, torch.float16)
SLOT = 32  #: positions a row must have for each slot of documents, which cost memory and empty programs
WIDE = 1024  #: windows from which on it beats our own kernel: 1.4 times at 1,024, not at 128 (LOG.md)


def kernels() -> Any:
    """The package's module of kernels, imported when first needed; it must have ``_flash_attn_fwd`` and ``_bwd``."""
    return import_module("flash_attn.cute.interface")


def _load() -> None:
    module = kernels()
    for name in ("_flash_attn_fwd", "_flash_attn_bwd"):
        getattr(module, name)


package = OptionalKernels(
    "FlashAttention-4", "torch's attention runs", "flash-attn-4", "flash", "flash_attn", "DEEPSEEK_FLASH", _load
)  # fmt: skip
forced = package.forced


def usable(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    group: int,
    packed: bool = False,
    window: bool = False,
) -> bool:
    """Whether whole-row causal attention on ``device`` runs here; a first answer may compile kernels.

    Args:
        dtype, head_dim: of queries, keys and values.
        group: query heads to a key/value head.
        packed: whether rows hold several documents.
        window: whether positions see only the last few.

    Raises:
        MissingExtraError, ConfigError: it is switched on, ``device`` is CUDA, and it cannot be had.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    if deterministic and not package.asked():
        return False
    kind = f"heads of {head_dim} in {dtype}", device, group, packed, window, deterministic
    return package.usable(
        device,
        lambda: _refusal(device, dtype, head_dim),
        kind,
        lambda: relative_error(device, dtype, head_dim, group, packed, window, deterministic),
    )


# As ``torch.compiler.assume_constant_result`` does, which imports the whole compiler: a second at every start.
usable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why inputs of this kind are not taken, or nothing."""
    if (capability := torch.cuda.get_device_capability(device)) not in CAPABILITIES:
        return f"FlashAttention-4 is used on GPUs of capability 9.0 or 10.0, and this has {capability}"
    if head_dim not in HEAD_DIMS or dtype not in DTYPES:
        return f"FlashAttention-4 is used for 16-bit heads of {HEAD_DIMS}, not {head_dim} of {dtype}"
    return ""


def relative_error(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    group: int,
    packed: bool,
    window: bool,
    deterministic: bool,
) -> float:
    """The worst error of output and gradients on two rows of two key/value heads, against float64."""
    B, T, K = 2, 330, 2  # several tiles and a part of one: what long rows need is then compiled
    random = torch.Generator(device).manual_seed(0)
    shapes = [(B, T, n, head_dim) for n in (group * K, K, K, group * K)]
    q, k, v, do = (torch.randn(s, generator=random, device=device).to(dtype) for s in shapes)
    position = torch.arange(T, device=device)
    seen = position[:, None] >= position
    sees = 150 if window else None
    if sees is not None:
        seen &= position[:, None] < position + sees
    offsets = None
    if packed:
        offsets = torch.tensor([0, 200, T, T, T, 2 * T, 2 * T], device=device, dtype=torch.int32)
        apart = (position[:, None] >= 200) & (position < 200)
        seen = torch.stack((seen & ~apart, seen))[:, None, None]
    out, lse = flash_forward(q, k, v, offsets, sees, deterministic)
    got = (out, *flash_backward(do, q, k, v, out, lse, offsets, sees, deterministic))

    q, k, v, do = (x.double().unflatten(2, (K, -1)).permute(0, 2, 3, 1, 4) for x in (q, k, v, do))
    scores = q @ k.mT * head_dim**-0.5
    p = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    dp = do @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * head_dim**-0.5
    want = (p @ v, ds @ k, (ds.mT @ q).sum(2, keepdim=True), (p.mT @ do).sum(2, keepdim=True))
    errors = []
    for a, b in zip(got, want):
        b = b.permute(0, 3, 1, 2, 4).flatten(2, 3)
        errors.append((a.double() - b).norm() / b.norm())
    return float(torch.stack(errors).max())


def countable(starts: Tensor | None, length: int) -> bool:
    """Whether the documents of rows of ``length`` are counted, and few enough to be worth it."""
    return starts is not None and starts.shape[1] * SLOT <= length


def document_offsets(starts: Tensor, length: int) -> Tensor:
    """The ``offsets`` of rows of ``length`` positions: int32 ``[B, M]`` of ``Batch.starts`` → ``[B·M + 1]``."""
    B = starts.shape[0]
    first = torch.arange(B, device=starts.device, dtype=starts.dtype) * length
    return F.pad((starts + first[:, None]).flatten(), (0, 1), value=B * length)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor | None = None, window: int | None = None
) -> Tensor:
    """Causal attention over whole rows by FlashAttention-4, where it is ``usable``; differentiable.

    Args:
        q: ``[B, H, T, D]``; k, v: ``[B, K, T, D]``; 16-bit, best as transposed views of ``[B, T, …, D]``, which is
            how the kernels read them: they copy what is not aligned to 16 bytes.
        offsets: ``document_offsets`` when rows hold several documents.
        window: a position sees the last ``window`` positions, itself included; ``None``: all.

    Returns:
        ``[B, H, T, D]``, in memory ``[B, T, H, D]``.
    """
    rows = [x.transpose(1, 2) for x in (q, k, v)]
    deterministic = torch.are_deterministic_algorithms_enabled()
    return flash_forward(rows[0], rows[1], rows[2], offsets, window, deterministic)[0].transpose(1, 2)


@torch.library.custom_op("deepseek::flash_attention", mutates_args=())
def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor | None, window: int | None, deterministic: bool
) -> tuple[Tensor, Tensor]:
    """Causal attention and the logarithms of the softmax's denominators.

    Args:
        q: ``[B, T, H, D]``; k, v: ``[B, T, K, D]``; 16-bit, the last dimension contiguous.
        offsets: int32 ``[N + 1]``, where documents start in the ``B·T`` positions, and their end; they may not cross
            rows. ``None``: a document a row.
        window: a query sees the last ``window`` positions, itself included; ``None``: all.
        deterministic: whether gradients are added up in one order, which is slower.

    Returns:
        ``[B, T, H, D]`` and fp32 ``[B, H, T]``, ``[H, B·T]`` with offsets.
    """
    sizes = _sizes(q, offsets, window)
    flat = [x.flatten(0, 1) if offsets is not None else x for x in (q, k, v)]
    with torch.cuda.device_of(q):
        out, lse = kernels()._flash_attn_fwd(*flat, **sizes, return_lse=True)[:2]
    return out.view(q.shape), lse


@flash_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor | None, window: int | None, deterministic: bool
) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    shape = (B, H, T) if offsets is None else (H, B * T)
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("deepseek::flash_attention_backward", mutates_args=())
def flash_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor | None,
    window: int | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, contiguous."""
    sizes, grads = _sizes(q, offsets, window), [x.new_empty(x.shape) for x in (q, k, v)]
    flat = [x.flatten(0, 1) if offsets is not None else x for x in (q, k, v, out, do, *grads)]
    dq, dk, dv = flat[5:]
    with torch.cuda.device_of(q):
        kernels()._flash_attn_bwd(*flat[:5], lse, **sizes, deterministic=deterministic, dq=dq, dk=dk, dv=dv)
    return grads[0], grads[1], grads[2]


@flash_backward.register_fake
def _(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor | None,
    window: int | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _sizes(q: Tensor, offsets: Tensor | None, window: int | None) -> dict[str, Any]:
    """What both kernels are told; a document is at most as long as a row, so nothing has to be read back."""
    T = q.shape[1]
    sizes: dict[str, Any] = {"causal": True}
    if window is not None and window < T:
        sizes["window_size_left"] = window - 1
    if offsets is not None:
        sizes.update(cu_seqlens_q=offsets, cu_seqlens_k=offsets, max_seqlen_q=T, max_seqlen_k=T)
    return sizes


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, offsets, ctx.window, ctx.deterministic = inputs
    ctx.save_for_backward(q, k, v, *output, offsets)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if do is None:
        return (None,) * 6
    grads = flash_backward(do, *ctx.saved_tensors, ctx.window, ctx.deterministic)
    return (*grads, None, None, None)


flash_forward.register_autograd(_differentiate, setup_context=_save)
