"""What a thread does: one item at a time, with buffers of its own.

For a tile that is four calls: the sources' reads and the method inside `merged.merge`, the cast,
the sink's write; the receipt goes back to the one thread that keeps the record.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from streammerge.arrays import PerModel, RawBytes
from streammerge.errors import BadInput
from streammerge.kernels.casts import narrow, not_finite
from streammerge.memory import Scratch
from streammerge.planning import Plan
from streammerge.scheduler import Copy, Finish, Item, Measure, Merge
from streammerge.sinks.shards import Receipt
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

    def __init__(self, plan: Plan, sink: Sink) -> None:
        self._files = plan.files
        self._names = [model.name for model in plan.inputs.models]
        self._sink = sink
        self._local = threading.local()

    def work(self, item: Item) -> Any:
        """Do one item; its result goes back to the scheduler and the record."""
        if isinstance(item, Merge):
            return self._merge(item)
        if isinstance(item, Measure):
            return self._measure(item)
        if isinstance(item, Finish):
            return {name: fold.finish() for name, fold in item.folds.items()}
        return self._copy(item)

    def _measure(self, item: Measure) -> dict[str, Any]:
        return item.job.merged.measure(item.folds, item.tile, item.index, self._scratch())

    def _merge(self, item: Merge) -> tuple[Receipt, PerModel]:
        scratch = self._scratch()
        rows, norms = item.job.merge(item.tile, item.index, item.values, scratch)
        _refuse_spoiled_model(item, norms, self._names)
        target = item.job.target
        stored = scratch.array("output", (rows.size * target.spec.dtype.itemsize,), np.uint8)
        if narrow(rows, target.spec.dtype, stored):
            _refuse_not_finite(item, not_finite(rows))
        crc = self._sink.write(target, item.tile, stored)
        name = target.spec.name
        receipt = Receipt(name, target.path, item.index, item.pieces, stored.nbytes, crc)
        return receipt, norms

    def _copy(self, item: Copy) -> Receipt:
        source, target = item.job.source, item.job.target
        self._sink.copy(self._files, source, target, item.start, item.length)
        origin = f"{Path(source.path).name} at {source.offset + item.start}"
        place = (target.spec.name, target.path, item.index, item.pieces, item.length)
        return Receipt(*place, crc32c=None, copied_from=origin)

    def _scratch(self) -> Scratch:
        if not hasattr(self._local, "scratch"):
            self._local.scratch = Scratch()
        scratch: Scratch = self._local.scratch
        return scratch


def _rows_of(item: Merge) -> str:
    return f"{item.job.target.spec.name}, rows {item.tile.start} to {item.tile.stop - 1}"


def _refuse_spoiled_model(item: Merge, norms: PerModel, names: Sequence[str]) -> None:
    """By its norm, which tells whose the values are where the result could not."""
    if not np.isfinite(norms[0]):
        return  # no base to compare with, or one that spoils the result itself
    for model, squared in zip(item.job.models, norms[1:], strict=False):  # none in a mere cast
        if not np.isfinite(squared):
            raise BadInput(
                f"{names[model]} has values that are NaN or infinite",
                where=_rows_of(item),
                remedy="fetch or train that model again, or leave it out",
            )


def _refuse_not_finite(item: Merge, in_float32: int) -> None:
    spec, place = item.job.target.spec, _rows_of(item)
    if in_float32:
        raise BadInput(
            f"the merge has {in_float32} values that are NaN or infinite",
            where=place,
            remedy="look for the input that holds them with `streammerge inspect`",
        )
    raise BadInput(
        f"the merge has values that are too large for {spec.dtype.label}",
        where=place,
        remedy="choose out_dtype: bfloat16 or float32",
    )
