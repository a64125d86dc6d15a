"""A finished shard written again with fewer rows and columns of some of its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from streammerge.arrays import PerModel, Rows
from streammerge.kernels.casts import widen
from streammerge.scratch import Scratch
from streammerge.sinks.receipts import Receipt, Sums
from streammerge.storage.bytesource import Files
from streammerge.storage.checksum import checksum
from streammerge.storage.shard import ShardFile, ShardLayout
from streammerge.words import Extent, TensorSpec, Tile

# Read, and written, at once.
_BLOCK_BYTES = 4 << 20


def cut(files: Files, stored: Mapping[str, Extent], folder: Path, layout: ShardLayout) -> Sums:
    """Write the shard of `layout` into a folder, made durable; returns its checksums.

    Of each tensor it takes the first rows and columns that its shape has of the one `stored` under
    the same name.
    """
    shard, sums = ShardFile(folder, layout), Sums([layout])
    try:
        for name, target in layout.extents.items():
            if target.spec.numel:
                _cut_tensor(files, stored[name], target, shard, sums)
        shard.sync()
    finally:
        shard.close()
    return sums


def _cut_tensor(files: Files, source: Extent, target: Extent, shard: ShardFile, sums: Sums) -> None:
    scratch = Scratch()
    row_bytes = target.spec.cols * target.spec.dtype.itemsize
    blocks = list(_blocks(source.spec, target.spec.rows))
    for index, tile in enumerate(blocks):
        with files.tile(source, tile, scratch) as held:
            rows = held.reshape(tile.stop - tile.start, -1)
            kept = np.ascontiguousarray(rows[:, :row_bytes]).reshape(-1)
        offset = target.offset + tile.start * row_bytes
        shard.write(offset, kept)
        crc, name = checksum(kept), target.spec.name
        sums.add(Receipt(name, target.path, index, len(blocks), offset, kept.nbytes, crc))


def column_squares(files: Files, stored: Extent) -> PerModel:
    """Squared norms of a tensor's columns, `[cols]`, in float64."""
    scratch, total = Scratch(), np.zeros(stored.spec.cols)
    for tile in _blocks(stored.spec, stored.spec.rows):
        rows = _widened(files, stored, tile, scratch)
        total += np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
    return total


def row_squares(files: Files, stored: Extent) -> PerModel:
    """Squared norms of a tensor's rows, `[rows]`, in float64."""
    scratch, found = Scratch(), []
    for tile in _blocks(stored.spec, stored.spec.rows):
        rows = _widened(files, stored, tile, scratch)
        found.append(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
    return np.concatenate(found)


def _widened(files: Files, stored: Extent, tile: Tile, scratch: Scratch) -> Rows:
    rows = scratch.rows("widened", tile.shape(stored.spec))
    with files.tile(stored, tile, scratch) as held:
        widen(held, stored.spec.dtype, rows)
    return rows


def _blocks(spec: TensorSpec, rows: int) -> Iterator[Tile]:
    """The first rows of a tensor, some at a time."""
    step = max(1, _BLOCK_BYTES // (spec.cols * spec.dtype.itemsize))
    for start in range(0, rows, step):
        yield Tile(start, min(start + step, rows))
