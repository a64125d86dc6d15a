"""What every sink owes: the same files in any order, checksums of them, and honest receipts.

A subclass makes the sink in a folder. What is written are the rows of a few tensors, a tile each,
as the engine writes them; one tensor is copied from another file.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streammerge import grid, system
from streammerge.sinks.receipts import Receipt
from streammerge.sinks.shards import ShardsSink
from streammerge.words import Extent, Tile
from tests.contracts.source_contract import open_files, write_odd
from tests.makers import Tensor

# Values of any type are bytes here. Two files: the first four tensors, and the other three.
TENSORS: dict[str, Tensor] = {
    name: (dtype, shape, np.random.default_rng(number).bytes(nbytes))
    for number, (name, dtype, shape, nbytes) in enumerate(
        [
            ("a.weight", "BF16", (7, 5), 70),
            ("a.bias", "F32", (40,), 160),
            ("a.empty", "F32", (0, 4), 0),
            ("a.scale", "F16", (), 2),
            ("b.weight", "F64", (9, 3), 216),
            ("b.steps", "I64", (3,), 24),
            ("b.conv", "F16", (4, 2, 3), 48),
        ]
    )
}
SPLIT = 4
COPIED = "b.steps"


@dataclass(frozen=True, slots=True)
class Piece:
    """One tile's bytes, or a range to copy, and where they belong."""

    target: Extent
    index: int
    pieces: int
    tile: Tile
    data: bytes


