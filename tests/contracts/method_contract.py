"""What every merge method owes, through the whole engine on a small model folder.

Inherit `MethodContract`, name the method and give its formula on dense float64 arrays. A method
that is not in the package's catalogue brings its own.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import streammerge as sm
from streammerge import grid
from streammerge.declarations import Knob, MethodSpec
from streammerge.errors import ConfigError, Place, Problems
from streammerge.methods import CATALOGUE
from streammerge.planning import MergeJob
from streammerge.recipe.read import parse_recipe
from streammerge.sinks.shards import ShardsSink
from streammerge.work import Worker
from tests.contracts.any_order import AnyOrder
from tests.contracts.merged_contract import assert_within_its_word
from tests.contracts.small_inputs import Entry, Shape, SmallInputs, decode, read_back
from tests.oracles.dense import Answer, check

MEMORY = "4GiB"  # far more than these merges take, and than a test process holds
TILE_ELEMENTS = 256

EMBED, UP, DOWN = "model.embed.weight", "model.layers.0.up.weight", "model.layers.0.down.weight"
WIDE, NORM = "model.layers.0.wide.weight", "model.layers.0.norm.weight"
SHAPES: Mapping[str, Shape] = {
    EMBED: (61, 8),
    UP: (37, 24),
    DOWN: (24, 37),
    WIDE: (3, 300),  # each row is longer than a tile
    NORM: (70,),
    "model.layers.0.temperature": (),
    "model.layers.0.nothing.weight": (0, 5),
    "model.norm.weight": (33,),
}
LARGE: Mapping[str, Shape] = {UP: (384, 512), WIDE: (2, 90_000), NORM: (70_000,)}


@dataclass(frozen=True, slots=True)
class Setting:
    """Parameters of a merge: of each entry, and shared."""

    per_model: Sequence[Mapping[str, Any]] = ()
    shared: Mapping[str, Any] = field(default_factory=dict)

    def of(self, name: str, knobs: Mapping[str, Knob], models: Sequence[int]) -> list[Any]:
        """A per-model parameter of some models, with its default."""
        given = self.per_model or [{}] * (max(models, default=0) + 1)
        return [given[i].get(name, knobs[name].default) for i in models]

    def get(self, name: str, knobs: Mapping[str, Knob]) -> Any:
        """A shared parameter, with its default."""
        return self.shared.get(name, knobs[name].default)


class MethodContract:
    """Streamed is dense, in any order, within its memory, and its knobs keep their bounds."""

    method: ClassVar[str]
    catalogue: ClassVar[Mapping[str, MethodSpec]] = CATALOGUE
    settings: ClassVar[Sequence[Setting]] = (Setting(),)

    # --------------------------------------------------------------------- what a method gives

    def answer(self, inputs: SmallInputs, name: str, setting: Setting) -> Answer:
        """The formula, on whole tensors in float64."""
        raise NotImplementedError

    def add_entries(self, inputs: SmallInputs, shapes: Mapping[str, Shape]) -> None:
        """A full model and adapters on some of the matrices, one of them on the full model."""
        matrices = [name for name, shape in shapes.items() if len(shape) == 2 and 0 not in shape]
        tuned = inputs.add_model()
        inputs.add_adapter(matrices[:2], rank=3, largest=3)  # small: many equal magnitudes
        inputs.add_adapter(matrices[1:], rank=9, scale=-2.0)
        inputs.add_adapter(matrices[-1:], rank=2, on=tuned)

    # -------------------------------------------------------------------------- for the formulas

    @property
    def spec(self) -> MethodSpec:
        return self.catalogue[self.method]

    def everyone(self, inputs: SmallInputs) -> list[int]:
        return list(range(len(inputs.entries)))

    def touching(self, inputs: SmallInputs, name: str) -> list[int]:
        """The positions of the models that can differ from the base there."""
        return [i for i, one in enumerate(inputs.entries) if inputs.touches(one, name)]

    def entries(self, inputs: SmallInputs, models: Sequence[int]) -> list[Entry]:
        return [inputs.entries[i] for i in models]

    # --------------------------------------------------------------------------------- the suite

    @pytest.fixture(autouse=True)
    def small_tiles_and_no_waiting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Several tiles per tensor. Nothing here is about durability, and a sync takes a while."""
        monkeypatch.setattr(grid, "TILE_ELEMENTS", TILE_ELEMENTS)
        for name in ("fsync", "fdatasync"):
            monkeypatch.setattr(os, name, lambda descriptor: None)

    def make(self, folder: Path, dtype: str = "BF16") -> SmallInputs:
        inputs = SmallInputs(folder, SHAPES, dtype)
        self.add_entries(inputs, SHAPES)
        return inputs

    def merge(self, recipe: Path, out: Path, **options: Any) -> sm.Report:
        options = {"memory": MEMORY, "threads": 2, "methods": self.catalogue, **options}
        return sm.merge(recipe, out=out, **options)

    @pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
    def test_streamed_equals_the_dense_formula(self, tmp_path: Path, dtype: str) -> None:
        inputs = self.make(tmp_path, dtype)
        for number, setting in enumerate(self.settings):
            recipe = inputs.recipe(self.method, setting.per_model, setting.shared)
            out = tmp_path / f"out-{number}"
            self.merge(recipe, out)
            self._check(inputs, out, setting, dtype)

    @pytest.mark.parametrize("out_dtype", ["bfloat16", "float16", "float32", "float64"])
    def test_the_output_takes_the_dtype_that_the_recipe_names(
        self, tmp_path: Path, out_dtype: str
    ) -> None:
        inputs = self.make(tmp_path, "F32")
        setting = self.settings[0]
        recipe = inputs.recipe(self.method, setting.per_model, setting.shared, out_dtype)
        self.merge(recipe, tmp_path / "out")
        label = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}[
            out_dtype
        ]
        self._check(inputs, tmp_path / "out", setting, label)

    @pytest.mark.parametrize("out_dtype", [None, "bfloat16"])
    def test_tensors_that_no_model_touches(self, tmp_path: Path, out_dtype: str | None) -> None:
        inputs = SmallInputs(tmp_path, SHAPES, "F32")
        for _ in range(self.spec.models[0]):
            inputs.add_adapter([UP], rank=2)
        setting = Setting(shared=self.settings[0].shared)
        recipe = inputs.recipe(self.method, shared=setting.shared, out_dtype=out_dtype)
        self.merge(recipe, tmp_path / "out")
        self._check(inputs, tmp_path / "out", setting, "BF16" if out_dtype else "F32")

    def _check(self, inputs: SmallInputs, out: Path, setting: Setting, dtype: str) -> None:
        merged = read_back(out)
        assert merged.keys() == inputs.base.keys()
        for name, tensor in merged.items():
            assert tensor[:2] == (dtype, inputs.base[name][1])
            # float64 outputs hold float32 results.
            rounding = "F32" if dtype == "F64" else dtype
            check(name, decode(tensor), rounding, self.answer(inputs, name, setting))

    def test_it_reads_as_much_as_was_planned(self, tmp_path: Path) -> None:
        inputs = self.make(tmp_path)
        for number, setting in enumerate(self.settings):
            recipe = inputs.recipe(self.method, setting.per_model, setting.shared)
            planned = sm.plan(recipe, memory=MEMORY, methods=self.catalogue).demand.read_bytes
            read = self.merge(recipe, tmp_path / f"out-{number}").read_bytes
            assert read == pytest.approx(planned, rel=0.01), setting

    def test_the_report_counts_the_tensors_of_each_adapter(self, tmp_path: Path) -> None:
        inputs = self.make(tmp_path)
        setting = self.settings[0]
        recipe = inputs.recipe(self.method, setting.per_model, setting.shared)
        changes = self.merge(recipe, tmp_path / "out").changes
        for entry, change in zip(inputs.entries, changes, strict=True):
            assert change.applied <= change.total, str(change)
            if entry.updates and entry.tensors is inputs.base:
                assert change.applied == change.total == len(entry.updates), str(change)

    # ------------------------------------------------------------------------------- any order

    @pytest.fixture
    def undisturbed(self, tmp_path: Path) -> tuple[Path, dict[str, bytes]]:
        """A recipe and the files that one thread makes of it."""
        inputs = self.make(tmp_path)
        setting = self.settings[-1]
        recipe = inputs.recipe(self.method, setting.per_model, setting.shared)
        self.merge(recipe, tmp_path / "undisturbed", threads=1)
        return recipe, _files(tmp_path / "undisturbed")

    @pytest.mark.parametrize("threads", [2, 3, 4])
    def test_any_number_of_threads_gives_the_same_files(
        self, undisturbed: tuple[Path, dict[str, bytes]], tmp_path: Path, threads: int
    ) -> None:
        recipe, expected = undisturbed
        for io in ("mmap", "read"):
            self.merge(recipe, tmp_path / io, threads=threads, io=io)
            assert _files(tmp_path / io) == expected

    @pytest.mark.parametrize("seed", range(3))
    def test_any_order_of_items_gives_the_same_files(
        self,
        undisturbed: tuple[Path, dict[str, bytes]],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        seed: int,
    ) -> None:
        recipe, expected = undisturbed
        AnyOrder(seed).install(monkeypatch)
        self.merge(recipe, tmp_path / "out", threads=4)
        assert _files(tmp_path / "out") == expected

    def test_random_sleeps_give_the_same_files(
        self,
        undisturbed: tuple[Path, dict[str, bytes]],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        recipe, expected = undisturbed
        chance = random.Random(0)
        for kind, name in ((ShardsSink, "write"), (ShardsSink, "copy"), (Worker, "work")):
            monkeypatch.setattr(kind, name, _late(getattr(kind, name), chance))
        self.merge(recipe, tmp_path / "out", threads=4)
        assert _files(tmp_path / "out") == expected

    # --------------------------------------------------------------------------------- memory

    def test_working_memory_is_within_the_projection(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(grid, "TILE_ELEMENTS", 1 << 16)
        inputs = SmallInputs(tmp_path, LARGE, "BF16")
        self.add_entries(inputs, LARGE)
        setting = self.settings[-1]
        recipe = inputs.recipe(self.method, setting.per_model, setting.shared)
        made = sm.plan(recipe, memory=MEMORY, methods=self.catalogue, io="read")
        jobs = [job for job in made.jobs() if isinstance(job, MergeJob)]
        assert jobs
        with made.files:
            for job in jobs:
                assert_within_its_word(job.merged)

    # ----------------------------------------------------------------------------------- knobs

    def test_every_knob_is_refused_out_of_its_bounds(self) -> None:
        for name, knob in self.spec.per_model.items():
            for bad in _outside(knob):
                self._assert_refused(f"parameters: {{{name}: {bad}}}", name, bad)
        for name, knob in self.spec.shared.items():
            for bad in _outside(knob):
                self._assert_refused("", name, bad, shared=f"parameters: {{{name}: {bad}}}\n")

    def test_every_knob_takes_its_bounds(self) -> None:
        for name, knob in {**self.spec.per_model, **self.spec.shared}.items():
            for good in _inside(knob):
                problems = self._problems("", f"parameters: {{{name}: {good}}}\n")[1]
                assert not any("is not valid" in problem.what for problem in problems), (name, good)

    def _assert_refused(self, of_model: str, knob: str, bad: str, shared: str = "") -> None:
        text, problems = self._problems(of_model, shared)
        line = next(i for i, one in enumerate(text.splitlines(), 1) if f"{knob}: " in one)
        column = text.splitlines()[line - 1].index(f"{knob}: ") + len(f"{knob}: ") + 1
        place = Place("recipe.yaml", line, column)
        found = [problem for problem in problems if problem.where == place]
        assert found, (text, [str(problem) for problem in problems])
        assert isinstance(found[0], ConfigError)
        assert knob in found[0].what
        assert found[0].expected and found[0].remedy

    def _problems(self, of_model: str, shared: str) -> tuple[str, Problems]:
        problems = Problems()
        count = self.spec.models[0]
        models = "".join(f"  - model: ./m{i}\n" for i in range(1, count))
        text = (
            f"merge_method: {self.method}\nbase_model: ./base\nmodels:\n"
            f"  - model: ./m0\n{f'    {of_model}' if of_model else ''}\n{models}{shared}"
        )
        parse_recipe(text, "recipe.yaml", Path(), self.catalogue, problems)
        return text, problems


def _outside(knob: Knob) -> Iterator[str]:
    """Values that are none of the knob's, as a recipe would spell them."""
    yield "[]"
    yield "soup"
    if isinstance(knob.default, bool):
        yield from ("0.5", "2")
        return
    if knob.choices:
        yield from ("0.5", "''", *(() if knob.switch else ("true", "false")))
        return
    if knob.whole:
        yield "1.5"
    yield from (".nan", ".inf", "-.inf", "true")
    if knob.above is not None:
        yield from (repr(knob.above), repr(knob.above - 1))
    if knob.below is not None:
        yield from (repr(knob.below), repr(knob.below + 1))
    if knob.at_least is not None:
        yield repr(float(np.nextafter(knob.at_least, -np.inf)))
    if knob.up_to is not None:
        yield repr(float(np.nextafter(knob.up_to, np.inf)))


def _inside(knob: Knob) -> Iterator[str]:
    """Values at the edge of what the knob takes."""
    if isinstance(knob.default, bool):
        yield from ("true", "false")
        return
    if knob.choices:
        yield from (*knob.choices, *(("true", "false") if knob.switch else ()))
        return
    if knob.at_least is not None:
        yield repr(knob.at_least)
    if knob.up_to is not None:
        yield repr(knob.up_to)
    if knob.above is not None:
        yield repr(knob.above + 1e-6)
    if knob.below is not None:
        yield repr(knob.below - 1e-6)
    if knob.above is None and knob.at_least is None:
        yield from ("-3.5", "0")


def _late(action: Any, chance: random.Random) -> Any:
    def slept(*args: Any, **kwargs: Any) -> Any:
        time.sleep(chance.random() * 1e-3)
        return action(*args, **kwargs)

    return slept


def _files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
