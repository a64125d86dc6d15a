"""The window of jobs: what runs when, how far ahead, and what a failure does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge import grid, scheduler
from streammerge.planning import CopyJob, MergeJob
from streammerge.planning.cost import State
from streammerge.scheduler import Copy, Course, Finish, Item, Measure, Merge, Room, Track, drive
from streammerge.words import DeltaStack, DType, Extent, Fold, StatisticValue, TensorSpec, Tile
from tests.contracts.any_order import AnyOrder


@dataclass
class Value:
    """What came of a fold: the parts that it took, in order."""

    parts: list[Any]

    def at(self, tile_index: int) -> Any:
        return self.parts


@dataclass
class FakeFold:
    """Wants every tile, or one sample; then so many further reads."""

    name: str
    reads: int
    sample: bool = False
    taken: list[Any] = field(default_factory=list)

    def wants(self, tiles: Sequence[Tile]) -> Sequence[Tile]:
        return [Tile(0, len(tiles), 2, 2)] if self.sample else tiles

    def measure(self, stack: DeltaStack, scratch: Any) -> Any:
        raise NotImplementedError

    def absorb(self, tile_index: int, part: Any) -> None:
        self.taken.append((self.name, self.reads, tile_index, part))

    def finish(self) -> Fold | StatisticValue:
        if self.reads == 1:
            return Value(self.taken)
        return FakeFold(self.name, self.reads - 1, taken=self.taken)


@dataclass
class FakeMerged:
    """A tensor of some rows, a tile each, and statistics that want some reads."""

    spec: TensorSpec
    statistics: Mapping[str, int] = field(default_factory=dict)
    sampled: bool = False
    released: int = 0
    after: Mapping[str, str] = field(default_factory=dict)  # statistic -> one that it waits for
    state: int = 0  # bytes

    @property
    def measured(self) -> TensorSpec:
        return self.spec

    def start(
        self, state_bytes: int, values: Mapping[str, StatisticValue]
    ) -> dict[str, Fold | StatisticValue]:
        found: dict[str, Fold | StatisticValue] = {}
        for name, reads in self.statistics.items():
            if name not in values and self.after.get(name) in (None, *values):
                found[name] = FakeFold(name, reads, self.sampled) if reads else Value([])
        return found

    def state_bytes(self) -> tuple[int, int]:
        return self.state // 2, self.state

    def over(self, statistic: str) -> int:
        """After how many waves a statistic is there."""
        before = self.after.get(statistic)
        return self.statistics[statistic] + (self.over(before) if before else 0)

    def release(self) -> None:
        self.released += 1


def merge_job(name: str, rows: int, sampled: bool = False, **statistics: int) -> MergeJob:
    spec = TensorSpec(name, (rows, 1), DType.F32)
    merged: Any = FakeMerged(spec, statistics, sampled)
    return MergeJob(merged, Extent("out", 0, spec), ())


def copy_job(name: str, nbytes: int) -> CopyJob:
    extent = Extent("in", 8, TensorSpec(name, (nbytes,), DType.U8))
    return CopyJob(extent, Extent("out", 8, extent.spec))


Job = MergeJob | CopyJob


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(scheduler, "COPY_BYTES", 10)


class Watch:
    """Does items, and keeps what was in flight."""

    def __init__(self, ahead: int, room: int = 1 << 20) -> None:
        self.ahead = ahead
        self.room = Room(room)
        self.state: dict[str, int] = {}  # of the jobs in a wave over the grid
        self.most_state = 0
        self.open: set[str] = set()
        self.most_open = 0
        self.most_running = 0

    def courses(self, jobs: Sequence[Job]) -> Iterator[Course]:
        for job in jobs:
            self.open.add(job.target.spec.name)
            self.most_open = max(self.most_open, len(self.open))
            yield Course(job, self.room, self.ahead)

    def begun(self, item: Item) -> None:
        if isinstance(item, Measure) and not item.tile.thinned:
            held = State(*item.job.merged.state_bytes()).within(self.room.nbytes)
            self.state[item.job.target.spec.name] = held
            self.most_state = max(self.most_state, sum(self.state.values()))

    def over(self, item: Item) -> None:
        if isinstance(item, Finish):
            self.state.pop(item.job.target.spec.name, None)

    def work(self, item: Item) -> Any:
        """A measured part says which tile it is of."""
        if isinstance(item, Measure):
            return {name: (name, item.tile.start) for name in item.folds}
        if isinstance(item, Finish):
            return {name: fold.finish() for name, fold in item.folds.items()}
        return None


def run(
    jobs: Sequence[Job],
    *,
    seed: int = 0,
    capacity: int = 4,
    window: int = 2,
    ahead: int = 3,
    room: int = 1 << 20,
    files: int = 1,
) -> tuple[list[Item], Watch]:
    """Drive jobs in an order of finishing drawn from the seed; no thread takes part.

    They are dealt out to so many files, in turn.
    """
    watch, pool = Watch(ahead, room), AnyOrder(seed)
    in_flight: set[int] = set()

    def submit(item: Item) -> Future[Any]:
        in_flight.add(id(item))
        watch.most_running = max(watch.most_running, len(in_flight))
        watch.begun(item)
        return pool.submit(watch.work, item)

    finished: list[Item] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "SimpleQueue", pool.queue)
        left = {job.target.spec.name: _items(job) for job in jobs}
        tracks = [Track(watch.courses(jobs[first::files])) for first in range(files)]
        for item, _ in drive(tracks, submit, capacity=capacity, window=window):
            in_flight.discard(id(item))
            watch.over(item)
            finished.append(item)
            name = item.job.target.spec.name
            left[name] -= 1
            if not left[name]:
                watch.open.discard(name)
    assert not any(left.values())
    return finished, watch


def _items(job: Job) -> int:
    """How many items a job is."""
    if isinstance(job, CopyJob):
        return -(-job.source.spec.nbytes // 10)
    merged: Any = job.merged
    rows, waves = job.merged.spec.rows, max(map(merged.over, merged.statistics), default=0)
    measured = waves * rows if not merged.sampled or not waves else 1 + (waves - 1) * rows
    return rows + measured + waves


JOBS: list[Job] = [
    merge_job("a", 5, cut=1),
    copy_job("b", 35),
    merge_job("c", 1),
    merge_job("d", 7, gram=2, cut=1),
    copy_job("e", 3),
    merge_job("f", 4, sampled=True, cut=2),
    merge_job("g", 3, known=0),
]


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_finishing_does_every_item_once(seed: int) -> None:
    finished, _ = run(JOBS, seed=seed)
    for job in JOBS:
        mine = [item for item in finished if item.job is job]
        last = [item for item in mine if isinstance(item, Merge | Copy)]
        pieces = 4 if job is JOBS[1] else 1 if job is JOBS[4] else job.target.spec.rows
        assert sorted(item.index for item in last) == list(range(pieces))
        assert all(item.pieces == pieces for item in last)
    copies = [item for item in finished if isinstance(item, Copy) and item.job is JOBS[1]]
    assert sorted((item.start, item.length) for item in copies) == [
        (0, 10),
        (10, 10),
        (20, 10),
        (30, 5),
    ]


@pytest.mark.parametrize("window", [1, 2, 4])
def test_a_job_after_another_begins_when_that_is_over(window: int) -> None:
    first = merge_job("first", 3, cut=1)
    second = replace(merge_job("second", 4, cut=1), after=first)
    jobs = [first, second, copy_job("b", 35), merge_job("c", 2)]
    between = 0
    for seed in range(20):
        order = [item.job for item in run(jobs, seed=seed, window=window)[0]]
        last = len(order) - 1 - order[::-1].index(first)
        assert order.index(second) > last
        between += order.index(jobs[2]) < last
    assert bool(between) == (window > 1)  # who waits takes no room, and keeps nobody waiting


@pytest.mark.parametrize("seed", range(20))
def test_parts_are_absorbed_in_grid_order(seed: int) -> None:
    finished, _ = run(JOBS, seed=seed)
    merges = [item for item in finished if isinstance(item, Merge) and item.job is JOBS[3]]
    assert {frozenset(item.values) for item in merges} == {frozenset({"gram", "cut"})}
    tiles = range(7)
    expected = {
        "cut": [("cut", 1, i, ("cut", i)) for i in tiles],
        "gram": [("gram", reads, i, ("gram", i)) for reads in (2, 1) for i in tiles],
    }
    for item in merges:
        assert {name: value.at(0) for name, value in item.values.items()} == expected


def test_nothing_is_merged_before_its_statistics_are_there() -> None:
    for seed in range(10):
        finished, _ = run([merge_job("a", 6, cut=2)], seed=seed)
        kinds = [type(item) for item in finished]
        assert kinds == [*[Measure] * 6, Finish, *[Measure] * 6, Finish, *[Merge] * 6]


@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.integers(0, 2), st.booleans(), st.integers(0, 9)),
        min_size=1,
        max_size=7,
    ),
    st.integers(0, 12),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_statistics_share_the_room_for_their_state(
    tensors: list[tuple[int, int, bool, int]], room: int, window: int, files: int, seed: int
) -> None:
    """No more of it at once than there is, or one that needs more; and nobody waits for ever."""
    jobs = [merge_job(str(i), rows, sampled) for i, (rows, _, sampled, _) in enumerate(tensors)]
    for job, (_, reads, _, state) in zip(jobs, tensors, strict=True):
        merged: Any = job.merged
        merged.statistics, merged.state = {"cut": reads}, state
    _, watch = run(jobs, seed=seed, window=window, room=room, files=files)
    assert watch.most_state <= max(room, *(state // 2 for *_, state in tensors))
    assert not watch.state


def test_large_states_wait_for_each_other_and_small_ones_do_not() -> None:
    jobs = [merge_job(str(i), 8, cut=1) for i in range(3)]
    for room, state in ((20, 10), (15, 10)):
        for job in jobs:
            job.merged.state = state  # type: ignore[attr-defined]
        most = max(run(jobs, seed=seed, window=3, room=room)[1].most_state for seed in range(20))
        assert most == room // state * state


def test_a_statistic_starts_when_those_that_it_waits_for_are_there() -> None:
    """Three in a chain, the second of two reads; one beside them shares the first read."""
    job = merge_job("w", 3, first=1, second=2, third=1, beside=1)
    job.merged.after = {"second": "first", "third": "second"}  # type: ignore[attr-defined]
    items, _ = run([job])
    waves: list[set[str]] = []
    for item in items:
        if isinstance(item, Finish):
            waves.append(set(item.folds))
    assert waves == [{"first", "beside"}, {"second"}, {"second"}, {"third"}]
    assert sum(isinstance(item, Measure) for item in items) == 4 * 3
    merged = [item for item in items if isinstance(item, Merge)]
    assert all(set(item.values) == {"first", "second", "third", "beside"} for item in merged)


def test_folds_that_want_the_same_tiles_share_a_read() -> None:
    finished, _ = run([merge_job("a", 4, one=1, two=1)])
    measured = [item for item in finished if isinstance(item, Measure)]
    assert len(measured) == 4
    assert all(set(item.folds) == {"one", "two"} for item in measured)


def test_a_job_is_released_once_when_it_is_over() -> None:
    jobs = [merge_job(str(i), 3, cut=i % 3) for i in range(6)]
    run(jobs, window=3)
    assert [job.merged.released for job in jobs] == [1] * 6  # type: ignore[attr-defined]


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2)), min_size=1, max_size=8),
    seed=st.integers(0, 1 << 30),
    capacity=st.integers(1, 9),
    window=st.integers(1, 5),
    ahead=st.integers(1, 6),
    files=st.integers(1, 4),
)
def test_what_is_in_flight_is_bounded(
    sizes: list[tuple[int, int]], seed: int, capacity: int, window: int, ahead: int, files: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "TILE_ELEMENTS", 1)
        most_ahead = _watch_parts(patch)
        jobs = [merge_job(f"{i}", rows, cut=reads) for i, (rows, reads) in enumerate(sizes)]
        _, watch = run(jobs, seed=seed, capacity=capacity, window=window, ahead=ahead, files=files)
    assert watch.most_running <= capacity
    assert watch.most_open <= window
    assert most_ahead() <= ahead


def _watch_parts(patch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The most tiles of a course that were handed out and not absorbed yet."""
    out: dict[int, int] = {}
    most = [0]
    pick, absorb = Course.next, FakeFold.absorb

    def counted_pick(course: Course) -> Item | None:
        item = pick(course)
        if isinstance(item, Measure):
            key = id(item.folds["cut"])
            out[key] = out.get(key, 0) + 1
            most[0] = max(most[0], out[key])
        return item

    def counted_absorb(fold: FakeFold, tile_index: int, part: Any) -> None:
        out[id(fold)] -= 1
        absorb(fold, tile_index, part)

    patch.setattr(Course, "next", counted_pick)
    patch.setattr(FakeFold, "absorb", counted_absorb)
    return lambda: most[0]


