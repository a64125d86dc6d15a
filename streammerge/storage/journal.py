"""The journal of a run: what is durably done, one checksummed line each, only ever appended.

A line is the crc32c of its JSON in eight hex digits, a space, the JSON, a newline; so a torn last
line or a flipped bit is seen. Lines are written after the data that they speak of was synced.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from streammerge import system
from streammerge.errors import StorageError
from streammerge.storage.checksum import checksum

VERSION = 1


class Journal:
    """Appends records; each `append` is durable when it returns."""

    def __init__(self, path: Path, opening: Mapping[str, Any]) -> None:
        self._path = path
        self._end = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self._descriptor = os.open(path, flags, 0o666)
        except OSError as error:
            raise self._failed(error) from error
        self.append([{"journal": VERSION, **opening}])

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        data = b"".join(_line(record) for record in records)
        try:
            self._end += system.write_all(self._descriptor, data, self._end)
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
