"""A merge that is a weighted sum whose factors a method finds from statistics of the models."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from streammerge.arrays import Factor, PerModel, Rows
from streammerge.declarations import Coefficients, Knobs, MethodSpec
from streammerge.errors import MethodError
from streammerge.kernels.weighted import sum_of_squares
from streammerge.scratch import Scratch
from streammerge.sources.needs import Needs
from streammerge.sources.together import add_times, together
from streammerge.storage.bytesource import Files
from streammerge.words import Fold, Source, StatisticValue, TensorSpec, Tile


class Combined:
    """On deltas `b * base + sum c_i d_i`, on weights `sum c_i x_i`; the method says b and c.

    The method is called once, when its statistics are there. In float32: the deltas in the order
    of the models (one product over stacked factors, where that is all they are), the base last;
    `update_only` leaves it out.
    """

    def __init__(
        self,
        files: Files,
        method: MethodSpec,
        knobs: Knobs,
        base: Source | None,
        models: Sequence[Source],
        *,
        update_only: bool = False,
    ) -> None:
        self._update_only = update_only
        self._method = method
        self._knobs = knobs
        self._base = base if method.on_deltas(has_base=base is not None) else None
        self._spec = models[0].spec
        self._needs = Needs(method, knobs, self._spec)
        rows = not self._needs.by_products()
        self._models = together(files, self._base, models, rows=rows)
        self._lock = threading.Lock()
        self._found: Coefficients | None = None

    def coefficients(self, values: Mapping[str, StatisticValue]) -> Coefficients:
        """What the method returns, given its finished statistics and those that need no read."""
        given = self._needs.start(0, values)
        known = {**values, **{n: v for n, v in given.items() if isinstance(v, StatisticValue)}}
        arguments = self._knobs.arguments(of_all=True) | self._needs.found(known, 0)
        found = self._method.function(None, **arguments)
        if isinstance(found, Coefficients) and len(found.models) == self._knobs.models:
            return Coefficients([_plain(one) for one in found.models], _plain(found.base))
        raise MethodError(
            f"the merge method {self._method.name} returns no coefficients of all models",
            found=repr(found),
            expected=f"Coefficients of {self._knobs.models} models",
            remedy="return Coefficients with one number for each model of the recipe",
        )

    @property
    def spec(self) -> TensorSpec:
        return self._spec

    @property
    def measured(self) -> TensorSpec:
        return self.spec

    @property
    def resident_bytes(self) -> int:
        return self._models.resident_bytes

    def start(
        self, state_bytes: int, values: Mapping[str, StatisticValue]
    ) -> dict[str, Fold | StatisticValue]:
        return self._needs.start(state_bytes, values)

    def state_bytes(self) -> tuple[int, int]:
        return self._needs.state_bytes()

    def measure(
        self, folds: Mapping[str, Fold], tile: Tile, index: int, scratch: Scratch
    ) -> dict[str, Any]:
        return self._needs.measure(folds, self._models.stack(tile, index, scratch), scratch)

    def merge(
        self, tile: Tile, index: int, values: Mapping[str, StatisticValue], scratch: Scratch
    ) -> tuple[Rows, PerModel]:
        with self._lock:
            if self._found is None:
                self._found = self.coefficients(values)
        factors = [self._found.models[model] for model in self._knobs.touching]
        out = scratch.rows("merged", tile.shape(self._spec))
        norms = np.full(1 + len(factors), np.nan)
        if self._base is None:
            self._models.add_up(tile, factors, None, out, scratch)
            return out, norms
        base = scratch.rows("base", out.shape)
        self._base.read(tile, base, scratch)
        norms[0] = sum_of_squares(base)
        norms[1:] = self._models.add_up(tile, factors, base, out, scratch)
        if not self._update_only:
            add_times(out, self._found.base, base, tile)
        return out, norms

    def waves(self) -> Sequence[Sequence[str]]:
        return self._needs.waves()

    @property
    def once_bytes(self) -> int:
        return self._models.once_bytes

    def part_bytes(self) -> int:
        return self._needs.part_bytes()

    def merge_bytes(self, tile: Tile) -> int:
        base = self._base.read_bytes(tile) if self._base is not None else 0
        return base + self._models.read_bytes(tile, range(len(self._knobs.touching)))

    def measure_bytes(self, tile: Tile, names: Sequence[str]) -> int:
        models = self._needs.measured(names)
        needs_base = self._models.needs_base(models) or self._needs.reads_base(names)
        base = self._base.read_bytes(tile) if self._base is not None and needs_base else 0
        return base + self._models.read_bytes(tile, models)

    def scratch_bytes(self, tile: Tile) -> int:
        rows, cols = tile.shape(self._spec)
        return self._models.scratch_bytes(tile) + sum(self._needs.buffers()) * 4 * rows * cols

    def release(self) -> None:
        self._models.release()


def _plain(factor: Factor) -> Factor:
    """A number as a float, whatever numpy made of it."""
    return float(factor) if np.ndim(factor) == 0 else factor
