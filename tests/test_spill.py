"""Merges that spill: the same bytes as those that do not, whatever happens to the cache."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import streammerge as sm
from streammerge import events, grid, system
from streammerge.arrays import Rows
from streammerge.errors import ConfigError, OutputRefused, StorageError
from streammerge.methods import CATALOGUE
from streammerge.planning import spill
from streammerge.storage.cachedir import runs
from streammerge.storage.diskspeed import DiskSpeed
from streammerge.storage.spill import SpillArray
from tests.contracts.small_inputs import SmallInputs
from tests.running import files, run

SHAPES = {"a.weight": (60, 40), "b.weight": (33, 40), "c.weight": (7,)}
ADAPTED = ["a.weight", "b.weight"]

# Methods that look at rows more than once, on adapters, a fine-tune and an adapter of that.
RECIPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ties": ("ties", {"density": 0.4}, {}),
    "rescaled": ("dare_ties", {"density": 0.5}, {"rescale": "l1"}),
    "slerp": ("slerp", {}, {"t": 0.3}),
    "karcher": ("karcher", {}, {}),
}


@pytest.fixture(autouse=True)
def many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "TILE_ELEMENTS", 400)


@pytest.fixture
def inputs(tmp_path: Path) -> SmallInputs:
    inputs = SmallInputs(tmp_path / "in", SHAPES, "BF16")
    tuned = inputs.add_model()
    inputs.add_adapter(ADAPTED, rank=4, on=tuned)
    inputs.add_adapter(ADAPTED, rank=3)
    inputs.add_adapter(["a.weight"], rank=2)
    return inputs


def recipe_of(inputs: SmallInputs, name: str) -> Path:
    method, per_model, shared = RECIPES[name]
    most = CATALOGUE[method].models[1]
    del inputs.entries[most or len(inputs.entries) :]
    return inputs.recipe(method, [per_model] * len(inputs.entries), shared)


@pytest.mark.parametrize("name", RECIPES)
def test_always_and_never_give_the_same_files(
    inputs: SmallInputs, tmp_path: Path, name: str
) -> None:
    recipe = recipe_of(inputs, name)
    never = sm.merge(recipe, out=tmp_path / "never", spill="never")
    always = sm.merge(recipe, out=tmp_path / "always", spill="always", cache=tmp_path / "cache")
    assert files(tmp_path / "never") == files(tmp_path / "always")
    plan = sm.plan(recipe, spill="always").as_dict()
    assert always.spilled_bytes >= plan["spilled_bytes"] > 0 == never.spilled_bytes
    assert always.read_bytes < never.read_bytes
    assert not list((tmp_path / "cache").iterdir())


def test_the_plan_says_what_and_why(inputs: SmallInputs, tmp_path: Path) -> None:
    recipe = recipe_of(inputs, "ties")
    plan = sm.plan(recipe, spill="always", out=tmp_path / "out").as_dict()
    sizes = {one["name"]: (one["bytes"], one["tensors"], one["spilled"]) for one in plan["spill"]}
    numel = [60 * 40, 33 * 40, 7]
    assert sizes == {
        "m0": (4 * sum(numel), 3, True),
        "m1": (4 * sum(numel), 3, True),
        "m2": (4 * sum(numel[:2]), 2, True),
        "m3": (4 * numel[0], 1, True),
    }
    assert plan["spilled_bytes"] == sum(nbytes for nbytes, _, _ in sizes.values())
    assert 0 < plan["spilled_at_once_bytes"] <= plan["spilled_bytes"]
    told = run("plan", recipe, "--spill", "never").stdout
    assert "m1: none, rows are made again; " in told and " of 3 tensors, kept " in told
    assert run("plan", recipe, "--spill", "always").stdout.count(" of 3 tensors, kept ") == 2
    once = inputs.recipe("task_arithmetic", name="once")
    assert "spill     none: every row is made once" in run("plan", once).stdout


def test_auto_spills_what_pays(
    inputs: SmallInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill, "_ROUGH_MAKING", 1e-5)  # else so little is not worth a thought
    monkeypatch.setattr(spill, "_time_product", lambda rank: rank * 1e-5)
    recipe = recipe_of(inputs, "ties")
    found = sm.plan(recipe, out=tmp_path / "out").as_dict()
    assert {(one["name"], one["spilled"], one["tensors"]) for one in found["spill"]} == {
        ("m0", False, 3),  # a full model, stored as it is
        ("m1", False, 1),  # an adapter of that, where it changes nothing about it
        ("m1", True, 2),
        ("m2", True, 2),
        ("m3", True, 1),
    }
    slow = DiskSpeed(1.0, 1.0)
    monkeypatch.setattr(spill, "measure", lambda folder, through: slow)
    assert not any(one["spilled"] for one in sm.plan(recipe).as_dict()["spill"])


def test_without_room_auto_does_without(
    inputs: SmallInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill, "_ROUGH_MAKING", 1e-5)
    monkeypatch.setattr(spill, "_time_product", lambda rank: rank * 1e-5)
    monkeypatch.setattr(system, "free_bytes", lambda folder: 100)
    recipe = recipe_of(inputs, "ties")
    made = sm.plan(recipe)
    assert made.demand.spill.nbytes == 0
    assert any("nothing is spilled: the cache has too little room" in note for note in made.notes)
    with pytest.raises(OutputRefused, match="too little room"):
        sm.plan(recipe, spill="always")


def test_what_is_kept_is_in_the_cache(inputs: SmallInputs, tmp_path: Path) -> None:
    import zarr

    recipe = recipe_of(inputs, "ties")
    with pytest.raises(ConfigError, match="goes when the output is there"):
        sm.plan(recipe, keep_cache=True)
    options: dict[str, Any] = {"spill": "always", "cache": tmp_path / "cache", "keep_cache": True}
    sm.merge(recipe, out=tmp_path / "out", **options)
    (left,) = runs(tmp_path / "cache")
    group = zarr.open(left.spill, mode="r")
    assert left.state() == "finished" and sorted(group) == sorted(SHAPES)
    assert group["a.weight"].attrs["models"] == ["m0", "m1", "m2", "m3"]
    assert group["b.weight"].attrs["models"] == ["m0", "m1", "m2"]
    own = inputs.task_vector(inputs.entries[3], "a.weight")
    assert group["a.weight"][3].view("float32").tobytes() == own.tobytes()


def test_nothing_spilled_means_no_zarr_and_no_folder(inputs: SmallInputs, tmp_path: Path) -> None:
    recipe = recipe_of(inputs, "ties")
    done = run("merge", recipe, "--out", tmp_path / "out", "--cache", tmp_path / "cache", "--json")
    assert json.loads(done.stdout)["spilled_bytes"] == 0
    assert not list((tmp_path / "cache").glob("streammerge-*"))


# ------------------------------------------------------------------------------------- faults


@pytest.fixture
def after_each_write(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let something happen to the cache once so many tiles are in it."""

    def install(happens: Callable[[SpillArray, int, int], None], writes: int = 5) -> None:
        kept, seen = SpillArray.write, [0]

        def write(self: SpillArray, model: int, tile: int, rows: Rows) -> None:
            kept(self, model, tile, rows)
            seen[0] += 1
            if seen[0] == writes:
                happens(self, model, tile)

        monkeypatch.setattr(SpillArray, "write", write)

    return install


