"""The output as safetensors shards: tiles in any order, marks after their data is durable."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from streammerge.arrays import RawBytes
from streammerge.sinks.receipts import Receipt, Sums
from streammerge.storage.bytesource import Files
from streammerge.storage.checksum import checksum
from streammerge.storage.durable import sync_folder
from streammerge.storage.journal import Journal
from streammerge.storage.shard import ShardFile, ShardLayout
from streammerge.words import Extent, Tile

# Group commit: a sync under write load takes a third of a second, so receipts wait for company.
COMMIT_BYTES = 256 << 20
COMMIT_SECONDS = 5.0


class ShardsSink:
    """Writes the shards of one output folder. `write` and `copy` may run in any thread;
    `record` and `commit` belong to one."""

    def __init__(
        self,
        folder: Path,
        layouts: Sequence[ShardLayout],
        journal: Journal,
        begun: Collection[str] = (),
    ) -> None:
        """Create every shard at its full size, so that a full disk is an error now.

        Those in `begun` are there already, as an earlier run left them.
        """
        self._journal = journal
        self._shards = {
            layout.name: ShardFile(folder, layout, begun=layout.name in begun) for layout in layouts
        }
        sync_folder(folder)
        self.sums = Sums(layouts)
        self._batch: list[Receipt] = []
        self._batch_bytes = 0
        self._committed_at = time.monotonic()
        self._committer = ThreadPoolExecutor(1, "commit")
        self._pending: list[Future[None]] = []

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
        self._journal.append([receipt.record()])
        self._batch.append(receipt)
        self._batch_bytes += receipt.nbytes
        self.sums.add(receipt)
        due = time.monotonic() - self._committed_at > COMMIT_SECONDS
        if self._batch_bytes >= COMMIT_BYTES or due:
            self._flush()

    def holds(self, receipt: Receipt) -> bool:
        """Whether the bytes that a receipt speaks of are there; of a copy that cannot be told."""
        if receipt.crc32c is None:
            return False
        shard = self._shards[receipt.shard]
        return shard.checksum(receipt.offset, receipt.nbytes) == receipt.crc32c

    def mark(self) -> None:
        """Make what was recorded durable; returns when it is."""
        self._flush()
        for future in self._pending:
            future.result()
        self._pending.clear()

    def commit(self) -> None:
        """Make everything durable, for good; returns when it is."""
        self.mark()
        # In a thread, for a signal is not heeded while the main one waits for the disk.
        self._committer.submit(self._sync_all).result()

    def _sync_all(self) -> None:
        for shard in self._shards.values():
            shard.sync()

    def __enter__(self) -> ShardsSink:
        return self

    def __exit__(self, *exception: object) -> None:
        self._committer.shutdown(cancel_futures=True)
        for shard in self._shards.values():
            shard.close()

    def _flush(self) -> None:
        for future in [future for future in self._pending if future.done()]:
            future.result()
            self._pending.remove(future)
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        self._committed_at = time.monotonic()
        if batch:
            written = {receipt.shard for receipt in batch}
            finished = {name for name in written if self.sums.finished(name)}
            future = self._committer.submit(
                self._make_durable, sorted(written), finished, self._journal.end
            )
            self._pending.append(future)

    def _make_durable(self, written: Sequence[str], finished: Collection[str], end: int) -> None:
        """Data first, then the mark that its receipts, the lines before `end`, can be relied on."""
        for name in written:
            self._shards[name].sync()
            if name in finished:  # no more than those being written are kept open
                self._shards[name].close()
        self._journal.append([{"durable": end}])
        self._journal.sync()
