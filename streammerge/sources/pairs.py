"""A merge of low-rank updates as a pair of factors: side by side, or through the core space."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from streammerge.arrays import PerModel, Rows
from streammerge.kernels.casts import round_to
from streammerge.kernels.spectral import svd
from streammerge.scratch import Scratch
from streammerge.sources.core import BLOCK, LowRank, core_bytes, core_space
from streammerge.sources.in_core import Combine
from streammerge.sources.low_rank import Product
from streammerge.storage.bytesource import Files
from streammerge.words import DType, Tile

if TYPE_CHECKING:
    from streammerge.arrays import Core


class Pair(Protocol):
    """`left [rows, rank] @ right [rank, cols]`."""

    @property
    def rank(self) -> int: ...

    def left(self, tile: Tile, scratch: Scratch) -> tuple[Rows, PerModel]:
        """The tile's rows of the left factor, and squared norms over them.

        Norms are of each model's update; then, where the pair approximates the merged update, of
        that and of what is missed of it.
        """
        ...

    def right(self) -> Rows:
        """The right factor, held until `release`."""
        ...

    @property
    def resident_bytes(self) -> int: ...

    @property
    def finding_bytes(self) -> int:
        """Working memory that whoever asks first needs; `scratch_bytes` counts it, too."""
        ...

    @property
    def once_bytes(self) -> int: ...

    def read_bytes(self, tile: Tile) -> int: ...

    def scratch_bytes(self, tile: Tile) -> int: ...

    def release(self) -> None: ...


class Stacked:
    """A weighted sum as it is: left factors side by side, times weight and scale in float32."""

    def __init__(self, files: Files, updates: LowRank, weights: Sequence[float]) -> None:
        self._product = Product(files, updates.factors)
        self._updates = updates
        self._weights = [weights[model] for model in updates.models]
        self.rank = updates.rank

    def left(self, tile: Tile, scratch: Scratch) -> tuple[Rows, PerModel]:
        left = self._product.left(tile, scratch)
        norms = self._updates.by_model(self._product.norms(left, scratch))
        return self._product.scaled(left, scratch, self._weights), norms

    def right(self) -> Rows:
        return self._product.right(Scratch())

    @property
    def resident_bytes(self) -> int:
        return self._product.resident_bytes

    @property
    def finding_bytes(self) -> int:
        return 0

    @property
    def once_bytes(self) -> int:
        return self._product.once_bytes

    def read_bytes(self, tile: Tile) -> int:
        return self._product.read_bytes(tile)

    def scratch_bytes(self, tile: Tile) -> int:
        return self._product.scratch_bytes(tile)

    def release(self) -> None:
        self._product.release()


@dataclass(frozen=True, slots=True)
class _Found:
    """What the core space gives: `left @ mix` is the left factor, `right` the right one."""

    mix: Core  # [R, rank]
    right: Rows  # [rank, cols], as it will be stored
    whole: Core  # [R, right basis]: rows of the merged update in the basis V
    in_basis: Core  # [right basis, rank]: V' right'
    gram: Core  # [rank, rank]: right @ right'


class Mixed:
    """A merge in core space: `(U M) V'`, M being the core matrices combined.

    With a `rank`, the nearest pair of that rank (Eckart and Young, 1936): M's largest singular
    values, their roots on both sides, and zeros where M has fewer. Without, U M and V' as they are.
    Rounded to `dtype`, and measured as rounded.
    """

    def __init__(
        self,
        files: Files,
        updates: LowRank,
        combine: Combine,
        *,
        rank: int | None = None,
        dtype: DType = DType.F32,
    ) -> None:
        self._product = Product(files, updates.factors)
        self._updates = updates
        self._combine = combine
        self._cut = rank
        self._dtype = dtype
        self.rank = rank or min(updates.rank, updates.cols)
        self._lock = threading.Lock()
        self._found: _Found | None = None

    def left(self, tile: Tile, scratch: Scratch) -> tuple[Rows, PerModel]:
        found = self._find()
        stored = self._product.left(tile, scratch)
        norms = self._updates.by_model(self._product.norms(stored, scratch))
        wide: Core = scratch.array("left in float64", stored.shape, np.float64)
        wide[...] = stored
        exact: Core = scratch.array("mixed in float64", (len(wide), self.rank), np.float64)
        np.matmul(wide, found.mix, out=exact)
        mixed = scratch.rows("mixed", exact.shape)
        mixed[...] = exact
        if self._cut is None:
            return mixed, norms
        round_to(mixed, self._dtype, scratch)
        exact[...] = mixed
        return mixed, np.append(norms, _missed(wide, exact, found, scratch))

    def right(self) -> Rows:
        return self._find().right

    def _find(self) -> _Found:
        with self._lock:
            if self._found is None:
                self._found = self._in_core()
            return self._found

    def _in_core(self) -> _Found:
        space = core_space(self._product, self._updates)
        merged = self._combine(space.cores)
        before, after = self._split(merged)
        right: Rows = np.zeros((self.rank, self._updates.cols), np.float32)
        in_basis, gram = np.zeros((len(after.T), self.rank)), np.zeros((self.rank, self.rank))
        scratch = Scratch()
        stored = self._product.right(scratch)
        for start in range(0, self._updates.cols, BLOCK):
            basis = space.to_right.T @ stored[:, start : start + BLOCK]
            block: Rows = np.zeros((self.rank, basis.shape[1]), np.float32)
            block[: len(after)] = after @ basis
            round_to(block, self._dtype, scratch)
            right[:, start : start + BLOCK] = block
            in_basis += basis @ block.T
            gram += block.astype(np.float64) @ block.T
        mix = np.zeros((self._product.rank, self.rank))
        mix[:, : before.shape[1]] = space.to_left @ before
        return _Found(mix, right, space.to_left @ merged, in_basis, gram)

    def _split(self, merged: Core) -> tuple[Core, Core]:
        """`merged` as a product of two, or its nearest of a rank."""
        if self._cut is None:
            return merged, np.eye(merged.shape[1])
        u, values, vt = svd(merged)
        roots = np.sqrt(values[: self._cut])
        return u[:, : self._cut] * roots, roots[:, np.newaxis] * vt[: self._cut]

    @property
    def resident_bytes(self) -> int:
        held, rank = self._updates.rank, self.rank
        small = 8 * (held**2 + 2 * held * rank + rank**2)
        return self._product.resident_bytes + 4 * rank * self._updates.cols + small

    @property
    def finding_bytes(self) -> int:
        """What finding the pair takes for a while: the space, then M, then the right factor."""
        held, rank = self._updates.rank, self.rank
        space = core_bytes(self._updates) + self._product.scratch_bytes(Tile(0, BLOCK))
        cores = 8 * (self._updates.count + 2) * held**2
        merged = cores + self._combine.working_bytes(held)
        right = cores + 8 * BLOCK * (2 * held + 4 * rank)
        return max(space, merged, right)

    @property
    def once_bytes(self) -> int:
        """Right factors, and left ones for their triangle."""
        return self._product.once_bytes + self._product.read_bytes(Tile(0, self._updates.rows))

    def read_bytes(self, tile: Tile) -> int:
        return self._product.read_bytes(tile)

    def scratch_bytes(self, tile: Tile) -> int:
        """The stored rows in float64, their mix, what measures it, and finding the pair."""
        rows = tile.stop - tile.start
        wide = min(self._updates.rank, self._updates.cols) + self._updates.rank
        mixed = 8 * wide + (4 + 8 + 8) * self.rank
        return self._product.scratch_bytes(tile) + rows * mixed + self.finding_bytes

    def release(self) -> None:
        with self._lock:
            self._found = None
        self._product.release()


def _missed(left: Core, mixed: Core, found: _Found, scratch: Scratch) -> tuple[float, float]:
    """Squared norms of the merged update over some rows, and of its difference from the pair.

    In the basis V the update's rows are `left @ whole`; the pair's are `mixed @ right`. No product
    of the tile's size is formed.
    """
    update: Core = scratch.array("in basis", (len(left), found.whole.shape[1]), np.float64)
    np.matmul(left, found.whole, out=update)
    product: Core = scratch.array("measure", mixed.shape, np.float64)
    squared = float(np.vdot(update, update))
    np.matmul(update, found.in_basis, out=product)
    across = float(np.vdot(product, mixed))
    np.matmul(mixed, found.gram, out=product)
    missed = squared - 2 * across + float(np.vdot(product, mixed))
    return squared, max(0.0, missed)
