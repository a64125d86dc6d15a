"""DoRA of rows and of columns, as sources and in merges; see the contracts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest

from streammerge import grid
from streammerge.adapters.lora import low_rank
from streammerge.declarations import Knobs
from streammerge.kernels.norms import rescale_columns, rescale_rows
from streammerge.methods import CATALOGUE
from streammerge.scratch import Scratch
from streammerge.sources.adapted import Adapted
from streammerge.sources.applied import Applied
from streammerge.sources.dense import Dense
from streammerge.sources.dora import DoraOfColumns, DoraOfRows
from streammerge.sources.prepared import Prepared
from streammerge.sources.stack import Stack
from streammerge.sources.weighted import WeightedSum
from streammerge.statistics.saved import restored, saved
from streammerge.storage.bytesource import Files, Io
from streammerge.words import Dora, Extent, Merged, Source, StatisticValue, Terms, Tile
from tests.contracts.merged_contract import MergedContract, settle
from tests.contracts.small_inputs import decode, encode
from tests.contracts.source_contract import SourceContract, open_files, random_tensor, write_odd
from tests.makers import Tensor
from tests.oracles import dense
from tests.oracles.dense import UNIT, Answer, Exact, Vector

NAME = "model.layers.0.up.weight"
RANK, SCALE = 3, 0.3


class Trained:
    """A DoRA in float64, straight from the formula, and the tensors it is made of."""

    def __init__(self, own: Tensor, axis: int, *, seed: int = 0) -> None:
        """`axis` is the one that the norms are taken over: 1 for rows, 0 for columns."""
        rows, cols = own[1]
        # Over columns the weight is stored as [in, out], so that A belongs to its rows.
        inner, outer = (cols, rows) if axis else (rows, cols)
        self.a = random_tensor(RANK, inner, "F32", seed + 2)
        self.b = random_tensor(outer, RANK, "BF16", seed + 3)
        lengths = np.random.default_rng(seed + 4).uniform(0.5, 3, size=outer)
        self.magnitude = encode(lengths, "F32")
        product = SCALE * (decode(self.b) @ decode(self.a))
        size = SCALE * (np.abs(decode(self.b)) @ np.abs(decode(self.a)))
        product, size = (product, size) if axis else (product.T, size.T)
        summed = decode(own) + product
        norms = np.sqrt(np.sum(summed**2, axis=axis, keepdims=True))
        self.factor = decode(self.magnitude).reshape(norms.shape) / norms
        self.rows = self.factor * summed
        self.change = self.rows - decode(own)
        terms = np.abs(decode(own)) + size
        # A product and sum in float32, and what they do to the norm.
        off = (RANK + 3) * terms
        of_norm = np.sqrt(np.sum(off**2, axis=axis, keepdims=True)) / norms
        self.size = self.factor * off + np.abs(self.rows) * of_norm + np.abs(decode(own))

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"a": self.a, "b": self.b, "m": self.magnitude}


def change_of(
    files: Files, rows: Source, found: dict[str, Extent], axis: int
) -> DoraOfRows | DoraOfColumns:
    factors = low_rank(found["a"], found["b"], SCALE, transposed=axis == 0)
    if axis:
        return DoraOfRows(files, rows, Dora(factors, found["m"], "rows"))
    return DoraOfColumns(files, rows, Dora(factors, found["m"], "columns"))


def give_what_it_needs(source: Source, step: int) -> None:
    """Measure its own statistics in tiles of so many rows."""
    rows = source.spec.rows
    grid = [Tile(top, min(top + step, rows)) for top in range(0, rows, step)]
    for wanted in source.own_statistics:
        fold = wanted.start()
        for index, tile in enumerate(fold.wants(grid)):
            stack = Stack(None, [wanted.rows], tile, index, Scratch())
            part = fold.measure(stack, Scratch())
            assert part.nbytes <= wanted.part_bytes
            fold.absorb(index, part)
        value = fold.finish()
        assert isinstance(value, StatisticValue)
        wanted.take(value)


class DoraContract(SourceContract):
    exact = False
    axis: ClassVar[int]
    on_base: ClassVar[bool]

    def make(self, folder: Path, io: Io, rows: int, cols: int) -> tuple[Source, Files]:
        base = random_tensor(rows, cols, "BF16", 0)
        own = base if self.on_base else random_tensor(rows, cols, "BF16", 1)
        self.base, self._own = decode(base), decode(own)
        self._trained = trained = Trained(own, self.axis)
        paths = folder / "own.safetensors", folder / "adapter.safetensors"
        stored = write_odd(paths[0], {NAME: own})[NAME]
        found = dict(write_odd(paths[1], trained.tensors))
        files = open_files(*paths, io=io)
        below = Dense(files, stored)
        source = Adapted(below, change_of(files, below, found, self.axis), on_base=self.on_base)
        give_what_it_needs(source, 7)
        source.release()
        return source, files

    def values(self) -> tuple[Exact, Exact]:
        return self._trained.rows, (self._own - self.base) + self._trained.change

    def sizes(self) -> tuple[Exact, Exact]:
        own = np.abs(self._own - self.base)
        return self._trained.size + np.abs(self._own), self._trained.size + own

    def test_it_is_no_product(self, tmp_path: Path) -> None:
        source, _ = self.make(tmp_path, "read", self.rows, self.cols)
        assert source.terms() == Terms(source)
        assert source.needs_base
        assert len(source.own_statistics) == (self.axis == 0)


class TestDoraOfRowsOnTheBase(DoraContract):
    axis, on_base = 1, True


class TestDoraOfRowsOnAnotherModel(DoraContract):
    axis, on_base = 1, False


class TestDoraOfColumnsOnTheBase(DoraContract):
    axis, on_base = 0, True


class TestDoraOfColumnsOnAnotherModel(DoraContract):
    axis, on_base = 0, False


@pytest.mark.parametrize("axis", [0, 1])
def test_a_feature_of_zeros_stays_as_it_is(tmp_path: Path, axis: int) -> None:
    """Nothing has no direction: no NaN comes of it."""
    paths = tmp_path / "own.safetensors", tmp_path / "adapter.safetensors"
    stored = write_odd(paths[0], {NAME: encode(np.zeros((4, 4)), "F32")})[NAME]
    zero = encode(np.zeros((2, 4)), "F32")
    turned = encode(np.zeros((4, 2)), "F32")
    found = write_odd(paths[1], {"a": zero, "b": turned, "m": encode(np.ones(4), "F32")})
    files = open_files(*paths)
    below = Dense(files, stored)
    source = Adapted(below, change_of(files, below, dict(found), axis), on_base=True)
    give_what_it_needs(source, 2)
    out = np.full((4, 4), np.nan, np.float32)
    source.read(Tile(0, 4), out, Scratch())
    assert not out.any()


@pytest.mark.parametrize("rescale", [rescale_rows, rescale_columns])
def test_a_factor_near_one_keeps_a_small_change(rescale: Callable[..., None]) -> None:
    """f (W + d) - W would round it to multiples of W's last place."""
    rows = np.full((2, 2), 1000.0, np.float32)
    change = np.full((2, 2), 1e-6, np.float32)
    rescale(rows, change, np.array([1 + 1e-9, 1.0]))
    expected = np.array([2e-6, 1e-6])
    expected = np.tile(expected, (2, 1)) if rescale is rescale_columns else expected[:, np.newaxis]
    assert change == pytest.approx(np.broadcast_to(expected, (2, 2)), rel=1e-6)


