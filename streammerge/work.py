"""What a thread does: one item at a time, with buffers of its own.

For a tile that is four calls: the sources' reads and the method inside `merged.merge`, the cast,
the sink's write; the receipt goes back to the one thread that keeps the record.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from streammerge.arrays import RawBytes
from streammerge.device import Lanes, too_small
from streammerge.kernels.casts import narrow, not_finite
from streammerge.planning import Plan
from streammerge.scheduler import Copy, Finish, Item, Measure, Merge
from streammerge.scratch import Scratch
from streammerge.sinks.receipts import Receipt
from streammerge.spoils import Spoils, refuse_overflow
from streammerge.storage.bytesource import Files
from streammerge.words import Extent, Tile


class Sink(Protocol):
    """Where finished pieces go; both may be called in any thread."""

    def write(self, extent: Extent, tile: Tile, stored: RawBytes) -> int:
        """Take a tile's bytes for their place in the extent; returns their crc32c."""
        ...

    def copy(self, files: Files, source: Extent, extent: Extent, start: int, length: int) -> None:
        """Take a range of a stored tensor's bytes as they are."""
        ...


class Worker:
    """What the threads share: the sink, and for each its own buffers."""

    def __init__(self, plan: Plan, sink: Sink, *, keep_nan: bool = False) -> None:
        self._keep_nan = keep_nan
        self._files = plan.files
        self._spoils = Spoils(plan.inputs, plan.files)
        self._sink = sink
        self._device = plan.device
        self._lanes = Lanes(plan.device, plan.flight.threads)

    def work(self, item: Item) -> Any:
        """Do one item; its result goes back to the scheduler and the record."""
        if isinstance(item, Finish):
            return {name: fold.finish() for name, fold in item.folds.items()}
        if isinstance(item, Copy):
            return self._copy(item)
        return self._computed(item)

    def _computed(self, item: Merge | Measure) -> Any:
        """Once more where the device had no room for so many at once."""
        while True:
            most = self._lanes.most
            try:
                with self._lanes.one() as scratch:
                    if isinstance(item, Merge):
                        return self._merge(item, scratch)
                    return item.job.merged.measure(item.folds, item.tile, item.index, scratch)
            except self._device.out_of_memory as error:
                if not self._lanes.fewer(most):
                    raise too_small(self._device) from error

    def _merge(self, item: Merge, scratch: Scratch) -> Receipt:
        rows, norms = item.job.merge(item.tile, item.index, item.values, scratch)
        if not self._keep_nan:
            self._spoils.refuse_model(item, norms)
        target = item.job.target
        nbytes = math.prod(rows.shape) * target.spec.dtype.itemsize
        stored = scratch.array("output", (nbytes,), np.uint8)
        spoiled = narrow(rows, target.spec.dtype, stored)
        if spoiled:
            self._refuse(item, spoiled, not_finite(rows), scratch)
        crc = self._sink.write(target, item.tile, stored)
        offset = item.tile.start * target.spec.cols * target.spec.dtype.itemsize
        return Receipt(
            *_place(item, offset, stored.nbytes),
            crc32c=crc,
            models=item.job.models,
            norms=tuple(norms.tolist()),
        )

    def _refuse(self, item: Merge, spoiled: int, in_float32: int, scratch: Scratch) -> None:
        """Values that are not finite, unless they are to be kept; those too large for the dtype."""
        if in_float32 and not self._keep_nan:
            self._spoils.refuse_rows(item, in_float32, scratch)
        if spoiled > in_float32:
            refuse_overflow(item, spoiled - in_float32)

    def _copy(self, item: Copy) -> Receipt:
        source, target = item.job.source, item.job.target
        self._sink.copy(self._files, source, target, item.start, item.length)
        origin = f"{Path(source.path).name} at {source.offset + item.start}"
        place = _place(item, item.start, item.length)
        return Receipt(*place, crc32c=None, copied_from=origin)


def _place(item: Merge | Copy, offset: int, nbytes: int) -> tuple[str, str, int, int, int, int]:
    """What a receipt says first: tensor, shard, piece, of how many, where, how many bytes."""
    target = item.job.target
    where = target.offset + offset
    return target.spec.name, target.path, item.index, item.pieces, where, nbytes
