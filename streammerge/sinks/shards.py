"""The output as safetensors shards: tiles in any order, receipts after their data is durable."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streammerge.arrays import RawBytes
from streammerge.storage.bytesource import Files
from streammerge.storage.checksum import checksum, combine
from streammerge.storage.journal import Journal
from streammerge.storage.shard import ShardFile, ShardLayout
from streammerge.words import Extent, Tile

# Group commit: a sync under write load takes a third of a second, so receipts wait for company.
COMMIT_BYTES = 256 << 20
COMMIT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Receipt:
    """One written piece of a tensor: piece `index` of `pieces`, and its checksum if computed."""

    tensor: str
    shard: str
    index: int
    pieces: int
    nbytes: int
    crc32c: int | None  # None: copied inside the kernel, `copied_from` says whence
    copied_from: str | None = None

    def record(self) -> dict[str, Any]:
        fields = {"tensor": self.tensor, "tile": self.index, "bytes": self.nbytes}
        origin = {"copied": self.copied_from} if self.crc32c is None else {"crc32c": self.crc32c}
        return {**fields, **origin}


class ShardsSink:
    """Writes the shards of one output folder. `write` and `copy` may run in any thread;
    `record` and `commit` belong to one."""

    def __init__(self, folder: Path, layouts: Sequence[ShardLayout], journal: Journal) -> None:
        """Create every shard at its full size, so that a full disk is an error now."""
        self._journal = journal
        self._shards: dict[str, ShardFile] = {}
        self._create(folder, layouts)
        self._sums: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
        self._pieces: Counter[str] = Counter()
        self._batch: list[Receipt] = []
        self._batch_bytes = 0
        self._committed_at = time.monotonic()
        self._committer = ThreadPoolExecutor(1, "commit")
        self._pending: list[Future[None]] = []
        self.checksums: dict[str, int | None] = {}  # of each finished tensor
        for layout in layouts:
            empty = [name for name, extent in layout.extents.items() if not extent.spec.nbytes]
            self.checksums.update(dict.fromkeys(empty, 0))

    def _create(self, folder: Path, layouts: Sequence[ShardLayout]) -> None:
        try:
            for layout in layouts:
                self._shards[layout.name] = ShardFile(folder, layout)
        except BaseException:
            self._close()
            raise

    def write(self, extent: Extent, tile: Tile, stored: RawBytes) -> int:
        """Put a tile's bytes at their place in the extent; returns their crc32c."""
        row_bytes = extent.spec.cols * extent.spec.dtype.itemsize
        self._shards[extent.path].write(extent.offset + tile.start * row_bytes, stored)
        return checksum(stored)

    def copy(self, files: Files, source: Extent, extent: Extent, start: int, length: int) -> None:
        """Copy a range of bytes of a stored tensor inside the kernel."""
        with files.descriptor(source.path, length) as descriptor:
            self._shards[extent.path].copy(
                descriptor, source.path, source.offset + start, extent.offset + start, length
            )

    def record(self, receipt: Receipt) -> None:
        """Note a written piece; now and then make a batch of them durable, in the background."""
        self._batch.append(receipt)
        self._batch_bytes += receipt.nbytes
        self._add_up(receipt)
        due = time.monotonic() - self._committed_at > COMMIT_SECONDS
        if self._batch_bytes >= COMMIT_BYTES or due:
            self._flush()

    def commit(self) -> None:
        """Make everything durable; returns when it is."""
        self._flush()
        for future in self._pending:
            future.result()
        for shard in self._shards.values():
            shard.sync()
        self._journal.append([{"shards": "complete"}])

    def __enter__(self) -> ShardsSink:
        return self

    def __exit__(self, *exception: object) -> None:
        self._committer.shutdown(cancel_futures=True)
        self._close()

    def _close(self) -> None:
        for shard in self._shards.values():
            shard.close()

    def _flush(self) -> None:
        for future in [future for future in self._pending if future.done()]:
            future.result()
            self._pending.remove(future)
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        self._committed_at = time.monotonic()
        if batch:
            self._pending.append(self._committer.submit(self._make_durable, batch))

    def _make_durable(self, batch: list[Receipt]) -> None:
        """Data first, then the receipts that speak of it."""
        for name in sorted({receipt.shard for receipt in batch}):
            self._shards[name].sync()
        self._journal.append(receipt.record() for receipt in batch)

    def _add_up(self, receipt: Receipt) -> None:
        name = receipt.tensor
        self._pieces[name] += 1
        if receipt.crc32c is not None:
            self._sums[name].append((receipt.index, receipt.crc32c, receipt.nbytes))
        if self._pieces[name] < receipt.pieces:
            return
        del self._pieces[name]
        total: int | None = None
        for _, crc, nbytes in sorted(self._sums.pop(name, [])):
            total = crc if total is None else combine(total, crc, nbytes)
        self.checksums[name] = total

    def shard_checksums(self, layouts: Sequence[ShardLayout]) -> Mapping[str, int | None]:
        """crc32c of each finished shard's file; None where part of it was copied unread."""
        found: dict[str, int | None] = {}
        for layout in layouts:
            total: int | None = checksum(layout.header)
            for name, extent in layout.extents.items():
                part = self.checksums[name]
                if total is not None:
                    nbytes = extent.spec.nbytes
                    total = None if part is None else combine(total, part, nbytes)
            found[layout.name] = total
        return found
