"""A model with an adapter applied: its own rows plus what the adapter changes about them."""

from __future__ import annotations

from typing import Protocol

from streammerge.arrays import Rows
from streammerge.kernels.weighted import add, subtract
from streammerge.scratch import Scratch
from streammerge.words import Factors, OwnStatistic, Source, TensorSpec, Terms, Tile


class Change(Protocol):
    """What an adapter adds to a tensor, tile by tile: a product, a stored tensor, ..."""

    @property
    def needs_rows(self) -> bool:
        """Whether it depends on the rows that it is added to."""
        ...

    @property
    def own_statistics(self) -> tuple[OwnStatistic, ...]:
        """What it must be given first."""
        ...

    @property
    def factors(self) -> tuple[Factors, ...]:
        """The products that it is the sum of; empty where it is no such sum."""
        ...

    @property
    def resident_bytes(self) -> int: ...

    @property
    def once_bytes(self) -> int: ...

    def rows(self, tile: Tile, own: Rows | None, out: Rows, scratch: Scratch) -> None:
        """The change of a tile, exactly: never the changed rows less the rows."""
        ...

    def read_bytes(self, tile: Tile) -> int:
        """How many bytes of files `rows` reads, what is read once not counted."""
        ...

    def scratch_bytes(self, tile: Tile) -> int: ...

    def release(self) -> None: ...


class Adapted:
    """`rows + change`.

    Where `rows` is the merge's own base, the delta is the change itself: (base + delta) - base
    would lose what the base's magnitude rounds away.
    """

    def __init__(self, rows: Source, change: Change, *, on_base: bool) -> None:
        self._rows = rows
        self._change = change
        self._on_base = on_base

    @property
    def spec(self) -> TensorSpec:
        return self._rows.spec

    @property
    def needs_base(self) -> bool:
        return not self._on_base or self._change.needs_rows

    @property
    def own_statistics(self) -> tuple[OwnStatistic, ...]:
        return self._change.own_statistics + self._rows.own_statistics

    @property
    def resident_bytes(self) -> int:
        return self._change.resident_bytes + self._rows.resident_bytes

    @property
    def once_bytes(self) -> int:
        return self._change.once_bytes + self._rows.once_bytes

    def read(self, tile: Tile, out: Rows, scratch: Scratch) -> None:
        own = self._read_own(tile, scratch)
        self._change.rows(tile, own, out, scratch)
        add(out, own, out)

    def delta(self, tile: Tile, base_rows: Rows | None, out: Rows, scratch: Scratch) -> None:
        if self._on_base:
            self._change.rows(tile, base_rows, out, scratch)
            return
        assert base_rows is not None, "its delta needs the base's rows"
        own = self._read_own(tile, scratch)
        self._change.rows(tile, own, out, scratch)
        subtract(own, base_rows, own)
        add(out, own, out)

    def _read_own(self, tile: Tile, scratch: Scratch) -> Rows:
        own = scratch.rows("adapted", tile.shape(self.spec))
        self._rows.read(tile, own, scratch)
        return own

    def terms(self) -> Terms:
        """Rows and products, where the change is nothing else."""
        if not self._change.factors:
            return Terms(self)
        below = self._rows.terms()
        return Terms(below.rows, below.factors + self._change.factors)

    def read_bytes(self, tile: Tile) -> int:
        rows = 0 if self._on_base else self._rows.read_bytes(tile)
        return self._change.read_bytes(tile) + rows

    def scratch_bytes(self, tile: Tile) -> int:
        rows, cols = tile.shape(self.spec)
        adapted = self._rows.scratch_bytes(tile) + 4 * rows * cols
        return self._change.scratch_bytes(tile) + adapted

    def release(self) -> None:
        self._change.release()
        self._rows.release()
