"""A merge that needs no statistics: rows come from a maker, one read of everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from streammerge.arrays import PerModel, Rows
from streammerge.scratch import Scratch
from streammerge.words import Fold, StatisticValue, TensorSpec, Tile


class Maker(Protocol):
    """What makes the rows of one output tensor."""

    @property
    def spec(self) -> TensorSpec: ...

    @property
    def resident_bytes(self) -> int:
        """What is held, or needed for a while to make it, from the first tile until `release`."""
        ...

    @property
    def once_bytes(self) -> int: ...

    def rows(self, tile: Tile, scratch: Scratch) -> tuple[Rows, PerModel]:
        """See `Merged.merge`."""
        ...

    def read_bytes(self, tile: Tile) -> int: ...

    def scratch_bytes(self, tile: Tile) -> int: ...

    def release(self) -> None: ...


class Direct:
    """A maker as a merge; see `Merged`."""

    def __init__(self, maker: Maker) -> None:
        self._maker = maker

    @property
    def spec(self) -> TensorSpec:
        return self._maker.spec

    @property
    def measured(self) -> TensorSpec:
        return self.spec

    @property
    def resident_bytes(self) -> int:
        return self._maker.resident_bytes

    @property
    def once_bytes(self) -> int:
        return self._maker.once_bytes

    def start(
        self, state_bytes: int, values: Mapping[str, StatisticValue]
    ) -> dict[str, Fold | StatisticValue]:
        return {}

    def state_bytes(self) -> tuple[int, int]:
        return 0, 0

    def measure(
        self, folds: Mapping[str, Fold], tile: Tile, index: int, scratch: Scratch
    ) -> dict[str, Any]:
        return {}

    def merge(
        self, tile: Tile, index: int, values: Mapping[str, StatisticValue], scratch: Scratch
    ) -> tuple[Rows, PerModel]:
        return self._maker.rows(tile, scratch)

    def waves(self) -> Sequence[Sequence[str]]:
        return ()

    def merge_bytes(self, tile: Tile) -> int:
        return self._maker.read_bytes(tile)

    def measure_bytes(self, tile: Tile, names: Sequence[str]) -> int:
        return 0

    def part_bytes(self) -> int:
        return 0

    def scratch_bytes(self, tile: Tile) -> int:
        return self._maker.scratch_bytes(tile)

    def release(self) -> None:
        self._maker.release()
