"""Merges in core space and by rank, put together by hand, against dense matrices in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from streammerge import grid
from streammerge.adapters.lora import low_rank as factors_of
from streammerge.declarations import Knobs
from streammerge.errors import BadInput
from streammerge.methods import CATALOGUE
from streammerge.scratch import Scratch
from streammerge.sources.core import LowRank, core_space
from streammerge.sources.dense import Dense
from streammerge.sources.direct import Direct
from streammerge.sources.factor_rows import Added
from streammerge.sources.in_core import (
    Combine,
    Compressed,
    InCore,
    Isotropized,
    Turned,
    Weighted,
)
from streammerge.sources.low_rank import Product
from streammerge.sources.pairs import Mixed, Pair, Stacked
from streammerge.storage.bytesource import Files
from streammerge.storage.header import read_header
from streammerge.words import DType, Merged, Tile
from tests.contracts.merged_contract import MergedContract
from tests.contracts.small_inputs import encode
from tests.contracts.source_contract import open_files
from tests.makers import write_safetensors
from tests.oracles import low_rank as oracle
from tests.oracles.dense import UNIT, Answer, Exact

SCALES = (0.5, -1.0, 2.0, 0.25)
WEIGHTS = (0.7, 0.3, -0.4, 1.0)
ROWS, COLS = 23, 17


class Made(NamedTuple):
    """Low-rank updates in a file, and the same as dense matrices."""

    files: Files
    updates: LowRank
    deltas: list[Exact]


def write(folder: Path, pairs: Sequence[tuple[Exact, Exact]], dtype: str = "F32") -> Made:
    """`pairs` are B `[rows, rank]` and A `[rank, cols]` of each model."""
    stored = {}
    for i, (b, a) in enumerate(pairs):
        stored |= {f"b{i}": encode(b, dtype), f"a{i}": encode(a, dtype)}
    path = write_safetensors(folder / "factors.safetensors", stored)
    found = read_header(path).tensors
    factors = [factors_of(found[f"a{i}"], found[f"b{i}"], SCALES[i]) for i in range(len(pairs))]
    count = len(pairs)
    updates = LowRank(tuple(factors), tuple(range(count)), count)
    deltas = [
        scale * b.astype("f4").astype("f8") @ a.astype("f4").astype("f8")
        for scale, (b, a) in zip(SCALES, pairs, strict=False)
    ]
    return Made(open_files(path), updates, deltas)


def random_pairs(
    ranks: Sequence[int], *, seed: int = 1, shape: tuple[int, int] = (ROWS, COLS)
) -> list[tuple[Exact, Exact]]:
    random = np.random.default_rng(seed)
    return [(random.normal(size=(shape[0], r)), random.normal(size=(r, shape[1]))) for r in ranks]


def product_of(pair: Pair, rows: int = ROWS) -> Exact:
    """The dense matrix of a pair, its left factor in two tiles."""
    scratch = Scratch()
    tiles = [Tile(0, 5), Tile(5, rows)]
    left = np.concatenate([pair.left(tile, scratch)[0].copy() for tile in tiles])
    return left.astype(np.float64) @ pair.right().astype(np.float64)


def knobs(method: str, count: int, **others: Sequence[float]) -> Knobs:
    spec = CATALOGUE[method]
    per_model = {
        name: np.array(others.get(name, [knob.default] * count), np.float64)
        for name, knob in spec.per_model.items()
    }
    shared = {name: knob.default for name, knob in spec.shared.items() if knob.default is not None}
    return Knobs(per_model, shared, count, tuple(range(count)))


def in_core(made: Made, method: str, **others: Sequence[float]) -> InCore:
    count = made.updates.count
    return InCore(made.files, CATALOGUE[method], knobs(method, count, **others), "up.weight")


def assert_near(found: Exact, expected: Exact, tolerance: float = 1e-6) -> None:
    size = max(np.abs(expected).max(), 1e-30)
    assert np.abs(found - expected).max() <= tolerance * size


# ------------------------------------------------------------------------------- the space itself


@st.composite
def any_pairs(draw: st.DrawFn) -> list[tuple[Exact, Exact]]:
    """Of any ranks, some sharing rows or columns with others, some short of their rank."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ranks = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    pairs = random_pairs(ranks, seed=int(random.integers(2**32)), shape=(12, 10))
    for i, (b, a) in enumerate(pairs):
        kind = draw(st.sampled_from(["apart", "same a", "same b", "short", "zero"]))
        other = pairs[0]
        if kind == "same a":
            pairs[i] = b, random.normal(size=(a.shape[0], other[1].shape[0])) @ other[1]
        elif kind == "same b":
            pairs[i] = other[0] @ random.normal(size=(other[0].shape[1], b.shape[1])), a
        elif kind == "short":
            pairs[i] = b @ np.diag([1.0, *[0.0] * (b.shape[1] - 1)]), a
        elif kind == "zero":
            pairs[i] = np.zeros_like(b), a
        size = 10.0 ** draw(st.sampled_from([0, 0, -6, 6]))  # of its left factor beside the right
        pairs[i] = pairs[i][0] * size, pairs[i][1] / size
    return pairs


