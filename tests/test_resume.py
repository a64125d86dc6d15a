"""A merge that was stopped goes on: the same bytes, and only what was not done is done again.

The command is stopped at chosen calls (see tests/stopping.py); what it then reads again, measures
again and says is counted.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import streammerge as sm
from streammerge import grid
from streammerge.engine import run
from streammerge.errors import BadInput, Interrupted, OutputRefused, StorageError
from streammerge.manner import Manner
from streammerge.scheduler import pieces_of
from streammerge.sinks.shards import ShardsSink
from streammerge.storage.journal import Journal, read_lines
from streammerge.storage.rundir import RunDirectory
from streammerge.work import Worker
from tests.running import digest, make_inputs, write_recipe

PRUNED = """\
base_model: ./base
merge_method: ties
adapters:
  - {path: ./lora-0, weight: 0.7, density: 0.4}
  - {path: ./lora-1, weight: 0.3, density: 0.6}
"""


class Stop(RuntimeError):
    """What stands for a power cut: nothing catches it."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    write_recipe(folder, "ties", PRUNED)
    write_recipe(folder, "linear")
    return folder


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some ten tiles to a tensor, whose journal is marked every few tiles."""
    monkeypatch.setattr(grid, "TILE_ELEMENTS", 1000)
    monkeypatch.setattr("streammerge.sinks.shards.COMMIT_BYTES", 20_000)


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "TILE_ELEMENTS", 1000)
        return digest(sm.merge(inputs / "ties.yaml", out=tmp_path_factory.mktemp("u") / "out").out)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "outs").mkdir()
    return tmp_path / "outs" / "out"


def state(out: Path) -> Path:
    return out.parent / ".out.streammerge"


def stop_after(
    recipe: Path,
    out: Path,
    calls: int,
    where: tuple[type, str] = (ShardsSink, "record"),
    *,
    force: bool = False,
) -> None:
    """Merge until so many calls of a method have been made; the next one does not happen."""
    kind, name = where
    original, left = getattr(kind, name), [calls]

    def stopping(self: object, *arguments: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise Stop
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(kind, name, stopping)
        sm.merge(recipe, out=out, threads=1, force=force)
    assert out.exists() == force  # the one that is to be replaced


class Count:
    """What a run does: pieces written, tiles measured."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.written: list[tuple[str, int]] = []
        self.measured: list[str] = []
        original = Worker.work

        def work(worker: Worker, item: object) -> object:
            name = type(item).__name__
            if name in ("Merge", "Copy"):
                self.written.append((item.job.target.spec.name, item.index))  # type: ignore[attr-defined]
            if name == "Measure":
                self.measured.append(item.job.target.spec.name)  # type: ignore[attr-defined]
            return original(worker, item)  # type: ignore[arg-type]

        patch.setattr(Worker, "work", work)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Count:
    return Count(monkeypatch)


ALL = 102  # pieces of the output


def test_there_are_as_many_pieces_as_these_tests_think(inputs: Path) -> None:
    assert sum(pieces_of(job) for job in sm.plan(inputs / "ties.yaml").jobs()) == ALL


