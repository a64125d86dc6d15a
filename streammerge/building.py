"""The main loop: an output is built in a folder of its own, tile by tile, and then published."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from streammerge import events, system
from streammerge.errors import Interrupted
from streammerge.manner import Manner
from streammerge.planning import CopyJob, Job, MergeJob, Plan
from streammerge.planning.fingerprint import Identity
from streammerge.publication import built_files, there_already, write_companions
from streammerge.report import Changes, Written
from streammerge.resume import (
    Earlier,
    Survey,
    go_on,
    note_change,
    open_journal,
    sound_shards,
    take_up,
)
from streammerge.scheduler import (
    Copy,
    Course,
    Done,
    Finish,
    Item,
    Measure,
    Merge,
    Room,
    Track,
    drive,
    pieces_of,
)
from streammerge.sinks.shards import ShardsSink
from streammerge.sizes import format_size
from streammerge.statistics.saved import saved
from streammerge.storage.journal import Journal
from streammerge.storage.rundir import RunDirectory
from streammerge.trimming import trim, unmet
from streammerge.work import Worker

PROGRESS_SECONDS = 0.2


def build(plan: Plan, out: Path, identity: Identity, changes: Changes, manner: Manner) -> int:
    """Build the output and publish it; returns how many bytes an earlier run had done already.

    What is done when the run is stopped, or fails for a reason that may pass, is kept beside the
    output; the next run goes on from it.
    """
    with RunDirectory(out) as state:
        resumed = plan.output_bytes()
        if there_already(out, identity, manner):
            return resumed  # by another process, since it was looked for
        found = take_up(state, identity, manner)
        if found is None or found.built is None:
            with open_journal(state, identity, found) as journal:
                resumed = _fill(plan, state, identity, found, journal, changes, manner)
        state.publish(plan.last_file())
    return resumed


def _fill(
    plan: Plan,
    state: RunDirectory,
    identity: Identity,
    found: Survey | None,
    journal: Journal,
    changes: Changes,
    manner: Manner,
) -> int:
    """Everything that is to be published, durable; returns the bytes that were done already."""
    if plan.trims:
        state.write_apart()
    begun = sound_shards(state, plan, journal, found) if found else set()
    with ShardsSink(state.shards, plan.layouts, journal, begun) as sink:
        earlier = go_on(state, found, sink, changes) if found else Earlier()
        if earlier.nbytes:
            size = format_size(earlier.nbytes)
            manner.emit(events.Note(f"going on with {size} that an earlier run has written"))
        with plan.spilling(state.path, state.out, identity.fingerprint):
            _Loop(plan, state, sink, journal, changes, earlier, manner).run()
        sink.commit()
    if lost := plan.store.lost_chunks:
        manner.emit(events.Warned(f"{lost} spilled tiles were removed by others and made again"))
    written = Written(plan.layouts, sink.sums, plan.adapter, changes.missed())
    if plan.trims:
        written = trim(written, state)
        for line in unmet(written):
            manner.emit(events.Warned(line))
    write_companions(plan, state.output, identity, written, changes)
    journal.append([{"built": built_files(state.output)}])
    journal.sync()
    return earlier.nbytes


class _Loop:
    """Drives the jobs, and keeps the record of what they come to."""

    def __init__(
        self,
        plan: Plan,
        state: RunDirectory,
        sink: ShardsSink,
        journal: Journal,
        changes: Changes,
        earlier: Earlier,
        manner: Manner,
    ) -> None:
        self._plan = plan
        self._state = state
        self._sink = sink
        self._journal = journal
        self._changes = changes
        self._earlier = earlier
        self._manner = manner
        self._meter = _Meter(plan, manner.emit, earlier.nbytes)

    def run(self) -> None:
        """All jobs, or `Interrupted` once a signal asked to stop."""
        flight, stopped = self._plan.flight, self._manner.stopped
        worker = Worker(self._plan, self._sink, keep_nan=self._manner.keep_nan)
        with ThreadPoolExecutor(flight.threads, "worker") as pool:
            done = drive(
                self._tracks(),
                lambda item: pool.submit(worker.work, item),
                capacity=2 * flight.threads,
                window=flight.window,
                stopped=lambda: stopped() is not None,
            )
            for item, result in done:
                self._note_down(item, result)
                self._meter.count(item)
        if signal := stopped():
            self._sink.mark()
            self._state.keep = True  # be it the statistics alone
            raise Interrupted(
                f"stopped by {signal}",
                where=str(self._state.path),
                found=f"{self._meter.share()} done, and kept there",
            )

    def _tracks(self) -> list[Track]:
        room = Room(self._plan.flight.state_bytes)
        return [Track(self._courses(jobs, room)) for jobs in self._plan.tracks()]

    def _courses(self, jobs: Iterable[Job], room: Room) -> Iterator[Course]:
        for job in jobs:
            done = self._earlier.of(job)
            self._meter.skip_reads(job, done)
            if isinstance(job, CopyJob) and 0 in done.pieces:
                self._changes.copied(job.target.spec.name, job.source.path)
            yield Course(job, room, self._plan.flight.parts_ahead, done)

    def _note_down(self, item: Item, result: Any) -> None:
        if isinstance(item, Merge | Copy):
            self._sink.record(result)
            self._state.keep = True
            note_change(self._changes, result)
        if isinstance(item, Copy) and item.index == 0:
            self._changes.copied(result.tensor, item.job.source.path)
        if isinstance(item, Finish):
            name = item.job.target.spec.name
            self._journal.append(
                {"tensor": name, "statistic": statistic, "value": document}
                for statistic, value in result.items()
                if (document := saved(value)) is not None
            )


class _Meter:
    """Reports progress a few times a second, in bytes of output measured or written."""

    def __init__(self, plan: Plan, emit: events.Emit, resumed: int) -> None:
        self._emit = emit
        self._started = time.monotonic()
        self._written = self._done = self._resumed = resumed
        self._total = plan.demand.progress_bytes
        self._last = 0.0

    def skip_reads(self, job: Job, done: Done) -> None:
        """Count the reads that a job is spared because its statistics are known."""
        if not isinstance(job, MergeJob):
            return
        if done.values or all(piece in done.pieces for piece in range(pieces_of(job))):
            of_a_wave = job.merged.measured.numel * job.target.spec.dtype.itemsize
            spared = len(job.merged.waves()) * of_a_wave
            self._done += spared
            self._resumed += spared

    def share(self) -> str:
        """How much is done, in per cent."""
        return f"{100 * min(self._done, self._total) / max(1, self._total):.0f} %"

    def count(self, item: Item) -> None:
        if isinstance(item, Finish):
            return
        spec = item.job.target.spec
        if isinstance(item, Copy):
            nbytes = item.length
        else:
            seen = item.job.merged.measured if isinstance(item, Measure) else spec
            rows, cols = item.tile.shape(seen)
            nbytes = rows * cols * spec.dtype.itemsize
        self._done += nbytes
        self._written += 0 if isinstance(item, Measure) else nbytes
        now = time.monotonic()
        if now - self._last >= PROGRESS_SECONDS or self._done >= self._total:
            self._last = now
            self._emit(
                events.Progress(
                    done=min(self._done, self._total),
                    total=self._total,
                    resumed=self._resumed,
                    tensor=spec.name,
                    written_bytes=self._written,
                    seconds=now - self._started,
                    resident_bytes=system.resident_bytes(),
                )
            )
