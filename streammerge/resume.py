"""What an earlier run left of this very merge, and how the next one goes on from it.

The journal says what is done. Lines that a mark covers are taken at their word; the bytes that
later ones speak of are read again. A shard that is not as it was left is written anew, and what
the journal says of it does not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from streammerge import events
from streammerge.errors import OutputRefused
from streammerge.manner import Manner
from streammerge.planning import Job, Plan
from streammerge.planning.differences import differences
from streammerge.planning.fingerprint import Identity
from streammerge.report import Changes, HalfDone
from streammerge.scheduler import Done
from streammerge.sinks.receipts import Receipt
from streammerge.sinks.shards import ShardsSink
from streammerge.statistics.saved import restored
from streammerge.storage.durable import sync_folder
from streammerge.storage.journal import VERSION, Journal, Line, read_lines
from streammerge.storage.lock import perhaps_at_work
from streammerge.storage.room import taken_bytes
from streammerge.storage.rundir import JOURNAL, RunDirectory, state_folder
from streammerge.storage.shard import is_begun

_DISCARD = "--force discards it; or choose another --out"


@dataclass(slots=True)
class Survey:
    """One look at a journal: how much of it holds, and what it says as a whole."""

    opening: Mapping[str, Any]
    stop: int  # the end of its last sound line
    durable: int = 0  # receipts before this offset are covered by a mark
    void: list[tuple[int, int]] = field(default_factory=list)  # where none count any more
    anew: dict[str, int] = field(default_factory=dict)  # shard -> none before this offset does
    shards: set[str] = field(default_factory=set)  # those that receipts speak of
    built: tuple[str, ...] | None = None  # the output's files, once all are there
    lost_bytes: int = 0  # at the end, torn or damaged

    def take(self, line: Line) -> None:
        record = line.record
        self.stop = line.stop
        self.durable = max(self.durable, record.get("durable", 0))
        if "void" in record:
            self.void.append(tuple(record["void"]))
        elif "anew" in record:
            self.anew[record["anew"]] = line.start
        elif "built" in record:
            self.built = tuple(record["built"])
        elif "shard" in record:
            self.shards.add(record["shard"])

    def receipt(self, line: Line) -> Receipt | None:
        """The receipt in a line, if there is one and it still counts."""
        receipt = Receipt.read(line.record)
        if receipt is None or line.start < self.anew.get(receipt.shard, 0):
            return None
        return None if any(a <= line.start < b for a, b in self.void) else receipt


def device_before(out: Path) -> str | None:
    """The kind of device with which an unfinished merge into `out` was begun, if there is one."""
    journal = state_folder(out) / JOURNAL
    first = next(read_lines(journal), None) if journal.is_file() else None
    opening = first.record if first is not None else {}
    device = opening.get("environment", {}).get("device")
    return device if isinstance(device, str) else None


def survey(path: Path) -> Survey | None:
    """Read a journal once; None where not even its first line holds."""
    lines = read_lines(path)
    first = next(lines, None)
    if first is None or "journal" not in first.record:
        return None
    found = Survey(first.record, first.stop)
    for line in lines:
        found.take(line)
    found.lost_bytes = path.stat().st_size - found.stop
    return found


# ------------------------------------------------------------------------------- may it go on?


def take_up(state: RunDirectory, identity: Identity, manner: Manner) -> Survey | None:
    """The journal of an earlier run of this merge, None where there is nothing to go on from.

    Raises `OutputRefused` where it is of another merge, unless that is to be replaced, or was begun
    elsewhere and bytes are strict; else the latter is a warning.
    """
    if not state.keep:
        return None
    found = survey(state.journal)
    if found is None:
        damage = "the journal of an earlier run is damaged at its start"
        manner.emit(events.Warned(f"{damage}: starting over"))
        state.start_over()
        return None
    problem = _unfit(state, found.opening, identity, manner)
    if problem is None and found.built is not None and not state.holds(found.built):
        manner.emit(events.Warned("files of an earlier run have been removed: starting over"))
        state.start_over(found.built)
        return None
    if problem is None:
        if found.lost_bytes:
            damage = f"the last {found.lost_bytes} bytes of the journal are torn or damaged"
            manner.emit(events.Warned(f"{damage}: what they spoke of is done again"))
        return found
    if not manner.force:
        raise problem
    manner.emit(events.Note("another merge was half done here: starting over"))
    state.start_over(found.built or ())
    return None


def _unfit(
    state: RunDirectory, opening: Mapping[str, Any], identity: Identity, manner: Manner
) -> OutputRefused | None:
    """Why this merge must not go on from what is there, if so."""
    where = str(state.path)
    begun = _begun(opening)
    if begun is None:
        return OutputRefused(
            "another version of streammerge left an unfinished merge here",
            where=where,
            found=f"a journal of format {opening['journal']}",
            expected=f"format {VERSION}",
            remedy=f"finish it with that version; {_DISCARD}",
        )
    differ = differences(begun, identity)
    if differ.merge:
        what, found = "another merge is half done here", "; ".join(differ.merge)
        return OutputRefused(what, where=where, found=found, remedy=_DISCARD)
    if differ.elsewhere and manner.strict_bytes:
        what, found = "the merge was begun elsewhere", "; ".join(differ.elsewhere)
        remedy = f"go on with it there; {_DISCARD}"
        return OutputRefused(what, where=where, found=found, remedy=remedy)
    for line in differ.elsewhere:
        text = f"the merge was begun elsewhere; its last bits may differ: {line}"
        manner.emit(events.Warned(text))
    return None


def _begun(opening: Mapping[str, Any]) -> Identity | None:
    """The merge that a journal is of; None where another version wrote it."""
    given = {name: one for name, one in opening.items() if name != "journal"}
    known = {one.name for one in fields(Identity)}
    return Identity(**given) if opening["journal"] == VERSION and given.keys() == known else None


def half_done(folder: Path, identity: Identity) -> HalfDone:
    """What lies in a state folder beside a finished output of this merge."""
    found = survey(folder / JOURNAL)
    begun = _begun(found.opening) if found else None
    same = begun is not None and not differences(begun, identity).merge
    owner = perhaps_at_work(folder)
    return HalfDone(str(folder), taken_bytes(folder), same, str(owner) if owner else None)


# -------------------------------------------------------------------------------- what is done


class Earlier:
    """What counts as done, tensor by tensor; nothing, where no earlier run left anything."""

    def __init__(self) -> None:
        self._whole: dict[str, range] = {}
        self._partly: dict[str, set[int]] = {}
        self._values: dict[str, dict[str, Any]] = {}
        self.nbytes = 0

    def of(self, job: Job) -> Done:
        """What need not be done again of a job."""
        name = job.target.spec.name
        pieces = self._whole.get(name) or self._partly.get(name, set())
        values = {what: restored(one) for what, one in self._values.get(name, {}).items()}
        return Done(pieces, values)

    def add(self, receipt: Receipt) -> bool:
        """Take a receipt that counts; False when the piece is known already."""
        pieces = self._partly.setdefault(receipt.tensor, set())
        if receipt.index in pieces:
            return False
        pieces.add(receipt.index)
        self.nbytes += receipt.nbytes
        if (
            len(pieces) == receipt.pieces
        ):  # a range takes no room, and its statistics are not needed
            self._whole[receipt.tensor] = range(receipt.pieces)
            del self._partly[receipt.tensor]
            self._values.pop(receipt.tensor, None)
        return True

    def add_value(self, record: Mapping[str, Any]) -> None:
        self._values.setdefault(record["tensor"], {})[record["statistic"]] = record["value"]


def open_journal(state: RunDirectory, identity: Identity, found: Survey | None) -> Journal:
    """The journal to write on: a new one, or the old one up to its last sound line.

    Receipts that no mark covers are void from here on: those that hold are written down again.
    """
    if found is None:
        journal = Journal(state.journal, asdict(identity))
        for folder in (state.path, state.path.parent):  # else a dead machine may lose their names
            sync_folder(folder)
        return journal
    journal = Journal(state.journal, end=found.stop)
    journal.append([{"void": [found.durable, found.stop]}])
    return journal


def sound_shards(state: RunDirectory, plan: Plan, journal: Journal, found: Survey) -> set[str]:
    """The shards to go on with. The others go, and the journal is told so first."""
    paths = {layout.name: state.shards / layout.name for layout in plan.layouts}
    sound = {one.name for one in plan.layouts if is_begun(paths[one.name], one)}
    lost = sorted(found.shards - sound)
    journal.append({"anew": name} for name in lost)
    journal.sync()
    found.anew.update(dict.fromkeys(lost, found.stop))
    for name in paths.keys() - sound:
        state.drop(paths[name])
    return sound


def go_on(state: RunDirectory, found: Survey, sink: ShardsSink, changes: Changes) -> Earlier:
    """Count what is done: into the sink's sums, the models' changes, and what is returned."""
    earlier = Earlier()
    for line in read_lines(state.journal):
        if line.start >= found.stop:
            break
        if "statistic" in line.record:
            earlier.add_value(line.record)
        receipt = found.receipt(line)
        if receipt is None:
            continue
        covered = line.start < found.durable
        if (covered or sink.holds(receipt)) and earlier.add(receipt):
            sink.sums.add(receipt) if covered else sink.record(receipt)
            note_change(changes, receipt)
    return earlier


def note_change(changes: Changes, receipt: Receipt) -> None:
    """Keep account of what the models changed in a piece."""
    if receipt.crc32c is not None:
        norms = np.array(receipt.norms, np.float64)
        changes.add(receipt.tensor, receipt.index, receipt.pieces, receipt.models, norms)
