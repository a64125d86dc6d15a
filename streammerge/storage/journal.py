"""The journal of a run: what is done, one checksummed line each, only ever appended.

A line is the crc32c of its JSON in eight hex digits, a space, the JSON, a newline; so a torn last
line or a flipped bit is seen. Lines are written when their work is done and made durable now and
then: what a line says of data counts without another look only where a mark, written after that
data was synced, covers it.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from streammerge import system
from streammerge.errors import StorageError
from streammerge.storage.checksum import checksum

VERSION = 2


class Line(NamedTuple):
    """A sound line: where it begins and ends in the file, and what it says."""

    start: int
    stop: int
    record: dict[str, Any]


class Journal:
    """Appends records; `append` may be called in any thread."""

    def __init__(self, path: Path, opening: Mapping[str, Any] | None = None, end: int = 0) -> None:
        """Begin a new journal with an opening; or, without one, go on at `end` of an old one.

        Whatever follows `end` is dropped.
        """
        self._path = path
        self._end = end
        self._lock = threading.Lock()
        flags = os.O_WRONLY | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if opening else 0)
        try:
            self._descriptor = os.open(path, flags, 0o666)
            os.ftruncate(self._descriptor, end)
        except OSError as error:
            raise self._failed(error) from error
        if opening:
            self.append([{"journal": VERSION, **opening}])
            self.sync()

    @property
    def end(self) -> int:
        """Where the next line begins."""
        return self._end

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write records; they survive the process, and the machine once they are synced."""
        data = b"".join(_line(record) for record in records)
        try:
            with self._lock:
                self._end += system.write_all(self._descriptor, data, self._end)
        except OSError as error:
            raise self._failed(error) from error

    def sync(self) -> None:
        """Make durable what was appended."""
        try:
            system.sync_data(self._descriptor)
        except OSError as error:
            raise self._failed(error) from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._descriptor)

    def _failed(self, error: OSError) -> StorageError:
        remedy = "free space on that disk, then run the command again"
        return StorageError(
            f"the journal cannot be written: {error.strerror}", where=str(self._path), remedy=remedy
        )


def _line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, separators=(",", ":"), sort_keys=True).encode()
    return b"%08x %b\n" % (checksum(text), text)


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a journal up to the first that is torn or damaged: what follows is in doubt."""
    start = 0
    try:
        with open(path, "rb") as file:
            for line in file:
                record = _parsed(line)
                if record is None:
                    return
                yield Line(start, start + len(line), record)
                start += len(line)
    except OSError as error:
        what, remedy = f"the journal cannot be read: {error.strerror}", "check the disk"
        raise StorageError(what, where=str(path), remedy=remedy) from error


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The record of a line, None where the line is not as it was written."""
    crc, space, text = line[:8], line[8:9], line[9:-1]
    if space != b" " or line[-1:] != b"\n" or b"%08x" % checksum(text) != crc:
        return None
    record = json.loads(text)  # its checksum is right, so it is what was written
    return record if isinstance(record, dict) else None
