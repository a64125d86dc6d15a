"""The spill store: what zarr reads of it, and every way in which rows can be lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr

from streammerge import grid
from streammerge.arrays import Rows
from streammerge.errors import OutputRefused, StorageError
from streammerge.storage.cachedir import runs
from streammerge.storage.spill import SpillArray, SpillStore
from streammerge.words import DType, TensorSpec

NAME = "model.layers.0.up.weight"
SPEC = TensorSpec(NAME, (20, 6), DType.BF16)
TILES = [(0, 8), (8, 16), (16, 20)]  # eight rows each, the last one shorter


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "TILE_ELEMENTS", 8 * 6)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SpillStore]:
    store = SpillStore(tmp_path / "cache")
    with store.opened(tmp_path, tmp_path / "out", "f00d"):
        yield store


def rows_of(seed: int) -> Rows:
    """Random bits of 20 rows, with those that arithmetic would change."""
    rows = np.random.default_rng(seed).normal(size=(20, 6)).astype(np.float32)
    rows[:8] = 0.0  # a chunk of zeros alone
    rows[9] = [np.inf, -np.inf, np.nan, -0.0, 1e-45, 0.0]
    rows[10].view(np.uint32)[0] = 0x7FA00001  # a NaN with a payload
    return rows


def fill(store: SpillStore, spec: TensorSpec = SPEC) -> SpillArray:
    array = SpillArray(store, spec, ["math", "code"], "deltas")
    for model in range(2):
        for tile, (start, stop) in enumerate(TILES):
            array.write(model, tile, rows_of(model)[start:stop])
    return array


def group_of(cache: Path) -> Path:
    (run,) = runs(cache)
    return run.spill


def test_zarr_opens_the_group_and_reads_the_bits(store: SpillStore, tmp_path: Path) -> None:
    fill(store)
    found = zarr.open(group_of(tmp_path / "cache"), mode="r")
    assert list(found) == [NAME]
    array = found[NAME]
    assert (array.shape, array.chunks, array.dtype) == ((2, 20, 6), (1, 8, 6), np.uint32)
    assert dict(array.attrs) == {
        "tensor": NAME,
        "shape": [20, 6],
        "models": ["math", "code"],
        "kind": "deltas",
        "dtype": "float32",
    }
    for model in range(2):
        assert array[model].tobytes() == rows_of(model).tobytes()


def test_chunks_are_those_that_zarr_would_write(store: SpillStore, tmp_path: Path) -> None:
    fill(store)
    folder = group_of(tmp_path / "cache") / NAME
    ours = {path.name: path.read_bytes() for path in folder.glob("c.*")}
    assert len(ours) == 6, "one for each tile of each model, those of zeros too"
    array = zarr.open(group_of(tmp_path / "cache"), mode="r+")[NAME]
    for model in range(2):
        array[model] = rows_of(model).view(np.uint32)
    theirs = {path.name: path.read_bytes() for path in folder.glob("c.*")}
    assert ours.keys() - theirs.keys() == {"c.0.0.0", "c.1.0.0"}, "zarr leaves zeros out"
    assert theirs == {name: ours[name] for name in theirs}


@pytest.mark.parametrize("name", ["../up", "a/b", "__init__", "zarr.json", "x" * 300])
def test_names_that_are_no_names_of_folders(tmp_path: Path, store: SpillStore, name: str) -> None:
    array = fill(store, TensorSpec(name, (20, 6), DType.F32))
    folder = group_of(tmp_path / "cache")
    (one,) = [path for path in folder.iterdir() if path.is_dir()]
    assert one.name == array.key and one.name.startswith("tensor-")
    assert zarr.open(folder, mode="r")[one.name].attrs["tensor"] == name


def test_rows_come_back_as_they_were(store: SpillStore) -> None:
    array = fill(store)
    for model in range(2):
        for tile, (start, stop) in enumerate(TILES):
            out = np.empty((stop - start, 6), np.float32)
            assert array.holds(model, tile)
            array.read(model, tile, out)
            assert out.tobytes() == rows_of(model)[start:stop].tobytes()


def test_files_of_a_tensor_that_is_done_serve_the_next(store: SpillStore, tmp_path: Path) -> None:
    """A longer file first, then shorter rows: nothing of what it held may be left."""
    array = SpillArray(store, TensorSpec("long", (16, 6), DType.F32), ["math"], "deltas")
    for tile in range(2):
        array.write(0, tile, np.full((8, 6), 7.0, np.float32))
    array.drop()
    (run,) = runs(tmp_path / "cache")
    assert len(list(run.used.iterdir())) == 2
    assert not (run.spill / "long").exists()
    fill(store)
    assert not list(run.used.iterdir())
    assert zarr.open(run.spill, mode="r")[NAME][0].tobytes() == rows_of(0).tobytes()


# ---------------------------------------------------------------------------- what can be lost


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(data[:-1])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        data[17] ^= 0x10
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped"])
def test_a_damaged_chunk_is_named(store: SpillStore, tmp_path: Path, how: str) -> None:
    array = fill(store)
    path = group_of(tmp_path / "cache") / NAME / "c.1.2.0"
    damage(path, how)
    assert array.holds(1, 2)
    with pytest.raises(StorageError) as raised:
        array.read(1, 2, np.empty((4, 6), np.float32))
    problem = raised.value
    assert problem.where == str(path)
    assert f"{NAME}, rows 16 to 19," in problem.what and "not what was written" in problem.what
    assert problem.found and problem.expected and "--spill never" in str(problem.remedy)


def test_a_chunk_without_a_receipt_is_not_read(store: SpillStore, tmp_path: Path) -> None:
    """Another process's, or one that was only half written."""
    fill(store)
    other = SpillArray(store, SPEC, ["math", "code"], "deltas")
    other.write(0, 0, rows_of(0)[:8])
    assert not other.holds(0, 1)
    with pytest.raises(StorageError, match="rows 8 to 15") as raised:
        other.read(0, 1, np.empty((8, 6), np.float32))
    assert raised.value.found == "no receipt for them"