A_THIRTIETH = np.linspace(-1, 1, 10)[np.newaxis]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(any_pairs())
@example(
    [(np.ones((12, 1)), A_THIRTIETH * 30), (np.linspace(1, 2, 12)[:, np.newaxis], A_THIRTIETH)]
)
def test_the_bases_are_orthonormal_and_nothing_is_lost(
    tmp_path: Path, pairs: list[tuple[Exact, Exact]]
) -> None:
    made = write(tmp_path, pairs)
    product, scratch = Product(made.files, made.updates.factors), Scratch()
    space = core_space(product, made.updates)
    u = product.left(Tile(0, 12), scratch).astype(np.float64) @ space.to_left
    vt = space.to_right.T @ product.right(Scratch())
    np.testing.assert_allclose(u.T @ u, np.eye(u.shape[1]), atol=1e-6)
    np.testing.assert_allclose(vt @ vt.T, np.eye(len(vt)), atol=1e-6)
    size = max(np.abs(delta).max() for delta in made.deltas)
    for core, delta, (b, a) in zip(space.cores, made.deltas, pairs, strict=True):
        rounding = 1e-7 * (np.abs(b) @ np.abs(a)).max()  # of its own size, however small
        np.testing.assert_allclose(u @ core @ vt, delta, rtol=0, atol=rounding)
    weights = WEIGHTS[: len(pairs)]
    merged = sum(w * d for w, d in zip(weights, made.deltas, strict=True))
    found = product_of(Mixed(made.files, made.updates, Weighted(weights)), 12)
    np.testing.assert_allclose(found, merged, rtol=0, atol=1e-6 * size)


def test_blocks_are_put_together(tmp_path: Path) -> None:
    """More rows and columns than are decomposed at once."""
    made = write(tmp_path, random_pairs([2, 3], shape=(2500, 2100)))
    pair = Mixed(made.files, made.updates, Weighted([1.0, 1.0]))
    assert_near(product_of(pair, 2500), made.deltas[0] + made.deltas[1])


# ---------------------------------------------------------------------------- methods, isotropy


@pytest.mark.parametrize("ranks", [(4, 4), (3, 6, 2), (5,)])
def test_tsv_is_the_dense_formula(tmp_path: Path, ranks: tuple[int, ...]) -> None:
    made = write(tmp_path, random_pairs(ranks))
    weights = WEIGHTS[: len(ranks)]
    found = product_of(Mixed(made.files, made.updates, in_core(made, "tsv", weight=weights)))
    assert_near(found, oracle.tsv(made.deltas, weights))


@pytest.mark.parametrize("ranks", [(4, 4), (3, 6, 2), (5,)])
def test_iso_c_is_the_dense_formula(tmp_path: Path, ranks: tuple[int, ...]) -> None:
    made = write(tmp_path, random_pairs(ranks))
    weights = WEIGHTS[: len(ranks)]
    found = product_of(Mixed(made.files, made.updates, in_core(made, "iso_c", weight=weights)))
    assert_near(found, oracle.iso_c(made.deltas, weights))
    isotropized = Mixed(made.files, made.updates, Isotropized(Weighted(weights)))
    assert_near(product_of(isotropized), oracle.iso_c(made.deltas, weights))


def test_a_method_of_inner_products_gives_the_same_as_in_full_space(tmp_path: Path) -> None:
    """Karcher's mean of two updates, by hand: their angle halved, at their mean length."""
    made = write(tmp_path, random_pairs((3, 4)))
    lengths = [np.linalg.norm(delta) for delta in made.deltas]
    directions = [delta / length for delta, length in zip(made.deltas, lengths, strict=True)]
    middle = directions[0] + directions[1]
    expected = middle / np.linalg.norm(middle) * np.mean(lengths)
    found = product_of(Mixed(made.files, made.updates, in_core(made, "karcher")))
    assert_near(found, expected, 1e-5)


