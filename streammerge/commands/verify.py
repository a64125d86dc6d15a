"""Is an output what its record says, and is that what its inputs give?

In three depths: the structure (headers, sizes, small files); every byte of the tensors against
their checksums, or against the input that they were copied from; and tiles derived again from the
inputs. What needs the inputs is in `commands.recompute`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from streammerge.errors import BadInput, InputMissing, Problems, StorageError, StreammergeError
from streammerge.kernels.casts import not_finite_stored
from streammerge.storage.checksum import checksum, combine
from streammerge.storage.folder import open_model
from streammerge.storage.header import Header, read_header
from streammerge.storage.record import RECORD, Record, read_record
from streammerge.storage.rundir import JOURNAL, state_folder
from streammerge.storage.smallfile import bad, open_regular, pread, read_small
from streammerge.words import Extent

_T = TypeVar("_T")

_CHUNK_BYTES = 4 << 20
_RESTORE = "copy the output again from where it was made, or merge again with --force"


@dataclass(frozen=True, slots=True)
class Verified:
    """What was looked at; all of it is as it should be."""

    out: Path
    shards: int
    files: int  # small ones
    tensors: int
    summed: int | None  # tensors whose bytes have the recorded checksum; None: not read
    unsummed: int  # tensors that were copied unread, of which no checksum is recorded
    not_finite: Mapping[str, int]  # tensor -> values that are NaN or infinite, of those read
    compared: int | None = None  # unsummed tensors that equal their input; None: not looked at
    derived: int | None = None  # tiles derived again from the inputs; None: not asked for
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "out": str(self.out)}


def verify(out: Path, *, read_data: bool = False) -> Verified:
    """Hold an output to its own record.

    `read_data` reads every byte of its tensors: those that were copied unread have no checksum, and
    are for `recompute.compare_copies`. Raises `InputMissing` where there is no output,
    `BadInput` for one thing that is wrong, `Refused` for several, each with its file.
    """
    if not out.is_dir():
        raise _no_output(out)
    if not (out / RECORD).exists():
        what, remedy = f"holds no {RECORD}", "name the folder of a finished merge"
        raise bad(str(out), what, remedy=remedy)
    record = read_record(out)
    problems = Problems()
    headers = _check_structure(out, record, problems)
    data = _Data(record, problems)
    for header in headers if read_data else ():
        data.check(header)
    problems.raise_any()
    return Verified(
        out=out,
        shards=len(record.shards),
        files=len(record.files),
        tensors=len(record.tensors),
        summed=data.right if read_data else None,
        unsummed=sum(crc is None for crc in record.tensors.values()),
        not_finite=data.not_finite,
    )


def _no_output(out: Path) -> InputMissing:
    what, remedy, state = "there is no such output", "name the folder of a finished merge", None
    if (state_folder(out) / JOURNAL).exists():
        state = f"a merge that is half done, in {state_folder(out)}"
        remedy = "run the command of that merge again: it goes on"
    return InputMissing(what, where=str(out), found=state, remedy=remedy)


def describe(found: Verified) -> str:
    """The result for a person."""
    lines = [
        f"structure  {found.tensors} tensors in {found.shards} shard(s), "
        f"{found.files} other files: as recorded"
    ]
    if found.summed is None:
        lines.append("data       not read: --read-data holds every tensor to its checksum")
    else:
        lines.append(f"data       {found.summed} tensors read: every checksum is right")
        if found.unsummed:
            equal = "have its bytes" if found.compared is not None else "have none"
            lines.append(f"           {found.unsummed} more were copied from an input and {equal}")
    if found.derived is not None:
        lines.append(f"recompute  {found.derived} tiles derived again: equal byte for byte")
    lines += [f"note       {note}" for note in (*_about_values(found), *found.notes)]
    return "\n".join([*lines, f"output     {found.out} is what its record says"])


def _about_values(found: Verified) -> Iterator[str]:
    """Not what a record forbids: a base may hold such values, and tensors are copied unread."""
    if found.not_finite:
        first = ", ".join(f"{name} ({n})" for name, n in list(found.not_finite.items())[:3])
        more = ", ..." * (len(found.not_finite) > 3)
        count = len(found.not_finite)
        yield f"{count} tensor(s) hold values that are NaN or infinite: {first}{more}"


# ------------------------------------------------------------------------------------- structure


def _check_structure(out: Path, record: Record, problems: Problems) -> list[Header]:
    """Headers, sizes and small files against the record; returns the headers that are right."""
    for name, digest in record.files.items():
        _try(problems, partial(_check_file, out / name, digest))
    found = [_try(problems, partial(_checked_header, out / n, record)) for n in record.shards]
    headers = [header for header in found if header is not None]
    if len(headers) == len(record.shards):
        if record.kind == "model":
            _try(problems, lambda: open_model(out))  # whether index and shards agree
        _check_names(out, record, headers, problems)
    return headers


def _try(problems: Problems, action: Callable[[], _T]) -> _T | None:
    try:
        return action()
    except InputMissing as error:  # a part of the output is not there: the output is damaged
        found = error.found or "nothing"
        problems.add(bad(str(error.where), "is missing", found, remedy=_RESTORE))
    except BadInput as error:  # whoever found it takes the output for any model
        error.remedy = _RESTORE
        problems.add(error)
    except StreammergeError as error:
        problems.add(error)
    return None


def _check_file(path: Path, digest: str) -> None:
    found = hashlib.sha256(read_small(path)).hexdigest()
    if found != digest:
        what = "is not the file that the merge wrote"
        raise bad(str(path), what, f"sha256 {found}", f"sha256 {digest}", _RESTORE)


def _checked_header(path: Path, record: Record) -> Header:
    expected = record.shards[path.name]
    with open_regular(os.fspath(path)) as (_, stamp):  # first: a header says less of a cut file
        if stamp.st_size != expected.bytes:
            found, wanted = f"{stamp.st_size} bytes", f"{expected.bytes} bytes"
            raise bad(str(path), "has not the size that was written", found, wanted, _RESTORE)
    header = read_header(path)
    if header.digest != expected.header_sha256:
        found, wanted = f"sha256 {header.digest}", f"sha256 {expected.header_sha256}"
        raise bad(str(path), "has not the header that was written", found, wanted, _RESTORE)
    return header


def _check_names(out: Path, record: Record, headers: list[Header], problems: Problems) -> None:
    held = {name for header in headers for name in header.tensors}
    for name in sorted(held ^ record.tensors.keys()):
        places = ("the shards", "the record") if name in held else ("the record", "the shards")
        what = f"{name} is in {places[0]} and not in {places[1]}"
        problems.add(bad(str(out / RECORD), what, remedy=_RESTORE))


# ------------------------------------------------------------------------------------------ data


class _Data:
    """Reads shards, and holds every tensor to the checksum that was recorded."""

    def __init__(self, record: Record, problems: Problems) -> None:
        self._record = record
        self._problems = problems
        self.right = 0  # tensors that have it
        self.not_finite: dict[str, int] = {}

    def check(self, header: Header) -> None:
        with open_regular(header.path) as (descriptor, _):
            whole = checksum(pread(descriptor, header.data_start, 0))
            for extent in header.tensors.values():
                crc = self._read(descriptor, extent)
                whole = combine(whole, crc, extent.spec.nbytes)
                self._compare(extent, crc)
        stated = self._record.shards[os.path.basename(header.path)].crc32c
        if stated is not None and stated != whole:
            what = "the bytes of the file are not those that were written"
            self._problems.add(_other_sum(header.path, what, whole, stated))

    def _compare(self, extent: Extent, crc: int) -> None:
        expected = self._record.tensors[extent.spec.name]
        if crc == expected:
            self.right += 1
        elif expected is not None:
            what = f"the bytes of {extent.spec.name} are not those that were written"
            self._problems.add(_other_sum(extent.path, what, crc, expected))

    def _read(self, descriptor: int, extent: Extent) -> int:
        """crc32c of a tensor's bytes; values that are not finite are counted on the way."""
        crc, spoiled, dtype = 0, 0, extent.spec.dtype
        for chunk in _chunks(descriptor, extent):
            crc = checksum(chunk, crc)
            if dtype.mergeable:
                spoiled += not_finite_stored(np.frombuffer(chunk, np.uint8), dtype)
        if spoiled:
            self.not_finite[extent.spec.name] = spoiled
        return crc


def _chunks(descriptor: int, extent: Extent) -> Iterator[bytes]:
    end = extent.offset + extent.spec.nbytes
    for start in range(extent.offset, end, _CHUNK_BYTES):
        length = min(_CHUNK_BYTES, end - start)
        data = pread(descriptor, length, start)
        if len(data) < length:
            raise StorageError("became shorter while it was read", where=extent.path)
        yield data


def _other_sum(where: str, what: str, found: int, expected: int) -> StreammergeError:
    return bad(where, what, f"crc32c {found:08x}", f"crc32c {expected:08x}", _RESTORE)
