"""Where an output goes: mount points, full disks, few handles, no flock."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import streammerge as sm
from streammerge.errors import OutputRefused, Refused, StorageError
from streammerge.sinks.shards import ShardsSink
from streammerge.storage.lock import Lock, Owner
from streammerge.storage.rundir import RunDirectory
from tests.running import COMMAND, digest, make_inputs, write_recipe


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    write_recipe(folder, "ties")
    write_recipe(folder, "linear")
    many = "ties" + "\noutput: {shard_size: 2KB}"
    write_recipe(folder, "many").write_text((folder / "ties.yaml").read_text() + many[4:] + "\n")
    return folder


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return digest(sm.merge(inputs / "ties.yaml", out=tmp_path_factory.mktemp("u") / "out").out)


class Stop(RuntimeError):
    """What stands for a power cut."""


def stop_at(patch: pytest.MonkeyPatch, kind: type, name: str, calls: int) -> None:
    """Let a method be called so many times, and no more."""
    original, left = getattr(kind, name), iter(range(calls))

    def stopping(*arguments: object) -> object:
        if next(left, None) is None:
            raise Stop
        return original(*arguments)

    patch.setattr(kind, name, stopping)


Mount = Callable[..., Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Makes small file systems; needs root."""
    made: list[Path] = []

    def make(size: str, inodes: int = 0) -> Path:
        point = tmp_path / f"mount-{len(made)}"
        point.mkdir()
        options = f"size={size}" + (f",nr_inodes={inodes}" if inodes else "")
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(point)]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs root, to mount a file system")
        made.append(point)
        return point

    yield make
    for point in made:
        subprocess.run(["umount", "-l", str(point)], check=True)


def test_a_setgid_folder_gives_its_group(inputs: Path, tmp_path: Path) -> None:
    """As on a file system that a team shares."""
    if os.geteuid():
        pytest.skip("needs root, to give a folder to a group")
    team = 54321
    shared = tmp_path / "shared"
    shared.mkdir()
    os.chown(shared, -1, team)
    shared.chmod(0o2775)
    out = sm.merge(inputs / "ties.yaml", out=shared / "out").out
    assert {path.stat().st_gid for path in (out, *out.rglob("*"))} == {team}
    assert out.stat().st_mode & 0o2000


# --------------------------------------------------------------------------- an existing folder


def test_a_mount_point_takes_the_output(inputs: Path, undisturbed: str, mount: Mount) -> None:
    out = mount("20m")
    sm.merge(inputs / "ties.yaml", out=out)
    assert digest(out) == undisturbed
    assert sm.merge(inputs / "ties.yaml", out=out).already_done
    assert digest(out) == undisturbed
    with pytest.raises(OutputRefused, match="mount point"):
        sm.merge(inputs / "linear.yaml", out=out, force=True)
    assert digest(out) == undisturbed


def test_a_fresh_file_system_is_empty(inputs: Path, undisturbed: str, tmp_path: Path) -> None:
    (tmp_path / "out" / "lost+found").mkdir(parents=True)
    sm.merge(inputs / "ties.yaml", out=tmp_path / "out")
    (tmp_path / "out" / "lost+found").rmdir()
    assert digest(tmp_path / "out") == undisturbed


