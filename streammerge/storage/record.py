"""The record of a finished merge, `streammerge.json`: what was merged, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from streammerge.errors import StreammergeError
from streammerge.storage.smallfile import bad, parse_json, read_small, show

RECORD = "streammerge.json"
RECIPE = "streammerge.yaml"
FORMAT = 1

_REMEDY = "restore it from a copy of the output, or remove the folder and merge again"


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A file of weights as it was written; no checksum where part of it was copied unread.

    `planned_sha256` is of the header in the plan, where the file has another: lower ranks.
    """

    bytes: int
    header_sha256: str
    crc32c: int | None
    planned_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class ChangeRecord:
    """What one model changed: tensors, of how many, and the mean of |update| / |base|."""

    model: str
    applied: int
    total: int
    relative: float | None


@dataclass(frozen=True, slots=True)
class ApproximationRecord:
    """The factors of one tensor's merged update: their rank, and norms of it and of the rest."""

    rank: int
    update: float
    missed: float


@dataclass(frozen=True, slots=True)
class Record:
    """Everything that `streammerge.json` says. Nothing tells when, where or by whom."""

    streammerge: str  # version
    kind: Literal["model", "adapter"]
    fingerprint: str
    method: str
    grid: int  # elements of a tile
    environment: Mapping[str, Any]
    inputs: Mapping[str, Any]
    changes: tuple[ChangeRecord, ...]
    approximations: Mapping[str, ApproximationRecord]  # of an adapter, by the base's tensor
    files: Mapping[str, str]  # sha256 of each file but the shards and this one
    shards: Mapping[str, ShardRecord]
    tensors: Mapping[str, int | None]  # crc32c; None where it was copied unread

    def as_json(self) -> bytes:
        """The file's bytes."""
        document = {"format": FORMAT, **asdict(self)}
        return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def read_record(out: Path) -> Record:
    """The record of a finished output; `InputMissing` or `BadInput` where it has none that holds.

    Only the record's own form is checked here, not what it says of other files.
    """
    path = out / RECORD
    document = parse_json(read_small(path), str(path), "the record", _REMEDY)
    if document.pop("format", None) != FORMAT:
        expected = f"format {FORMAT}"
        raise bad(str(path), "is no record that this version reads", "", expected, _REMEDY)
    try:
        return _parsed(document)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        what = "the record is damaged"
        raise bad(str(path), what, show(str(error)), "as streammerge wrote it", _REMEDY) from error


def find_record(out: Path) -> Record | None:
    """The same, or None where there is none that can be read: the folder is not known as ours."""
    try:
        return read_record(out)
    except StreammergeError:
        return None


def _parsed(document: dict[str, Any]) -> Record:
    """The document as values; whatever does not fit raises."""
    shards = {name: ShardRecord(**shard) for name, shard in document.pop("shards").items()}
    changes = tuple(ChangeRecord(**change) for change in document.pop("changes"))
    approximations = {
        name: ApproximationRecord(**one) for name, one in document.pop("approximations").items()
    }
    record = Record(changes=changes, shards=shards, approximations=approximations, **document)
    whole_or_none, number_or_none = (int, type(None)), (float, int, type(None))
    for shard in shards.values():
        _expect((int,), shard.bytes)
        _expect((str,), shard.header_sha256)
        _expect(whole_or_none, shard.crc32c)
        _expect((str, type(None)), shard.planned_sha256)
    for change in changes:
        _expect((str,), change.model)
        _expect((int,), change.applied, change.total)
        _expect(number_or_none, change.relative)
    for one in approximations.values():
        _expect((int,), one.rank)
        _expect((float, int), one.update, one.missed)
    if record.kind not in ("model", "adapter"):
        raise ValueError(f"{show(record.kind)} is no kind of output")
    _expect((str,), *record.files.values(), record.streammerge, record.fingerprint, record.method)
    _expect(whole_or_none, *record.tensors.values())
    _expect((int,), record.grid)
    _expect((dict,), record.environment, record.inputs)
    return record


def _expect(kinds: tuple[type, ...], *values: object) -> None:
    for value in values:
        if type(value) not in kinds:
            raise TypeError(f"{show(value)} is no {kinds[0].__name__}")
