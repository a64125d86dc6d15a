"""What was written where, and the checksums of tensors and shards that follow from it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streammerge.storage.checksum import checksum, combine
from streammerge.storage.shard import ShardLayout


@dataclass(frozen=True, slots=True)
class Receipt:
    """One written piece of a tensor: piece `index` of `pieces`, and its checksum if computed.

    `norms` are the piece's squared norms, of the base and of the update of each of `models`.
    """

    tensor: str
    shard: str
    index: int
    pieces: int
    offset: int  # of its first byte in the shard
    nbytes: int
    crc32c: int | None  # None: copied inside the kernel, `copied_from` says whence
    copied_from: str | None = None
    models: tuple[int, ...] = ()
    norms: tuple[float, ...] = ()

    def record(self) -> dict[str, Any]:
        """For the journal."""
        fields: dict[str, Any] = {
            "tensor": self.tensor,
            "shard": self.shard,
            "tile": self.index,
            "of": self.pieces,
            "at": self.offset,
            "bytes": self.nbytes,
        }
        if self.crc32c is None:
            return {**fields, "copied": self.copied_from}
        return {**fields, "crc32c": self.crc32c, "models": self.models, "norms": self.norms}

    @staticmethod
    def read(record: Mapping[str, Any]) -> Receipt | None:
        """The receipt of a line of the journal, None where it speaks of something else."""
        if "tile" not in record:
            return None
        return Receipt(
            tensor=record["tensor"],
            shard=record["shard"],
            index=record["tile"],
            pieces=record["of"],
            offset=record["at"],
            nbytes=record["bytes"],
            crc32c=record.get("crc32c"),
            copied_from=record.get("copied"),
            models=tuple(record.get("models", ())),
            norms=tuple(record.get("norms", ())),
        )


class Sums:
    """Checksums of tensors, from the receipts of their pieces in any order."""

    def __init__(self, layouts: Sequence[ShardLayout]) -> None:
        self._layouts = layouts
        self._crcs: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
        self._pieces: Counter[str] = Counter()
        self._left: Counter[str] = Counter()  # shard -> tensors that are not finished
        self.tensors: dict[str, int | None] = {}  # of each finished one; None: copied unread
        for layout in layouts:
            for name, extent in layout.extents.items():
                if extent.spec.nbytes:
                    self._left[layout.name] += 1
                else:
                    self.tensors[name] = 0

    def add(self, receipt: Receipt) -> None:
        name = receipt.tensor
        self._pieces[name] += 1
        if receipt.crc32c is not None:
            self._crcs[name].append((receipt.index, receipt.crc32c, receipt.nbytes))
        if self._pieces[name] < receipt.pieces:
            return
        del self._pieces[name]
        self._left[receipt.shard] -= 1
        total: int | None = None
        for _, crc, nbytes in sorted(self._crcs.pop(name, [])):
            total = crc if total is None else combine(total, crc, nbytes)
        self.tensors[name] = total

    def finished(self, shard: str) -> bool:
        """Whether every tensor of a shard is."""
        return self._left[shard] == 0

    def shards(self) -> dict[str, int | None]:
        """crc32c of each finished shard's file; None where part of it was copied unread."""
        return {layout.name: self._shard(layout) for layout in self._layouts}

    def _shard(self, layout: ShardLayout) -> int | None:
        total = checksum(layout.header)
        for name, extent in layout.extents.items():
            part = self.tensors[name]
            if part is None:
                return None
            total = combine(total, part, extent.spec.nbytes)
        return total