def test_waves_of_different_tensors_overlap() -> None:
    """While one tensor waits for its last tiles, another one's are under way."""
    finished, _ = run([merge_job("a", 3, cut=1), merge_job("b", 3, cut=1)], capacity=4, window=2)
    names = [item.job.target.spec.name for item in finished]
    assert names != sorted(names)


@pytest.mark.parametrize("seed", range(10))
def test_threads_write_to_different_files(seed: int) -> None:
    """As long as each has something to write: the kernel lets one at a time write to a file."""
    files: list[list[Job]] = [
        [copy_job("a", 90), merge_job("b", 5)],
        [merge_job("c", 9), copy_job("d", 60)],
    ]
    where = {id(job): file for file, jobs in enumerate(files) for job in jobs}
    left = [sum(_items(job) for job in jobs) for jobs in files]
    writing, together = [0, 0], 0
    watch, pool = Watch(3), AnyOrder(seed)

    def submit(item: Item) -> Future[Any]:
        file = where[id(item.job)]
        left[file] -= 1
        writing[file] += 1
        if all(left):
            assert writing[file] == 1
        return pool.submit(watch.work, item)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "SimpleQueue", pool.queue)
        tracks = [Track(watch.courses(jobs)) for jobs in files]
        for item, _ in drive(tracks, submit, capacity=2, window=2):
            together += all(writing)
            writing[where[id(item.job)]] -= 1
    assert together >= 10
    assert left == [0, 0]


