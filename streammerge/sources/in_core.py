"""A merge method on core matrices: the registered function itself, with small tensors in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from streammerge import grid
from streammerge.arrays import Rows
from streammerge.declarations import Knobs, MethodSpec
from streammerge.kernels.spectral import isotropic, shared_bases
from streammerge.scratch import Scratch
from streammerge.sources.applied import Applied
from streammerge.sources.combined import Combined
from streammerge.storage.bytesource import Files
from streammerge.words import DType, Merged, OwnStatistic, StatisticValue, TensorSpec, Terms, Tile

if TYPE_CHECKING:
    from streammerge.arrays import Core

# What statistics may hold: a core matrix is small enough for all of it.
_STATE_BYTES = 32 << 20
# How much of its own size an update has where shared directions are chosen, the rest being the mean
# of all: the authors' setting for the merges that they say how to run again.
_OWN_SIZE = 0.25


class Combine(Protocol):
    """How core matrices `[models, left, right]` become one."""

    def __call__(self, cores: Core) -> Core: ...

    def working_bytes(self, rank: int) -> int:
        """Working memory for cores of at most `[rank, rank]`."""
        ...


class Weighted:
    """`sum of factor_i * core_i`, exactly the same as of the updates themselves."""

    def __init__(self, factors: Sequence[float]) -> None:
        self.factors = tuple(factors)

    def __call__(self, cores: Core) -> Core:
        return np.asarray(np.tensordot(np.array(self.factors, np.float64), cores, 1))

    def working_bytes(self, rank: int) -> int:
        return 8 * rank**2


class Isotropized:
    """Another way to combine, and then every singular value their mean."""

    def __init__(self, combine: Combine) -> None:
        self._combine = combine

    def __call__(self, cores: Core) -> Core:
        return isotropic(self._combine(cores))

    def working_bytes(self, rank: int) -> int:
        return self._combine.working_bytes(rank) + 8 * 8 * rank**2


class Compressed:
    """Another way to combine, in coordinates along `rank` directions that the updates share.

    He et al., "Compress then Merge: From Multiple LoRAs into One Low-Rank Adapter", ICML 2026
    (arXiv 2606.03723). The directions are those in which updates of nearly one size lie best; what
    is combined are the updates as they are, `U' M_i V`. So the merge has that rank by construction.
    """

    def __init__(self, combine: Combine, rank: int, models: int) -> None:
        self._combine = combine
        self._rank = rank
        self._models = models

    def __call__(self, cores: Core) -> Core:
        if not cores.size:
            return np.zeros(cores.shape[1:])
        u, v = shared_bases(_evened(cores), self._rank)
        return np.asarray(u @ self._combine(u.T @ cores @ v) @ v.T)

    def working_bytes(self, rank: int) -> int:
        """The cores evened and side by side, their singular vectors, and LAPACK's copies."""
        own = 8 * (5 * self._models + 8) * rank**2
        return own + self._combine.working_bytes(min(rank, self._rank))


def _evened(cores: Core) -> Core:
    """Each of nearly the mean size, so that small updates have a say in what is shared."""
    sizes = np.linalg.norm(cores, axis=(1, 2))
    wanted = _OWN_SIZE * sizes + (1 - _OWN_SIZE) * sizes.mean()
    factors = np.divide(wanted, sizes, out=np.zeros_like(sizes), where=sizes > 0)
    return np.asarray(factors[:, np.newaxis, np.newaxis] * cores)


class Turned:
    """The same for updates of the transposed tensor."""

    def __init__(self, combine: Combine) -> None:
        self._combine = combine

    def __call__(self, cores: Core) -> Core:
        return self._combine(cores.transpose(0, 2, 1)).T

    def working_bytes(self, rank: int) -> int:
        return self._combine.working_bytes(rank)


class InCore:
    """A method with its knobs; the base's core is zero, since what is merged are differences.

    Its statistics are of the core matrices, and chance is drawn for their elements.
    """

    def __init__(self, files: Files, method: MethodSpec, knobs: Knobs, tensor: str) -> None:
        self._files = files
        self._method = method
        self._knobs = knobs
        self._tensor = tensor

    def __call__(self, cores: Core) -> Core:
        shape = cores.shape[1:]
        if not cores.size:
            return np.zeros(shape)
        if self._method.returns == "core":
            merged = self._method.function(cores, **self._knobs.arguments(of_all=False))
            return self._checked(merged, shape)
        spec = TensorSpec(self._tensor, shape, DType.F32)
        base = Held(spec, np.zeros(shape, np.float32))
        models = [Held(spec, core.astype(np.float32)) for core in cores]
        if self._method.returns == "rows":
            return self._rows(Applied(self._method, self._knobs, base, models))
        merge = Combined(self._files, self._method, self._knobs, base, models)
        found = merge.coefficients(_settle(merge, Scratch()))
        factors = [found.models[model] for model in self._knobs.touching]
        return np.asarray(sum(f * core for f, core in zip(factors, cores, strict=True)), np.float64)

    def working_bytes(self, rank: int) -> int:
        """The models in float32, as a stack, as the method changes it, and statistics of it; or of
        a method on cores, their singular vectors."""
        return 4 * (12 + 4 * len(self._knobs.touching)) * rank**2

    def _rows(self, merge: Merged) -> Core:
        scratch = Scratch()
        values = _settle(merge, scratch)
        out = np.empty((merge.spec.rows, merge.spec.cols))
        for index, tile in enumerate(grid.tiles(merge.spec)):
            out[tile.start : tile.stop] = merge.merge(tile, index, values, scratch)[0]
        return out

    def _checked(self, merged: Core, shape: tuple[int, ...]) -> Core:
        if merged.dtype == np.float64 and merged.shape == shape:
            return merged
        raise TypeError(
            f"the method {self._method.name} returned {merged.dtype} {merged.shape}, "
            f"expected float64 {shape}"
        )


def _settle(merge: Merged, scratch: Scratch) -> Mapping[str, StatisticValue]:
    """All statistics of a merge, tile by tile in grid order."""
    values: dict[str, StatisticValue] = {}
    tiles = grid.tiles(merge.spec)
    while found := merge.start(_STATE_BYTES, values):
        for name, one in found.items():
            while not isinstance(one, StatisticValue):
                for index, tile in enumerate(one.wants(tiles)):
                    one.absorb(index, merge.measure({name: one}, tile, index, scratch)[name])
                one = one.finish()
            values[name] = one
    return values


class Held:
    """A small tensor in memory, as its own difference from a base of zeros; see `Source`."""

    needs_base = False
    resident_bytes = 0
    once_bytes = 0
    own_statistics: tuple[OwnStatistic, ...] = ()

    def __init__(self, spec: TensorSpec, rows: Rows) -> None:
        self.spec = spec
        self._rows = rows

    def read(self, tile: Tile, out: Rows, scratch: Scratch) -> None:
        out[...] = self._rows[tile.start : tile.stop : tile.row_step, :: tile.col_step]

    def delta(self, tile: Tile, base_rows: Rows | None, out: Rows, scratch: Scratch) -> None:
        self.read(tile, out, scratch)

    def terms(self) -> Terms:
        return Terms(self)

    def read_bytes(self, tile: Tile) -> int:
        return 0

    def scratch_bytes(self, tile: Tile) -> int:
        return 0

    def release(self) -> None:
        """The caller's to let go."""