def crc32c(data: bytes) -> int:
    """Castagnoli's cyclic redundancy check, bit by bit (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


class SinkContract:
    """Inherit, and say how to make the sink, what it says is done, and where."""

    def make(self, folder: Path) -> AbstractContextManager[ShardsSink]:
        """A sink in an existing folder, for `TENSORS`, in two files split at `SPLIT`."""
        raise NotImplementedError

    def extents(self) -> dict[str, Extent]:
        """Where each tensor goes."""
        raise NotImplementedError

    def read_back(self, folder: Path) -> dict[str, Tensor]:
        """What an independent reader finds."""
        raise NotImplementedError

    def journal(self, folder: Path) -> list[dict[str, Any]]:
        """The receipts that are in the journal."""
        raise NotImplementedError

    def marked(self, folder: Path) -> list[dict[str, Any]]:
        """Those of them that a mark says are durable."""
        raise NotImplementedError

    def is_data(self, path: str) -> bool:
        """Whether that is a file of the output."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------ the suite

    @pytest.fixture(autouse=True)
    def small_tiles(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(grid, "TILE_ELEMENTS", 10)

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "out").mkdir()
        return tmp_path / "out"

    def pieces(self) -> list[Piece]:
        found = []
        for name, extent in self.extents().items():
            spec, data = extent.spec, TENSORS[name][2]
            tiles = [Tile(0, spec.rows)] if name == COPIED else grid.tiles(spec)
            row = spec.cols * spec.dtype.itemsize
            for index, tile in enumerate(tiles):
                part = data[tile.start * row : tile.stop * row]
                found.append(Piece(extent, index, len(tiles), tile, part))
        assert len(found) > 10
        return found

    def write(self, sink: ShardsSink, piece: Piece, source: Path) -> Receipt:
        """Write a piece, or copy it out of a file at `source`."""
        name, crc = piece.target.spec.name, None
        if name == COPIED:
            extent = write_odd(source, {name: TENSORS[name]})[name]
            with open_files(source) as files:
                sink.copy(files, extent, piece.target, 0, len(piece.data))
        else:
            stored = np.frombuffer(bytearray(piece.data), np.uint8)
            crc = sink.write(piece.target, piece.tile, stored)
            assert crc == crc32c(piece.data)
        row_bytes = piece.target.spec.cols * piece.target.spec.dtype.itemsize
        offset = piece.target.offset + piece.tile.start * row_bytes
        place = name, piece.target.path, piece.index, piece.pieces, offset, len(piece.data)
        return Receipt(*place, crc, None if crc is not None else "elsewhere")

    def fill(self, folder: Path, *, seed: int, threads: int = 1) -> ShardsSink:
        """Write everything in an order drawn from the seed, and commit."""
        pieces = self.pieces()
        random.Random(seed).shuffle(pieces)
        source = folder.parent / f"source-{seed}-{threads}.safetensors"
        with self.make(folder) as sink, ThreadPoolExecutor(threads) as pool:
            for receipt in pool.map(lambda piece: self.write(sink, piece, source), pieces):
                sink.record(receipt)
            sink.commit()
        return sink

    @pytest.mark.parametrize(("seed", "threads"), [(0, 1), (1, 1), (2, 3)])
    def test_any_order_gives_the_same_files(self, folder: Path, seed: int, threads: int) -> None:
        self.fill(folder, seed=seed, threads=threads)
        assert self.read_back(folder) == TENSORS
        other = folder.parent / "other"
        other.mkdir()
        self.fill(other, seed=99)
        assert _data(folder) == _data(other)

    def test_checksums_are_those_of_what_was_written(self, folder: Path) -> None:
        sink = self.fill(folder, seed=3)
        expected = {name: crc32c(data) for name, (_, _, data) in TENSORS.items()}
        assert sink.sums.tensors == {**expected, COPIED: None}

    def test_every_piece_has_one_receipt(self, folder: Path) -> None:
        self.fill(folder, seed=4)
        receipts = [one for one in self.journal(folder) if "tensor" in one]
        found = sorted((one["tensor"], one["tile"], one["bytes"]) for one in receipts)
        pieces = self.pieces()
        assert found == sorted((p.target.spec.name, p.index, len(p.data)) for p in pieces)
        for receipt in receipts:
            assert ("copied" in receipt) == (receipt["tensor"] == COPIED) != ("crc32c" in receipt)

    def test_marks_follow_the_sync_of_their_data(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Small batches, and a journal that is read at each of its syncs: receipts that a mark
        covers are taken at their word by the next run."""
        monkeypatch.setattr("streammerge.sinks.shards.COMMIT_BYTES", 100)
        written: dict[tuple[str, int], str] = {}  # piece -> its file
        durable: set[tuple[str, int]] = set()
        early: list[Any] = []
        syncs = 0

        def sync(descriptor: int) -> None:
            nonlocal syncs
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if self.is_data(path):
                syncs += 1
                name = os.path.basename(path)
                durable.update(piece for piece, file in written.items() if file == name)
            else:
                done = {(one["tensor"], one["tile"]) for one in self.marked(folder)}
                early.extend(done - durable)

        monkeypatch.setattr(system, "sync_data", sync)
        source = folder.parent / "source.safetensors"
        with self.make(folder) as sink:
            for piece in self.pieces():
                receipt = self.write(sink, piece, source)
                written[receipt.tensor, receipt.index] = receipt.shard
                sink.record(receipt)
            sink.commit()
        assert not early
        assert durable == set(written)
        assert syncs > 3
        assert {(one["tensor"], one["tile"]) for one in self.marked(folder)} == durable

    def test_receipts_do_not_wait_for_the_end(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("streammerge.sinks.shards.COMMIT_BYTES", 1)
        piece = self.pieces()[0]
        with self.make(folder) as sink:
            sink.record(self.write(sink, piece, folder.parent / "source"))
        assert [one for one in self.journal(folder) if "tensor" in one]


def _data(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def failing_once(monkeypatch: pytest.MonkeyPatch, fails: Iterator[bool], is_data: Any) -> list[str]:
    """Let syncs of data fail as `fails` says; returns the paths that were synced, as they come."""
    seen: list[str] = []

    def sync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if is_data(path):
            seen.append(path)
            if next(fails):
                raise OSError(5, "Input/output error")

    monkeypatch.setattr(system, "sync_data", sync)
    return seen
