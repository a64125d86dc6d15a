"""What every `Merged` owes: the merge of one tensor, tile by tile, in any order, within its word.

A subclass gives the merge and the answer; `run_merged` drives it as the engine would.
"""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streammerge import grid
from streammerge.scratch import Scratch
from streammerge.storage.bytesource import Files
from streammerge.words import Fold, Merged, StatisticValue, Tile
from tests.oracles.dense import Answer, check

# What Python's own small objects take; far less than one buffer of the tiles that are measured.
OBJECT_BYTES = 24 << 10


@dataclass
class Peak:
    """The most that calls held beyond what was there before them."""

    nbytes: int = 0
    _held: int = field(default=0, repr=False)

    @contextmanager
    def watch(self, scratch: Scratch) -> Iterator[None]:
        """Count the buffers of the scratch as the call's own, however old they are."""
        held = tracemalloc.get_traced_memory()[0] - scratch.nbytes
        tracemalloc.reset_peak()
        yield
        self.nbytes = max(self.nbytes, tracemalloc.get_traced_memory()[1] - held)


def settle(
    merged: Merged, scratch: Scratch, *, state_bytes: int = 1 << 20, peak: Peak | None = None
) -> dict[str, StatisticValue]:
    """All statistics of a merge, tile by tile in grid order."""
    values: dict[str, StatisticValue] = {}
    while found := merged.start(state_bytes, values):
        for name, one in found.items():
            values[name] = _finished(merged, name, one, scratch, peak)
    return values


def _finished(
    merged: Merged, name: str, first: Fold | StatisticValue, scratch: Scratch, peak: Peak | None
) -> StatisticValue:
    found = first
    while not isinstance(found, StatisticValue):
        for index, tile in enumerate(found.wants(grid.tiles(merged.measured))):
            with peak.watch(scratch) if peak else _unwatched():
                part = merged.measure({name: found}, tile, index, scratch)[name]
            found.absorb(index, part)
            part = None
        found = found.finish()
    return found


@contextmanager
def _unwatched() -> Iterator[None]:
    yield


def run_merged(merged: Merged, *, seed: int | None = None) -> Any:
    """The merged tensor, float32 of its shape; tiles in grid order, or in one drawn from a seed."""
    scratch = Scratch()
    values = settle(merged, scratch)
    out = np.full((merged.spec.rows, merged.spec.cols), np.nan, np.float32)
    order = list(enumerate(grid.tiles(merged.spec)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    for index, tile in order:
        rows, _ = merged.merge(tile, index, values, scratch)
        out[tile.start : tile.stop] = rows
    merged.release()
    return out.reshape(merged.spec.shape)


class MergedContract:
    """Inherit, and say what is merged and what must come of it."""

    def merged(self, folder: Path) -> tuple[Merged, Files]:
        raise NotImplementedError

    def answer(self) -> Answer:
        """Of the merge that `merged` made last."""
        raise NotImplementedError

    @pytest.fixture
    def made(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Merged, Files]:
        monkeypatch.setattr(grid, "TILE_ELEMENTS", 256)
        return self.merged(tmp_path)

    def test_tiles_stacked_are_the_answer(self, made: tuple[Merged, Files]) -> None:
        merged, _ = made
        assert len(grid.tiles(merged.spec)) > 3
        check("stacked", run_merged(merged).astype(np.float64), "F32", self.answer())

    @pytest.mark.parametrize("seed", range(3))
    def test_any_order_of_tiles_gives_the_same_bits(
        self, made: tuple[Merged, Files], seed: int
    ) -> None:
        merged, _ = made
        in_order = run_merged(merged).tobytes()
        assert run_merged(merged, seed=seed).tobytes() == in_order

    def test_norms_are_those_of_the_base_and_of_each_model(
        self, made: tuple[Merged, Files]
    ) -> None:
        merged, _ = made
        scratch = Scratch()
        values = settle(merged, scratch)
        tiles = enumerate(grid.tiles(merged.spec))
        norms = [merged.merge(tile, i, values, scratch)[1].copy() for i, tile in tiles]
        np.testing.assert_allclose(np.sum(norms, axis=0), self.squared_norms(), rtol=1e-5)

    def squared_norms(self) -> list[float]:
        """Of the base, then of each model's own update; NaN where there is no base."""
        raise NotImplementedError

    def test_it_reads_what_it_says(self, made: tuple[Merged, Files]) -> None:
        merged, files = made
        scratch = Scratch()
        tiles = grid.tiles(merged.spec)
        values = settle(merged, scratch)
        merged.release()
        merged.merge(tiles[0], 0, values, scratch)
        for index, tile in enumerate(tiles):
            before = files.read_bytes
            merged.merge(tile, index, values, scratch)
            assert files.read_bytes - before == merged.merge_bytes(tile)
        before = files.read_bytes
        merged.release()
        merged.merge(tiles[0], 0, values, scratch)
        assert files.read_bytes - before == merged.once_bytes + merged.merge_bytes(tiles[0])

    def test_it_measures_what_it_says(self, made: tuple[Merged, Files]) -> None:
        merged, files = made
        scratch = Scratch()
        tiles = grid.tiles(merged.spec)
        merged.merge(tiles[0], 0, settle(merged, scratch), scratch)  # what is held is loaded
        for name, fold in merged.start(1 << 20, {}).items():
            if isinstance(fold, StatisticValue):
                continue
            for index, tile in enumerate(fold.wants(grid.tiles(merged.measured))):
                before = files.read_bytes
                merged.measure({name: fold}, tile, index, scratch)
                assert files.read_bytes - before == merged.measure_bytes(tile, [name])

    def test_its_working_memory_is_within_its_word(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With tiles whose buffers are far larger than Python's own objects."""
        monkeypatch.setattr(grid, "TILE_ELEMENTS", 1 << 16)
        merged, _ = self.large(tmp_path)
        assert_within_its_word(merged)

    def large(self, folder: Path) -> tuple[Merged, Files]:
        """A merge of at least two tiles of 2^16 elements."""
        raise NotImplementedError


def assert_within_its_word(merged: Merged) -> None:
    """Measure and merge all tiles, and hold the peak of each call to `scratch_bytes`."""
    tiles = grid.tiles(merged.spec)
    warm = Scratch()
    merged.merge(tiles[0], 0, settle(merged, warm), warm)  # loads the factors that are held
    del warm
    samples = _sampled(merged)
    allowed = max(merged.scratch_bytes(tile) for tile in [*tiles, *samples])
    scratch = Scratch()
    tracemalloc.start()
    try:
        measuring, merging = Peak(), Peak()
        values = settle(merged, scratch, peak=measuring)
        for index, tile in enumerate(tiles):
            with merging.watch(scratch):
                merged.merge(tile, index, values, scratch)
    finally:
        tracemalloc.stop()
    assert scratch.nbytes <= allowed + OBJECT_BYTES, "buffers that are kept"
    assert merging.nbytes <= allowed + OBJECT_BYTES, "merging"
    assert measuring.nbytes <= allowed + merged.part_bytes() + OBJECT_BYTES, "measuring"


def _sampled(merged: Merged) -> list[Tile]:
    tiles = grid.tiles(merged.measured)
    folds = [one for one in merged.start(0, {}).values() if not isinstance(one, StatisticValue)]
    return [tile for fold in folds for tile in fold.wants(tiles)]