# ---------------------------------------------------------------------------------------- failure


class Broken(Exception):
    """What went wrong with an item."""


@pytest.mark.parametrize("kind", [Measure, Finish, Merge, Copy])
def test_the_first_failure_stops_and_is_raised(kind: type[Item]) -> None:
    """What runs comes to its end, and nothing is started any more."""
    jobs: list[Job] = [merge_job("a", 30, cut=1), copy_job("b", 300), merge_job("c", 30)]
    running: set[int] = set()
    started: list[Item] = []  # sets and lists, as counting is not safe among threads
    after: list[Item] = []
    failed = threading.Event()

    def work(item: Item) -> Any:
        started.append(item)
        after.extend([item] if failed.is_set() else [])
        running.add(id(item))
        try:
            if isinstance(item, kind):
                failed.set()
                raise Broken(item)
            time.sleep(0.001)
            return watch.work(item)
        finally:
            running.discard(id(item))

    watch = Watch(8)
    with ThreadPoolExecutor(3) as pool, pytest.raises(Broken) as caught:
        tracks = [Track(watch.courses(jobs))]
        for _ in drive(tracks, lambda item: pool.submit(work, item), capacity=6, window=3):
            pass
    assert isinstance(caught.value.args[0], kind)
    assert not running
    assert len(after) <= 6  # what was handed out by then
    assert len(started) < sum(_items(job) for job in jobs)


