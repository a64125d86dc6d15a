"""A stored tensor times a number, added as it is."""

from __future__ import annotations

import numpy as np

from streammerge.arrays import Rows
from streammerge.scratch import Scratch
from streammerge.sources.dense import Dense
from streammerge.storage.bytesource import Files
from streammerge.words import Addition, Factors, OwnStatistic, Tile


class Scaled:
    """`float32(scale) * stored`: a change that depends on nothing else; see `adapted.Change`."""

    needs_rows = False
    own_statistics: tuple[OwnStatistic, ...] = ()
    factors: tuple[Factors, ...] = ()
    resident_bytes = 0
    once_bytes = 0

    def __init__(self, files: Files, addition: Addition) -> None:
        self._scale = np.float32(addition.scale)
        self._stored = Dense(files, addition.extent)

    def rows(self, tile: Tile, own: Rows | None, out: Rows, scratch: Scratch) -> None:
        self._stored.read(tile, out, scratch)
        out *= self._scale

    def read_bytes(self, tile: Tile) -> int:
        return self._stored.read_bytes(tile)

    def scratch_bytes(self, tile: Tile) -> int:
        return self._stored.scratch_bytes(tile)

    def release(self) -> None:
        """Nothing is held."""
