"""A stored tensor of a full model."""

from __future__ import annotations

from streammerge.arrays import Rows
from streammerge.kernels.casts import widen
from streammerge.kernels.weighted import subtract
from streammerge.scratch import Scratch
from streammerge.storage.bytesource import Files
from streammerge.words import Extent, OwnStatistic, TensorSpec, Terms, Tile


class Dense:
    """Rows as they lie in a safetensors file, widened to float32."""

    needs_base = True
    own_statistics: tuple[OwnStatistic, ...] = ()
    resident_bytes = 0
    once_bytes = 0

    def __init__(self, files: Files, extent: Extent) -> None:
        self._files = files
        self.extent = extent

    @property
    def spec(self) -> TensorSpec:
        return self.extent.spec

    def read(self, tile: Tile, out: Rows, scratch: Scratch) -> None:
        with self._files.tile(self.extent, tile, scratch) as stored:
            widen(stored, self.spec.dtype, out)

    def delta(self, tile: Tile, base_rows: Rows | None, out: Rows, scratch: Scratch) -> None:
        """The rows minus the base's, in float32: exact when they are within a factor of two."""
        if base_rows is None:
            raise ValueError("a full model's delta needs the base's rows")
        self.read(tile, out, scratch)
        subtract(out, base_rows, out)

    def terms(self) -> Terms:
        return Terms(self)

    def read_bytes(self, tile: Tile) -> int:
        rows, _ = tile.shape(self.spec)
        return rows * self.spec.cols * self.spec.dtype.itemsize

    def scratch_bytes(self, tile: Tile) -> int:
        """The stored bytes, whether mapped or read; of a thinned tile, what is kept and a row."""
        rows, cols = tile.shape(self.spec)
        size = self.spec.dtype.itemsize
        whole_row = self.spec.cols * size if tile.thinned else 0
        return rows * cols * size + whole_row

    def release(self) -> None:
        """Nothing is held."""
