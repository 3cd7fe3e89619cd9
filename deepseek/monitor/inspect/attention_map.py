"""What one head looks at, as a picture of any size: computed in strips, never the whole ``T × T`` of all heads.

A strip of queries is scored, softmaxed and reduced to the picture's cells at once. A cell shows the largest
probability in it: one strong entry among a million weak ones stays visible at every zoom.

The picture is in positions on both axes. A hybrid layer can be seen as it acts (branch ``""``: both branches with
their gate, pooled blocks spread over their positions) or branch by branch; in ``pooled``, a position shows the
probability of the block that holds it. What falls on the learned sink has no position and is told beside the picture.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepseek.errors import ConfigError
from deepseek.monitor.inspect.view import AttentionView

GAMMA = (
    2.0  #: bytes are ``255 (p / scale)^(1/γ)``: with 2, an entry of 4e-6 of the largest is still not black
)
STRIP = 256  #: queries at a time
LARGEST = 2048  #: cells a side; more than any screen shows


@dataclass(frozen=True)
class AttentionMap:
    """A picture of one head.

    Attributes:
        cells: fp32 ``[P, P]``, row = query, column = key; the largest probability in each cell.
        sink: fp32 ``[P]``, the largest share of the learned sink among a row's queries; zeros without a sink.
        start, size: the picture covers positions ``start … start + size − 1``, on both axes.
        branch: '' = as the head acts, 'full', 'window' or 'pooled'.
    """

    cells: Tensor
    sink: Tensor
    start: int
    size: int
    branch: str

    def to_dict(self) -> dict[str, Any]:
        """JSON: bytes in base64, row by row; ``probability = scale · (byte / 255)^gamma``."""
        scale = float(self.cells.max())
        share = (self.cells / scale if scale > 0 else self.cells).pow(1 / GAMMA)
        pixels = (share * 255).round().to(torch.uint8)
        # Rounding must not hide an entry that is there.
        pixels = torch.where((pixels == 0) & (self.cells > 0), torch.ones_like(pixels), pixels)
        return {
            "start": self.start,
            "size": self.size,
            "pixels": self.cells.shape[0],
            "values": base64.b64encode(pixels.numpy().tobytes()).decode("ascii"),
            "scale": scale,
            "gamma": GAMMA,
            "sink": [round(v, 5) for v in self.sink.tolist()],
            "branch": self.branch,
        }


def attention_map(
    view: AttentionView,
    head: int,
    *,
    row: int = 0,
    branch: str = "",
    start: int = 0,
    size: int | None = None,
    pixels: int = 512,
) -> AttentionMap:
    """The picture of ``head`` for queries and keys ``start … start + size − 1``.

    Args:
        view: of the layer, with all queries (``rows=None``).
        row: which row of the view's batch. size: ``None``: to the row's end.
        pixels: cells a side, at most ``LARGEST``; fewer when ``size`` is smaller.

    Raises:
        ConfigError: head, row, branch, start or size do not exist.
    """
    size = view.length - start if size is None else size
    _check(view, head, row, start, size, pixels)
    P, device = min(pixels, size, LARGEST), view.index.device
    bin_of = torch.arange(size, device=device) * P // size
    cells = torch.zeros(P, P, device=device, dtype=view.q_BHRD[view.branches[0]].dtype)
    sink = cells.new_zeros(P)
    for first in range(start, start + size, STRIP):
        some = slice(first, min(first + STRIP, start + size))
        shares, on_sink = _strip(view, branch, some, head, row)
        at = bin_of[some.start - start : some.stop - start]
        part = shares[:, start : start + size]
        columns = part.new_zeros(len(part), P).scatter_reduce(1, bin_of.expand_as(part), part, "amax")
        cells.scatter_reduce_(0, at[:, None].expand_as(columns), columns, "amax")
        sink.scatter_reduce_(0, at, on_sink, "amax")
    return AttentionMap(cells.float().cpu(), sink.float().cpu(), start, size, branch or _default(view))


def _default(view: AttentionView) -> str:
    return view.branches[0] if len(view.branches) == 1 else ""


def _strip(view: AttentionView, branch: str, some: slice, head: int, row: int) -> tuple[Tensor, Tensor]:
    """Shares ``[R, T]`` and the sink's ``[R]`` of one strip of queries of one head."""
    heads = slice(head, head + 1)
    if not branch:
        shares, sink = view.over_positions(some, heads)
        return shares[row, 0], sink[row, 0]
    p = view.probabilities(branch, some, heads)
    if branch != "pooled":
        return p[row, 0], p.new_zeros(p.shape[2])
    return _over_blocks(view, p[row, 0, :, 1:], row), p[row, 0, :, 0]


def _over_blocks(view: AttentionView, whole_RJ: Tensor, row: int) -> Tensor:
    """Blocks' probabilities painted over their positions, the largest where blocks overlap: ``[R, T]``."""
    assert view.starts_BJ is not None
    painted = whole_RJ.new_zeros(len(whole_RJ), view.length + 1)
    for n in range(view.config.block):
        at = (view.starts_BJ[row] + n).clamp(max=view.length)
        painted.scatter_reduce_(1, at.expand_as(whole_RJ), whole_RJ, "amax")
    return painted[:, :-1]


def _check(view: AttentionView, head: int, row: int, start: int, size: int, pixels: int) -> None:
    heads, rows = view.config.heads, view.q_BHRD[view.branches[0]].shape[0]
    if not 0 <= head < heads:
        raise ConfigError(f"no head {head}: this layer has heads 0 to {heads - 1}")
    if not 0 <= row < rows:
        raise ConfigError(f"no row {row}: the batch has rows 0 to {rows - 1}")
    if not (0 <= start < view.length and 1 <= size <= view.length - start):
        raise ConfigError(
            f"start={start} and size={size} leave the row of {view.length} positions; "
            f"size may be 1 to {max(view.length - start, 1)} there"
        )
    if pixels < 1:
        raise ConfigError(f"pixels={pixels} must be at least 1")
