"""Tiles of an output derived again from its inputs and compared byte for byte.

It is a merge of which all but a sample counts as done, into a sink that compares.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from streammerge import engine
from streammerge.arrays import RawBytes
from streammerge.commands.verify import Verified
from streammerge.errors import BadInput, InputMissing, Problems, Refused, StreammergeError
from streammerge.planning import Job, Plan
from streammerge.planning.differences import differences
from streammerge.planning.fingerprint import identify
from streammerge.publication import recorded_identity
from streammerge.recipe import to_yaml
from streammerge.scheduler import Course, Done, Room, Track, drive, pieces_of
from streammerge.storage.bytesource import Files
from streammerge.storage.checksum import checksum
from streammerge.storage.header import read_header
from streammerge.storage.record import RECIPE, Record, read_record
from streammerge.storage.smallfile import open_regular, pread
from streammerge.words import Extent, Tile
from streammerge.work import Worker

_CHUNK_BYTES = 4 << 20
_REMEDY = "merge again with --force; if it stays so, check memory and disks of this machine"


@dataclass(frozen=True, slots=True)
class Lead:
    """How to get at the inputs of an output, and with how much memory.

    `config` is the recipe whose paths lead to them; without it the output's own, whose names are
    looked for in the working directory.
    """

    config: Path | None = None
    memory: str | None = None
    allow_pickle: bool = False


def recompute(verified: Verified, tiles: int, lead: Lead) -> Verified:
    """Derive up to `tiles` tiles of a verified output again, drawn by its fingerprint.

    Raises `BadInput` where inputs or recipe are not those of the output, or a tile differs; every
    tile that does is named.
    """
    plan, elsewhere = _planned(verified.out, lead)
    sample = _sample(plan, tiles, read_record(verified.out).fingerprint)
    _hold(verified.out, plan, sample)
    derived = sum(len(pieces) for pieces in sample.values())
    return replace(verified, derived=derived, notes=(*verified.notes, *elsewhere))


def compare_copies(verified: Verified, lead: Lead) -> Verified:
    """Hold the tensors that were copied unread to the input that they were copied from.

    Where the inputs are not at hand that is a note, unless a recipe was named that leads to them.
    Raises `BadInput` where a tensor differs; every one is named.
    """
    try:
        plan, _ = _planned(verified.out, lead)
    except StreammergeError as error:
        if lead.config:
            raise
        why = error.problems[0] if isinstance(error, Refused) else error
        note = (
            f"{verified.unsummed} copied tensors are compared with nothing: {why.what}; "
            "--config names the recipe that leads to the inputs"
        )
        return replace(verified, notes=(*verified.notes, note))
    sums = read_record(verified.out).tensors
    pieces = {job.target.spec.name: range(pieces_of(job)) for job in plan.jobs()}
    sample = {name: frozenset(all_of) for name, all_of in pieces.items() if sums[name] is None}
    _hold(verified.out, plan, sample)
    return replace(verified, compared=len(sample))


def _planned(out: Path, lead: Lead) -> tuple[Plan, tuple[str, ...]]:
    """The plan that the output came of, and notes where other libraries would compute it."""
    plan = _plan(out, lead)
    return plan, _compare_identity(out, read_record(out), plan)


def _hold(out: Path, plan: Plan, sample: Mapping[str, frozenset[int]]) -> None:
    """Derive pieces of tensors, and compare them with the output's."""
    comparison, problems = _Comparison(out, read_record(out).shards), Problems()
    with plan.files, threadpool_limits(1, "blas"):
        _derive(plan, sample, comparison)
    for fault in comparison.faults:
        problems.add(fault)
    problems.raise_any()


def _plan(out: Path, lead: Lead) -> Plan:
    recipe, pickles = lead.config or out / RECIPE, lead.allow_pickle
    try:
        return engine.plan(
            recipe,
            memory=lead.memory,
            device=_device(out),
            spill="never",
            allow_pickle=pickles,
        )
    except StreammergeError as error:
        if lead.config is not None or error.exit_code != InputMissing.exit_code:
            raise
        missing = error.problems if isinstance(error, Refused) else (error,)
        raise InputMissing(
            "the inputs of the output are not here, and it does not say where they lie",
            where=str(out / RECIPE),
            found="; ".join(one.what for one in missing),
            remedy="run this in the folder that holds them, or name the recipe that leads to "
            "them with --config",
        ) from error


