"""Rows that are kept on disk between two reads of a tensor: a Zarr group, an array per tensor.

zarr makes the group and the arrays, and reads them back for whoever is curious. Chunks are written
and read here, as its codecs `bytes` and `crc32c` lay them down: without a copy, in the thread that
wants the rows, and so that what zarr lets pass in silence is an error that says what it is about.
A chunk that is missing would read as zeros, one of zeros alone would not be written, and a part of
a chunk by each of two writers would lose one of them: here a chunk is a tile of one model, written
once, and every chunk has a receipt in this process, without which it is not read.

Nothing is synced, and nothing is of use to another run: losing it costs time. Once a tensor is
done, its chunks give their files to those of the next: to write over pages that are in memory takes
a third of the time of new ones.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from streammerge import grid, system
from streammerge.arrays import Rows
from streammerge.errors import StorageError
from streammerge.storage.cachedir import CachedRun, create, remove_left
from streammerge.storage.checksum import checksum
from streammerge.words import TensorSpec

if TYPE_CHECKING:
    import zarr

Kind = Literal["deltas", "weights"]

_CRC_BYTES = 4
_ZEROS = bytes(1 << 16)
# Names of tensors that can be names of files, and that zarr does not use itself.
_PLAIN = re.compile(r"(?!__|zarr)[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")
_REMEDY = "name another --cache, or merge with --spill never"


class SpillStore:
    """The arrays of one run, shared by its threads; nothing is on disk until it is opened."""

    def __init__(self, cache: Path | None = None, *, keep: bool = False) -> None:
        """`cache` None: beside the output. With `keep`, what was spilled stays when it closes."""
        self._cache = cache
        self._keep = keep
        self._lock = threading.Lock()
        self._run: CachedRun | None = None
        self._group: zarr.Group | None = None
        self._used: list[Path] = []
        self._numbers = count()
        self.written_bytes = 0  # so far
        self.lost_chunks = 0  # that somebody removed while they were needed

    def remove_left(self, beside: Path, output: Path) -> None:
        """What runs of this output left that died, also where nothing is spilled this time."""
        remove_left(self._cache or beside, output)

    @contextmanager
    def opened(self, beside: Path, output: Path, fingerprint: str) -> Iterator[None]:
        """Make the folder of a run in the cache, or in `beside` where no cache was named."""
        self._run = create(self._cache or beside, output, fingerprint)
        complete = False
        try:
            with _told(self._run.spill, "the spill cannot be made"):
                self._group = _make_group(self._run.spill)
            yield
            complete = True
        finally:
            self._group = None
            if not self._keep:
                self._run.remove()
            elif complete:
                self._run.finish()

    def make_array(self, array: SpillArray) -> Path:
        """Its metadata, once; returns its folder."""
        assert self._run is not None and self._group is not None, "the spill store is not open"
        path = self._run.spill / array.key
        with self._lock, _told(path, f"{array.spec.name} cannot be spilled"):
            if array.key not in self._group:
                _make_array(self._group, array)
        return path

    def open_chunk(self, path: Path) -> int:
        """A descriptor of a file of that name, to be written from the start."""
        with self._lock:
            used = self._used.pop() if self._used else None
        if used is not None:
            with suppress(FileNotFoundError):  # somebody emptied the cache
                os.rename(used, path)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def remove_array(self, path: Path, chunks: Iterable[Path]) -> None:
        """An array that nobody reads any more; its chunks' files are for others."""
        if self._keep or self._run is None or not path.exists():
            return
        with _told(path, "spilled rows cannot be removed"):
            self._run.used.mkdir(exist_ok=True)  # unless somebody emptied the cache
            for chunk in chunks:
                used = self._run.used / str(next(self._numbers))
                with suppress(FileNotFoundError):
                    os.rename(chunk, used)
                    self._used.append(used)
            shutil.rmtree(path)

    def tally(self, *, written_bytes: int = 0, lost_chunks: int = 0) -> None:
        with self._lock:
            self.written_bytes += written_bytes
            self.lost_chunks += lost_chunks


