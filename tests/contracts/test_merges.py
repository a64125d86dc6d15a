"""Weighted sums and applied methods, put together by hand; see `merged_contract`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest

from streammerge.adapters.lora import low_rank
from streammerge.declarations import Knobs
from streammerge.methods import CATALOGUE
from streammerge.sources.adapted import Adapted
from streammerge.sources.applied import Applied
from streammerge.sources.combined import Combined
from streammerge.sources.dense import Dense
from streammerge.sources.low_rank import Product
from streammerge.sources.weighted import WeightedSum
from streammerge.storage.bytesource import Files
from streammerge.storage.header import read_header
from streammerge.words import Merged, Source, Tile
from tests.contracts.merged_contract import MergedContract, assert_within_its_word
from tests.contracts.small_inputs import Entry, SmallInputs
from tests.contracts.source_contract import open_files
from tests.makers import write_safetensors
from tests.oracles import dense, spherical
from tests.oracles.dense import Answer, Vector

NAME = "up.weight"
PREFIX = "base_model.model.up."

Space = Literal["deltas", "weights"]
SPACES: tuple[Space, ...] = ("deltas", "weights")
SHAPE = (61, 24)
LARGE = (384, 512)


class Table:
    """The sources of one tensor: a base, a full model, and adapters on each of them."""

    def __init__(self, folder: Path, shape: tuple[int, int], dtype: str = "BF16") -> None:
        self.inputs = SmallInputs(folder, {NAME: shape}, dtype)
        tuned = self.inputs.add_model()
        self.inputs.add_adapter([NAME], rank=3)
        self.inputs.add_adapter([NAME], rank=5, scale=-1.0, on=tuned)
        folders = [folder / "base", folder / "model-0", folder / "adapter-1", folder / "adapter-2"]
        weights = [
            next(path for path in one.iterdir() if path.suffix == ".safetensors") for one in folders
        ]
        self.files = open_files(*weights)
        extents = [read_header(path).tensors for path in weights]
        self.base = Dense(self.files, extents[0][NAME])
        self.tuned = Dense(self.files, extents[1][NAME])
        updates = [
            low_rank(found[f"{PREFIX}lora_A.weight"], found[f"{PREFIX}lora_B.weight"], scale)
            for scale, found in ((0.5, extents[2]), (-1.0, extents[3]))
        ]
        products = [Product(self.files, [update]) for update in updates]
        self.models: list[Source] = [
            self.tuned,
            Adapted(self.base, products[0], on_base=True),
            Adapted(self.tuned, products[1], on_base=False),
        ]

    @property
    def entries(self) -> list[Entry]:
        return self.inputs.entries

    def squared_norms(self) -> list[float]:
        origin = float(np.sum(self.inputs.origin(NAME) ** 2))
        deltas = [self.inputs.delta(entry, NAME).value for entry in self.entries]
        return [origin, *(float(np.sum(delta**2)) for delta in deltas)]


class WeightedContract(MergedContract):
    space: ClassVar[Space]
    coefficients: ClassVar[tuple[float, ...]] = (0.4, -1.3, 0.7)

    def merged(self, folder: Path, shape: tuple[int, int] = SHAPE) -> tuple[Merged, Files]:
        self.table = table = Table(folder, shape)
        sources = table.models
        merged = WeightedSum(table.files, table.base, sources, self.coefficients, self.space)
        return merged, table.files

    def large(self, folder: Path) -> tuple[Merged, Files]:
        return self.merged(folder, LARGE)

    def squared_norms(self) -> list[float]:
        return self.table.squared_norms()


class TestWeightedSumOfDeltas(WeightedContract):
    space: ClassVar[Space] = "deltas"

    def answer(self) -> Answer:
        inputs = self.table.inputs
        deltas = [inputs.delta(entry, NAME) for entry in inputs.entries]
        return dense.task_arithmetic(inputs.origin(NAME), deltas, self.coefficients)


class TestWeightedSumOfWeights(WeightedContract):
    space: ClassVar[Space] = "weights"

    def answer(self) -> Answer:
        inputs = self.table.inputs
        models = [inputs.model(entry, NAME) for entry in inputs.entries]
        return dense.linear(models, self.coefficients, normalize=False)


class TestAppliedTies(MergedContract):
    weights = (0.5, 1.0, -0.3)
    densities = (0.6, 0.25, 0.9)

    def merged(self, folder: Path, shape: tuple[int, int] = SHAPE) -> tuple[Merged, Files]:
        self.table = table = Table(folder, shape)
        knobs = Knobs(
            {"weight": np.array(self.weights), "density": np.array(self.densities)},
            {name: knob.default for name, knob in CATALOGUE["ties"].shared.items()},
            3,
            (0, 1, 2),
        )
        return Applied(CATALOGUE["ties"], knobs, table.base, table.models), table.files

    def large(self, folder: Path) -> tuple[Merged, Files]:
        return self.merged(folder, LARGE)

    def answer(self) -> Answer:
        inputs = self.table.inputs
        deltas = [inputs.task_vector(entry, NAME) for entry in inputs.entries]
        return dense.ties(inputs.origin(NAME), deltas, self.weights, self.densities)

    def squared_norms(self) -> list[float]:
        return self.table.squared_norms()

    def test_its_working_memory_is_within_its_word_where_the_sample_lies(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All magnitudes of a tile are inside the bracket then, and no two are equal."""
        monkeypatch.setattr("streammerge.grid.TILE_ELEMENTS", 1 << 16)
        values = 1 + np.random.default_rng(0).random(LARGE)
        values[::7] *= 100
        data = np.asarray(values, "<f4").tobytes()
        path = write_safetensors(tmp_path / "tuned.safetensors", {NAME: ("F32", LARGE, data)})
        zeros = write_safetensors(
            tmp_path / "base.safetensors", {NAME: ("F32", LARGE, bytes(len(data)))}
        )
        files = open_files(path, zeros)
        sources = [Dense(files, read_header(one).tensors[NAME]) for one in (path, zeros)]
        knobs = Knobs(
            {"weight": np.ones(1), "density": np.array([0.6])},
            {name: knob.default for name, knob in CATALOGUE["ties"].shared.items()},
            1,
            (0,),
        )
        assert_within_its_word(Applied(CATALOGUE["ties"], knobs, sources[1], sources[:1]))


