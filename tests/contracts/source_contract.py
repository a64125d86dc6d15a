"""What every source owes: the same rows however they are cut, thinned, mapped or read.

A subclass says how to make the source in a folder, with a given way of reading. The fixture of the
file puts its tensors at odd offsets, since the format promises no alignment.
"""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from streammerge.scratch import Scratch
from streammerge.storage.bytesource import Files, Io, Stamp
from streammerge.storage.header import read_header
from streammerge.words import Extent, Source, Tile
from tests.contracts.small_inputs import encode
from tests.makers import Tensor, frame, header_of
from tests.oracles.dense import UNIT, Exact, Single

OBJECT_BYTES = 24 << 10


def write_odd(path: Path, tensors: Mapping[str, Tensor]) -> Mapping[str, Extent]:
    """A safetensors file whose tensors start at odd offsets; returns where they lie."""
    one: Tensor = ("U8", (1,), b"\0")
    header = json.dumps(header_of({"before": one, **tensors})).encode()
    header += b" " * (len(header) % 2)
    data = b"".join(data for _, _, data in (one, *tensors.values()))
    path.write_bytes(frame(header, data))
    return read_header(path).tensors


def open_files(*paths: Path, io: Io = "read") -> Files:
    """The byte source of some files, as a plan makes it."""
    headers = [read_header(path) for path in paths]
    return Files({h.path: Stamp(h.size_bytes, h.mtime_ns, h.inode) for h in headers}, io)


