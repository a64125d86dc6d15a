"""The safetensors header, read strictly: names, dtypes, shapes, and where each tensor's bytes lie.

A file is the header's length (u64, little endian), the header (a JSON object) and the byte buffer,
which the tensors fill without a hole (https://huggingface.co/docs/safetensors#format). The
safetensors library never names the file in its errors, and it takes duplicate names, NUL in names
and unknown keys of an entry, any of which may mean that what is merged is not what was saved.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from streammerge.errors import Problems, StreammergeError
from streammerge.storage.smallfile import AGAIN, LIMIT, bad, open_regular, parse_json, pread, show
from streammerge.words import DType, Extent, TensorSpec

LENGTH_BYTES = 8
MAX_HEADER_BYTES = LIMIT  # the safetensors library's own limit
MAX_NAME_BYTES = 4096
MAX_DIMENSIONS = 64  # numpy's limit; it also bounds the arithmetic that a hostile shape costs
_MAX_EXTENT = 2**63 - 1  # what a file offset can hold

_CUT = "a download or copy that was interrupted leaves this: fetch the file again"
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_DTYPES = {dtype.label: dtype for dtype in DType}
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


class Entry(NamedTuple):
    """One tensor as the header declares it, its bytes relative to the end of the header."""

    begin: int
    end: int
    name: str
    dtype: DType
    shape: tuple[int, ...]


class TensorTable(Mapping[str, Extent]):
    """The tensors of one file in the order in which they lie in it, looked up by name.

    Extents are made on access: a model of experts has 60,000 tensors, most never looked at twice.
    """

    __slots__ = ("_dtypes", "_index", "_offsets", "_path", "_shapes")

    def __init__(self, path: str, entries: Sequence[Entry], data_start: int) -> None:
        known: dict[tuple[int, ...], tuple[int, ...]] = {}  # layers repeat a few shapes: keep one
        self._path = path
        self._index = {entry.name: place for place, entry in enumerate(entries)}
        self._offsets = array("q", (data_start + entry.begin for entry in entries))
        self._dtypes = [entry.dtype for entry in entries]
        self._shapes = [known.setdefault(entry.shape, entry.shape) for entry in entries]

    def __getitem__(self, name: str) -> Extent:
        place = self._index[name]
        spec = TensorSpec(name, self._shapes[place], self._dtypes[place])
        return Extent(self._path, self._offsets[place], spec)

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def dtypes(self) -> frozenset[DType]:
        """The element types that occur."""
        return frozenset(self._dtypes)


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of a safetensors file says, and the stamp of the file that said it."""

    path: str  # as opened
    size_bytes: int
    mtime_ns: int
    inode: int
    device: int
    data_start: int  # where the byte buffer begins: 8 + the header's length
    tensors: TensorTable  # offsets counted from the start of the file
    metadata: Mapping[str, str]
    digest: str  # sha256 of the first `data_start` bytes

    @property
    def header_bytes(self) -> int:
        """How many bytes were read."""
        return self.data_start

    @property
    def data_bytes(self) -> int:
        """How many bytes the tensors hold: all that follow the header."""
        return self.size_bytes - self.data_start


def read_header(path: Path | str) -> Header:
    """Read and check the header of a safetensors file; no tensor byte is read.

    Raises `InputMissing` when the file is not there or may not be read, `BadInput` when it is not
    a regular file or breaks the format, `StorageError` when reading fails. Never blocks on a FIFO.
    """
    where = os.fspath(path)
    with open_regular(where) as (descriptor, stamp):
        length = _header_length(where, descriptor, stamp.st_size)
        raw = pread(descriptor, LENGTH_BYTES + length, 0)
    if len(raw) < LENGTH_BYTES + length:
        raise bad(where, "the file shrank while its header was read", f"{len(raw)} bytes")
    data_start = LENGTH_BYTES + length
    document = parse_json(raw[LENGTH_BYTES:], where, "the header", AGAIN)
    metadata = _metadata(where, document.pop("__metadata__", {}))
    data_bytes = stamp.st_size - data_start
    entries = checked_entries(where, document, data_bytes)
    _check_cover(where, entries, data_bytes)
    return Header(
        path=where,
        size_bytes=stamp.st_size,
        mtime_ns=stamp.st_mtime_ns,
        inode=stamp.st_ino,
        device=stamp.st_dev,
        data_start=data_start,
        tensors=TensorTable(where, entries, data_start),
        metadata=metadata,
        digest=hashlib.sha256(raw).hexdigest(),
    )


