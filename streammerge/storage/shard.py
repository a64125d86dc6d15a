"""Writing a safetensors shard: the header first, then every tile at its own place.

All shapes are known from the plan, so no shard is ever held in memory and any order will do.
Format: https://huggingface.co/docs/safetensors, a little-endian u64 header length, a JSON header,
and the tensors' bytes without holes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from streammerge import system
from streammerge.arrays import RawBytes
from streammerge.errors import StorageError
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
    """An unfinished shard on disk. A failed sync condemns it: syncing again would prove nothing."""

    def __init__(self, folder: Path, layout: ShardLayout) -> None:
        """Create the file, reserve its blocks and write its header."""
        self.layout = layout
        self._condemned: StorageError | None = None
        self.path = folder / layout.name
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self._descriptor = os.open(self.path, flags, 0o666)
            system.reserve(self._descriptor, layout.size_bytes)
            system.write_all(self._descriptor, layout.header, 0)
        except OSError as error:
            raise self._failed("cannot be created", error) from error

    def write(self, offset: int, stored: RawBytes) -> None:
        """Put bytes at an absolute offset, and start their way to the disk."""
        try:
            system.write_all(self._descriptor, stored.data, offset)
        except OSError as error:
            raise self._failed(f"cannot be written at offset {offset}", error) from error
        system.start_writeback(self._descriptor, offset, stored.nbytes)

    def copy(
        self, source: int, source_path: str, source_offset: int, offset: int, length: int
    ) -> None:
        """Copy a range of another file inside the kernel."""
        try:
            system.copy_range(source, self._descriptor, source_offset, offset, length)
        except EOFError as error:
            what = f"ended while {self.path.name} was copied from it: {error}"
            raise StorageError(what, where=source_path) from error
        except OSError as error:
            raise self._failed(f"cannot take a copy of {source_path}", error) from error
        system.start_writeback(self._descriptor, offset, length)

    def sync(self) -> None:
        """Make what was written durable; after a failure, fail again without another try."""
        if self._condemned:
            raise self._condemned
        try:
            system.sync_data(self._descriptor)
        except OSError as error:
            self._condemned = self._failed("cannot be made durable", error)
            raise self._condemned from error

    def close(self) -> None:
        os.close(self._descriptor)

    def _failed(self, what: str, error: OSError) -> StorageError:
        return StorageError(
            f"{what}: {error.strerror}",
            where=str(self.path),
            found=f"{self.layout.size_bytes} bytes to store",
            remedy="free space on that disk or choose another --out, then run the command again",
        )
