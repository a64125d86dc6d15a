"""What every adapter owes: an update of the stored tensor's shape, the same in any cut of rows."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from streammerge.scratch import Scratch
from streammerge.sources.low_rank import Product
from streammerge.storage.bytesource import Files
from streammerge.words import Factors, Tile
from tests.oracles.dense import UNIT, Exact, Single


class AdapterContract:
    """Inherit, and say which adapter it is and what it adds, in float64."""

    shape: ClassVar[tuple[int, int]] = (23, 14)

    def make(self, folder: Path) -> tuple[Factors, Files]:
        """An adapter on a tensor of `shape`."""
        raise NotImplementedError

    def update(self) -> tuple[Exact, Exact]:
        """Of the adapter made last: the update, and the magnitudes of its terms."""
        raise NotImplementedError

    @pytest.fixture
    def made(self, tmp_path: Path) -> tuple[Factors, Files]:
        return self.make(tmp_path)

    def band(self, factors: Factors, files: Files, tile: Tile) -> Single:
        out = np.full((tile.stop - tile.start, self.shape[1]), np.nan, np.float32)
        Product(files, [factors]).rows(tile, None, out, Scratch())
        return out

    def test_its_factors_fit_the_stored_tensor(self, made: tuple[Factors, Files]) -> None:
        factors, _ = made
        assert (factors.left.rows, factors.right.cols) == self.shape
        assert factors.left.cols == factors.right.rows == factors.rank

    def test_the_whole_is_the_product_in_float64(self, made: tuple[Factors, Files]) -> None:
        factors, files = made
        whole = self.band(factors, files, Tile(0, self.shape[0]))
        value, size = self.update()
        assert np.all(np.abs(whole - value) <= (factors.rank + 2) * UNIT * size)

    @pytest.mark.parametrize("step", [1, 4, 22])
    def test_tiles_stacked_are_the_whole(self, made: tuple[Factors, Files], step: int) -> None:
        factors, files = made
        rows = self.shape[0]
        tiles = [Tile(i, min(i + step, rows)) for i in range(0, rows, step)]
        stacked = np.concatenate([self.band(factors, files, tile) for tile in tiles])
        value, size = self.update()
        assert np.all(np.abs(stacked - value) <= (factors.rank + 2) * UNIT * size)

    def test_a_tile_twice_is_the_same_bits(self, made: tuple[Factors, Files]) -> None:
        factors, files = made
        tile = Tile(5, 17)
        first = self.band(factors, files, tile)
        assert self.band(factors, files, tile).tobytes() == first.tobytes()