def test_a_merge_inside_a_folder_goes_on(
    inputs: Path, undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, ShardsSink, "record", 9)
        sm.merge(inputs / "ties.yaml", out=out)
    assert [path.name for path in out.iterdir()] == [".streammerge"]
    assert sm.merge(inputs / "ties.yaml", out=out).resumed_bytes > 0
    assert digest(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("moved", range(9))
def test_a_stop_among_the_renames_leaves_no_model_and_goes_on(
    inputs: Path, undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    """The index comes last: a loader finds the whole model or none."""
    out = tmp_path / "out"
    out.mkdir()
    rename, left = os.rename, iter(range(moved))

    def stopping(*arguments: Path) -> None:
        if next(left, None) is None:
            raise Stop
        rename(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr("os.rename", stopping)
        sm.merge(inputs / "ties.yaml", out=out)
    assert not (out / "model.safetensors.index.json").exists()
    if moved == 8:
        assert len(list(out.iterdir())) == 9
    sm.merge(inputs / "ties.yaml", out=out)
    assert digest(out) == undisturbed


def test_another_merge_after_such_a_stop_is_refused_or_forced(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    out.mkdir()
    rename, left = os.rename, iter(range(4))

    def stopping(*arguments: Path) -> None:
        if next(left, None) is None:
            raise Stop
        rename(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr("os.rename", stopping)
        sm.merge(inputs / "ties.yaml", out=out)
    with pytest.raises(OutputRefused, match="half done"):
        sm.merge(inputs / "linear.yaml", out=out)
    sm.merge(inputs / "linear.yaml", out=out, force=True)
    assert digest(out) == digest(sm.merge(inputs / "linear.yaml", out=other).out)


def test_what_others_put_there_meanwhile_is_kept(
    inputs: Path, undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    publish = RunDirectory.publish

    def late(state: RunDirectory, last: str) -> None:
        (out / "config.json").write_text("mine")
        publish(state, last)

    with monkeypatch.context() as patch, pytest.raises(OutputRefused, match=r"config\.json"):
        patch.setattr(RunDirectory, "publish", late)
        sm.merge(inputs / "ties.yaml", out=out)
    assert (out / "config.json").read_text() == "mine"
    (out / "config.json").unlink()
    sm.merge(inputs / "ties.yaml", out=out)
    assert digest(out) == undisturbed


# ----------------------------------------------------------------------------------- full disks


def test_too_small_a_disk_is_refused_before_data_moves(inputs: Path, mount: Mount) -> None:
    out = mount("256k") / "out"
    with pytest.raises(OutputRefused, match="not enough space") as caught:
        sm.merge(inputs / "ties.yaml", out=out)
    assert "256 KiB free" in str(caught.value.found)
    assert not list(out.parent.iterdir())


def test_too_few_inodes_are_refused(inputs: Path, mount: Mount) -> None:
    out = mount("20m", inodes=12) / "out"
    with pytest.raises(OutputRefused, match="not enough inodes"):
        sm.merge(inputs / "ties.yaml", out=out)
    assert not list(out.parent.iterdir())


def test_space_and_inodes_are_said_at_once(inputs: Path, mount: Mount) -> None:
    with pytest.raises(Refused) as caught:
        sm.merge(inputs / "ties.yaml", out=mount("256k", inodes=12) / "out")
    assert [problem.exit_code for problem in caught.value.problems] == [73, 73]


def test_the_plan_refuses_what_does_not_fit(inputs: Path, mount: Mount) -> None:
    out = mount("256k") / "out"
    command = [COMMAND, "plan", str(inputs / "ties.yaml"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 73
    assert "not enough space for the output" in done.stderr


@pytest.mark.parametrize("free", [0, 4096, 12_000])
def test_a_disk_that_others_fill_leaves_what_can_be_gone_on_from(
    inputs: Path, undisturbed: str, mount: Mount, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    """Blocks are reserved at the start; what is still to come are journal and small files."""
    point = mount("3m")
    out, filler = point / "out", point / "filler"

    def fill(sink: ShardsSink, receipt: object) -> None:
        if not filler.exists():
            room = os.statvfs(point)
            filler.write_bytes(bytes(max(0, room.f_bavail * room.f_frsize - free)))
        record(sink, receipt)  # type: ignore[arg-type]

    record = ShardsSink.record
    with (
        monkeypatch.context() as patch,
        pytest.raises(StorageError, match="No space left") as caught,
    ):
        patch.setattr(ShardsSink, "record", fill)
        sm.merge(inputs / "ties.yaml", out=out)
    assert caught.value.exit_code == 74 and caught.value.remedy
    assert not out.exists()
    filler.unlink()
    sm.merge(inputs / "ties.yaml", out=out)
    assert digest(out) == undisturbed
    assert [path.name for path in point.iterdir()] == ["out"]


def test_room_that_an_unfinished_run_has_taken_is_counted(
    inputs: Path, undisturbed: str, mount: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = mount("1600k")
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, ShardsSink, "record", 9)
        sm.merge(inputs / "ties.yaml", out=point / "out")
    sm.merge(inputs / "ties.yaml", out=point / "out")
    assert digest(point / "out") == undisturbed


# --------------------------------------------------------------------------------------- limits


def limited(limit: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    script = f'ulimit {limit} && exec "$0" "$@"'
    return subprocess.run(
        ["sh", "-c", script, COMMAND, *map(str, arguments)], capture_output=True, text=True
    )


def test_64_handles_are_enough(inputs: Path, tmp_path: Path) -> None:
    """For two models and an output of eighteen files each."""
    for name in ("one", "two"):
        sm.merge(inputs / "many.yaml", out=tmp_path / name)
    text = "merge_method: linear\nmodels: [{model: ./one}, {model: ./two}]\n"
    recipe = write_recipe(tmp_path, "both", text)
    expected = sm.merge(recipe, out=tmp_path / "expected").out
    assert len(list(expected.glob("*.safetensors"))) == 18
    done = limited("-n 64", "merge", recipe, "--out", tmp_path / "out", "--threads", "16")
    assert done.returncode == 0, done.stderr
    assert digest(tmp_path / "out") == digest(expected)


def test_a_file_size_limit_is_refused_with_both_remedies(inputs: Path, tmp_path: Path) -> None:
    done = limited("-f 40", "merge", inputs / "ties.yaml", "--out", tmp_path / "out")
    assert done.returncode == 73, done.stderr
    assert "ulimit -f" in done.stderr and "--shard-size" in done.stderr
    assert not list(tmp_path.iterdir())
    small = limited(
        "-f 400", "merge", inputs / "ties.yaml", "--out", tmp_path / "out", "--shard-size", "50KB"
    )
    assert small.returncode == 0, small.stderr


# ---------------------------------------------------------------------------------------- locks


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_without_flock_it_works_and_tidies_up(
    inputs: Path, undisturbed: str, tmp_path: Path, no_flock: None
) -> None:
    sm.merge(inputs / "ties.yaml", out=tmp_path / "out")
    assert digest(tmp_path / "out") == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_flock_a_second_process_is_refused(tmp_path: Path, no_flock: None) -> None:
    first = Lock(tmp_path / "state")
    with pytest.raises(OutputRefused, match="another process") as caught:
        Lock(tmp_path / "state")
    assert f"process {os.getpid()} on" in str(caught.value.found)
    first.release()
    Lock(tmp_path / "state").release()


@pytest.mark.parametrize("dead", ["a number that is free", "another start", "another boot"])
def test_without_flock_the_lock_of_a_dead_process_is_taken_over(
    inputs: Path, undisturbed: str, tmp_path: Path, no_flock: None, dead: str
) -> None:
    out, state = tmp_path / "out", tmp_path / ".out.streammerge"
    state.mkdir()
    this = Owner.this()
    fields = {"host": this.host, "boot": this.boot, "pid": this.pid, "started": this.started}
    changes = {
        "a number that is free": {"pid": 2**22 + 1},
        "another start": {"started": "1"},
        "another boot": {"boot": "b"},
    }
    (state / "owner").write_text(json.dumps(fields | changes[dead]))
    sm.merge(inputs / "ties.yaml", out=out)
    assert digest(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_flock_the_lock_of_another_machine_is_kept(
    inputs: Path, tmp_path: Path, no_flock: None
) -> None:
    state = tmp_path / ".out.streammerge"
    state.mkdir()
    text = json.dumps({"host": "elsewhere", "boot": "b", "pid": 7, "started": "1"})
    (state / "owner").write_text(text)
    with pytest.raises(OutputRefused, match="another process") as caught:
        sm.merge(inputs / "ties.yaml", out=tmp_path / "out")
    assert caught.value.found == "process 7 on elsewhere"
    assert f"remove {state / 'owner'}" in str(caught.value.remedy)
    assert (state / "owner").read_text() == text
