"""Opening files that may be anything, and reading small ones: configs, indices, headers.

Every error names the file. Nothing here blocks on a FIFO, follows a link loop, or trusts JSON.
"""

from __future__ import annotations

import errno
import json
import os
import re
import reprlib
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streammerge.errors import BadInput, InputMissing, StorageError, StreammergeError

LIMIT = 100_000_000  # bytes of a small file
REPAIR = "correct the file, or download it again"
AGAIN = "the file is damaged or was not written as safetensors: download it or save it again"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

_shorten = reprlib.Repr()
_shorten.maxstring = 100
# reprlib walks a value to a bounded depth and width: what it shows came from a hostile file.
show = _shorten.repr


def bad(
    where: str, what: str, found: str = "", expected: str = "", remedy: str = AGAIN
) -> BadInput:
    """The error of a file or folder `where` that breaks its format; see `StreammergeError`."""
    return BadInput(what, where=where, found=found, expected=expected, remedy=remedy)


# ------------------------------------------------------------------------------- opening a file

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_ABSENT = {
    errno.ENOENT: "check the path; an interrupted download leaves files out",
    errno.ENOTDIR: "check the path; a part of it is a file, not a folder",
    errno.ELOOP: "its links lead back to themselves: put the file itself there",
    errno.EACCES: "give this user permission to read it",
    errno.ENAMETOOLONG: "check the path",
}


@contextmanager
def open_regular(path: str) -> Iterator[tuple[int, os.stat_result]]:
    """A descriptor of the regular file at `path`, links followed, and the stamp of what was opened.

    Asks what it is before opening it, since opening a device may act on it, and again after, since
    it may have been replaced; `O_NONBLOCK` keeps the open of a FIFO put there between from waiting.
    """
    try:
        _check_regular(path, os.stat(path))
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    try:
        stamp = os.fstat(descriptor)
        _check_regular(path, stamp)
        yield descriptor, stamp
    except OSError as error:
        raise unreadable(path, error) from error
    finally:
        os.close(descriptor)


def _check_regular(path: str, stamp: os.stat_result) -> None:
    if kind := _KINDS.get(stat.S_IFMT(stamp.st_mode)):
        expected, remedy = "a regular file, or a link to one", "put the file itself there"
        raise bad(path, "is not a regular file", kind, expected, remedy)


def unreadable(
    path: str, error: OSError | ValueError, what: str = "cannot be read"
) -> StreammergeError:
    """The error that says why a file or folder could not be opened or read.

    At any time of a merge: one that is not there, or not for this user, is `InputMissing`; what the
    disk refuses is `StorageError`.
    """
    if not isinstance(error, OSError):  # NUL, or what the file system's encoding cannot hold
        return BadInput("is no possible file name", where=show(path), found=str(error))
    found = os.strerror(error.errno) if error.errno else str(error)
    if error.errno == errno.ENOENT and os.path.islink(path):
        what, found = "is a link to a file that is not there", f"link to {os.readlink(path)}"
        remedy = "download or copy the file again; the link alone was kept"
        return InputMissing(what, where=path, found=found, remedy=remedy)
    if error.errno in _ABSENT:
        remedy = _ABSENT[error.errno]
        return InputMissing(what, where=path, found=found, remedy=remedy)
    remedy = "check the disk or mount, and try again"
    return StorageError(what, where=path, found=found, remedy=remedy)


def pread(descriptor: int, count: int, offset: int) -> bytes:
    """`count` bytes from `offset`, fewer only at the end of the file: one call may come short."""
    parts: list[bytes] = []
    while count and (part := os.pread(descriptor, count, offset)):
        parts.append(part)
        offset += len(part)
        count -= len(part)
    return b"".join(parts)


def read_small(path: Path | str, limit: int = LIMIT) -> bytes:
    """The whole of a small regular file; `BadInput` when it holds more than `limit` bytes.

    Errors as in `open_regular`.
    """
    where = os.fspath(path)
    with open_regular(where) as (descriptor, stamp):
        if stamp.st_size > limit:
            found, expected = f"{stamp.st_size} bytes", f"at most {limit} bytes"
            raise bad(where, "is too large", found, expected, "check which file it is")
        return pread(descriptor, stamp.st_size, 0)


# --------------------------------------------------------------------------------- strict JSON


class _DuplicateKeyError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise _DuplicateKeyError(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return table


def parse_json(data: bytes, where: str, what: str = "", remedy: str = REPAIR) -> dict[str, Any]:
    """The JSON object in `data`, which is the file `where`, or what of it is JSON.

    `BadInput` for bad UTF-8, bad JSON, absurd nesting, half a surrogate pair, a key given twice in
    one object (Python's json keeps the last, others the first), and anything but an object.
    """
    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
        if _SURROGATE.search(data):  # legal in JSON, but half a pair cannot be written as UTF-8
            json.dumps(document, ensure_ascii=False).encode()
        if isinstance(document, dict):
            return document
        fault, found = "is not a JSON object", show(document)
    except UnicodeDecodeError as error:
        fault, found = "is not UTF-8", f"byte 0x{data[error.start]:02x} at offset {error.start}"
    except _DuplicateKeyError as error:
        fault, found = "has a key twice", show(str(error))
    except RecursionError:
        fault, found = "is nested absurdly deep", "more levels than can be followed"
    except json.JSONDecodeError as error:
        fault = "is not valid JSON"
        found = f"{error.msg} at line {error.lineno}, column {error.colno}"
    except ValueError as error:  # half a surrogate pair, or a number of thousands of digits
        fault, found = "is not valid JSON", str(error)
    raise bad(where, f"{what} {fault}".lstrip(), found, "a JSON object, each key once", remedy)