def _device(out: Path) -> str:
    """That of the kind which the output was made on, where it is here."""
    kind = str(read_record(out).environment.get("device", "cpu"))
    return "auto" if kind.startswith("cuda") else kind


def _compare_identity(out: Path, record: Record, plan: Plan) -> tuple[str, ...]:
    """Refuse other inputs or another recipe; returns notes where other libraries compute."""
    recipe_yaml = to_yaml(plan.recipe, portable=True)
    now = identify(plan.inputs, plan.layouts, recipe_yaml, plan.outline.tokenizer, plan.device)
    found = differences(recorded_identity(out, record), now)
    if found.merge:
        raise BadInput(
            "the output was made from another recipe or other inputs",
            where=str(out),
            found="; ".join(found.merge),
            remedy="name the recipe that it was made with, and its inputs as they were",
        )
    return tuple(f"made elsewhere: {line}" for line in found.elsewhere)


def _sample(plan: Plan, tiles: int, seed: str) -> dict[str, frozenset[int]]:
    """Tensor -> pieces, drawn evenly from all pieces of the output."""
    counts = {job.target.spec.name: pieces_of(job) for job in plan.jobs()}
    total = sum(counts.values())
    drawn = sorted(random.Random(seed).sample(range(total), min(tiles, total)))
    sample: dict[str, frozenset[int]] = {}
    begin = 0
    for name, count in counts.items():
        mine = frozenset(piece - begin for piece in drawn if begin <= piece < begin + count)
        if mine:
            sample[name] = mine
        begin += count
    return sample


def _derive(plan: Plan, sample: Mapping[str, frozenset[int]], comparison: _Comparison) -> None:
    worker, flight = Worker(plan, comparison, keep_nan=True), plan.flight
    room = Room(flight.state_bytes)

    def courses() -> Iterator[Course]:
        for job in plan.jobs():
            if wanted := sample.get(job.target.spec.name):
                done = Done(_others(job, wanted))
                yield Course(job, room, flight.parts_ahead, done)

    tracks = [Track(courses())]
    with ThreadPoolExecutor(flight.threads, "worker") as pool:
        submit = lambda item: pool.submit(worker.work, item)  # noqa: E731
        for _ in drive(tracks, submit, capacity=2 * flight.threads, window=flight.window):
            pass


def _others(job: Job, wanted: frozenset[int]) -> frozenset[int]:
    return frozenset(range(pieces_of(job))) - wanted


class _Comparison:
    """A sink that holds what it is given against the files of an output.

    Of factors that were cut to a lower rank, the file has the first rows and columns.
    """

    def __init__(self, out: Path, shards: Iterable[str]) -> None:
        headers = [read_header(out / name) for name in shards]
        self._extents = {n: one for header in headers for n, one in header.tensors.items()}
        self.faults: list[BadInput] = []

    def write(self, extent: Extent, tile: Tile, stored: RawBytes) -> int:
        held = self._extents[extent.spec.name].spec
        row_bytes = held.cols * held.dtype.itemsize
        rows = stored.reshape(tile.stop - tile.start, -1)
        kept = rows[: max(0, held.rows - tile.start), :row_bytes]
        part = f"rows {tile.start} to {tile.stop - 1}"
        derived = np.ascontiguousarray(kept).reshape(-1)
        self._compare(extent.spec.name, part, tile.start * row_bytes, derived)
        return checksum(stored)

    def copy(self, files: Files, source: Extent, extent: Extent, start: int, length: int) -> None:
        with files.descriptor(source.path, length) as descriptor:
            for offset in range(start, start + length, _CHUNK_BYTES):
                count = min(_CHUNK_BYTES, start + length - offset)
                data = pread(descriptor, count, source.offset + offset)
                part = f"bytes {offset} to {offset + count - 1}"
                self._compare(extent.spec.name, part, offset, np.frombuffer(data, np.uint8))

    def _compare(self, tensor: str, part: str, offset: int, derived: RawBytes) -> None:
        extent = self._extents[tensor]
        place = extent.offset + offset
        with open_regular(extent.path) as (descriptor, _):
            held = np.frombuffer(pread(descriptor, derived.nbytes, place), np.uint8)
        if np.array_equal(held, derived):
            return
        differ = np.flatnonzero(held != derived)
        found = f"{len(differ)} of {derived.nbytes} bytes differ"
        found += f", the first at offset {place + int(differ[0])}"
        what = f"{tensor}, {part}: is not what the inputs give"
        self.faults.append(BadInput(what, where=extent.path, found=found, remedy=_REMEDY))
