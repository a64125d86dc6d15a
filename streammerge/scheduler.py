"""A window of jobs in flight: waves of different tensors overlap, so no thread waits for a tensor.

Each job runs its course: while statistics are missing, a wave of measured tiles and a finish for
each; then the wave of merged tiles. What is in flight is bounded by numbers of the plan: items by
`capacity`, jobs by `window`, statistics by the `Room` for their state, and measured parts may be
only so far ahead of the next to absorb. Jobs of several output files are in flight side by side,
for the kernel lets one thread at a time write to a file.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from streammerge import grid
from streammerge.planning import CopyJob, Job, MergeJob
from streammerge.planning.cost import State
from streammerge.words import Fold, StatisticValue, Tile

# Copies are cut into pieces of this size, so that they share the threads with tiles.
COPY_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy a range of a stored tensor."""

    job: CopyJob
    index: int
    pieces: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Measure:
    """Measure a tile for all folds that share this read."""

    job: MergeJob
    index: int
    tile: Tile
    folds: Mapping[str, Fold]


@dataclass(frozen=True, slots=True)
class Finish:
    """Turn the folds of a wave into values or further folds."""

    job: MergeJob
    folds: Mapping[str, Fold]


@dataclass(frozen=True, slots=True)
class Merge:
    """Merge a tile and write it."""

    job: MergeJob
    index: int
    pieces: int
    tile: Tile
    values: Mapping[str, StatisticValue]


Item = Copy | Measure | Finish | Merge


@dataclass(frozen=True, slots=True)
class Done:
    """What need not be done again of a job: pieces that are written, statistics that are known."""

    pieces: Container[int] = ()
    values: Mapping[str, StatisticValue] = field(default_factory=dict)


NOTHING_DONE = Done()


