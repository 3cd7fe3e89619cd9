"""Key/value caches for decoding, one per layer kind.

A full layer keeps every position. A window layer keeps the last W. A hybrid layer keeps the last max(W,
block) raw positions and one pooled key and value per ``stride`` positions, which is why a long context costs
it so little memory.

Shape letters: B rows, K key/value heads, T positions, D head size, J pooled blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek.ops.hybrid_attention import pool_blocks, pooled_length


class Growing:
    """A tensor that grows along dimension 2; capacity doubles, so appending is O(1) amortised."""

    def __init__(self) -> None:
        self._data: Tensor | None = None
        self.length = 0

    def append(self, x: Tensor) -> None:
        need = self.length + x.shape[2]
        if self._data is None or need > self._data.shape[2]:
            grown = x.new_empty(*x.shape[:2], max(need, 2 * self.length, 64), x.shape[3])
            if self._data is not None:
                grown[:, :, : self.length] = self.view()
            self._data = grown
        self._data[:, :, self.length : need] = x
        self.length = need

    def view(self) -> Tensor:
        assert self._data is not None, "nothing was appended yet"
        return self._data[:, :, : self.length]

    def select(self, rows: Tensor) -> None:
        """Keep ``rows`` (int64 indices into dimension 0) in this order; a row may come twice."""
        if self._data is not None:
            self._data = self._data.index_select(0, rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the positions held (spare capacity not counted)."""
        return 0 if self._data is None else self.view().numel() * self._data.element_size()


class LayerCache:
    """Keys and values of one layer: the last ``keep`` positions (``None``: all), perhaps pooled blocks."""

    def __init__(self, keep: int | None = None, block: int = 0, stride: int = 0) -> None:
        self.keep, self.block, self.stride = keep, block, stride
        self.length = 0  #: positions seen so far
        self._k: Growing | Tensor | None = Growing() if keep is None else None
        self._v: Growing | Tensor | None = Growing() if keep is None else None
        self._k_pool, self._v_pool = Growing(), Growing()

    def extend(self, k: Tensor, v: Tensor, pooling: Tensor | None = None) -> tuple[Tensor, Tensor, int]:
        """Append ``k, v [B, K, T, D]``; ``pooling``: weights ``[2, K, block]`` of pooled blocks, ``None``: the mean.

        Returns:
            Every key and value needed to attend from the new positions, and the position of the first of
            them.
        """
        if self.keep is None:
            assert isinstance(self._k, Growing)
            assert isinstance(self._v, Growing)
            self._k.append(k)
            self._v.append(v)
            self.length += k.shape[2]
            return self._k.view(), self._v.view(), 0
        if isinstance(self._k, Tensor) and isinstance(self._v, Tensor):
            k, v = torch.cat((self._k, k), 2), torch.cat((self._v, v), 2)
        first = self.length - (self._k.shape[2] if isinstance(self._k, Tensor) else 0)
        self.length = first + k.shape[2]
        if self.block:
            self._pool(k, v, first, pooling)
        self._k, self._v = k[:, :, -self.keep :].clone(), v[:, :, -self.keep :].clone()
        return k, v, first

    def pooled(self) -> tuple[Tensor, Tensor] | None:
        """Pooled keys and values ``[B, K, J, D]``, or ``None`` before the first complete block."""
        return (self._k_pool.view(), self._v_pool.view()) if self._k_pool.length else None

    def select(self, rows: Tensor) -> None:
        """Keep ``rows`` in this order, as beam search asks."""
        if isinstance(self._k, Tensor) and isinstance(self._v, Tensor):
            self._k, self._v = self._k.index_select(0, rows), self._v.index_select(0, rows)
        for grown in (self._k, self._v, self._k_pool, self._v_pool):
            if isinstance(grown, Growing):
                grown.select(rows)

    def _pool(self, k: Tensor, v: Tensor, first: int, pooling: Tensor | None) -> None:
        start = self._k_pool.length * self.stride - first
        if pooled_length(self.length, self.block, self.stride) > self._k_pool.length:
            for_k, for_v = (None, None) if pooling is None else pooling.unbind()
            self._k_pool.append(pool_blocks(k[:, :, start:], self.block, self.stride, weights=for_k))
            self._v_pool.append(pool_blocks(v[:, :, start:], self.block, self.stride, weights=for_v))

    @property
    def nbytes(self) -> int:
        def size(x: Growing | Tensor | None) -> int:
            if isinstance(x, Tensor):
                return x.numel() * x.element_size()
            return x.nbytes if x is not None else 0

        return sum(size(x) for x in (self._k, self._v, self._k_pool, self._v_pool))


class Cache:
    """One ``LayerCache`` per layer of a model."""

    def __init__(self, layers: list[LayerCache]) -> None:
        self.layers = layers

    @property
    def length(self) -> int:
        """Positions seen so far."""
        return self.layers[0].length

    def select(self, rows: Tensor) -> None:
        """Keep ``rows`` (int64 indices into the batch) in this order; a row may come twice."""
        for layer in self.layers:
            layer.select(rows)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)