# ---------------------------------------------------------------------------------------- merges

Space = Literal["deltas", "weights"]
AXES = (0, 1, 0)  # of three models: two by columns, one by rows
WEIGHTS = (0.4, -1.3, 0.7)


class Table:
    """A base and DoRAs on it, all of one tensor."""

    def __init__(self, folder: Path, shape: tuple[int, int], space: Space) -> None:
        base = random_tensor(*shape, "BF16", 0)
        self.base = decode(base)
        self.trained = [Trained(base, axis, seed=10 * i) for i, axis in enumerate(AXES)]
        paths = [folder / f"{i}.safetensors" for i in range(4)]
        stored = write_odd(paths[0], {NAME: base})[NAME]
        written = [
            dict(write_odd(path, one.tensors))
            for path, one in zip(paths[1:], self.trained, strict=True)
        ]
        self.files = open_files(*paths)
        self.stored = Dense(self.files, stored)
        self.models: list[Source] = [
            Adapted(
                self.stored,
                change_of(self.files, self.stored, found, axis),
                on_base=space == "deltas",
            )
            for found, axis in zip(written, AXES, strict=True)
        ]

    def squared_norms(self) -> list[float]:
        changes = [float(np.sum(one.change**2)) for one in self.trained]
        return [float(np.sum(self.base**2)), *changes]


