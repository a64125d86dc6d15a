"""A source whose tiles are made once: who makes them, and that the bits are the same."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from streammerge import grid
from streammerge.arrays import Rows
from streammerge.scratch import Scratch
from streammerge.sources.spilled import Spilled
from streammerge.storage.cachedir import runs
from streammerge.storage.spill import Kind, SpillArray, SpillStore
from streammerge.words import DType, OwnStatistic, TensorSpec, Terms, Tile

SPEC = TensorSpec("up", (20, 6), DType.F32)
GRID = [Tile(0, 8), Tile(8, 16), Tile(16, 20)]


class Counted:
    """Rows that know how often they were asked for."""

    spec = SPEC
    needs_base = False
    own_statistics: tuple[OwnStatistic, ...] = ()
    resident_bytes = 12
    once_bytes = 100

    def __init__(self) -> None:
        self.asked: list[tuple[str, Tile]] = []
        self.released = 0
        self._own = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)

    def rows(self, kind: str, tile: Tile) -> Rows:
        own = self._own if kind == "weights" else self._own - np.float32(1)
        return own[tile.start : tile.stop : tile.row_step, :: tile.col_step]

    def read(self, tile: Tile, out: Rows, scratch: Scratch) -> None:
        self.asked.append(("weights", tile))
        out[...] = self.rows("weights", tile)

    def delta(self, tile: Tile, base_rows: Rows | None, out: Rows, scratch: Scratch) -> None:
        self.asked.append(("deltas", tile))
        out[...] = self.rows("deltas", tile)

    def terms(self) -> Terms:
        return Terms(self)

    def read_bytes(self, tile: Tile) -> int:
        rows, cols = tile.shape(self.spec)
        return rows * cols

    def scratch_bytes(self, tile: Tile) -> int:
        return 7

    def release(self) -> None:
        self.released += 1


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SpillStore]:
    monkeypatch.setattr(grid, "TILE_ELEMENTS", 8 * 6)
    store = SpillStore(tmp_path)
    with store.opened(tmp_path, tmp_path / "out", "f00d"):
        yield store


def ask(source: Spilled, kind: str, tile: Tile) -> Rows:
    out = np.empty(tile.shape(SPEC), np.float32)
    if kind == "weights":
        source.read(tile, out, Scratch())
    else:
        source.delta(tile, None, out, Scratch())
    return out


@pytest.mark.parametrize("kind", ["weights", "deltas"])
def test_every_tile_is_made_once(store: SpillStore, kind: Kind) -> None:
    inner = Counted()
    source = Spilled(inner, SpillArray(store, SPEC, ["a"], kind), 0)
    for _ in range(3):
        for tile in GRID:
            assert ask(source, kind, tile).tobytes() == inner.rows(kind, tile).tobytes()
    assert inner.asked == [(kind, tile) for tile in GRID]
    assert store.written_bytes == 3 * 8 * 6 * 4


@pytest.mark.parametrize("tile", [Tile(0, 20, 3, 1), Tile(0, 8, 1, 2), Tile(0, 16), Tile(4, 12)])
def test_what_is_no_tile_of_the_grid_is_made_each_time(store: SpillStore, tile: Tile) -> None:
    inner = Counted()
    source = Spilled(inner, SpillArray(store, SPEC, ["a"], "deltas"), 0)
    for _ in range(2):
        assert ask(source, "deltas", tile).tobytes() == inner.rows("deltas", tile).tobytes()
    assert len(inner.asked) == 2 and not store.written_bytes


def test_the_other_kind_is_never_mixed_up(store: SpillStore) -> None:
    inner = Counted()
    source = Spilled(inner, SpillArray(store, SPEC, ["a"], "deltas"), 0)
    for kind in ("deltas", "weights", "deltas", "weights"):
        assert ask(source, kind, GRID[0]).tobytes() == inner.rows(kind, GRID[0]).tobytes()


def test_models_of_one_array_have_places_of_their_own(store: SpillStore) -> None:
    one, other = Counted(), Counted()
    other._own += np.float32(5)
    array = SpillArray(store, SPEC, ["a", "b"], "deltas")
    sources = Spilled(one, array, 0), Spilled(other, array, 1)
    for _ in range(2):
        for source, inner in zip(sources, (one, other), strict=True):
            found = ask(source, "deltas", GRID[1])
            assert found.tobytes() == inner.rows("deltas", GRID[1]).tobytes()
    sources[0].release()
    sources[1].release()
    assert one.released == other.released == 1


def test_rows_that_were_removed_are_made_again(store: SpillStore, tmp_path: Path) -> None:
    inner = Counted()
    source = Spilled(inner, SpillArray(store, SPEC, ["a"], "deltas"), 0)
    ask(source, "deltas", GRID[0])
    (run,) = runs(tmp_path)
    shutil.rmtree(run.path)
    for _ in range(2):
        assert ask(source, "deltas", GRID[0]).tobytes() == inner.rows("deltas", GRID[0]).tobytes()
    assert len(inner.asked) == 2 and store.lost_chunks == 1


def test_it_says_that_everything_is_read_once(store: SpillStore) -> None:
    source = Spilled(Counted(), SpillArray(store, SPEC, ["a"], "deltas"), 0)
    assert source.once_bytes == 100 + 20 * 6
    assert source.read_bytes(GRID[0]) == 0
    assert source.read_bytes(Tile(0, 20, 3, 2)) == 7 * 3
    assert (source.resident_bytes, source.scratch_bytes(GRID[0])) == (12, 7)
