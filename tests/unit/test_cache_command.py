"""`streammerge cache`: whose runs are listed, and that nothing else is ever removed."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from streammerge.commands.cache import STALE_SECONDS, clean, examine
from streammerge.errors import InputMissing, Refused, StorageError
from streammerge.storage.cachedir import CachedRun
from streammerge.storage.owner import Owner
from tests.running import files, run

DEAD = replace(Owner.this(), started="1")
ELSEWHERE = Owner("another.host", "b007", 4711, "12345")


def make(
    cache: Path, number: int, owner: Owner, *, finished: bool = False, old: bool = False
) -> CachedRun:
    path = cache / f"streammerge-{number:012x}"
    (path / "spill.zarr" / "up").mkdir(parents=True)
    (path / "used").mkdir()
    (path / "spill.zarr" / "up" / "c.0.0.0").write_bytes(bytes(1000))
    one = CachedRun(path, f"/out/{number}", "f00d", owner, finished=finished)
    one.write()
    if old:
        then = time.time() - STALE_SECONDS - 60
        for entry in (path / "run.json", path / "spill.zarr" / "up" / "c.0.0.0"):
            os.utime(entry, (then, then))
    return one


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A run of each state, and much that is no run."""
    folder = tmp_path / "cache"
    make(folder, 1, Owner.this())
    make(folder, 2, Owner.this(), finished=True)
    make(folder, 3, DEAD)
    make(folder, 4, DEAD, old=True)
    make(folder, 5, ELSEWHERE, old=True)
    make(folder, 6, Owner.this(), old=True)
    (folder / "streammerge-000000000007").mkdir()  # without run.json
    (folder / "streammerge-000000000007" / "mine.txt").write_text("mine")
    (folder / "streammerge-notes").mkdir()
    (folder / "streammerge-000000000008").symlink_to(tmp_path / "elsewhere")
    make(tmp_path, 9, DEAD, old=True).path.rename(tmp_path / "elsewhere")
    (folder / "streammerge-00000000000a").mkdir()
    (folder / "streammerge-00000000000a" / "run.json").write_text('{"output": 1}')
    (folder / "spill.zarr").mkdir()
    (folder / "spill.zarr" / "theirs").write_text("theirs")
    return folder


def numbers(cache: Path) -> set[int]:
    return {int(one.run.path.name.rpartition("-")[2], 16) for one in examine(cache)}


def test_runs_and_nothing_else_are_listed(cache: Path) -> None:
    states = [(one.state, one.stale) for one in examine(cache)]
    assert states == [
        ("running", False),
        ("finished", False),
        ("left", False),
        ("left", True),
        ("elsewhere", False),
        ("running", False),
    ]
    assert all(one.nbytes > 1000 for one in examine(cache))


def test_the_command_lists(cache: Path) -> None:
    done = run("cache", "list", cache, "--json")
    found = json.loads(done.stdout)
    assert [one["run"][-1] for one in found] == list("123456")
    assert found[3]["stale"] and found[3]["output"] == "/out/4"
    told = run("cache", "list", cache).stdout
    assert "its process is gone, stale" in told and "process 4711 on another.host" in told
    assert run("cache", "list", cache.parent / "elsewhere").stdout == "no run left anything here\n"


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["--stale"], {1, 2, 3, 5, 6}),
        (["--finished"], {1, 3, 4, 5, 6}),
        (["--stale", "--finished"], {1, 3, 5, 6}),
        (["streammerge-000000000003", "streammerge-000000000005"], {1, 2, 4, 6}),
    ],
)
def test_the_command_cleans(cache: Path, options: list[str], left: set[int]) -> None:
    before = files(cache)
    done = run("cache", "clean", cache, *options)
    assert done.returncode == 0 and "removed:" in done.stdout
    assert numbers(cache) == left
    gone = {f"{one:012x}" for one in {1, 2, 3, 4, 5, 6} - left}
    rest = {n: d for n, d in before.items() if n.split("/")[0].rpartition("-")[2] not in gone}
    assert files(cache) == rest
    assert (cache.parent / "elsewhere" / "run.json").exists()


def test_names_that_cannot_be_cleaned_are_all_told_and_nothing_goes(cache: Path) -> None:
    names = ["streammerge-000000000003", "streammerge-000000000001", "../elsewhere"]
    names += ["streammerge-000000000007", "streammerge-000000000008"]
    with pytest.raises(Refused) as raised:
        clean(cache, names, finished=False, stale=False)
    told = str(raised.value)
    assert told.count("no run of that name is in this cache") == 3
    assert "this run is at work" in told and str(os.getpid()) in told
    assert numbers(cache) == {1, 2, 3, 4, 5, 6}


def test_a_folder_with_others_files_stays(cache: Path) -> None:
    (cache / "streammerge-000000000004" / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="did not put there") as raised:
        clean(cache, ["streammerge-000000000004"], finished=False, stale=False)
    assert raised.value.found == "notes.txt"
    assert numbers(cache) == {1, 2, 3, 4, 5, 6}


def test_bad_calls(tmp_path: Path) -> None:
    assert run("cache", "clean", tmp_path).returncode == 2
    assert run("cache", "list", tmp_path / "none").returncode == InputMissing.exit_code
    told = run("cache", "clean", tmp_path, "--stale").stdout
    assert "nothing to remove; a run that is named goes at once" in told
