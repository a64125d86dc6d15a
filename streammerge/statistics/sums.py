"""Sums over a tensor of what a function makes of the models, in float64 and in grid order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streammerge.declarations import Buffers, Declared, Knobs
from streammerge.scratch import Scratch
from streammerge.statistics.given import Same
from streammerge.statistics.of_stack import OfStack
from streammerge.words import DeltaStack, Fold, StatisticValue, TensorSpec, Tile

if TYPE_CHECKING:
    from streammerge.arrays import Deltas, PerModel


@dataclass(frozen=True, slots=True)
class Sums:
    """Declares the sum of `of(deltas, ...)`, float64 `[width, models]` or `[models]` of a tile.

    `temporaries` are the buffers of a tile that `of` allocates.
    """

    of: Callable[..., PerModel]
    width: int = 1
    temporaries: int = 0

    def check(self, declared: Declared) -> None:
        OfStack(self.of).check(declared)

    def waits_for(self) -> Sequence[str]:
        return OfStack(self.of).names

    def measured(self, knobs: Knobs) -> Sequence[int]:
        return range(len(knobs.touching))

    def reads_base(self, knobs: Knobs) -> bool:
        return OfStack(self.of).wants_base

    def reads(self, knobs: Knobs) -> int:
        return 1

    def state_bytes(self, spec: TensorSpec, knobs: Knobs) -> tuple[int, int]:
        return (self.part_bytes(spec, knobs),) * 2

    def part_bytes(self, spec: TensorSpec, knobs: Knobs) -> int:
        return 8 * self.width * len(knobs.touching)

    def buffers(self, knobs: Knobs) -> Buffers:
        return Buffers(passing=self.temporaries)

    def by_products(self, knobs: Knobs) -> bool:
        return False

    def start(
        self,
        spec: TensorSpec,
        knobs: Knobs,
        values: Mapping[str, StatisticValue],
        state_bytes: int,
    ) -> Fold | StatisticValue:
        return Summing(OfStack(self.of).bound(knobs, values))


@dataclass(slots=True)
class Summing:
    """One read; `then` makes the value of the total."""

    of: Callable[[DeltaStack, Deltas], PerModel]
    then: Callable[[PerModel], Any] | None = None
    total: PerModel | None = None

    def wants(self, grid: Sequence[Tile]) -> Sequence[Tile]:
        return grid

    def measure(self, stack: DeltaStack, scratch: Scratch) -> PerModel:
        return self.of(stack, stack.all())

    def absorb(self, tile_index: int, part: PerModel) -> None:
        self.total = part if self.total is None else self.total + part

    def finish(self) -> StatisticValue:
        assert self.total is not None
        return Same(self.then(self.total) if self.then else self.total)
