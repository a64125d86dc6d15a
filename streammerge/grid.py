"""The tile grid: how a tensor is cut into runs of whole rows.

It depends on the shape alone, never on the budget: a band of `B @ A` is not bit-equal to the same
rows of the whole product, so a grid that moved with the budget would change the output's bytes.
"""

from __future__ import annotations

from streammerge.words import TensorSpec, Tile

# Half a Mi elements: the fastest on two cores, small enough for L3 with three models. Part of the
# fingerprint of every output, since it decides the last bit of matrix products.
TILE_ELEMENTS = 1 << 19


def tile_rows(spec: TensorSpec) -> int:
    """Rows of a full tile: as many as fit, at least one however long a row is."""
    return max(1, min(spec.rows, TILE_ELEMENTS // max(1, spec.cols)))


def tiles(spec: TensorSpec) -> list[Tile]:
    """All tiles of a tensor in file order; none for a tensor without elements."""
    if spec.numel == 0:
        return []
    step = tile_rows(spec)
    return [Tile(top, min(top + step, spec.rows)) for top in range(0, spec.rows, step)]


def largest_tile(spec: TensorSpec) -> Tile:
    """The tile that takes the most memory."""
    return Tile(0, tile_rows(spec))
