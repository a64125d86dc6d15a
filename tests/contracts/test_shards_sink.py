"""The sink of safetensors shards; see `sink_contract`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from threading import Event
from typing import Any

import pytest

import streammerge as sm
from streammerge import system
from streammerge.errors import StorageError
from streammerge.sinks.shards import ShardsSink
from streammerge.storage.checksum import checksum
from streammerge.storage.journal import Journal, read_lines
from streammerge.storage.shard import ShardLayout, lay_out
from streammerge.words import DType, Extent, TensorSpec
from tests.contracts.sink_contract import (
    COPIED,
    SPLIT,
    TENSORS,
    SinkContract,
    crc32c,
    failing_once,
)
from tests.contracts.small_inputs import SmallInputs, read_back
from tests.makers import Tensor

DTYPES = {dtype.label: dtype for dtype in DType}


def layouts() -> list[ShardLayout]:
    specs = [TensorSpec(name, shape, DTYPES[d]) for name, (d, shape, _) in TENSORS.items()]
    groups = specs[:SPLIT], specs[SPLIT:]
    names = [f"model-{i}-of-00002.safetensors" for i in ("00001", "00002")]
    return [lay_out(name, group, 1003) for name, group in zip(names, groups, strict=True)]


def records(journal: Path) -> list[dict[str, Any]]:
    """The lines of a journal, each held to its checksum."""
    found = []
    for line in journal.read_bytes().splitlines():
        crc, _, text = line.partition(b" ")
        assert int(crc, 16) == crc32c(text)
        found.append(json.loads(text))
    return found


class TestShardsSink(SinkContract):
    @contextmanager
    def make(self, folder: Path) -> Iterator[ShardsSink]:
        with (
            Journal(folder / "journal", {"fingerprint": "f"}) as journal,
            ShardsSink(folder, layouts(), journal) as sink,
        ):
            yield sink

    def extents(self) -> dict[str, Extent]:
        return {name: extent for layout in layouts() for name, extent in layout.extents.items()}

    def read_back(self, folder: Path) -> dict[str, Tensor]:
        found = read_back(folder)
        return {name: found[name] for name in TENSORS}

    def journal(self, folder: Path) -> list[dict[str, Any]]:
        return records(folder / "journal")

    def marked(self, folder: Path) -> list[dict[str, Any]]:
        lines = list(read_lines(folder / "journal"))
        end = max((line.record.get("durable", 0) for line in lines), default=0)
        return [one.record for one in lines if one.start < end and "tensor" in one.record]

    def is_data(self, path: str) -> bool:
        return path.endswith(".safetensors")

    # ------------------------------------------------------------------- shards in particular

    def test_shard_checksums_are_those_of_the_files(self, folder: Path) -> None:
        sink = self.fill(folder, seed=5)
        first, second = layouts()
        expected = crc32c((folder / first.name).read_bytes())
        assert sink.sums.shards() == {first.name: expected, second.name: None}
        assert COPIED in second.extents

    def test_files_have_their_size_from_the_start(self, folder: Path) -> None:
        with self.make(folder):
            sizes = {layout.name: (folder / layout.name).stat().st_size for layout in layouts()}
        assert sizes == {layout.name: layout.size_bytes for layout in layouts()}

    def test_a_file_that_is_there_is_never_overwritten(self, folder: Path) -> None:
        (folder / layouts()[1].name).write_text("precious")
        with pytest.raises(StorageError, match="cannot be created") as caught, self.make(folder):
            pass
        assert caught.value.where == str(folder / layouts()[1].name)
        assert (folder / layouts()[1].name).read_text() == "precious"

    @pytest.mark.parametrize("nth", range(4))
    def test_a_sync_that_fails_is_an_error(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, nth: int
    ) -> None:
        fails = iter([*repeat(False, nth), True, *repeat(False, 99)])
        seen = failing_once(monkeypatch, fails, self.is_data)
        with pytest.raises(StorageError, match="durable") as caught:
            self.fill(folder, seed=6)
        assert caught.value.where == seen[nth]
        assert caught.value.exit_code == 74
        name = os.path.basename(seen[nth])
        if nth < 2:  # of the first two; the last two make sure of what was marked before
            assert name not in {one["shard"] for one in self.marked(folder)}
        assert not (folder / name).exists(), "what could not be synced is not to be relied on"

    def test_a_failed_sync_condemns_the_shard(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The kernel forgets pages that it could not write: a second sync would prove nothing."""
        monkeypatch.setattr("streammerge.sinks.shards.COMMIT_BYTES", 1)
        all_written = Event()
        seen: list[str] = []

        def sync(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if self.is_data(path):
                seen.append(path)
                if len(seen) == 1:
                    all_written.wait(10)
                    raise OSError(5, "Input/output error")

        monkeypatch.setattr(system, "sync_data", sync)
        shard = layouts()[0].name
        pieces = [piece for piece in self.pieces() if piece.target.path == shard]
        with pytest.raises(StorageError), self.make(folder) as sink:
            for piece in pieces:
                sink.record(self.write(sink, piece, folder.parent / "source"))
            all_written.set()
            sink.commit()
        assert len(seen) == 1, "the shard was synced again"
        assert not self.marked(folder)
        assert not (folder / shard).exists(), "another run would take it for good"


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path]:
    """A recipe whose output has two shards, and where it goes."""
    shapes = {f"model.layers.{i}.up.weight": (6, 5) for i in range(4)}
    inputs = SmallInputs(tmp_path, shapes)
    inputs.add_adapter(list(shapes)[:3], rank=2)
    return inputs.recipe("task_arithmetic"), tmp_path / "results" / "out"


@pytest.mark.parametrize("nth", range(4))
def test_nothing_is_published_after_a_sync_that_failed(
    small: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    recipe, out = small
    with monkeypatch.context() as patch:
        fails = iter([*repeat(False, nth), True, *repeat(False, 99)])
        failing_once(patch, fails, lambda path: path.endswith(".safetensors"))
        with pytest.raises(StorageError):
            sm.merge(recipe, out=out, memory="4GiB", threads=2)
    assert not out.exists()
    sm.merge(recipe, out=out, memory="4GiB", threads=2)
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_the_record_holds_checksums_of_the_files(small: tuple[Path, Path]) -> None:
    recipe, out = small
    sm.merge(recipe, out=out, memory="4GiB", threads=2)
    record = json.loads((out / "streammerge.json").read_text())
    assert len(record["shards"]) == 2
    whole = [name for name, one in record["shards"].items() if one["crc32c"] is not None]
    assert whole  # the other one holds a tensor that was copied inside the kernel
    for name, one in record["shards"].items():
        data = (out / name).read_bytes()
        assert one["bytes"] == len(data)
        if name in whole:
            assert one["crc32c"] == crc32c(data)
    for name, (_, _, data) in read_back(out).items():
        assert record["tensors"][name] in (None, checksum(data))