def read_headers(paths: Iterable[Path | str], problems: Problems) -> list[Header]:
    """The headers of those files that are sound; what is wrong with the others is a problem."""
    found = []
    for path in paths:
        try:
            found.append(read_header(path))
        except StreammergeError as error:
            problems.add(error)
    return found


def checked_entries(where: str, document: Mapping[str, Any], data_bytes: int) -> list[Entry]:
    """Tensors as the header of `where` declares them, in file order; each lies within the data.

    Raises `BadInput` for the first that cannot be.
    """
    entries = [_entry(where, name, info, data_bytes) for name, info in document.items()]
    entries.sort(key=lambda entry: entry[:2])
    return entries


# ---------------------------------------------------------------------------------- the framing


def _header_length(where: str, descriptor: int, size: int) -> int:
    """The length of the header in bytes, once the frame of the file is known to be sound."""
    if size == 0:
        raise bad(where, "is empty", "0 bytes", "a safetensors file")
    head = pread(descriptor, LENGTH_BYTES + 1, 0)
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    most = min(size - LENGTH_BYTES, MAX_HEADER_BYTES)
    if 0 < length <= most and head[LENGTH_BYTES:] == b"{":
        return length
    # Only now, for a sound file may begin like a pickle: one with a header of 640 bytes does.
    _refuse_foreign(where, pread(descriptor, 512, 0))
    if size < LENGTH_BYTES:
        raise bad(where, "is cut short", f"{size} bytes", "8 bytes and a header", _CUT)
    if not 0 < length <= most:
        found = f"{length} bytes in a file of {size} bytes"
        expected = f"1 to {MAX_HEADER_BYTES} bytes, within the file"
        raise bad(where, "impossible header length in the first 8 bytes", found, expected)
    raise bad(where, "the header does not begin with {", show(head[LENGTH_BYTES:]), "{")


_FOREIGN = (
    (rb"version https://git-lfs", "a Git LFS pointer", "run `git lfs pull` in its folder"),
    (
        rb"(\xef\xbb\xbf)?\s*(?i:<!doctype|<html|<\?xml)",
        "a web page",
        "download the file itself; the page inside may say why that failed",
    ),
    (
        rb"PK\x03\x04|\x80[\x02-\x05]",
        "a pickle of PyTorch (.bin, .pt)",
        "convert it to safetensors, as a pickle can run code; or name it as the .bin that it is, "
        "and --allow-pickle reads its tensors and nothing else",
    ),
    (rb"GGUF", "a GGUF file", "use the model's safetensors files instead"),
    (rb"\x1f\x8b", "a gzip archive", "unpack it with gunzip"),
)


def _refuse_foreign(where: str, head: bytes) -> None:
    for pattern, kind, remedy in _FOREIGN:
        if re.match(pattern, head):
            raise bad(where, "is not a safetensors file", kind, "a safetensors file", remedy)


# ----------------------------------------------------------------------------------------- JSON


# ---------------------------------------------------------------------------------- the entries


def _metadata(where: str, document: Any) -> dict[str, str]:
    if not isinstance(document, dict) or not all(type(v) is str for v in document.values()):
        raise bad(where, "__metadata__ is malformed", show(document), "an object of strings")
    return document


