"""How tensors are seen as rows, and how they are cut into tiles."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammerge import grid
from streammerge.words import DType, TensorSpec, Tile

FULL = 1 << 19  # elements of a tile


def spec(*shape: int, name: str = "model.layers.0.mlp.up_proj.weight") -> TensorSpec:
    return TensorSpec(name, shape, DType.BF16)


@pytest.mark.parametrize(
    ("tensor", "rows", "cols"),
    [
        (spec(), 1, 1),
        (spec(7), 1, 7),
        (spec(0), 1, 0),
        (spec(4, 6), 4, 6),
        (spec(1, 6), 1, 6),
        (spec(6, 1), 6, 1),
        (spec(0, 6), 0, 0),
        (spec(6, 0), 6, 0),
        (spec(8, 3, 5), 8, 15),  # convolution
        (spec(8, 3, 5, 5), 8, 75),
        (spec(8, 3, 5, name="model.layers.0.mlp.experts.gate_up_proj"), 24, 5),
        (spec(8, 3, name="model.layers.0.mlp.experts.bias"), 8, 3),
    ],
)
def test_rows_and_cols(tensor: TensorSpec, rows: int, cols: int) -> None:
    assert (tensor.rows, tensor.cols) == (rows, cols)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (spec(), [(0, 1)]),
        (spec(5), [(0, 1)]),
        (spec(0, 6), []),
        (spec(6, 0), []),
        (spec(0), []),
        (spec(FULL), [(0, 1)]),
        (spec(10 * FULL), [(0, 1)]),  # one row is never cut
        (spec(3, FULL + 1), [(0, 1), (1, 2), (2, 3)]),
        (spec(3, FULL), [(0, 1), (1, 2), (2, 3)]),
        (spec(3, FULL // 2), [(0, 2), (2, 3)]),
        (spec(4096, 4096), [(top, top + 128) for top in range(0, 4096, 128)]),
        (spec(300, 4096), [(0, 128), (128, 256), (256, 300)]),
        (spec(FULL + 1, 1), [(0, FULL), (FULL, FULL + 1)]),
    ],
)
def test_tiles(tensor: TensorSpec, expected: list[tuple[int, int]]) -> None:
    assert [(tile.start, tile.stop) for tile in grid.tiles(tensor)] == expected


@given(st.lists(st.integers(0, 3000), min_size=0, max_size=3))
def test_tiles_cover_every_row_once(shape: list[int]) -> None:
    tensor = spec(*shape)
    tiles = grid.tiles(tensor)
    covered = [row for tile in tiles for row in range(tile.start, tile.stop)]
    assert covered == (list(range(tensor.rows)) if tensor.numel else [])
    assert all(tile.row_step == tile.col_step == 1 for tile in tiles)
    for tile in tiles:
        rows, cols = tile.shape(tensor)
        assert rows == 1 or rows * cols <= FULL
    if tiles:
        assert max(tile.stop - tile.start for tile in tiles) == grid.largest_tile(tensor).stop


@pytest.mark.parametrize(
    ("tile", "shape"),
    [
        (Tile(0, 10), (10, 7)),
        (Tile(3, 10), (7, 7)),
        (Tile(0, 10, 3), (4, 7)),
        (Tile(0, 9, 3), (3, 7)),
        (Tile(0, 10, 1, 2), (10, 4)),
        (Tile(2, 10, 20, 7), (1, 1)),
    ],
)
def test_the_shape_of_a_thinned_tile(tile: Tile, shape: tuple[int, int]) -> None:
    assert tile.shape(spec(10, 7)) == shape