@pytest.mark.parametrize("done", [1, 25, 50, 75, ALL - 1])
def test_it_goes_on_with_the_same_bytes(
    inputs: Path, undisturbed: str, out: Path, done: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(inputs / "ties.yaml", out, done)
    count = Count(monkeypatch)
    report = sm.merge(inputs / "ties.yaml", out=out, threads=2)
    assert digest(out) == undisturbed
    assert len(count.written) == len(set(count.written))
    # Copies that no mark covers are done again; at most those of a batch.
    assert ALL - done <= len(count.written) <= ALL - done + 6
    assert (report.resumed_bytes > 0 or done == 1) and not report.already_done
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_statistics_that_are_finished_are_not_measured_again(
    inputs: Path, undisturbed: str, out: Path, count: Count
) -> None:
    stop_after(inputs / "ties.yaml", out, 30)
    lines = read_lines(state(out) / "journal")
    known = {line.record["tensor"] for line in lines if "statistic" in line.record}
    assert len(known) > 3
    count.measured.clear()
    sm.merge(inputs / "ties.yaml", out=out, threads=2)
    assert len(set(count.measured)) == 14 - len(known)
    assert not known & set(count.measured)
    assert digest(out) == undisturbed


METHODS = {
    "della": "density: 0.6, epsilon: 0.2",  # rescaled to the norm before: one statistic on another
    "breadcrumbs_ties": "density: 0.6, gamma: 0.1",
    "dare_ties": "density: 0.6",
    "sce": "",
    "karcher": "",
    "model_stock": "",
}


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_statistic_is_gone_on_with(
    inputs: Path, tmp_path: Path, out: Path, method: str
) -> None:
    knobs = METHODS[method]
    adapters = "".join(
        f"  - {{path: ./lora-{i}{', ' if knobs else ''}{knobs}}}\n" for i in range(2)
    )
    text = f"base_model: ./base\nmerge_method: {method}\nadapters:\n{adapters}"
    recipe = write_recipe(inputs, method, text)
    expected = digest(sm.merge(recipe, out=tmp_path / "undisturbed").out)
    stop_after(recipe, out, 30)
    lines = read_lines(state(out) / "journal")
    assert any("statistic" in line.record for line in lines), "none is written down"
    stop_after(recipe, out, 20)
    sm.merge(recipe, out=out, threads=2)
    assert digest(out) == expected


def test_it_may_be_stopped_again_and_again(inputs: Path, undisturbed: str, out: Path) -> None:
    for done in (20, 30, 15, 1, 40):
        stop_after(inputs / "ties.yaml", out, done)
    assert sm.merge(inputs / "ties.yaml", out=out).resumed_bytes > 0
    assert digest(out) == undisturbed


def test_bytes_that_no_mark_covers_are_looked_at(
    inputs: Path, undisturbed: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that died may have kept the journal and lost the data."""
    monkeypatch.setattr("streammerge.sinks.shards.COMMIT_BYTES", 1 << 40)
    stop_after(inputs / "ties.yaml", out, 50)
    for path in (state(out) / "output").glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        data[start + len(data) // 8 :: 5000] = bytes(len(data[start + len(data) // 8 :: 5000]))
        path.write_bytes(data)
    sm.merge(inputs / "ties.yaml", out=out)
    assert digest(out) == undisturbed


def test_what_a_mark_covers_is_not_read_again(
    inputs: Path, undisturbed: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(inputs / "ties.yaml", out, 0, (ShardsSink, "commit"))
    end = list(read_lines(state(out) / "journal"))[-1].stop
    with Journal(state(out) / "journal", end=end) as journal:
        journal.append([{"durable": end}])
    monkeypatch.setattr(ShardsSink, "holds", None)
    assert sm.merge(inputs / "ties.yaml", out=out).resumed_bytes > 0
    assert digest(out) == undisturbed


@pytest.mark.parametrize("lost", ["removed", "cut", "other header"])
def test_a_shard_that_is_not_as_it_was_left_is_written_anew(
    inputs: Path, undisturbed: str, out: Path, lost: str
) -> None:
    stop_after(inputs / "ties.yaml", out, 90)
    shard = state(out) / "output" / "model-00001-of-00002.safetensors"
    if lost == "removed":
        shard.unlink()
    elif lost == "cut":
        os.truncate(shard, 10_000)
    else:
        shard.write_bytes(b"\x07" + shard.read_bytes()[1:])
    stop_after(inputs / "ties.yaml", out, 5)  # what the journal then holds is of two files
    stop_after(inputs / "ties.yaml", out, 5)
    sm.merge(inputs / "ties.yaml", out=out)
    assert digest(out) == undisturbed


def test_a_stop_at_the_end_leaves_only_publishing(
    inputs: Path, undisturbed: str, out: Path, count: Count
) -> None:
    stop_after(inputs / "ties.yaml", out, 0, (RunDirectory, "publish"))
    count.written.clear()
    assert sm.merge(inputs / "ties.yaml", out=out).resumed_bytes > 0
    assert not count.written
    assert digest(out) == undisturbed


def test_what_was_built_and_removed_by_others_is_built_anew(
    inputs: Path, undisturbed: str, out: Path
) -> None:
    stop_after(inputs / "ties.yaml", out, 0, (RunDirectory, "publish"))
    (state(out) / "output" / "tokenizer.json").unlink()
    sm.merge(inputs / "ties.yaml", out=out)
    assert digest(out) == undisturbed


def test_a_signal_before_the_first_piece_keeps_what_it_says(
    inputs: Path, undisturbed: str, out: Path
) -> None:
    with pytest.raises(Interrupted, match="0 % done, and kept there"):
        run(sm.plan(inputs / "ties.yaml"), out, Manner(stopped=lambda: "SIGTERM"))
    assert (state(out) / "journal").exists()
    sm.merge(inputs / "ties.yaml", out=out)
    assert digest(out) == undisturbed


# ------------------------------------------------------------------------------ a spoiled journal


def test_any_torn_end_of_the_journal_will_do(inputs: Path, undisturbed: str, out: Path) -> None:
    stop_after(inputs / "ties.yaml", out, 60)
    kept = out.parent / "kept"
    shutil.copytree(state(out), kept)
    data = (kept / "journal").read_bytes()
    for size in (0, 1, 500, len(data) // 2, len(data) - 1):
        shutil.rmtree(state(out), ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(kept, state(out))
        os.truncate(state(out) / "journal", size)
        sm.merge(inputs / "ties.yaml", out=out)
        assert digest(out) == undisturbed, size


@pytest.mark.parametrize("share", [0.001, 0.3, 0.6, 0.99])
def test_a_flipped_bit_is_said_and_costs_what_follows(
    inputs: Path, undisturbed: str, out: Path, share: float
) -> None:
    stop_after(inputs / "ties.yaml", out, 100)
    journal = state(out) / "journal"
    data = bytearray(journal.read_bytes())
    data[int(share * len(data))] ^= 1
    journal.write_bytes(data)
    said: list[str] = []
    sm.merge(inputs / "ties.yaml", out=out, emit=lambda e: said.append(str(getattr(e, "text", ""))))
    assert any("damaged" in one for one in said)
    assert digest(out) == undisturbed


# ------------------------------------------------------------------- what it must not go on with


def test_another_recipe_is_refused_with_what_differs(
    inputs: Path, undisturbed: str, out: Path
) -> None:
    stop_after(inputs / "ties.yaml", out, 60)
    before = digest(state(out))
    with pytest.raises(OutputRefused, match="half done") as caught:
        sm.merge(inputs / "linear.yaml", out=out)
    assert "the recipe had `merge_method: ties`" in str(caught.value)
    assert "--force" in str(caught.value)
    assert digest(state(out)) == before
    sm.merge(inputs / "ties.yaml", out=out)
    assert digest(out) == undisturbed


def test_force_starts_over_with_another_recipe(inputs: Path, out: Path, tmp_path: Path) -> None:
    stop_after(inputs / "ties.yaml", out, 60)
    report = sm.merge(inputs / "linear.yaml", out=out, force=True)
    assert report.resumed_bytes == 0
    assert digest(out) == digest(sm.merge(inputs / "linear.yaml", out=tmp_path / "other").out)


def test_force_goes_on_with_the_same_merge(inputs: Path, undisturbed: str, out: Path) -> None:
    """The same command, which replaces another's output, was stopped and is run again."""
    before = digest(sm.merge(inputs / "linear.yaml", out=out).out)
    stop_after(inputs / "ties.yaml", out, 60, force=True)
    assert digest(out) == before
    assert sm.merge(inputs / "ties.yaml", out=out, force=True).resumed_bytes > 0
    assert digest(out) == undisturbed


def test_force_makes_a_finished_output_anew(
    inputs: Path, undisturbed: str, out: Path, count: Count
) -> None:
    for _ in range(2):
        count.written.clear()
        assert not sm.merge(inputs / "ties.yaml", out=out, force=True).already_done
        assert len(count.written) == ALL
        assert digest(out) == undisturbed


def test_without_its_state_the_same_merge_starts_over(
    inputs: Path, undisturbed: str, out: Path
) -> None:
    """As the README says."""
    stop_after(inputs / "ties.yaml", out, 60)
    shutil.rmtree(state(out))
    assert sm.merge(inputs / "ties.yaml", out=out).resumed_bytes == 0
    assert digest(out) == undisturbed


def test_one_that_is_half_done_is_left_alone_by_the_one_that_is_finished(
    inputs: Path, undisturbed: str, out: Path
) -> None:
    """It was to replace the finished output, and still can."""
    sm.merge(inputs / "linear.yaml", out=out)
    stop_after(inputs / "ties.yaml", out, 60, force=True)
    assert sm.merge(inputs / "linear.yaml", out=out).already_done
    assert sm.merge(inputs / "ties.yaml", out=out, force=True).resumed_bytes > 0
    assert digest(out) == undisturbed


@pytest.mark.parametrize("changed", ["base", "lora-1", "tokenizer"])
def test_changed_inputs_are_refused_and_named(
    inputs: Path, tmp_path: Path, out: Path, changed: str
) -> None:
    own = Path(shutil.copytree(inputs, tmp_path / "own"))
    stop_after(own / "ties.yaml", out, 60)
    if changed == "tokenizer":
        (own / "base" / "tokenizer.json").write_text("{}")
        said = "tokenizer.json"
    else:
        path = sorted((own / changed).glob("*.safetensors"))[-1]
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        said = "the weights of the base model" if changed == "base" else "weights of lora-1"
    with pytest.raises(OutputRefused) as caught:
        sm.merge(own / "ties.yaml", out=out)
    assert said in str(caught.value.found)
    assert state(out).exists()


def test_inputs_that_were_only_touched_are_the_same(
    inputs: Path, undisturbed: str, tmp_path: Path, out: Path
) -> None:
    stop_after(inputs / "ties.yaml", out, 60)
    moved = Path(shutil.copytree(inputs, tmp_path / "moved", copy_function=shutil.copyfile))
    assert sm.merge(moved / "ties.yaml", out=out).resumed_bytes > 0
    assert digest(out) == undisturbed


@pytest.mark.parametrize("other", ["format", "parts"])
def test_a_journal_of_another_version_is_refused(inputs: Path, out: Path, other: str) -> None:
    stop_after(inputs / "ties.yaml", out, 60)
    journal = state(out) / "journal"
    opening = next(read_lines(journal)).record
    journal.unlink()
    with pytest.MonkeyPatch.context() as patch:
        opening.pop("journal")
        if other == "format":
            patch.setattr("streammerge.storage.journal.VERSION", 1)
        else:
            opening["colour"] = opening.pop("layout")
        Journal(journal, opening)
    with pytest.raises(OutputRefused, match="another version") as caught:
        sm.merge(inputs / "ties.yaml", out=out)
    assert ("a journal of format 1" in str(caught.value)) == (other == "format")


def test_elsewhere_is_a_warning_or_refused(
    inputs: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(inputs / "ties.yaml", out, 60)
    monkeypatch.setattr("streammerge.planning.fingerprint.np.__version__", "9.9")
    with pytest.raises(OutputRefused, match="elsewhere") as caught:
        sm.merge(inputs / "ties.yaml", out=out, strict_bytes=True)
    assert "9.9 now" in str(caught.value.found)
    said: list[str] = []
    report = sm.merge(
        inputs / "ties.yaml", out=out, emit=lambda e: said.append(str(getattr(e, "text", "")))
    )
    assert report.resumed_bytes > 0
    assert any("begun elsewhere" in one and "numpy" in one for one in said)


# ---------------------------------------------------------------------------- what is worth keeping


def test_an_input_that_spoils_the_merge_leaves_no_state(
    inputs: Path, tmp_path: Path, out: Path
) -> None:
    own = Path(shutil.copytree(inputs, tmp_path / "own"))
    for path in (own / "base").glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-5000:] = b"\xff" * 5000
        path.write_bytes(data)
    with pytest.raises(BadInput, match="NaN"):
        sm.merge(own / "ties.yaml", out=out)
    assert not list(out.parent.iterdir())


def test_a_failed_write_leaves_what_is_done(
    inputs: Path, undisturbed: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = iter(range(60))

    def full(descriptor: int, data: object, offset: int) -> int:
        if next(written, None) is None:
            raise OSError(28, "No space left on device")
        return write_all(descriptor, data, offset)  # type: ignore[arg-type]

    from streammerge.system import write_all

    with monkeypatch.context() as patch, pytest.raises(StorageError, match="No space left"):
        patch.setattr("streammerge.system.write_all", full)
        sm.merge(inputs / "ties.yaml", out=out)
    assert state(out).exists()
    assert sm.merge(inputs / "ties.yaml", out=out).resumed_bytes > 0
    assert digest(out) == undisturbed
