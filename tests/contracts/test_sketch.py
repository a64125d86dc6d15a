"""Dense merged updates as two factors, against the nearest of the rank that there is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from streammerge import grid
from streammerge.declarations import Knobs
from streammerge.methods import CATALOGUE
from streammerge.scratch import Scratch
from streammerge.sources.applied import Applied
from streammerge.sources.combined import Combined
from streammerge.sources.sketched import Sketch, Sketched
from streammerge.statistics import sketch
from streammerge.words import DType, Merged, TensorSpec
from tests.contracts.merged_contract import assert_within_its_word, run_merged, settle
from tests.contracts.test_merges import NAME, SHAPE, Table
from tests.oracles import low_rank as oracle
from tests.oracles.dense import Exact, ties

WEIGHTS, DENSITIES = (0.5, 1.0, -0.3), (0.6, 0.25, 0.9)
RANK = 6
# The error of a sketch over that of the nearest matrix; see `sketch.ROUNDS`.
NEARLY = 1.1


def knobs(method: str, models: int) -> Knobs:
    spec = CATALOGUE[method]
    given = {"weight": np.array(WEIGHTS), "density": np.array(DENSITIES)}
    shared = {name: knob.default for name, knob in spec.shared.items() if knob.default is not None}
    per_model = {name: given[name] for name in spec.per_model}
    return Knobs(per_model, shared, models, tuple(range(models)))


def update_of(table: Table, method: str) -> Merged:
    made = (CATALOGUE[method], knobs(method, 3), table.base, table.models)
    if method == "ties":
        return Applied(*made, update_only=True)
    return Combined(table.files, *made, update_only=True)


def both(
    update: Merged, rank: int, dtype: DType = DType.F32, *, turned: bool = False
) -> tuple[Merged, Merged]:
    """The two factors' merges of an update or of its transpose, B and A."""
    shared = Sketch(update, rank, dtype, 7, turned=turned)
    spec = update.spec
    outer, inner = (spec.cols, spec.rows) if turned else (spec.rows, spec.cols)
    b = Sketched(TensorSpec("b", (outer, rank), dtype), shared, "B")
    return b, Sketched(TensorSpec("a", (rank, inner), dtype), shared, "A")


def expected(table: Table, method: str) -> Exact:
    inputs = table.inputs
    deltas = [inputs.task_vector(entry, NAME) for entry in inputs.entries]
    if method == "ties":
        zeros = np.zeros(deltas[0].shape)
        return ties(zeros, deltas, WEIGHTS, DENSITIES).value
    total = sum(w * d.astype(np.float64) for w, d in zip(WEIGHTS, deltas, strict=True))
    return np.asarray(total)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Table:
    monkeypatch.setattr(grid, "TILE_ELEMENTS", 256)
    return Table(tmp_path, SHAPE)


@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
@pytest.mark.parametrize("turned", [False, True])
def test_the_factors_are_nearly_the_nearest_and_say_what_they_miss(
    table: Table, method: str, dtype: DType, turned: bool
) -> None:
    left, right = both(update_of(table, method), RANK, dtype, turned=turned)
    dense = expected(table, method).T if turned else expected(table, method)
    product = run_merged(left).astype(np.float64) @ run_merged(right).astype(np.float64)
    missed = np.linalg.norm(dense - product)
    best = np.linalg.norm(dense - oracle.nearest(dense, RANK))
    assert missed <= NEARLY * best
    scratch = Scratch()
    values = settle(left, scratch)
    tiles = enumerate(grid.tiles(left.spec))
    norms = np.sum([left.merge(tile, i, values, scratch)[1] for i, tile in tiles], axis=0)
    np.testing.assert_allclose(norms[-2:], [np.linalg.norm(dense) ** 2, missed**2], rtol=1e-4)
    np.testing.assert_allclose(norms[:-2], table.squared_norms(), rtol=1e-5)


@pytest.mark.parametrize("which", [0, 1])
def test_any_order_of_tiles_gives_the_same_bits(table: Table, which: int) -> None:
    one, again = (both(update_of(table, "ties"), RANK)[which] for _ in range(2))
    assert run_merged(one).tobytes() == run_merged(again, seed=3).tobytes()


def test_the_second_factor_is_spared_the_reads(table: Table) -> None:
    left, right = both(update_of(table, "task_arithmetic"), RANK)
    run_merged(right)
    before = table.files.read_bytes
    assert settle(left, Scratch())
    assert table.files.read_bytes == before


@pytest.mark.parametrize("which", [0, 1])
def test_it_measures_and_reads_what_it_says(table: Table, which: int) -> None:
    merged, files = both(update_of(table, "ties"), RANK)[which], table.files
    scratch = Scratch()
    values = settle(merged, scratch)
    tiles = grid.tiles(merged.spec)
    for index, tile in enumerate(tiles):
        before = files.read_bytes
        merged.merge(tile, index, values, scratch)
        assert files.read_bytes - before == merged.merge_bytes(tile)


@pytest.mark.parametrize("which", [0, 1])
def test_its_working_memory_is_within_its_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    monkeypatch.setattr(grid, "TILE_ELEMENTS", 1 << 16)
    assert_within_its_word(both(update_of(Table(tmp_path, (384, 512)), "ties"), RANK)[which])


# ------------------------------------------------------------------------------ the directions


def directions(matrix: Exact, rank: int, bands: int = 5) -> Exact:
    """What the fold finds of a matrix that it is shown in bands."""
    spec = TensorSpec("w", (matrix.shape[0], matrix.shape[1]), DType.F32)
    fold = sketch.first_round(spec, rank, 0)
    while True:
        for index, rows in enumerate(np.array_split(matrix.astype(np.float32), bands)):
            fold.absorb(index, fold.measure(_Only(rows), Scratch()))  # type: ignore[arg-type]
        found = fold.finish()
        if isinstance(found, sketch.Directions):
            return found.rows.astype(np.float64)
        fold = found  # type: ignore[assignment]


class _Only:
    def __init__(self, rows: np.ndarray) -> None:  # type: ignore[type-arg]
        self._rows = rows

    def one(self, model: int) -> np.ndarray:  # type: ignore[type-arg]
        return self._rows


def decaying(values: Sequence[float], shape: tuple[int, int], seed: int) -> Exact:
    random = np.random.default_rng(seed)
    left, right = (np.linalg.qr(random.normal(size=(n, len(values))))[0] for n in shape)
    return np.asarray((left * np.array(values)) @ right.T)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "values",
    [
        [1.0] * 60,  # flat: the hardest
        [2.0**-i for i in range(40)],
        [1 / (1 + i) for i in range(60)],
        [1.0] * 5 + [0.01] * 55,
    ],
    ids=["flat", "geometric", "harmonic", "cliff"],
)
def test_the_directions_are_nearly_the_best(values: list[float], seed: int) -> None:
    matrix = decaying(values, (90, 70), seed)
    for rank in (1, 5, 20):
        found = directions(matrix, rank)
        np.testing.assert_allclose(found @ found.T, np.eye(rank), atol=1e-5)
        missed = np.linalg.norm(matrix - matrix @ found.T @ found)
        best = np.linalg.norm(matrix - oracle.nearest(matrix, rank))
        assert missed <= NEARLY * best + 1e-6 * np.linalg.norm(matrix)


def test_a_matrix_of_that_rank_is_found_whole() -> None:
    matrix = decaying([3.0, 2.0, 0.5], (40, 30), 1)
    found = directions(matrix, 3)
    np.testing.assert_allclose(matrix @ found.T @ found, matrix, atol=3e-6)