class CombinedContract(MergedContract):
    """Factors that follow from inner products; here from those of whole arrays."""

    def merged(self, folder: Path, shape: tuple[int, int] = SHAPE) -> tuple[Merged, Files]:
        self.table = table = Table(folder, shape)
        knobs = Knobs(
            {"weight": np.array((0.5, 0.2, 0.4, 0.9))}, {"normalize_weights": True, "eps": 1e-8},
            4, tuple(range(len(self.models()))),
        )  # fmt: skip
        spec = CATALOGUE["multislerp"]
        return Combined(table.files, spec, knobs, table.base, self.models()), table.files

    def models(self) -> list[Source]:
        raise NotImplementedError

    def entries(self) -> list[Entry]:
        raise NotImplementedError

    def large(self, folder: Path) -> tuple[Merged, Files]:
        return self.merged(folder, LARGE)

    def answer(self) -> Answer:
        inputs, base = self.table.inputs, self.table.inputs.origin(NAME)
        missing = [np.zeros(base.shape)] * (4 - len(self.entries()))
        deltas = [inputs.delta(entry, NAME) for entry in self.entries()]
        vectors = [*(inputs.task_vector(one, NAME).astype(np.float64) for one in self.entries())]
        merged = spherical.multislerp((0.5, 0.2, 0.4, 0.9), [*vectors, *missing])
        return spherical.answer(base + merged, [Vector(base, np.abs(base)), *deltas], 8)

    def squared_norms(self) -> list[float]:
        origin = float(np.sum(self.table.inputs.origin(NAME) ** 2))
        deltas = [self.table.inputs.delta(entry, NAME).value for entry in self.entries()]
        return [origin, *(float(np.sum(delta**2)) for delta in deltas)]


class TestCombinedByRows(CombinedContract):
    """A full model, adapters on the base and on it; a fourth leaves the tensor alone."""

    def models(self) -> list[Source]:
        return self.table.models

    def entries(self) -> list[Entry]:
        return self.table.entries


class TestCombinedByFactors(CombinedContract):
    """Adapters on the base, whose inner products take no row of it."""

    def models(self) -> list[Source]:
        return [self.table.models[1], self.table.models[1]]

    def entries(self) -> list[Entry]:
        return [self.table.entries[1]] * 2

    def test_inner_products_read_the_factors_alone(self, made: tuple[Merged, Files]) -> None:
        merged, _ = made
        whole = Tile(0, merged.spec.rows)
        assert merged.measure_bytes(whole, ["gram"]) == 0  # besides what is read once
        assert merged.once_bytes == 2 * 4 * 3 * sum(SHAPE)  # two of rank 3, F32
        assert merged.merge_bytes(whole) == 2 * SHAPE[0] * SHAPE[1]


class TestSameAs:
    """A weighted sum that is a stored tensor as it is gets copied, not computed."""

    @pytest.fixture
    def table(self, tmp_path: Path) -> Table:
        return Table(tmp_path, SHAPE)

    def same(
        self, table: Table, models: list[Source], weights: list[float], space: Space
    ) -> Source | None:
        merged = WeightedSum(table.files, table.base, models, weights, space)
        return merged.same_as()

    def test_a_model_in_full(self, table: Table) -> None:
        for space in SPACES:
            assert self.same(table, [table.tuned], [1.0], space) is table.tuned
            assert self.same(table, [table.tuned], [0.5], space) is None
            assert self.same(table, [table.tuned, table.tuned], [0.5, 0.5], space) is table.tuned

    def test_the_base_alone(self, table: Table) -> None:
        assert self.same(table, [table.base, table.base], [0.7, 0.3], "weights") is table.base
        assert self.same(table, [table.base], [0.3], "weights") is None
        assert self.same(table, [table.base], [0.3], "deltas") is table.base

    def test_an_adapter_is_never_a_copy(self, table: Table) -> None:
        for space in SPACES:
            assert self.same(table, [table.models[1]], [1.0], space) is None
