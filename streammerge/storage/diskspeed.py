"""How fast a disk takes what is written to it and gives it back: a small timed write and read."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from streammerge import system
from streammerge.storage.checksum import checksum

_CHUNK_BYTES = 2 << 20
_CHUNKS = 16


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """Seconds per byte of one thread, checksums included."""

    write: float
    read: float


def measure(folder: Path, *, through: bool) -> DiskSpeed:
    """Time 32 MiB in a file without a name. Raises OSError where the folder cannot be written to.

    `through` is for more than the page cache holds: written data is waited for, and read again from
    the disk itself. Else the median chunk counts, written into pages that are in memory already:
    whatever else the machine does at the moment should not decide.
    """
    chunk = np.random.default_rng(0).integers(0, 256, _CHUNK_BYTES, np.uint8)
    starts = range(0, _CHUNKS * _CHUNK_BYTES, _CHUNK_BYTES)
    with tempfile.TemporaryFile(dir=folder) as file:
        descriptor = file.fileno()

        def write(start: int) -> None:
            checksum(chunk)
            system.write_all(descriptor, chunk.data, start)

        def read(start: int) -> None:
            system.read_into(descriptor, chunk.data, start)
            checksum(chunk)

        written = [_seconds(write, start) for start in starts]
        if through:
            synced = _seconds(_let_go, descriptor)
            back = [_seconds(read, start) for start in starts]
            size = _CHUNKS * _CHUNK_BYTES
            return DiskSpeed((sum(written) + synced) / size, sum(back) / size)
        written = [_seconds(write, start) for start in starts]
        back = [_seconds(read, start) for start in starts]
    return DiskSpeed(median(written) / _CHUNK_BYTES, median(back) / _CHUNK_BYTES)


def _seconds(action: Callable[[int], None], argument: int) -> float:
    started = time.perf_counter()
    action(argument)
    return time.perf_counter() - started


def _let_go(descriptor: int) -> None:
    """What was written goes to the disk, and out of the page cache."""
    system.sync_data(descriptor)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