class MergedDora(MergedContract):
    space: ClassVar[Space]
    measured: ClassVar[int] = 0  # reads of the method

    def merged(self, folder: Path, shape: tuple[int, int] = (61, 24)) -> tuple[Merged, Files]:
        self.table = Table(folder, shape, self.space)
        return Prepared(self.merge(), self.table.models), self.table.files

    def merge(self) -> Merged:
        raise NotImplementedError

    def large(self, folder: Path) -> tuple[Merged, Files]:
        return self.merged(folder, (384, 512))

    def test_it_reads_the_tensor_once_more(self, made: tuple[Merged, Files]) -> None:
        merged, _ = made
        assert len(merged.waves()) == 1 + self.measured
        assert merged.waves()[0] == ["source 0", "source 1"]

    def test_it_goes_on_from_statistics_that_were_kept(
        self, made: tuple[Merged, Files], tmp_path: Path
    ) -> None:
        """As a merge that was stopped does: another object, and values out of a journal."""
        merged, _ = made
        values = settle(merged, Scratch())
        kept = {name: json.loads(json.dumps(saved(value))) for name, value in values.items()}
        (tmp_path / "again").mkdir()
        again, _ = self.merged(tmp_path / "again")
        known = {name: restored(document) for name, document in kept.items()}
        assert again.start(1 << 20, known) == {}
        tiles = list(enumerate(grid.tiles(merged.spec)))
        for index, tile in tiles:
            rows, _ = merged.merge(tile, index, values, Scratch())
            ours, _ = again.merge(tile, index, known, Scratch())
            assert rows.tobytes() == ours.tobytes()


class TestWeightedSumOfDoraDeltas(MergedDora):
    space: ClassVar[Space] = "deltas"

    def merge(self) -> Merged:
        table = self.table
        return WeightedSum(table.files, table.stored, table.models, WEIGHTS, self.space)

    def answer(self) -> Answer:
        deltas = [Vector(one.change, one.size) for one in self.table.trained]
        return dense.task_arithmetic(self.table.base, deltas, WEIGHTS)

    def squared_norms(self) -> list[float]:
        return self.table.squared_norms()


class TestWeightedSumOfDoraWeights(MergedDora):
    space: ClassVar[Space] = "weights"

    def merge(self) -> Merged:
        table = self.table
        return WeightedSum(table.files, None, table.models, WEIGHTS, self.space)

    def answer(self) -> Answer:
        models = [Vector(one.rows, one.size) for one in self.table.trained]
        return dense.linear(models, WEIGHTS, normalize=False)

    def squared_norms(self) -> list[float]:
        return [np.nan] * 4


SHARED = {name: knob.default for name, knob in CATALOGUE["ties"].shared.items()}


class TestTiesOfDora(MergedDora):
    space: ClassVar[Space] = "deltas"
    densities = (1.0, 1.0, 1.0)

    def merge(self) -> Merged:
        knobs = Knobs(
            {"weight": np.abs(WEIGHTS), "density": np.array(self.densities)},
            SHARED | {"normalize": False},
            3,
            (0, 1, 2),
        )
        return Applied(CATALOGUE["ties"], knobs, self.table.stored, self.table.models)

    def answer(self) -> Answer:
        table, weights = self.table, [abs(weight) for weight in WEIGHTS]
        deltas = [one.change.astype(np.float32) for one in table.trained]
        answer = dense.ties(
            table.base, deltas, weights, self.densities, lambda_=1.0, normalize=False
        )
        off = sum(w * 2 * UNIT * one.size for w, one in zip(weights, table.trained, strict=True))
        return Answer(answer.value, answer.slack + off, answer.other)

    def squared_norms(self) -> list[float]:
        return self.table.squared_norms()


class TestTiesOfPrunedDora(TestTiesOfDora):
    """Its sample leaves columns out, which a row's norm must not notice."""

    densities = (0.4, 0.6, 1.0)
    measured = 1