class Waiting(Future[Any]):
    """Not begun yet, and told so as soon as it is cancelled."""

    def cancel(self) -> bool:
        return super().cancel() and not self.set_running_or_notify_cancel()


def test_what_has_not_begun_is_cancelled() -> None:
    futures: list[Waiting] = []

    def submit(item: Item) -> Waiting:
        futures.append(Waiting())
        if len(futures) == 4:
            futures[1].set_exception(Broken())
        return futures[-1]

    courses = Watch(4).courses([merge_job("a", 9)])
    with pytest.raises(Broken):
        next(drive([Track(courses)], submit, capacity=4, window=1))
    assert [future.cancelled() for future in futures] == [True, False, True, True]


def test_a_caller_that_stops_stops_the_run() -> None:
    jobs = [merge_job("a", 200)]
    watch = Watch(4)
    started: list[Item] = []

    def work(item: Item) -> None:
        started.append(item)
        time.sleep(0.001)

    with ThreadPoolExecutor(2) as pool:
        tracks = [Track(watch.courses(jobs))]
        finished = drive(tracks, lambda item: pool.submit(work, item), capacity=4, window=1)
        next(finished)
        finished.close()  # type: ignore[attr-defined]
        assert len(started) <= 8


def test_no_jobs_are_no_work() -> None:
    assert run([])[0] == []


# ------------------------------------------------------------------------- what is done already


def drive_with(done: Mapping[str, scheduler.Done], seed: int = 0) -> list[Item]:
    """All items of JOBS in the order in which they finish."""
    watch, pool = Watch(3), AnyOrder(seed)
    courses = (
        Course(job, Room(1 << 20), 3, done.get(job.target.spec.name, scheduler.NOTHING_DONE))
        for job in JOBS
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "SimpleQueue", pool.queue)
        submit: Any = lambda item: pool.submit(watch.work, item)  # noqa: E731
        return [item for item, _ in drive([Track(courses)], submit, capacity=4, window=2)]


def test_pieces_that_are_done_are_left_out_and_all_others_done() -> None:
    done = {"a": scheduler.Done({0, 3}), "b": scheduler.Done({1}), "d": scheduler.Done(range(7))}
    items = drive_with(done)
    last = [(i.job.target.spec.name, i.index) for i in items if isinstance(i, Merge | Copy)]
    expected = {(job.target.spec.name, i) for job in JOBS for i in range(scheduler.pieces_of(job))}
    expected -= {(name, i) for name, one in done.items() for i in range(9) if i in one.pieces}
    assert sorted(last) == sorted(expected)
    assert not [item for item in items if item.job is JOBS[3]], "a tensor that is done was read"


def test_statistics_that_are_known_are_not_measured_again() -> None:
    known = Value(["known"])
    items = drive_with(
        {"d": scheduler.Done({2}, {"gram": known}), "a": scheduler.Done((), {"cut": known})}
    )
    mine = [item for item in items if item.job is JOBS[3]]
    assert {name for item in mine if isinstance(item, Measure) for name in item.folds} == {"cut"}
    merges = [item for item in mine if isinstance(item, Merge)]
    assert len(merges) == 6
    assert all(item.values["gram"] is known for item in merges)
    assert not [item for item in items if item.job is JOBS[0] and isinstance(item, Measure)]
