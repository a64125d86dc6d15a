"""A merge by a method that computes rows: its statistics first, then tile by tile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from streammerge.arrays import Deltas, PerModel, Rows
from streammerge.kernels.weighted import sum_of_squares
from streammerge.memory import Scratch
from streammerge.words import (
    Fold,
    Knobs,
    MethodSpec,
    Source,
    StatisticValue,
    TensorSpec,
    Tile,
)


class _Stack:
    """One tile of all models; see `DeltaStack`."""

    def __init__(self, base: Source | None, models: Sequence[Source], tile: Tile, scratch: Scratch):
        self._base = base
        self._models = models
        self._tile = tile
        self._scratch = scratch
        self._base_rows: Rows | None = None

    def base(self) -> Rows:
        """The base's rows, read once."""
        if self._base_rows is None:
            assert self._base is not None
            self._base_rows = self._scratch.array("base", self._shape, np.float32)
            self._base.read(self._tile, self._base_rows, self._scratch)
        return self._base_rows

    def one(self, model: int) -> Rows:
        out: Rows = self._scratch.array("rows", self._shape, np.float32)
        self.fill(model, out)
        return out

    def fill(self, model: int, out: Rows) -> None:
        """One model's delta, or its own rows where no base is subtracted."""
        source = self._models[model]
        if self._base is None:
            source.read(self._tile, out, self._scratch)
            return
        base = self.base() if source.needs_base else None
        source.delta(self._tile, base, out, self._scratch)

    def all(self) -> Deltas:
        shape = (len(self._models), *self._shape)
        stack: Deltas = self._scratch.array("deltas", shape, np.float32)
        for model, out in enumerate(stack):
            self.fill(model, out)
        return stack

    @property
    def _shape(self) -> tuple[int, int]:
        return self._tile.shape(self._models[0].spec)


class Applied:
    """`base + method(deltas)`, or `method(weights)`, for the models that touch the tensor."""

    def __init__(
        self, method: MethodSpec, knobs: Knobs, base: Source | None, models: Sequence[Source]
    ) -> None:
        self._method = method
        self._knobs = knobs
        self._base = base if method.space == "deltas" else None
        self._models = tuple(models)

    @property
    def spec(self) -> TensorSpec:
        return self._models[0].spec

    @property
    def resident_bytes(self) -> int:
        return sum(model.resident_bytes for model in self._models)

    def start(self, state_bytes: int) -> dict[str, Fold | StatisticValue]:
        return {
            name: statistic.start(self.spec, self._knobs, state_bytes)
            for name, statistic in self._method.statistics.items()
        }

    def least_state_bytes(self) -> int:
        statistics = self._method.statistics.values()
        return sum(statistic.least_state_bytes(self._knobs) for statistic in statistics)

    def measure(self, folds: Mapping[str, Fold], tile: Tile, scratch: Scratch) -> dict[str, Any]:
        stack = _Stack(self._base, self._models, tile, scratch)
        return {name: fold.measure(stack, scratch) for name, fold in folds.items()}

    def merge(
        self, tile: Tile, index: int, values: Mapping[str, StatisticValue], scratch: Scratch
    ) -> tuple[Rows, PerModel]:
        stack = _Stack(self._base, self._models, tile, scratch)
        deltas = stack.all()
        norms = np.full(1 + len(deltas), np.nan)
        if self._base is not None:  # before the method, which may work in place
            norms[0] = sum_of_squares(stack.base())
            norms[1:] = [sum_of_squares(delta) for delta in deltas]
        found = {name: value.at(index) for name, value in values.items()}
        merged = self._checked(
            self._method.function(deltas, **self._knobs.arguments(), **found), deltas.shape[1:]
        )
        if self._base is not None:
            np.add(stack.base(), merged, out=merged)
        return merged, norms

    def _checked(self, merged: Rows, shape: tuple[int, ...]) -> Rows:
        if merged.dtype == np.float32 and merged.shape == shape:
            return merged
        raise TypeError(
            f"the method {self._method.name} returned {merged.dtype} {merged.shape}, "
            f"expected float32 {shape}"
        )

    def reads(self) -> int:
        counted = [s.most_reads(self._knobs) for s in self._method.statistics.values()]
        return 1 + max(counted, default=0)

    @property
    def once_bytes(self) -> int:
        return sum(model.once_bytes for model in self._models)

    def part_bytes(self) -> int:
        statistics = self._method.statistics.values()
        return len(self._models) * sum(statistic.part_bytes() for statistic in statistics)

    def merge_bytes(self, tile: Tile) -> int:
        base = self._base.read_bytes(tile) if self._base is not None else 0
        return base + sum(model.read_bytes(tile) for model in self._models)

    def measure_bytes(self, tile: Tile) -> int:
        measured = {
            model
            for statistic in self._method.statistics.values()
            for model in statistic.measured(self._knobs)
        }
        models = [self._models[model] for model in sorted(measured)]
        needs_base = self._base is not None and any(model.needs_base for model in models)
        base = self._base.read_bytes(tile) if self._base is not None and needs_base else 0
        return base + sum(model.read_bytes(tile) for model in models)

    def scratch_bytes(self, tile: Tile) -> int:
        rows, cols = tile.shape(self.spec)
        sources = [*self._models, *([self._base] if self._base is not None else [])]
        stored = max(source.scratch_bytes(tile) for source in sources)
        # The base, each model; one model and the collected magnitudes while measuring.
        measured = 2 if self._method.statistics else 0
        own = self._method.temporaries
        own = 1 + len(self._models) if own is None else own
        return (1 + len(self._models) + max(measured, own)) * 4 * rows * cols + stored

    def release(self) -> None:
        for model in self._models:
            model.release()