def test_the_cache_purged_while_it_is_needed(
    inputs: SmallInputs, tmp_path: Path, after_each_write: Callable[..., None]
) -> None:
    recipe, seen = recipe_of(inputs, "ties"), list[events.Event]()
    sm.merge(recipe, out=tmp_path / "never", spill="never")
    after_each_write(lambda *_: shutil.rmtree(tmp_path / "cache"))
    options: dict[str, Any] = {"spill": "always", "cache": tmp_path / "cache", "threads": 1}
    sm.merge(recipe, out=tmp_path / "out", emit=seen.append, **options)
    assert files(tmp_path / "never") == files(tmp_path / "out")
    told = [event.text for event in seen if isinstance(event, events.Warned)]
    assert any("spilled tiles were removed by others and made again" in text for text in told)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_damaged_chunk_ends_the_merge_and_the_next_one_succeeds(
    inputs: SmallInputs, tmp_path: Path, after_each_write: Callable[..., None], how: str
) -> None:
    recipe, out = recipe_of(inputs, "ties"), tmp_path / "out"
    sm.merge(recipe, out=tmp_path / "never", spill="never")

    def damage(array: SpillArray, model: int, tile: int) -> None:
        path = array._chunk(model, tile)
        data = bytearray(path.read_bytes())
        data[3] ^= 1
        path.write_bytes(data if how == "flipped" else data[: len(data) // 2])

    after_each_write(damage)
    options: dict[str, Any] = {"spill": "always", "cache": tmp_path / "cache"}
    with pytest.raises(StorageError, match="are not what was written") as raised:
        sm.merge(recipe, out=out, **options)
    assert raised.value.exit_code == 74 and "weight, rows " in raised.value.what
    assert not out.exists() and not list((tmp_path / "cache").iterdir())
    sm.merge(recipe, out=out, **options)
    assert files(tmp_path / "never") == files(out)


@pytest.mark.parametrize("mode", ["always", "never"])
def test_what_a_dead_run_left_goes_with_the_next(
    inputs: SmallInputs, tmp_path: Path, mode: spill.Mode
) -> None:
    recipe, out, cache = recipe_of(inputs, "ties"), tmp_path / "out", tmp_path / "cache"
    merge = (
        "import os, sys; import streammerge as sm; from streammerge import grid;"
        "from streammerge.storage.spill import SpillArray as A; grid.TILE_ELEMENTS = 400;"
        "A.read = lambda *_: os._exit(9);"
        f"sm.merge({str(recipe)!r}, out={str(out)!r}, cache={str(cache)!r}, spill='always')"
    )
    assert subprocess.run([sys.executable, "-c", merge]).returncode == 9
    (dead,) = runs(cache)
    assert dead.state() == "left" and dead.nbytes() > 0
    sm.merge(recipe, out=out, cache=cache, spill=mode)
    assert not list(cache.iterdir())
    sm.merge(recipe, out=tmp_path / "never", spill="never")
    assert files(tmp_path / "never") == files(out)