def _check_name(where: str, name: str) -> None:
    """Refuse names that cannot be shown or written back.

    `/` and `..` are let through: a tensor's name is a key in headers and indexes and never becomes
    part of a path, here or in the output.
    """
    if not name:
        raise bad(where, "a tensor has an empty name", "''", "a name")
    if hit := _CONTROL.search(name):
        found = f"U+{ord(hit[0]):04X} at character {hit.start()}"
        raise bad(where, f"tensor name {show(name)} has a control character", found, "none")
    if len(name) > MAX_NAME_BYTES or len(name.encode()) > MAX_NAME_BYTES:
        found, expected = f"{len(name.encode())} bytes", f"at most {MAX_NAME_BYTES} bytes"
        raise bad(where, f"tensor name {show(name)} is too long", found, expected)


def _entry(where: str, name: str, info: Any, data_bytes: int) -> Entry:
    _check_name(where, name)
    what = f"tensor {show(name)}"
    if not isinstance(info, dict) or info.keys() != _ENTRY_KEYS:
        raise bad(where, f"{what}: malformed entry", show(info), "dtype, shape, data_offsets")
    label, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    dtype = _DTYPES.get(label) if isinstance(label, str) else None
    if dtype is None:
        raise bad(where, f"{what}: unknown dtype", show(label), f"one of {', '.join(_DTYPES)}")
    nbytes = _shape_elements(where, what, shape) * dtype.itemsize
    begin, end = _offsets(where, what, offsets, data_bytes)
    if end - begin != nbytes:
        found = f"{end - begin} bytes, from {begin} to {end}"
        expected = f"{nbytes} bytes for {dtype.label} {shape}"
        raise bad(where, f"{what}: shape and data_offsets disagree", found, expected)
    return Entry(begin, end, name, dtype, tuple(shape))


def _is_natural(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_EXTENT  # `True` is an int to isinstance


def _shape_elements(where: str, what: str, shape: Any) -> int:
    """The number of elements. Dimensions must not overflow even where one of them is 0."""
    if not isinstance(shape, list) or not all(map(_is_natural, shape)):
        raise bad(where, f"{what}: malformed shape", show(shape), "a list of integers from 0")
    if len(shape) > MAX_DIMENSIONS:
        found, expected = f"{len(shape)} dimensions", f"at most {MAX_DIMENSIONS}"
        raise bad(where, f"{what}: too many dimensions", found, expected)
    if math.prod(filter(None, shape)) > _MAX_EXTENT:
        raise bad(where, f"{what}: shape overflows", show(shape), "under 2^63 elements")
    return math.prod(shape)


def _offsets(where: str, what: str, offsets: Any, data_bytes: int) -> tuple[int, int]:
    expected = "two integers from 0, the second not the smaller"
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_natural, offsets)):
        raise bad(where, f"{what}: malformed data_offsets", show(offsets), expected)
    begin, end = offsets
    if begin > end:
        raise bad(where, f"{what}: reversed data_offsets", show(offsets), expected)
    if end > data_bytes:
        found = f"{data_bytes} bytes of data, {end - data_bytes} too few"
        raise bad(where, f"{what}: ends past the end of the file", found, f"at least {end}", _CUT)
    return begin, end


def _check_cover(where: str, entries: Sequence[Entry], data_bytes: int) -> None:
    """Entries in file order must lie end to end, from the first byte of the buffer to the last."""
    cursor, before = 0, "the header"
    for entry in entries:
        if entry.begin != cursor:
            what = "overlaps" if entry.begin < cursor else "leaves a hole after"
            found, expected = f"it begins at byte {entry.begin}", f"byte {cursor} of the data"
            raise bad(where, f"tensor {show(entry.name)} {what} {before}", found, expected)
        cursor, before = entry.end, f"tensor {show(entry.name)}"
    if cursor != data_bytes:
        found, expected = f"{data_bytes} bytes of data", f"{cursor} bytes, the end of {before}"
        raise bad(where, f"{data_bytes - cursor} bytes at the end are no tensor's", found, expected)