def test_a_method_that_prunes_does_so_in_the_core(tmp_path: Path) -> None:
    """With one model and no vote, TIES keeps the largest half of the core matrix."""
    made = write(tmp_path, random_pairs((4,)))
    pair = Mixed(made.files, made.updates, in_core(made, "ties", density=[0.5]))
    product = Product(made.files, made.updates.factors)
    space = core_space(product, made.updates)
    core = space.cores[0]
    kept = np.where(np.abs(core) >= np.sort(np.abs(core).ravel())[8], core, 0)
    u = product.left(Tile(0, ROWS), Scratch()).astype(np.float64) @ space.to_left
    assert_near(product_of(pair), u @ kept @ space.to_right.T @ product.right(Scratch()))


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("smaller", [1.0, 1e-3])
def test_compressed_first_is_the_dense_formula(tmp_path: Path, rank: int, smaller: float) -> None:
    """Updates in a few shared directions, some much smaller; summed there, and pruned there."""
    pairs = random_pairs((4, 6, 2))
    pairs[1] = smaller * pairs[1][0], pairs[1][1]
    made = write(tmp_path, pairs)
    weights = WEIGHTS[:3]

    def summed(cores: list[Exact]) -> Exact:
        return np.asarray(sum(w * core for w, core in zip(weights, cores, strict=True)))

    def pruned(cores: list[Exact]) -> Exact:
        count = max(1, cores[0].size // 2)
        least = [np.sort(np.abs(core), axis=None)[-count] for core in cores]
        return summed([c * (np.abs(c) >= cut) for c, cut in zip(cores, least, strict=True)])

    prune = in_core(made, "magnitude_prune", weight=weights, density=[0.5] * 3)
    rules = ((Weighted(weights), summed), (prune, pruned))
    for combine, rule in rules:
        pair = Mixed(made.files, made.updates, Compressed(combine, rank, 3), rank=rank)
        assert_near(product_of(pair), oracle.compressed(made.deltas, rank, rule), 1e-5)


def test_compressed_to_all_directions_nothing_is_lost(tmp_path: Path) -> None:
    made = write(tmp_path, random_pairs((3, 4)))
    pair = Mixed(made.files, made.updates, Compressed(Weighted(WEIGHTS[:2]), 9, 2), rank=7)
    merged = WEIGHTS[0] * made.deltas[0] + WEIGHTS[1] * made.deltas[1]
    assert_near(product_of(pair), merged)


def test_updates_of_a_transposed_tensor_are_merged_as_they_are_stored(tmp_path: Path) -> None:
    made = write(tmp_path, random_pairs((4, 2)))
    by_place = in_core(made, "dare_linear", density=[0.5, 0.7])  # of an element
    for combine in (by_place, Compressed(in_core(made, "ties", density=[0.5, 0.7]), 3, 2)):
        straight = product_of(Mixed(made.files, made.updates, combine))
        turned = Mixed(made.files, made.updates.turned(), Turned(combine), rank=6)
        assert_near(product_of(turned, COLS), straight.T)


# ---------------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_a_rank_is_the_best_of_that_rank_and_says_what_it_misses(
    tmp_path: Path, rank: int, dtype: DType
) -> None:
    made = write(tmp_path, random_pairs((3, 4)))
    merged = WEIGHTS[0] * made.deltas[0] + WEIGHTS[1] * made.deltas[1]
    pair = Mixed(made.files, made.updates, Weighted(WEIGHTS[:2]), rank=rank, dtype=dtype)
    scratch, squares = Scratch(), np.zeros(4)
    for tile in (Tile(0, 9), Tile(9, ROWS)):
        squares += pair.left(tile, scratch)[1]
    norms = [np.linalg.norm(one) ** 2 for one in (*made.deltas, merged)]
    np.testing.assert_allclose(squares[:3], norms, rtol=1e-5)
    missed = float(np.linalg.norm(merged - product_of(pair)))
    floor = 1e-6 * np.linalg.norm(merged)
    np.testing.assert_allclose(np.sqrt(squares[3]), missed, rtol=1e-3, atol=floor)
    if dtype is DType.F32:
        best = np.linalg.norm(merged - oracle.nearest(merged, rank))
        assert abs(missed - best) <= floor