def test_a_chunk_that_somebody_removed_is_forgotten(store: SpillStore, tmp_path: Path) -> None:
    array = fill(store)
    (group_of(tmp_path / "cache") / NAME / "c.0.1.0").unlink()
    assert not array.holds(0, 1) and store.lost_chunks == 1
    assert array.holds(0, 0) and array.holds(1, 1) and store.lost_chunks == 1


def test_what_cannot_be_written_is_named(store: SpillStore, tmp_path: Path) -> None:
    array = fill(store)
    path = group_of(tmp_path / "cache") / NAME / "c.1.0.0"
    path.unlink()
    path.mkdir()
    with pytest.raises(StorageError, match="rows 0 to 7, cannot be written") as raised:
        array.write(1, 0, rows_of(1)[:8])
    assert raised.value.where == str(path) and "--cache" in str(raised.value.remedy)


# ---------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_what_stays_afterwards(tmp_path: Path, keep: bool, fails: bool) -> None:
    cache, store = tmp_path / "cache", SpillStore(tmp_path / "cache", keep=keep)
    try:
        with store.opened(tmp_path, tmp_path / "out", "f00d"):
            fill(store).drop()
            (run,) = runs(cache)
            assert run.state() == "running"
            about = json.loads((run.path / "run.json").read_text())
            assert about["output"] == str(tmp_path / "out") and about["fingerprint"] == "f00d"
            assert {"host", "process", "start"} <= about.keys()
            if fails:
                raise InterruptedError
    except InterruptedError:
        pass
    left = list(runs(cache))
    assert [run.state() for run in left] == (
        [] if not keep else ["running"] * fails or ["finished"]
    )
    if keep:
        assert zarr.open(left[0].spill, mode="r")[NAME][0].tobytes() == rows_of(0).tobytes()
    else:
        assert not list(cache.iterdir())


def test_each_run_has_a_folder_of_its_own(tmp_path: Path) -> None:
    stores = SpillStore(tmp_path), SpillStore(tmp_path)
    with (
        stores[0].opened(tmp_path, tmp_path / "a", "f00d"),
        stores[1].opened(tmp_path, tmp_path / "b", "f00d"),
    ):
        assert len(list(runs(tmp_path))) == 2
        fill(stores[0])
        array = fill(stores[1])
        stores[0].remove_array(tmp_path / "nothing", [])
        assert array.holds(0, 0)


def test_a_cache_that_cannot_be_used_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    store = SpillStore(tmp_path / "cache")
    with (
        pytest.raises(OutputRefused, match="the cache cannot be used") as raised,
        store.opened(tmp_path, tmp_path / "out", "f00d"),
    ):
        raise AssertionError("it was opened")
    assert "--spill never" in str(raised.value.remedy)
