"""A killed merge goes on and gives the same bytes; two merges do not share an output.

The command is stopped at a chosen call of a chosen function, so that every kill hits its place.
"""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

import streammerge as sm
from streammerge.sizes import format_size
from tests.running import COMMAND, digest, make_inputs, run, write_recipe
from tests.stopping import stopped

# After publishing, before the state goes.
TIDYING = "streammerge.storage.lock Lock.remove_folder 1"

# Places on the way of a merge, in their order.
PLACES = {
    "the first write": "streammerge.storage.shard ShardFile.write 1",
    "a later write": "streammerge.storage.shard ShardFile.write 9",
    "a copy": "streammerge.storage.shard ShardFile.copy 3",
    "the receipts": "streammerge.storage.journal Journal.append 2",
    "the last sync": "streammerge.storage.shard ShardFile.sync 2",
    "the record": "streammerge.sinks.companions write_documents 1",
    "the rename": "os rename 1",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    write_recipe(folder, "ties")
    write_recipe(folder, "linear")
    return folder


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Recipe -> hash of its output."""
    outs = tmp_path_factory.mktemp("undisturbed")
    for recipe in ("ties", "linear"):
        sm.merge(inputs / f"{recipe}.yaml", out=outs / recipe)
    return {recipe: digest(outs / recipe) for recipe in ("ties", "linear")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the output goes, alone."""
    (tmp_path / "outs").mkdir()
    return tmp_path / "outs"


@pytest.mark.parametrize("place", list(PLACES))
def test_a_killed_merge_goes_on(
    inputs: Path, undisturbed: dict[str, str], tmp_path: Path, folder: Path, place: str
) -> None:
    out, before = folder / "out", digest(inputs)
    arguments = ("merge", "ties.yaml", "--out", out)
    with stopped(PLACES[place], tmp_path / "marks", *arguments, cwd=inputs) as merge:
        merge.send_signal(signal.SIGKILL)
    assert not out.exists(), "a final name proves completeness"
    assert [path.name for path in folder.iterdir()] == [".out.streammerge"]
    again = run(*arguments, "--json", cwd=inputs)
    assert again.returncode == 0, again.stderr
    assert digest(out) == undisturbed["ties"]
    assert [path.name for path in folder.iterdir()] == ["out"]
    assert digest(inputs) == before
    report = json.loads(again.stdout)
    assert report["peak_bytes"] <= report["projected_bytes"]


# Of two renames, the first takes the old output away and the second puts the new one there.
@pytest.mark.parametrize("renames", [1, 2])
def test_a_kill_while_replacing_loses_neither(
    inputs: Path, undisturbed: dict[str, str], tmp_path: Path, folder: Path, renames: int
) -> None:
    out = folder / "out"
    sm.merge(inputs / "ties.yaml", out=out)
    arguments = ("merge", "linear.yaml", "--out", out, "--force")
    with stopped(f"os rename {renames}", tmp_path / "marks", *arguments, cwd=inputs) as merge:
        merge.kill()
    assert not out.exists() or digest(out) == undisturbed["ties"]
    again = run(*arguments, cwd=inputs)
    assert again.returncode == 0, again.stderr
    assert digest(out) == undisturbed["linear"]
    assert [path.name for path in folder.iterdir()] == ["out"]


def test_a_kill_after_publishing_leaves_a_complete_output(
    inputs: Path, undisturbed: dict[str, str], tmp_path: Path, folder: Path
) -> None:
    """Killed before the state is removed: the same command says so, and cleans up."""
    out = folder / "out"
    arguments = ("merge", "ties.yaml", "--out", out)
    with stopped(TIDYING, tmp_path / "marks", *arguments, cwd=inputs) as merge:
        merge.kill()
    assert digest(out) == undisturbed["ties"]
    again = run(*arguments, cwd=inputs)
    assert again.returncode == 0, again.stderr
    assert "there already" in again.stdout
    assert digest(out) == undisturbed["ties"]
    assert [path.name for path in folder.iterdir()] == ["out"]


def test_what_an_old_kill_left_does_not_stop_another_merge(
    inputs: Path, undisturbed: dict[str, str], tmp_path: Path, folder: Path
) -> None:
    out = folder / "out"
    sm.merge(inputs / "ties.yaml", out=out)
    forced = ("merge", "linear.yaml", "--out", out, "--force")
    with stopped(TIDYING, tmp_path / "marks", *forced, cwd=inputs) as merge:
        merge.kill()
    assert digest(out) == undisturbed["linear"]
    other = run("merge", "ties.yaml", "--out", out, "--force", cwd=inputs)
    assert other.returncode == 0, other.stderr
    assert digest(out) == undisturbed["ties"]
    assert [path.name for path in folder.iterdir()] == ["out"]


def taken(folder: Path) -> int:
    """What `du` says."""
    blocks = [path.lstat().st_blocks for path in folder.rglob("*") if path.is_file()]
    return 512 * sum(blocks)


def stop_a_rebuild(inputs: Path, marks: Path, out: Path, number: signal.Signals) -> Path:
    """Of a finished output by TIES; returns the folder that it leaves."""
    arguments = ("merge", "ties.yaml", "--out", out, "--force")
    with stopped(PLACES["a later write"], marks, *arguments, cwd=inputs) as merge:
        merge.send_signal(number)
        (marks / "go").touch()
        merge.communicate(timeout=60)
    assert merge.returncode == (75 if number == signal.SIGTERM else -number)
    return out.parent / f".{out.name}.streammerge"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_rebuild_that_was_stopped_is_told_of_and_may_go_on(
    inputs: Path, undisturbed: dict[str, str], tmp_path: Path, folder: Path, number: signal.Signals
) -> None:
    out = folder / "out"
    sm.merge(inputs / "ties.yaml", out=out)
    state = stop_a_rebuild(inputs, tmp_path / "marks", out, number)
    left = digest(state)
    told = run("merge", "ties.yaml", "--out", out, cwd=inputs)
    assert told.returncode == 0, told.stderr
    assert "there already, complete" in told.stdout
    assert f"a rebuild of it lies half done in {state}, {format_size(taken(state))}" in told.stdout
    assert "go on:    this command with --force" in told.stdout
    assert digest(state) == left and digest(out) == undisturbed["ties"]
    on = run("merge", "ties.yaml", "--out", out, "--force", "--json", cwd=inputs)
    report = json.loads(on.stdout)
    assert report["resumed_bytes"] > 0 and report["half_done"] is None
    assert digest(out) == undisturbed["ties"]
    assert [path.name for path in folder.iterdir()] == ["out"]


def test_a_rebuild_that_was_stopped_is_discarded_as_it_says(
    inputs: Path, undisturbed: dict[str, str], tmp_path: Path, folder: Path
) -> None:
    out = folder / "an out"
    sm.merge(inputs / "ties.yaml", out=out)
    stop_a_rebuild(inputs, tmp_path / "marks", out, signal.SIGKILL)
    told = run("merge", "ties.yaml", "--out", out, cwd=inputs).stdout
    discard = next(line for line in told.splitlines() if line.startswith("  discard:"))
    subprocess.run(discard.removeprefix("  discard:"), shell=True, check=True)
    assert [path.name for path in folder.iterdir()] == ["an out"]
    again = run("merge", "ties.yaml", "--out", out, cwd=inputs)
    assert "there already, complete" in again.stdout and "half done" not in again.stdout
    assert digest(out) == undisturbed["ties"]


def test_another_merge_that_was_to_replace_it_is_told_apart(
    inputs: Path, undisturbed: dict[str, str], tmp_path: Path, folder: Path
) -> None:
    out = folder / "out"
    sm.merge(inputs / "linear.yaml", out=out)
    state = stop_a_rebuild(inputs, tmp_path / "marks", out, signal.SIGKILL)
    told = json.loads(run("merge", "linear.yaml", "--out", out, "--json", cwd=inputs).stdout)
    beside = {"path": str(state), "nbytes": taken(state), "same_merge": False, "at_work": None}
    assert told["already_done"] and told["half_done"] == beside
    said = run("merge", "linear.yaml", "--out", out, cwd=inputs).stdout
    assert "go on:    the command of that merge with --force" in said
    assert digest(out) == undisturbed["linear"]


def test_a_rebuild_that_is_under_way_is_left_alone(
    inputs: Path, undisturbed: dict[str, str], tmp_path: Path, folder: Path
) -> None:
    out, arguments = folder / "out", ("merge", "ties.yaml", "--out", folder / "out")
    sm.merge(inputs / "ties.yaml", out=out)
    marks = tmp_path / "marks"
    with stopped(PLACES["a later write"], marks, *arguments, "--force", cwd=inputs) as rebuild:
        told = run(*arguments, cwd=inputs)
        assert told.returncode == 0, told.stderr
        assert f"at work:  process {rebuild.pid} on " in told.stdout
        (marks / "go").touch()
        _, errors = rebuild.communicate(timeout=60)
        assert rebuild.returncode == 0, errors
    assert digest(out) == undisturbed["ties"]
    assert [path.name for path in folder.iterdir()] == ["out"]


@pytest.mark.parametrize("recipe", ["ties", "linear"])
def test_a_second_process_is_refused(
    inputs: Path, undisturbed: dict[str, str], tmp_path: Path, folder: Path, recipe: str
) -> None:
    out, place = folder / "out", PLACES["a later write"]
    arguments = ("merge", "ties.yaml", "--out", out)
    with stopped(place, tmp_path / "marks", *arguments, cwd=inputs) as first:
        second = run("merge", f"{recipe}.yaml", "--out", out, "--force", cwd=inputs)
        assert second.returncode == 73, second.stderr
        assert "another process is writing this output" in second.stderr
        assert str(folder) in second.stderr
        (tmp_path / "marks" / "go").touch()
        _, errors = first.communicate(timeout=60)
        assert first.returncode == 0, errors
    assert digest(out) == undisturbed["ties"]
    assert [path.name for path in folder.iterdir()] == ["out"]


def test_many_at_once_leave_one_complete_output(
    inputs: Path, undisturbed: dict[str, str], folder: Path
) -> None:
    command = [COMMAND, "merge", "ties.yaml", "--out", str(folder / "out")]
    pipe = subprocess.PIPE
    runs = [
        subprocess.Popen(command, cwd=inputs, stdout=pipe, stderr=pipe, text=True) for _ in range(3)
    ]
    said = [one.communicate(timeout=120)[1] for one in runs]
    codes = [one.returncode for one in runs]
    assert 0 in codes
    assert set(codes) <= {0, 73}, said
    assert digest(folder / "out") == undisturbed["ties"]
    assert [path.name for path in folder.iterdir()] == ["out"]
