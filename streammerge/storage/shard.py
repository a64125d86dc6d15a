"""Writing a safetensors shard: the header first, then every tile at its own place.

All shapes are known from the plan, so no shard is ever held in memory and any order will do.
Format: https://huggingface.co/docs/safetensors, a little-endian u64 header length, a JSON header,
and the tensors' bytes without holes.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from streammerge import system
from streammerge.arrays import RawBytes
from streammerge.errors import InputMissing, StorageError
from streammerge.storage.checksum import checksum
from streammerge.storage.smallfile import open_regular, pread
from streammerge.words import Extent, TensorSpec

# Data that starts where the source's data starts within a page can share blocks with it.
PAGE = 4096


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """A shard as it will be: its file name, header, and where each tensor's bytes go."""

    name: str
    header: bytes
    extents: Mapping[str, Extent]
    size_bytes: int


def lay_out(name: str, specs: Sequence[TensorSpec], data_start: int | None = None) -> ShardLayout:
    """Place the tensors one after the other; data starts at `data_start` modulo the page."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins: list[int] = []
    end = 0
    for spec in specs:
        begins.append(end)
        end += spec.nbytes
        fields[spec.name] = {
            "dtype": spec.dtype.label,
            "shape": list(spec.shape),
            "data_offsets": [begins[-1], end],
        }
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    modulus, target = (8, 0) if data_start is None else (PAGE, data_start % PAGE)
    text += b" " * ((target - 8 - len(text)) % modulus)
    header = len(text).to_bytes(8, "little") + text
    places = zip(specs, begins, strict=True)
    extents = {spec.name: Extent(name, len(header) + begin, spec) for spec, begin in places}
    return ShardLayout(name, header, extents, len(header) + end)


class ShardFile:
    """An unfinished shard on disk; opened when it is needed, by any thread.

    A failed sync condemns it: the kernel forgets pages that it could not write, so syncing or
    reading again would prove nothing. The file is removed, to be written anew by another run.
    """

    def __init__(self, folder: Path, layout: ShardLayout, *, begun: bool = False) -> None:
        """Create the file, reserve its blocks and write its header; or go on with one `begun`."""
        self.layout = layout
        self.path = folder / layout.name
        self._condemned: StorageError | None = None
        self._descriptor: int | None = None
        self._lock = threading.Lock()
        try:
            descriptor = self._open(0 if begun else os.O_CREAT | os.O_EXCL)
            if not begun:
                system.reserve(descriptor, layout.size_bytes)
                system.write_all(descriptor, layout.header, 0)
        except OSError as error:
            raise self._failed("cannot be created", error) from error
        finally:
            self.close()

    def _open(self, flags: int = 0) -> int:
        with self._lock:
            if self._descriptor is None:
                flags |= os.O_RDWR | os.O_CLOEXEC
                self._descriptor = os.open(self.path, flags, 0o666)
            return self._descriptor

    def write(self, offset: int, stored: RawBytes) -> None:
        """Put bytes at an absolute offset, and start their way to the disk."""
        try:
            descriptor = self._open()
            system.write_all(descriptor, stored.data, offset)
        except OSError as error:
            raise self._failed(f"cannot be written at offset {offset}", error) from error
        system.start_writeback(descriptor, offset, stored.nbytes)

    def copy(
        self, source: int, source_path: str, source_offset: int, offset: int, length: int
    ) -> None:
        """Copy a range of another file inside the kernel."""
        try:
            descriptor = self._open()
            system.copy_range(source, descriptor, source_offset, offset, length)
        except EOFError as error:
            what = f"ended while {self.path.name} was copied from it: {error}"
            raise StorageError(what, where=source_path) from error
        except OSError as error:
            raise self._failed(f"cannot take a copy of {source_path}", error) from error
        system.start_writeback(descriptor, offset, length)

    def checksum(self, offset: int, length: int) -> int:
        """crc32c of bytes that are there."""
        try:
            return checksum(pread(self._open(), length, offset))
        except OSError as error:
            raise self._failed(f"cannot be read at offset {offset}", error) from error

    def sync(self) -> None:
        """Make what was written durable; after a failure, fail again without another try."""
        if self._condemned:
            raise self._condemned
        try:
            system.sync_data(self._open())
        except OSError as error:
            self._condemned = self._failed("cannot be made durable", error)
            with suppress(
                OSError
            ):  # where not even that can be done, there is nothing to go on with
                self.path.unlink()
            raise self._condemned from error

    def close(self) -> None:
        """Give the file's handle back; it is opened again when needed."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
            self._descriptor = None

    def _failed(self, what: str, error: OSError) -> StorageError:
        remedies = {
            errno.EFBIG: "raise the file size limit (ulimit -f), or lower --shard-size",
            errno.EDQUOT: "make room in your quota, then run the command again",
            errno.EIO: "check the disk and its cables, then run the command again",
        }
        room = "free space on that disk or choose another --out, then run the command again"
        return StorageError(
            f"{what}: {error.strerror}",
            where=str(self.path),
            found=f"{self.layout.size_bytes} bytes to store",
            remedy=remedies.get(error.errno or 0, room),
        )


def is_begun(path: Path, layout: ShardLayout) -> bool:
    """Whether the file is an unfinished shard of this layout: its size and its header are."""
    try:
        with open_regular(os.fspath(path)) as (descriptor, stamp):
            sized = stamp.st_size == layout.size_bytes
            return sized and pread(descriptor, len(layout.header), 0) == layout.header
    except InputMissing:
        return False