class Room:
    """Memory for the state of statistics, which the jobs in flight share."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._taken = 0

    def take(self, nbytes: int) -> bool:
        """Whether there is so much; who needs more than there is gets it when it is alone."""
        if nbytes and self._taken and self._taken + nbytes > self.nbytes:
            return False
        self._taken += nbytes
        return True

    def give_back(self, nbytes: int) -> None:
        self._taken -= nbytes


class Course:
    """One job on its way: which items can be submitted now, and what came of those that were."""

    def __init__(self, job: Job, room: Room, parts_ahead: int, done: Done = NOTHING_DONE) -> None:
        self.job = job
        self._done = done
        self._room = room
        self._state_bytes = 0  # what the wave may come to hold
        self._taken = 0  # of the room, from the wave's first item to its finish
        self._ahead = parts_ahead
        self._running = 0
        self._finishing = False
        self._folds: dict[str, Fold] = {}
        self._values: dict[str, StatisticValue] = {}
        self._wave: dict[str, Fold] = {}
        self._tiles: Sequence[Tile] = ()
        self._next = 0
        self._absorbed = 0
        self._parts: dict[int, Mapping[str, Any]] = {}
        self._last: deque[Item] = deque()
        self._begun = False

    def _begin(self) -> None:
        self._begun = True
        job, done = self.job, self._done
        if isinstance(job, CopyJob):
            self._last.extend(item for item in _copies(job) if item.index not in done.pieces)
            return
        self._grid = grid.tiles(job.merged.measured)
        if any(index not in done.pieces for index in range(len(job.tiles()))):
            self._sort({**job.merged.start(self._room.nbytes, done.values), **done.values})
            self._start_wave(job)

    @property
    def done(self) -> bool:
        return self._begun and not (self._running or self._last or self._folds)

    def waits(self, active: Iterable[Course]) -> bool:
        """Whether its job is to begin after one that is not over."""
        before = self.job.after if isinstance(self.job, MergeJob) else None
        return before is not None and any(course.job is before for course in active)

    def next(self) -> Item | None:
        """An item to submit; None when there is none now."""
        if not self._begun:
            self._begin()
        item = self._pick()
        self._running += item is not None
        return item

    def _pick(self) -> Item | None:
        if self._last:
            return self._last.popleft()
        if not self._folds or self._finishing:
            return None
        assert isinstance(self.job, MergeJob)
        if self._next < len(self._tiles):
            if self._next - self._absorbed >= self._ahead:
                return None
            if self._next == 0:
                if not self._room.take(self._state_bytes):
                    return None
                self._taken = self._state_bytes
            index = self._next
            self._next += 1
            return Measure(self.job, index, self._tiles[index], self._wave)
        if self._absorbed == len(self._tiles):
            self._finishing = True
            return Finish(self.job, self._wave)
        return None

    def take(self, item: Item, result: Any) -> None:
        """Go on from a finished item."""
        self._running -= 1
        if isinstance(item, Measure):
            self._parts[item.index] = result
            self._absorb()
        elif isinstance(item, Finish):
            self._finishing = False
            self._room.give_back(self._taken)
            self._taken = 0
            for name in self._wave:
                del self._folds[name]
            self._sort(result)
            started = item.job.merged.start(self._room.nbytes, self._values)
            self._sort({name: one for name, one in started.items() if name not in self._folds})
            self._start_wave(item.job)

    def _absorb(self) -> None:
        """Parts go into their folds in grid order, whatever order they came in."""
        while self._absorbed in self._parts:
            part = self._parts.pop(self._absorbed)
            for name, fold in self._wave.items():
                fold.absorb(self._absorbed, part[name])
            self._absorbed += 1

    def _sort(self, found: Mapping[str, Fold | StatisticValue]) -> None:
        for name, one in found.items():
            if isinstance(one, StatisticValue):
                self._values[name] = one
            else:
                self._folds[name] = one

    def _start_wave(self, job: MergeJob) -> None:
        """All folds that want the tiles of the first one share its read."""
        self._next = self._absorbed = 0
        if self._folds:
            wants = {name: fold.wants(self._grid) for name, fold in self._folds.items()}
            self._tiles = next(iter(wants.values()))
            self._wave = {n: self._folds[n] for n, tiles in wants.items() if tiles == self._tiles}
            sampled = any(tile.thinned for tile in self._tiles)
            state = State(*job.merged.state_bytes())
            self._state_bytes = 0 if sampled else state.within(self._room.nbytes)
            return
        grid = job.tiles()
        pieces = len(grid)
        tiles = [(i, tile) for i, tile in enumerate(grid) if i not in self._done.pieces]
        self._last.extend(Merge(job, i, pieces, tile, self._values) for i, tile in tiles)


def pieces_of(job: Job) -> int:
    """How many tiles or ranges a job's tensor is written in."""
    if isinstance(job, CopyJob):
        return -(-job.source.spec.nbytes // COPY_BYTES)
    return len(job.tiles())


def _copies(job: CopyJob) -> Iterator[Copy]:
    size = job.source.spec.nbytes
    starts = range(0, size, COPY_BYTES)
    for index, start in enumerate(starts):
        yield Copy(job, index, len(starts), start, min(COPY_BYTES, size - start))


class Track:
    """The courses of one output file, in their order."""

    def __init__(self, courses: Iterable[Course]) -> None:
        self.active: list[Course] = []
        self.writing = 0  # items in flight
        self._coming = iter(courses)
        self._waiting: list[Course] = []

    def next(self, free: int) -> tuple[Course, Item] | None:
        """An item of the earliest job that has one; so many more jobs may be opened for it."""
        for course in self.active:
            item = course.next()
            if item is not None:
                return course, item
        while free > 0:
            opened = self._open()
            if opened is None:
                return None
            item = opened.next()
            if not opened.done:
                self.active.append(opened)
                free -= 1
            if item is not None:
                return opened, item
        return None

    def _open(self) -> Course | None:
        """The next that may begin. Those that wait hold nothing, and keep nobody waiting."""
        for course in self._waiting:
            if not course.waits(self.active):
                self._waiting.remove(course)
                return course
        for course in self._coming:
            if not course.waits(self.active):
                return course
            self._waiting.append(course)
        return None

    def retire(self) -> None:
        """Let go of the jobs that are over."""
        self.active[:] = [course for course in self.active if not _retire(course)]


def drive(
    tracks: Sequence[Track],
    submit: Callable[[Item], Future[Any]],
    *,
    capacity: int,
    window: int,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Item, Any]]:
    """Run all courses; yields each finished item with its result, in the order of finishing.

    The first item that fails ends the run with its exception, once those in flight are over. Once
    `stopped`, no more are begun, and the run ends with those in flight.
    """
    running: dict[Future[Any], tuple[Track, Course, Item]] = {}
    finished: SimpleQueue[Future[Any]] = SimpleQueue()
    try:
        while True:
            while len(running) < capacity and not stopped():
                picked = _pick(tracks, window)
                if picked is None:
                    break
                track, _, item = picked
                future = submit(item)
                running[future] = picked
                track.writing += isinstance(item, Copy | Merge)
                future.add_done_callback(finished.put)
            if not running:
                return
            future = finished.get()
            track, course, item = running.pop(future)
            result = future.result()
            track.writing -= isinstance(item, Copy | Merge)
            course.take(item, result)
            yield item, result
            track.retire()
    finally:
        for future in running:
            future.cancel()
        wait(running)


def _pick(tracks: Sequence[Track], window: int) -> tuple[Track, Course, Item] | None:
    """An item for the file that is written to least, so that threads seldom wait for each other."""
    for track in sorted(tracks, key=lambda track: track.writing):
        found = track.next(window - sum(len(one.active) for one in tracks))
        if found is not None:
            return track, *found
    return None


def _retire(course: Course) -> bool:
    if not course.done:
        return False
    if isinstance(course.job, MergeJob):
        course.job.release()
    return True
