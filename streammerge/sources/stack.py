"""The models of one tile, as statistics and methods look at them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from streammerge.arrays import Deltas, Rows
from streammerge.kernels.product import gram
from streammerge.scratch import Scratch
from streammerge.words import Source, Tile

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Stack:
    """The deltas of a tile, read from their sources; see `DeltaStack`.

    With `keep`, a delta that was asked for once is kept for the next who asks. `gram` forms inner
    products where there is a way without the rows.
    """

    def __init__(
        self,
        base: Source | None,
        models: Sequence[Source],
        tile: Tile,
        index: int,
        scratch: Scratch,
        *,
        keep: bool = False,
        gram: Callable[[], NDArray[np.float64]] | None = None,
    ) -> None:
        self.index = index
        self._base = base
        self._models = models
        self._tile = tile
        self._scratch = scratch
        self._gram = gram
        self._kept: dict[int, Rows] | None = {} if keep else None
        self._base_rows: Rows | None = None

    def base(self) -> Rows:
        """The base's rows, read once."""
        if self._base_rows is None:
            assert self._base is not None
            self._base_rows = self._scratch.rows("base", self._shape)
            self._base.read(self._tile, self._base_rows, self._scratch)
        return self._base_rows

    def one(self, model: int) -> Rows:
        if self._kept is None:
            out: Rows = self._scratch.rows("rows", self._shape)
            self._fill(model, out)
            return out
        if model not in self._kept:
            self._kept[model] = self._buffers()[model]
            self._fill(model, self._kept[model])
        return self._kept[model]

    def all(self) -> Deltas:
        if self._kept:
            self._kept.clear()  # the caller may change what we hand out
        stack = self._buffers()
        for model, out in enumerate(stack):
            self._fill(model, out)
        return stack

    def gram(self) -> NDArray[np.float64]:
        return self._gram() if self._gram else gram(self.all().reshape(len(self._models), -1))

    def _buffers(self) -> Deltas:
        shape = (len(self._models), *self._shape)
        stack: Deltas = self._scratch.rows("deltas", shape)
        return stack

    def _fill(self, model: int, out: Rows) -> None:
        """One model's delta, or its own rows where no base is subtracted."""
        source = self._models[model]
        if self._base is None:
            source.read(self._tile, out, self._scratch)
            return
        base = self.base() if source.needs_base else None
        source.delta(self._tile, base, out, self._scratch)

    @property
    def _shape(self) -> tuple[int, int]:
        return self._tile.shape(self._models[0].spec)
