"""What a merge will read, write and hold: sums over all jobs, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import nlargest
from typing import NamedTuple

from streammerge import grid
from streammerge.planning.jobs import CopyJob, Job, MergeJob
from streammerge.planning.spill import SpillTotals
from streammerge.planning.traffic import Passes, Traffic, traffic
from streammerge.words import Merged, Tile

# As many jobs as are ever in flight at once.
MOST_JOBS = 64


class State(NamedTuple):
    """Bytes that the statistics of one tensor cannot do without, and the most they could use."""

    least: int
    most: int

    def within(self, room_bytes: int) -> int:
        """What they may come to, where there is so much room."""
        return min(self.most, max(self.least, room_bytes))


@dataclass(slots=True)
class Group:
    """Tensors that take the same passes."""

    tensors: int = 0
    read_bytes: int = 0  # of all their passes


@dataclass(slots=True)
class Demand:
    """Totals over all jobs, and the largest of what must be in memory at once."""

    merged_tensors: int = 0
    copied_tensors: int = 0
    read_bytes: int = 0  # of the inputs' tensors, copies included
    write_bytes: int = 0  # of the output's tensors
    copied_bytes: int = 0
    tile_reads: int = 0  # elements times how often they are read
    progress_bytes: int = 0  # of the output, counted once for each read of a tensor
    most_reads: int = 1
    worker_bytes: int = 0  # of one thread, at its largest tile
    sample_bytes: list[int] = field(default_factory=list)  # of a thread besides, the largest
    resident_bytes: list[int] = field(default_factory=list)  # of the jobs that hold most
    states: list[State] = field(default_factory=list)  # the largest
    part_bytes: int = 0  # of one measured part
    passes: dict[Passes, Group] = field(default_factory=dict)
    spill: SpillTotals = field(default_factory=SpillTotals)
    spilled_at_once: list[int] = field(default_factory=list)  # bytes, of the jobs that spill most

    @property
    def reads(self) -> dict[int, int]:
        """Reads of a tensor -> tensors."""
        found: dict[int, int] = {}
        for waves, group in self.passes.items():
            found[1 + len(waves)] = found.get(1 + len(waves), 0) + group.tensors
        return found


def add_up(jobs: Iterable[Job]) -> Demand:
    """Walk all jobs once; each is dropped again."""
    demand = Demand()
    for job in jobs:
        moved = traffic(job)
        demand.read_bytes += moved.read_bytes
        demand.write_bytes += moved.write_bytes
        demand.progress_bytes += moved.write_bytes
        if isinstance(job, CopyJob):
            demand.copied_tensors += 1
            demand.copied_bytes += moved.read_bytes
        else:
            _add_merge(demand, job, moved)
    return demand


def _add_merge(demand: Demand, job: MergeJob, moved: Traffic) -> None:
    merged = job.merged
    measured, waves = merged.measured, len(moved.passes)
    demand.merged_tensors += 1
    demand.tile_reads += merged.spec.numel + waves * measured.numel
    demand.progress_bytes += waves * measured.numel * job.target.spec.dtype.itemsize
    demand.most_reads = max(demand.most_reads, moved.reads)
    demand.spill.add(job.choices)
    demand.spilled_at_once = nlargest(MOST_JOBS, [*demand.spilled_at_once, job.spilled_bytes])
    group = demand.passes.setdefault(moved.passes, Group())
    group.tensors += 1
    group.read_bytes += moved.read_bytes
    if moved.passes:
        demand.part_bytes = max(demand.part_bytes, merged.part_bytes())
    resident = merged.resident_bytes
    if job.beyond is not None:
        resident += _add_beyond(demand, job, job.beyond)
    demand.resident_bytes = nlargest(MOST_JOBS, [*demand.resident_bytes, resident])
    demand.states = nlargest(
        MOST_JOBS, [*demand.states, State(*merged.state_bytes())], key=lambda one: one.most
    )
    _add_buffers(demand, job, moved.samples)


def _add_buffers(demand: Demand, job: MergeJob, samples: Iterable[Tile]) -> None:
    """Add the buffers of a thread for a tile of the grid, and those that a larger sample needs."""
    merged, target = job.merged, job.target.spec
    tile = grid.largest_tile(merged.spec)
    rows, cols = tile.shape(merged.spec)
    worker = merged.scratch_bytes(tile) + rows * target.cols * target.dtype.itemsize
    for sample in samples:
        sampled_rows, sampled_cols = sample.shape(merged.measured)
        of_sample = merged.scratch_bytes(sample)
        if sampled_rows * sampled_cols > rows * cols:
            demand.sample_bytes = nlargest(MOST_JOBS, [*demand.sample_bytes, of_sample])
        else:
            worker = max(worker, of_sample)
    demand.worker_bytes = max(demand.worker_bytes, worker)


def _add_beyond(demand: Demand, job: MergeJob, beyond: Merged) -> int:
    """Add the memory of the rows that the base lacks; returns what is held for them."""
    spec = job.target.spec
    for tile in job.tiles()[-2:]:  # the last one may be shorter
        output = (tile.stop - tile.start) * spec.cols * spec.dtype.itemsize
        demand.worker_bytes = max(demand.worker_bytes, beyond.scratch_bytes(tile) + output)
    return beyond.resident_bytes


def sampled_at_once(demand: Demand, threads: int) -> int:
    """Buffers for large samples, of each thread that may come to take one: it keeps them."""
    known = demand.sample_bytes
    unknown = max(0, threads - MOST_JOBS) if len(known) == MOST_JOBS else 0
    return sum(known[:threads]) + unknown * min(known, default=0)


def spilled_at_once(demand: Demand, window: int, *, keep: bool) -> int:
    """Bytes on disk, of the tensors in flight, or of all where they are kept."""
    return demand.spill.nbytes if keep else sum(nlargest(window, demand.spilled_at_once))


def predict_seconds(
    demand: Demand, models: int, rank: int, threads: int, nanoseconds: float = 0.0
) -> float:
    """A rough prediction, from rates fitted to the runs in docs/performance.md.

    `rank` is the sum of the ranks of all adapters, `nanoseconds` what the method says of itself.
    """
    per_element = 1.0 + 0.02 * rank + (1.25 * models if demand.most_reads > 1 else 0.0)
    per_element += nanoseconds * models
    compute = demand.tile_reads * per_element * 1e-9 / threads
    disk = demand.write_bytes / 1.5e9 + demand.read_bytes / 5e9
    return max(1.0, 1.0 + compute + disk - demand.spill.seconds_spared / threads)