def test_what_is_more_than_the_rank_of_the_sum_is_zeros(tmp_path: Path) -> None:
    b, a = random_pairs((2,))[0]
    made = write(tmp_path, [(b, a), (2 * b, a)])
    pair = Mixed(made.files, made.updates, Weighted([1.0, 1.0]), rank=4)
    left, _ = pair.left(Tile(0, ROWS), Scratch())
    assert not left[:, 2:].any() and not pair.right()[2:].any()
    assert_near(product_of(pair), made.deltas[0] + made.deltas[1])


def test_updates_that_are_nothing(tmp_path: Path) -> None:
    made = write(tmp_path, [(np.zeros((ROWS, 2)), np.ones((2, COLS)))] * 2)
    summed = Weighted([1.0, 1.0])
    for combine in (summed, in_core(made, "tsv"), in_core(made, "ties"), Compressed(summed, 3, 2)):
        assert not product_of(Mixed(made.files, made.updates, combine, rank=3)).any()


def test_side_by_side_is_exact(tmp_path: Path) -> None:
    made = write(tmp_path, random_pairs((3, 4)))
    pair = Stacked(made.files, made.updates, WEIGHTS[:2])
    merged = WEIGHTS[0] * made.deltas[0] + WEIGHTS[1] * made.deltas[1]
    assert pair.rank == 7
    assert_near(product_of(pair), merged, 8 * UNIT)


@pytest.mark.parametrize("which", ["b1", "a0"])
def test_a_value_that_is_not_finite_is_named(tmp_path: Path, which: str) -> None:
    pairs = random_pairs((2, 3))
    pairs[int(which[1])]["ba".index(which[0])][1, 1] = np.inf
    made = write(tmp_path, pairs)
    with pytest.raises(BadInput, match=f"{which} has values that are NaN or infinite"):
        Mixed(made.files, made.updates, Weighted([1.0, 1.0])).right()


# ------------------------------------------------------------------------------------- contracts


class AddedContract(MergedContract):
    """`base + (U M) V'`, tile by tile."""

    ranks = (3, 5)

    def combine(self, made: Made) -> Combine:
        raise NotImplementedError

    def expected(self) -> Exact:
        raise NotImplementedError

    def merged(self, folder: Path, shape: tuple[int, int] = (61, 24)) -> tuple[Merged, Files]:
        self.made = made = write(folder, random_pairs(self.ranks, shape=shape))
        self.base = np.random.default_rng(2).normal(size=shape).astype("f4").astype("f8")
        path = write_safetensors(folder / "base.safetensors", {"w": encode(self.base, "F32")})
        headers = [read_header(path), read_header(folder / "factors.safetensors")]
        files = open_files(*(Path(header.path) for header in headers))
        pair = Mixed(files, made.updates, self.combine(made))
        return Direct(Added(Dense(files, headers[0].tensors["w"]), pair)), files

    def large(self, folder: Path) -> tuple[Merged, Files]:
        return self.merged(folder, (384, 512))

    def answer(self) -> Answer:
        value = self.base + self.expected()
        return Answer(value, np.full(value.shape, 1e-5))

    def squared_norms(self) -> list[float]:
        return [float(np.sum(one**2)) for one in (self.base, *self.made.deltas)]


class TestTsvInCore(AddedContract):
    def combine(self, made: Made) -> Combine:
        return in_core(made, "tsv")

    def expected(self) -> Exact:
        return oracle.tsv(self.made.deltas, [1.0, 1.0])


class TestIsotropizedSum(AddedContract):
    def combine(self, made: Made) -> Combine:
        return Isotropized(Weighted([0.5, 1.0]))

    def expected(self) -> Exact:
        return oracle.iso_c(self.made.deltas, [0.5, 1.0])


def test_tiles_of_core_matrices_are_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = write(tmp_path, random_pairs((4, 5)))
    combine = in_core(made, "ties", density=[0.5, 0.4])
    cores = core_space(Product(made.files, made.updates.factors), made.updates).cores
    whole = combine(cores)
    monkeypatch.setattr(grid, "TILE_ELEMENTS", 16)
    np.testing.assert_array_equal(combine(cores), whole)