class SpillArray:
    """The rows of some models of one tensor: uint32 `[models, rows, cols]`, a chunk for each tile.

    Bits and not numbers: a NaN keeps its payload. The attributes say that they are float32.
    """

    def __init__(
        self, store: SpillStore, spec: TensorSpec, models: Sequence[str], kind: Kind
    ) -> None:
        self.spec = spec
        self.models = tuple(models)
        self.kind = kind
        self._store = store
        self._path: Path | None = None
        self._receipts: dict[tuple[int, int], int] = {}  # (model, tile) -> crc32c of its rows
        self._lock = threading.Lock()

    @property
    def key(self) -> str:
        """The tensor's name, where it can be the name of a folder."""
        name = self.spec.name
        return (
            name if _PLAIN.fullmatch(name) else f"tensor-{sha256(name.encode()).hexdigest()[:16]}"
        )

    @property
    def chunk_bytes(self) -> int:
        return 4 * grid.tile_rows(self.spec) * self.spec.cols

    def holds(self, model: int, tile: int) -> bool:
        """Whether a tile was written and is still there; one that somebody removed is forgotten."""
        if (model, tile) not in self._receipts:
            return False
        if self._chunk(model, tile).exists():
            return True
        with self._lock:
            del self._receipts[model, tile]
        self._store.tally(lost_chunks=1)
        return False

    def write(self, model: int, tile: int, rows: Rows) -> None:
        """Keep the rows of a tile."""
        if self._path is None:
            self._path = self._store.make_array(self)
        path = self._chunk(model, tile)
        crc = checksum(rows.reshape(-1).view("u1"))
        with self._named(path, tile, "cannot be written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = self._store.open_chunk(path)
            try:
                os.ftruncate(descriptor, rows.nbytes)  # what follows reads as zeros
                system.write_all(descriptor, rows.data, 0)
                whole = _zeros(crc, self.chunk_bytes - rows.nbytes)  # the last tile is shorter
                end = whole.to_bytes(_CRC_BYTES, "little")
                system.write_all(descriptor, end, self.chunk_bytes)
            finally:
                os.close(descriptor)
        with self._lock:
            self._receipts[model, tile] = crc
        self._store.tally(written_bytes=self.chunk_bytes)

    def read(self, model: int, tile: int, out: Rows) -> None:
        """The rows of a tile that `holds`, the very bits; StorageError where they are others."""
        path = self._chunk(model, tile)
        receipt = self._receipts.get((model, tile))
        if receipt is None:
            raise self._damaged(path, tile, "no receipt for them", "one, from when they were kept")
        with self._named(path, tile, "cannot be read"):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                size = os.fstat(descriptor).st_size
                if size != self.chunk_bytes + _CRC_BYTES:
                    expected = f"{self.chunk_bytes + _CRC_BYTES} bytes"
                    raise self._damaged(path, tile, f"{size} bytes", expected)
                _fill(descriptor, out)
            finally:
                os.close(descriptor)
        crc = checksum(out.reshape(-1).view("u1"))
        if crc != receipt:
            found, expected = f"crc32c {crc:08x}", f"{receipt:08x}, as they were written"
            raise self._damaged(path, tile, found, expected)

    def drop(self) -> None:
        """Nobody reads it any more."""
        with self._lock:
            if self._path is None:
                return
            self._store.remove_array(self._path, [self._chunk(*one) for one in self._receipts])
            self._receipts.clear()
            self._path = None

    def _chunk(self, model: int, tile: int) -> Path:
        assert self._path is not None, "nothing was spilled"
        return self._path / f"c.{model}.{tile}.0"

    @contextmanager
    def _named(self, path: Path, tile: int, what: str) -> Iterator[None]:
        with _told(path, f"the spilled rows of {self._rows(tile)} {what}"):
            yield

    def _rows(self, tile: int) -> str:
        step = grid.tile_rows(self.spec)
        last = min(self.spec.rows, (tile + 1) * step) - 1
        return f"{self.spec.name}, rows {tile * step} to {last},"

    def _damaged(self, path: Path, tile: int, found: str, expected: str) -> StorageError:
        return StorageError(
            f"the spilled rows of {self._rows(tile)} are not what was written",
            where=str(path),
            found=found,
            expected=expected,
            remedy=f"check that disk; {_REMEDY}",
        )


def _make_group(path: Path) -> zarr.Group:
    import zarr

    # Never mode="w" nor overwrite=True: both delete whatever is there.
    return zarr.create_group(path, overwrite=False)


def _make_array(group: zarr.Group, array: SpillArray) -> None:
    from zarr.codecs import BytesCodec, Crc32cCodec

    spec = array.spec
    group.create_array(
        array.key,
        shape=(len(array.models), spec.rows, spec.cols),
        chunks=(1, grid.tile_rows(spec), spec.cols),
        chunk_key_encoding={"name": "default", "separator": "."},
        dtype="uint32",
        serializer=BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],
        filters=None,
        fill_value=0,
        config={"write_empty_chunks": True},
        attributes={
            "tensor": spec.name,
            "shape": list(spec.shape),
            "models": list(array.models),
            "kind": array.kind,
            "dtype": "float32",
        },
    )


def _fill(descriptor: int, out: Rows) -> None:
    """Read all of `out` from the start of a file that is known to be long enough."""
    buffer = out.reshape(-1).view("u1").data
    done = 0
    while done < len(buffer):
        count = system.read_into(descriptor, buffer[done:], done)
        if count == 0:
            raise EOFError("the file became shorter")
        done += count


def _zeros(crc: int, nbytes: int) -> int:
    """crc32c of what had `crc`, followed by zeros."""
    for start in range(0, nbytes, len(_ZEROS)):
        crc = checksum(_ZEROS[: nbytes - start], crc)
    return crc


@contextmanager
def _told(path: Path, what: str) -> Iterator[None]:
    """System errors inside become errors that say what could not be done."""
    try:
        yield
    except (OSError, EOFError) as error:
        why = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        raise StorageError(f"{what}: {why}", where=str(path), remedy=_REMEDY) from error
