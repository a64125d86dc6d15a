"""A merge by a method that computes rows: its statistics first, then tile by tile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from streammerge.arrays import PerModel, Rows
from streammerge.declarations import Knobs, MethodSpec
from streammerge.errors import MethodError
from streammerge.kernels.faces import on_host
from streammerge.kernels.weighted import add, sum_of_squares
from streammerge.scratch import Scratch
from streammerge.sources.needs import Needs
from streammerge.sources.stack import Stack
from streammerge.words import Fold, Source, StatisticValue, TensorSpec, Tile


class Applied:
    """`base + method(deltas)`, or `method(weights)`, for the models that touch the tensor.

    `update_only` leaves the base out of the sum.
    """

    def __init__(
        self,
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
        self._models = tuple(models)
        self._needs = Needs(method, knobs, self.spec)

    @property
    def spec(self) -> TensorSpec:
        return self._models[0].spec

    @property
    def measured(self) -> TensorSpec:
        return self.spec

    @property
    def resident_bytes(self) -> int:
        return sum(model.resident_bytes for model in self._models)

    def start(
        self, state_bytes: int, values: Mapping[str, StatisticValue]
    ) -> dict[str, Fold | StatisticValue]:
        return self._needs.start(state_bytes, values)

    def state_bytes(self) -> tuple[int, int]:
        return self._needs.state_bytes()

    def measure(
        self, folds: Mapping[str, Fold], tile: Tile, index: int, scratch: Scratch
    ) -> dict[str, Any]:
        keep = len(folds) > 1
        stack = Stack(self._base, self._models, tile, index, scratch, keep=keep)
        return self._needs.measure(folds, stack, scratch)

    def merge(
        self, tile: Tile, index: int, values: Mapping[str, StatisticValue], scratch: Scratch
    ) -> tuple[Rows, PerModel]:
        stack = Stack(self._base, self._models, tile, index, scratch)
        deltas = stack.all()
        norms = np.full(1 + len(deltas), np.nan)
        if self._base is not None:  # before the method, which may work in place
            norms[0] = sum_of_squares(stack.base())
            norms[1:] = [sum_of_squares(delta) for delta in deltas]
        shape = deltas.shape[1:]
        arguments = self._knobs.arguments(of_all=False) | self._needs.found(values, index)
        if self._method.wants_base:
            arguments["base"] = stack.base()
        merged = self._checked(self._method.function(deltas, **arguments), shape)
        if self._base is not None and not self._update_only:
            add(stack.base(), merged, merged)
        return merged, norms

    def _checked(self, merged: Rows, shape: tuple[int, ...]) -> Rows:
        found = np.asarray(merged) if on_host(merged) else merged
        if str(found.dtype).removeprefix("torch.") == "float32" and found.shape == shape:
            return merged
        raise MethodError(
            f"the merge method {self._method.name} returns something else than rows",
            found=f"{type(merged).__name__} of {found.dtype} {found.shape}",
            expected=f"float32 {shape}",
            remedy="return rows of the shape of one model's, in float32",
        )

    def waves(self) -> Sequence[Sequence[str]]:
        return self._needs.waves()

    @property
    def once_bytes(self) -> int:
        return sum(model.once_bytes for model in self._models)

    def part_bytes(self) -> int:
        return self._needs.part_bytes()

    def merge_bytes(self, tile: Tile) -> int:
        base = self._base.read_bytes(tile) if self._base is not None else 0
        return base + sum(model.read_bytes(tile) for model in self._models)

    def measure_bytes(self, tile: Tile, names: Sequence[str]) -> int:
        models = [self._models[model] for model in self._needs.measured(names)]
        base = self._measured_base(names)
        read = sum(model.read_bytes(tile) for model in models)
        return read + (base.read_bytes(tile) if base is not None else 0)

    def _measured_base(self, names: Sequence[str]) -> Source | None:
        """The base, where it is read to measure for some statistics."""
        models = [self._models[model] for model in self._needs.measured(names)]
        needed = any(model.needs_base for model in models) or self._needs.reads_base(names)
        return self._base if needed else None

    def scratch_bytes(self, tile: Tile) -> int:
        rows, cols = tile.shape(self.spec)
        sources = [*self._models, *([self._base] if self._base is not None else [])]
        stored = max(source.scratch_bytes(tile) for source in sources)
        held = tiles_held(self._method, self._needs, len(self._models))
        if tile.thinned:
            held = self._tiles_sampled()
        return held * 4 * rows * cols + stored

    def _tiles_sampled(self) -> int:
        """As `tiles_held`, of a sample, which is measured and never merged."""
        names = [name for wave in self.waves() for name in wave]
        base = int(self._measured_base(names) is not None)
        stack = len(self._models) if self._needs.stacks() else 0
        return base + stack + sum(self._needs.buffers())

    def release(self) -> None:
        for model in self._models:
            model.release()


def tiles_held(method: MethodSpec, needs: Needs, models: int) -> int:
    """How many float32 tiles a thread holds: the base, the stack, and what is made of them."""
    own = 1 + models if method.temporaries is None else method.temporaries
    kept, passing = needs.buffers()
    return 1 + models + kept + max(passing, own)
