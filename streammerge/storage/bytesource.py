"""Bytes of input files, tile by tile: read into the caller's buffer, or mapped with numpy.

Reading is the faster of the two (docs/decisions/0017-inputs-are-read.md), and a mapped file that
shrinks under the process is a SIGBUS that Python cannot catch. Every read first compares the file
with what the plan saw.
"""

from __future__ import annotations

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from streammerge import system
from streammerge.arrays import RawBytes
from streammerge.errors import InputChanged
from streammerge.scratch import Scratch
from streammerge.storage.smallfile import unreadable
from streammerge.words import Extent, Tile

Io = Literal["auto", "mmap", "read"]

# Files kept open at once, and handles left to all others: a merge of many shards must not run into
# the limit. A mapped file takes two.
_OPEN_FILES = 24
_OTHER_HANDLES = 32


@dataclass(frozen=True, slots=True)
class Stamp:
    """What must stay equal while a merge reads a file."""

    size_bytes: int
    mtime_ns: int
    inode: int


@dataclass(slots=True)
class _Handle:
    descriptor: int
    mapped: np.memmap[Any, np.dtype[np.uint8]] | None
    users: int = 0


class Files:
    """The open input files of a merge, shared by its threads; opened on first use.

    Pickles as a description: a worker process opens its own handles.
    """

    def __init__(self, stamps: Mapping[str, Stamp], io: Io = "auto") -> None:
        self._stamps = dict(stamps)
        self.mapped = io == "mmap"
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _Handle] = OrderedDict()
        self._most = _most_open()
        self.read_bytes = 0  # of tensors, so far

    def __reduce__(self) -> tuple[type[Files], tuple[Mapping[str, Stamp], Io]]:
        return Files, (self._stamps, "mmap" if self.mapped else "read")

    @contextmanager
    def tile(self, extent: Extent, tile: Tile, scratch: Scratch) -> Iterator[RawBytes]:
        """The stored bytes of a tile, row after row, valid inside the `with`."""
        spec = extent.spec
        row_bytes = spec.cols * spec.dtype.itemsize
        with self._borrow(extent.path, tile.shape(spec)[0] * row_bytes) as handle:
            if tile.thinned:
                yield self._sample(handle, extent, tile, scratch)
                return
            offset = extent.offset + tile.start * row_bytes
            length = (tile.stop - tile.start) * row_bytes
            if handle.mapped is None:
                buffer = scratch.array("stored", (length,), np.uint8)
                _read_into(handle.descriptor, extent.path, offset, buffer)
                yield buffer
                return
            yield handle.mapped[offset : offset + length]
            system.drop_mapped(handle.mapped._mmap, offset, length)  # type: ignore[attr-defined]

    def block(self, extent: Extent, rows: range, cols: range, out: RawBytes) -> None:
        """A block of a stored matrix, by reading; `out` takes `len(rows) * len(cols)` elements.

        `rows` may have a step, `cols` may not.
        """
        size = extent.spec.dtype.itemsize
        row_bytes = extent.spec.cols * size
        length = len(cols) * size
        with self._borrow(extent.path, len(rows) * length) as handle:
            if length == row_bytes and rows.step == 1:
                start = extent.offset + rows.start * row_bytes
                _read_into(handle.descriptor, extent.path, start, out)
                return
            for i, row in enumerate(rows):
                start = extent.offset + row * row_bytes + cols.start * size
                target = out[i * length : (i + 1) * length]
                _read_into(handle.descriptor, extent.path, start, target)

    @contextmanager
    def descriptor(self, path: str, length: int) -> Iterator[int]:
        """The file's descriptor, for a copy of `length` bytes inside the kernel."""
        with self._borrow(path, length) as handle:
            yield handle.descriptor

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the files; a further read opens them again."""
        with self._lock:
            for handle in self._open.values():
                _close(handle)
            self._open.clear()

    def _sample(self, handle: _Handle, extent: Extent, tile: Tile, scratch: Scratch) -> RawBytes:
        """A thinned tile, read and never mapped: each touched row would map its surroundings."""
        spec = extent.spec
        size = spec.dtype.itemsize
        row = scratch.array("sampled row", (spec.cols, size), np.uint8)
        rows, cols = tile.shape(spec)
        out = scratch.array("stored", (rows, cols, size), np.uint8)
        for i, index in enumerate(range(tile.start, tile.stop, tile.row_step)):
            offset = extent.offset + index * spec.cols * size
            _read_into(handle.descriptor, extent.path, offset, row.reshape(-1))
            out[i] = row[:: tile.col_step]
        return out.reshape(-1)

    @contextmanager
    def _borrow(self, path: str, nbytes: int) -> Iterator[_Handle]:
        """An open file, to read so many bytes of it."""
        with self._lock:
            self.read_bytes += nbytes
            handle = self._open.get(path)
            if handle is None:
                handle = self._open[path] = self._open_file(path)
            self._open.move_to_end(path)
            handle.users += 1
        try:
            self._compare(path, handle.descriptor)
            yield handle
        finally:
            with self._lock:
                handle.users -= 1
                if len(self._open) > self._most:
                    self._close_idle()

    def _close_idle(self) -> None:
        surplus = len(self._open) - self._most
        idle = [path for path, handle in self._open.items() if handle.users == 0]
        for path in idle[:surplus]:
            _close(self._open.pop(path))

    def _open_file(self, path: str) -> _Handle:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise unreadable(path, error, "cannot be opened") from error
        if not self.mapped or self._stamps[path].size_bytes == 0:
            return _Handle(descriptor, None)
        try:
            return _Handle(descriptor, np.memmap(path, np.uint8, "r"))
        except OSError as error:
            os.close(descriptor)
            raise unreadable(path, error, "cannot be mapped") from error
        except ValueError as error:  # which is how numpy refuses to map an empty file
            os.close(descriptor)
            raise _cut_short(path, 0, self._stamps[path].size_bytes) from error

    def _compare(self, path: str, descriptor: int) -> None:
        now = os.fstat(descriptor)
        planned = self._stamps[path]
        found = Stamp(now.st_size, now.st_mtime_ns, now.st_ino)
        if found != planned:
            raise InputChanged(
                "the file changed after the merge was planned",
                where=path,
                found=f"{found.size_bytes} bytes, mtime {found.mtime_ns} ns, inode {found.inode}",
                expected=(
                    f"{planned.size_bytes} bytes, mtime {planned.mtime_ns} ns, "
                    f"inode {planned.inode}"
                ),
                remedy="leave the inputs alone while a merge runs, then run the command again",
            )


def _most_open() -> int:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _OPEN_FILES if limit < 0 else min(_OPEN_FILES, (limit - _OTHER_HANDLES) // 2)


def _close(handle: _Handle) -> None:
    handle.mapped = None
    os.close(handle.descriptor)


def _cut_short(path: str, end: int, missing: int) -> InputChanged:
    return InputChanged(
        f"the file ends at offset {end}",
        where=path,
        expected=f"{missing} more bytes",
        remedy="the file was cut short; fetch it again",
    )


def _read_into(descriptor: int, path: str, offset: int, out: RawBytes) -> None:
    view = memoryview(out)  # type: ignore[arg-type]
    done = 0
    while done < len(view):
        try:
            count = system.read_into(descriptor, view[done:], offset + done)
        except OSError as error:
            raise unreadable(path, error, f"cannot be read at offset {offset + done}") from error
        if count == 0:
            raise _cut_short(path, offset + done, len(view) - done)
        done += count
