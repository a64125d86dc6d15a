"""What may happen to files, clocks and workers while a merge runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import streammerge as sm
from streammerge import grid
from streammerge.engine import run as carry_out
from streammerge.errors import InputChanged, InputMissing
from streammerge.scheduler import Item
from streammerge.scratch import Scratch
from streammerge.work import Worker
from tests.running import COMMAND, digest, make_inputs, run, write_recipe

PRUNED = """\
base_model: ./base
merge_method: ties
adapters:
  - {path: ./lora-0, weight: 0.7, density: 0.4}
  - {path: ./lora-1, weight: 0.3, density: 0.6}
"""
SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    write_recipe(folder, "ties", PRUNED)
    write_recipe(folder, "linear")
    return folder


@pytest.fixture(scope="module")
def undisturbed(made: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return digest(sm.merge(made / "ties.yaml", out=tmp_path_factory.mktemp("u") / "out").out)


@pytest.fixture
def inputs(made: Path, tmp_path: Path) -> Path:
    """Inputs to disturb."""
    return Path(shutil.copytree(made, tmp_path / "in"))


@pytest.fixture
def during(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], object]], None]]:
    """Do something once, in the middle of a merge."""
    original, calls = Worker.work, iter(range(10**6))

    def arrange(action: Callable[[], object]) -> None:
        def work(worker: Worker, item: Item) -> object:
            if next(calls) == 12:
                action()
            return original(worker, item)

        monkeypatch.setattr(Worker, "work", work)

    yield arrange
    monkeypatch.undo()


During = Callable[[Callable[[], object]], None]


def assert_mended(inputs: Path, made: Path, out: Path, undisturbed: str) -> None:
    """With the inputs as they were, the same command goes on."""
    shutil.rmtree(inputs)
    shutil.copytree(made, inputs)
    sm.merge(inputs / "ties.yaml", out=out)
    assert digest(out) == undisturbed


# --------------------------------------------------------------------------------- changed inputs


@pytest.mark.parametrize("io", ["mmap", "read"])
def test_an_input_that_is_cut_is_named(
    inputs: Path, made: Path, tmp_path: Path, undisturbed: str, during: During, io: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Mapped, a read past the end would be a SIGBUS, which no Python program survives."""
    path, out = inputs / "base" / SHARD, tmp_path / "out"
    during(lambda: os.truncate(path, path.stat().st_size // 2))
    with pytest.raises(InputChanged) as caught:
        sm.merge(inputs / "ties.yaml", out=out, io=io)  # type: ignore[arg-type]
    assert caught.value.where == str(path)
    assert caught.value.exit_code == 65 and caught.value.remedy
    assert not out.exists()
    monkeypatch.undo()
    assert_mended(inputs, made, out, undisturbed)


def test_an_input_that_is_rewritten_is_named(
    inputs: Path, made: Path, tmp_path: Path, undisturbed: str, during: During,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path, out = inputs / "lora-1" / "adapter_model.safetensors", tmp_path / "out"
    during(lambda: path.write_bytes(path.read_bytes()))
    with pytest.raises(InputChanged, match="changed after the merge was planned") as caught:
        sm.merge(inputs / "ties.yaml", out=out)
    assert caught.value.where == str(path)
    monkeypatch.undo()
    assert_mended(inputs, made, out, undisturbed)


def test_an_input_that_is_replaced_is_named(
    inputs: Path, made: Path, tmp_path: Path, undisturbed: str, during: During,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Another file takes the name; what was opened before stays as it was."""
    path, out = inputs / "base" / SHARD, tmp_path / "out"

    def replace() -> None:
        other = Path(shutil.copy(path, path.with_name("other")))
        other.replace(path)

    during(replace)
    monkeypatch.setattr("streammerge.storage.bytesource._OPEN_FILES", 0)  # opened at each read
    with pytest.raises(InputChanged) as caught:
        sm.merge(inputs / "ties.yaml", out=out)
    assert caught.value.where == str(path)
    monkeypatch.undo()
    assert_mended(inputs, made, out, undisturbed)


@pytest.mark.parametrize("open_files", [0, 24])
def test_an_input_that_is_deleted_is_named_or_read_on(
    inputs: Path, made: Path, tmp_path: Path, undisturbed: str, during: During, open_files: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A file that is open lives on until it is closed, and may be read to the end."""
    path, out = inputs / "base" / SHARD, tmp_path / "out"
    during(path.unlink)
    monkeypatch.setattr("streammerge.storage.bytesource._OPEN_FILES", open_files)
    try:
        sm.merge(inputs / "ties.yaml", out=out)
    except InputMissing as error:
        assert error.where == str(path)
        assert error.found == "No such file or directory"
    else:
        assert open_files
    monkeypatch.undo()
    shutil.rmtree(out, ignore_errors=True)
    assert_mended(inputs, made, out, undisturbed)


@pytest.mark.parametrize(
    "name",
    [f"base/{SHARD}", "lora-1/adapter_model.safetensors", "lora-1/adapter_config.json"],
)
def test_an_input_that_goes_before_the_run_is_missing(
    inputs: Path, tmp_path: Path, name: str
) -> None:
    """Whoever misses it first: the warning of torn files, the fingerprint, or the merge."""
    made = sm.plan(inputs / "ties.yaml")
    (inputs / name).unlink()
    with pytest.raises(InputMissing) as caught:
        carry_out(made, tmp_path / "out")
    assert caught.value.where == str(inputs / name)
    assert caught.value.exit_code == 66 and caught.value.remedy
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("disturb", "error"),
    [(Path.unlink, InputMissing), (lambda path: path.write_text("{}"), InputChanged)],
    ids=["deleted", "rewritten"],
)
def test_a_tokenizer_that_changes_during_a_merge_is_named(
    inputs: Path, made: Path, tmp_path: Path, undisturbed: str, during: During,
    monkeypatch: pytest.MonkeyPatch, disturb: Callable[[Path], object], error: type[Exception],
) -> None:  # fmt: skip
    """It is copied at the end, and the output must be what its fingerprint says."""
    path, out = inputs / "base" / "tokenizer.json", tmp_path / "out"
    during(lambda: disturb(path))
    with pytest.raises(error, match=r"tokenizer\.json"):
        sm.merge(inputs / "ties.yaml", out=out)
    assert not out.exists()
    monkeypatch.undo()
    assert_mended(inputs, made, out, undisturbed)


@pytest.mark.parametrize("io", ["mmap", "read"])
def test_an_input_that_is_emptied_before_it_is_opened_is_named(
    inputs: Path, tmp_path: Path, io: str
) -> None:
    made = sm.plan(inputs / "linear.yaml", io=io)  # type: ignore[arg-type]
    path = inputs / "base" / SHARD
    extent = next(iter(made.inputs.donor.shards[1].tensors.values()))
    os.truncate(path, 0)
    tile, scratch = next(iter(grid.tiles(extent.spec))), Scratch()
    with made.files, pytest.raises(InputChanged) as caught, made.files.tile(extent, tile, scratch):
        pass
    assert caught.value.where == str(path)


# ---------------------------------------------------------------------------------- short calls


def test_short_reads_and_writes_are_continued(
    made: Path, tmp_path: Path, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, preadv, copy = os.pwrite, os.preadv, os.copy_file_range
    monkeypatch.setattr(
        "os.pwrite", lambda fd, data, at: pwrite(fd, data[: -(-len(data) // 3)], at)
    )
    monkeypatch.setattr(
        "os.preadv", lambda fd, to, at: preadv(fd, [to[0][: -(-len(to[0]) // 3)]], at)
    )
    monkeypatch.setattr("os.copy_file_range", lambda a, b, n, *at: copy(a, b, -(-n // 3), *at))
    sm.merge(made / "ties.yaml", out=tmp_path / "out", io="read")
    monkeypatch.undo()
    assert digest(tmp_path / "out") == undisturbed


# ------------------------------------------------------------------------------------- elsewhere


def test_every_folder_may_be_a_file_system_of_its_own(
    made: Path, tmp_path: Path, undisturbed: str
) -> None:
    """Copies inside the kernel fall back to reading and writing."""
    points = [tmp_path / name for name in ("base", "lora", "out", "cache")]
    try:
        for point in points:
            point.mkdir()
            command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(point)]
            if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
                pytest.skip("needs root, to mount a file system")
        base, lora, out, cache = points
        shutil.copytree(made / "base", base / "base")
        shutil.copytree(made / "lora-1", lora / "lora-1")
        text = PRUNED.replace("./base", str(base / "base")).replace(
            "./lora-0", str(made / "lora-0")
        )
        recipe = write_recipe(tmp_path, "cfg", text.replace("./lora-1", str(lora / "lora-1")))
        done = run("merge", recipe, "--out", out / "out", "--cache", cache)
        assert done.returncode == 0, done.stderr
        assert digest(out / "out") == undisturbed
    finally:
        for point in points:
            subprocess.run(["umount", "-l", str(point)], capture_output=True)


def test_a_read_only_file_system_is_said(made: Path, tmp_path: Path) -> None:
    point = tmp_path / "point"
    point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(point)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs root, to mount a file system")
    try:
        for option in ("--out", "--cache"):
            given = {"--out": tmp_path / "out", option: point / "x"}
            arguments = [word for pair in given.items() for word in pair]
            done = run("merge", made / "ties.yaml", *arguments)
            assert done.returncode == 73, done.stderr
            assert str(point) in done.stderr and "  remedy:" in done.stderr
    finally:
        subprocess.run(["umount", str(point)], check=True)


def test_clocks_do_not_matter(
    inputs: Path, tmp_path: Path, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs from the future, and a clock that goes backwards while a merge runs."""
    for path in inputs.rglob("*"):
        os.utime(path, (2**32, 2**32))
    now = iter(range(10**6, 0, -1))
    monkeypatch.setattr(time, "time", lambda: next(now))
    sm.merge(inputs / "ties.yaml", out=tmp_path / "out")
    assert digest(tmp_path / "out") == undisturbed


def test_a_purged_cache_costs_nothing(made: Path, tmp_path: Path, undisturbed: str) -> None:
    cache = tmp_path / "cache"
    for _ in range(2):
        done = run("merge", made / "ties.yaml", "--out", tmp_path / "out", "--cache", cache)
        assert done.returncode == 0, done.stderr
        assert digest(tmp_path / "out") == undisturbed
        shutil.rmtree(cache)


def test_a_cgroup_just_above_the_budget(made: Path, tmp_path: Path, undisturbed: str) -> None:
    """The kernel kills what exceeds the limit: memory that only the budget bounds."""
    group = next((f for f in _memory_groups() if _can_make(f)), None)
    if group is None:
        pytest.skip("needs a memory cgroup that can be written to")
    try:
        name = "memory.max" if (group / "memory.max").exists() else "memory.limit_in_bytes"
        (group / name).write_text(str(300 << 20))
        script = f'echo $$ > {group}/cgroup.procs && exec "$0" "$@"'
        command = [COMMAND, "merge", str(made / "ties.yaml"), "--out", str(tmp_path / "out")]
        done = subprocess.run(
            ["sh", "-c", script, *command, "--memory", "260MiB"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert digest(tmp_path / "out") == undisturbed
    finally:
        time.sleep(0.1)
        group.rmdir()


def _memory_groups() -> Iterator[Path]:
    for root in ("/sys/fs/cgroup/memory", "/sys/fs/cgroup"):
        yield Path(root) / f"streammerge-test-{os.getpid()}"


def _can_make(group: Path) -> bool:
    try:
        group.mkdir()
    except OSError:
        return False
    if any((group / name).exists() for name in ("memory.max", "memory.limit_in_bytes")):
        return True
    group.rmdir()
    return False


# --------------------------------------------------------------------------------------- workers


def test_a_worker_that_fails_ends_the_merge_with_its_error(
    inputs: Path, made: Path, tmp_path: Path, undisturbed: str, during: During,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Items in flight beside it finish, and what they wrote counts or is written again."""
    out = tmp_path / "out"

    def fail() -> None:
        raise MemoryError("no memory for a tile")

    during(fail)
    with pytest.raises(MemoryError):
        sm.merge(inputs / "ties.yaml", out=out, threads=4)
    assert not out.exists()
    monkeypatch.undo()
    assert_mended(inputs, made, out, undisturbed)


def test_reserving_is_not_needed(
    made: Path, tmp_path: Path, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that cannot reserve blocks gets a file of the size."""

    def refuse(*_: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.posix_fallocate", refuse)
    sm.merge(made / "ties.yaml", out=tmp_path / "out")
    assert digest(tmp_path / "out") == undisturbed