class SourceContract:
    """Inherit, and say how to make the source and what it holds."""

    rows: ClassVar[int] = 29
    cols: ClassVar[int] = 18
    large: ClassVar[tuple[int, int]] = (512, 384)
    exact: ClassVar[bool]  # whether tiles stacked are bit-equal to the whole

    def make(self, folder: Path, io: Io, rows: int, cols: int) -> tuple[Source, Files]:
        """The source of a tensor `[rows, cols]`; the same for the same arguments."""
        raise NotImplementedError

    def values(self) -> tuple[Exact, Exact]:
        """Of the source made last: its own rows, and its difference from the base."""
        raise NotImplementedError

    def sizes(self) -> tuple[Exact, Exact]:
        """The magnitudes of the terms that those are sums of; zero where they are exact."""
        raise NotImplementedError

    base: Exact  # what `delta` is taken from, float32 values [rows, cols]

    # ------------------------------------------------------------------------------ the suite

    @pytest.fixture(params=["mmap", "read"])
    def io(self, request: pytest.FixtureRequest) -> Io:
        io: Io = request.param
        return io

    @pytest.fixture
    def made(self, tmp_path: Path, io: Io) -> Iterator[tuple[Source, Files]]:
        source, files = self.make(tmp_path, io, self.rows, self.cols)
        with files:
            yield source, files
        source.release()

    def both(self, source: Source, tile: Tile, scratch: Scratch) -> tuple[Single, Single]:
        """A tile's rows and its delta; the base's rows are only given where they are needed."""
        shape = tile.shape(source.spec)
        rows, delta = np.full((2, *shape), np.nan, np.float32)
        source.read(tile, rows, scratch)
        picked = self.base[tile.start : tile.stop : tile.row_step, :: tile.col_step]
        base = np.ascontiguousarray(picked, np.float32) if source.needs_base else None
        source.delta(tile, base, delta, scratch)
        return rows, delta

    def test_the_whole_is_what_was_stored(self, made: tuple[Source, Files]) -> None:
        source, _ = made
        got = self.both(source, Tile(0, self.rows), Scratch())
        for ours, value, size in zip(got, self.values(), self.sizes(), strict=True):
            assert np.all(np.abs(ours - value) <= 16 * UNIT * size)

    @pytest.mark.parametrize("step", [1, 2, 5, 13, 28])
    def test_tiles_stacked_are_the_whole(self, made: tuple[Source, Files], step: int) -> None:
        source, _ = made
        scratch = Scratch()
        tiles = [Tile(i, min(i + step, self.rows)) for i in range(0, self.rows, step)]
        parts = [self.both(source, tile, scratch) for tile in tiles]
        whole = self.both(source, Tile(0, self.rows), Scratch())
        for kind in range(2):
            stacked = np.concatenate([part[kind] for part in parts])
            if self.exact:
                assert stacked.tobytes() == whole[kind].tobytes()
            off = np.abs(stacked.astype(np.float64) - whole[kind])
            assert np.all(off <= 32 * UNIT * self.sizes()[kind])

    def test_a_tile_is_the_same_at_any_time(self, made: tuple[Source, Files]) -> None:
        source, _ = made
        tile = Tile(3, 11)
        first = self.both(source, tile, Scratch())
        scratch = Scratch()
        self.both(source, Tile(0, self.rows), scratch)  # larger buffers are reused
        source.release()
        again = self.both(source, tile, scratch)
        for one, other in zip(first, again, strict=True):
            assert one.tobytes() == other.tobytes()

    @pytest.mark.parametrize("steps", [(2, 1), (1, 3), (3, 5), (7, 17)])
    def test_thinned_tiles_are_the_slices(
        self, made: tuple[Source, Files], steps: tuple[int, int]
    ) -> None:
        source, _ = made
        row_step, col_step = steps
        whole = self.both(source, Tile(0, self.rows), Scratch())
        for tile in (Tile(0, self.rows, *steps), Tile(2, 23, *steps)):
            thin = self.both(source, tile, Scratch())
            for kind in range(2):
                cut = slice(tile.start, tile.stop, row_step), slice(None, None, col_step)
                expected = whole[kind][cut]
                assert thin[kind].shape == expected.shape == tile.shape(source.spec)
                off = np.abs(thin[kind].astype(np.float64) - expected)
                assert np.all(off <= 32 * UNIT * self.sizes()[kind][cut])
                if self.exact:
                    assert thin[kind].tobytes() == expected.tobytes()

    def test_mapped_and_read_give_the_same_bits(self, tmp_path: Path) -> None:
        found = []
        ways: tuple[Io, ...] = ("mmap", "read")
        for io in ways:
            folder = tmp_path / io
            folder.mkdir()
            source, files = self.make(folder, io, self.rows, self.cols)
            tiles = [Tile(0, 9), Tile(9, self.rows), Tile(0, self.rows, 3, 5)]
            with files:
                found.append([self.both(source, tile, Scratch()) for tile in tiles])
        for mapped, read in zip(*found, strict=True):
            for one, other in zip(mapped, read, strict=True):
                assert one.tobytes() == other.tobytes()

    @pytest.mark.parametrize("tile", [Tile(0, 29), Tile(4, 9), Tile(0, 29, 3, 5), Tile(1, 29, 4)])
    def test_a_delta_reads_what_it_says(self, made: tuple[Source, Files], tile: Tile) -> None:
        source, files = made
        self.both(source, Tile(0, 1), Scratch())  # what is held from now on
        before = files.read_bytes
        self._delta(source, tile, Scratch())
        assert files.read_bytes - before == source.read_bytes(tile)
        source.release()
        before = files.read_bytes
        self._delta(source, tile, Scratch())
        assert files.read_bytes - before == source.read_bytes(tile) + source.once_bytes

    def _delta(self, source: Source, tile: Tile, scratch: Scratch) -> None:
        out = np.empty(tile.shape(source.spec), np.float32)
        picked = self.base[tile.start : tile.stop : tile.row_step, :: tile.col_step]
        source.delta(tile, np.ascontiguousarray(picked, np.float32), out, scratch)

    def test_working_memory_is_within_its_word(self, tmp_path: Path, io: Io) -> None:
        source, files = self.make(tmp_path, io, *self.large)
        rows = self.large[0]
        with files:
            for tile in (Tile(0, rows), Tile(0, rows // 2), Tile(0, rows, 3, 5)):
                assert self._peak(source, tile) <= source.scratch_bytes(tile) + OBJECT_BYTES

    def _peak(self, source: Source, tile: Tile) -> int:
        """Scratch and everything besides, of a read and a delta, the caller's buffers aside."""
        shape = tile.shape(source.spec)
        out: Any = np.empty(shape, np.float32)
        picked = self.base[tile.start : tile.stop : tile.row_step, :: tile.col_step]
        base = np.ascontiguousarray(picked, np.float32)
        source.read(tile, out, Scratch())  # loads what is held
        with traced():
            scratch = Scratch()
            source.read(tile, out, scratch)
            source.delta(tile, base, out, scratch)
            return tracemalloc.get_traced_memory()[1]

    def test_what_is_held_is_within_its_word(self, tmp_path: Path, io: Io) -> None:
        source, files = self.make(tmp_path, io, *self.large)
        tile = Tile(0, 64)
        out = np.empty(tile.shape(source.spec), np.float32)
        with files, traced():
            scratch = Scratch()
            source.read(tile, out, scratch)
            word = source.resident_bytes + source.scratch_bytes(tile)
            assert tracemalloc.get_traced_memory()[1] <= word + OBJECT_BYTES
            source.release()
            del scratch
            assert tracemalloc.get_traced_memory()[0] <= OBJECT_BYTES


@contextmanager
def traced() -> Iterator[None]:
    """Count what is allocated inside."""
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


def random_tensor(rows: int, cols: int, dtype: str, seed: int) -> Tensor:
    """Normal values of a type."""
    return encode(np.random.default_rng(seed).normal(size=(rows, cols)), dtype)
