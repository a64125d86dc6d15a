"""A merge whose sources must be given something before they can hand out rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from streammerge.arrays import PerModel, Rows
from streammerge.scratch import Scratch
from streammerge.sources.stack import Stack
from streammerge.words import Fold, Merged, OwnStatistic, Source, StatisticValue, TensorSpec, Tile


class Prepared:
    """Another merge, preceded by one read for the sources' own statistics.

    These go by names that no parameter of a method can have: `source 0`, `source 1`, ...
    """

    def __init__(self, merged: Merged, sources: Iterable[Source]) -> None:
        self.merged = merged
        wanted = [one for source in sources for one in source.own_statistics]
        self._wanted: dict[str, OwnStatistic] = {f"source {i}": one for i, one in enumerate(wanted)}

    @property
    def spec(self) -> TensorSpec:
        return self.merged.spec

    @property
    def measured(self) -> TensorSpec:
        return self.merged.measured

    @property
    def resident_bytes(self) -> int:
        return self.merged.resident_bytes

    def start(
        self, state_bytes: int, values: Mapping[str, StatisticValue]
    ) -> dict[str, Fold | StatisticValue]:
        """The sources' folds; once their values are found, hands them out and goes on."""
        missing = [name for name in self._wanted if name not in values]
        if missing:
            return {name: self._wanted[name].start() for name in missing}
        for name, one in self._wanted.items():
            one.take(values[name])
        return self.merged.start(state_bytes, self._of_method(values))

    def state_bytes(self) -> tuple[int, int]:
        own = sum(one.state_bytes for one in self._wanted.values())
        least, most = self.merged.state_bytes()
        return own + least, own + most

    def measure(
        self, folds: Mapping[str, Fold], tile: Tile, index: int, scratch: Scratch
    ) -> dict[str, Any]:
        others = {name: fold for name, fold in folds.items() if name not in self._wanted}
        if others:
            return self.merged.measure(others, tile, index, scratch)
        return {
            name: fold.measure(
                Stack(None, [self._wanted[name].rows], tile, index, scratch), scratch
            )
            for name, fold in folds.items()
        }

    def merge(
        self, tile: Tile, index: int, values: Mapping[str, StatisticValue], scratch: Scratch
    ) -> tuple[Rows, PerModel]:
        return self.merged.merge(tile, index, self._of_method(values), scratch)

    def _of_method(self, values: Mapping[str, StatisticValue]) -> dict[str, StatisticValue]:
        return {name: value for name, value in values.items() if name not in self._wanted}

    def waves(self) -> Sequence[Sequence[str]]:
        return [list(self._wanted), *self.merged.waves()]

    def merge_bytes(self, tile: Tile) -> int:
        return self.merged.merge_bytes(tile)

    def measure_bytes(self, tile: Tile, names: Iterable[str]) -> int:
        own = [self._wanted[name].rows for name in names if name in self._wanted]
        others = [name for name in names if name not in self._wanted]
        read = sum(rows.read_bytes(tile) for rows in own)
        return read + (self.merged.measure_bytes(tile, others) if others else 0)

    def part_bytes(self) -> int:
        own = sum(one.part_bytes for one in self._wanted.values())
        return max(own, self.merged.part_bytes())

    @property
    def once_bytes(self) -> int:
        return self.merged.once_bytes

    def scratch_bytes(self, tile: Tile) -> int:
        """Buffers are kept from wave to wave, so that of the measured rows comes on top."""
        rows, cols = tile.shape(self.spec)
        return 4 * rows * cols + self.merged.scratch_bytes(tile)

    def release(self) -> None:
        self.merged.release()
