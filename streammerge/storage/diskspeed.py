"""How fast a disk takes what is written to it and gives it back: a small timed write and read."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

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
    the disk itself.
    """
    chunk = np.random.default_rng(0).integers(0, 256, _CHUNK_BYTES, np.uint8)
    with tempfile.TemporaryFile(dir=folder) as file:
        descriptor, size = file.fileno(), _CHUNKS * _CHUNK_BYTES
        for _ in range(1 if through else 2):  # the second time into pages that are in memory
            started = time.perf_counter()
            for start in range(0, size, _CHUNK_BYTES):
                checksum(chunk)
                system.write_all(descriptor, chunk.data, start)
        if through:
            system.sync_data(descriptor)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_DONTNEED)
        written = time.perf_counter()
        for start in range(0, size, _CHUNK_BYTES):
            system.read_into(descriptor, chunk.data, start)
            checksum(chunk)
        done = time.perf_counter()
    return DiskSpeed((written - started) / size, (done - written) / size)
