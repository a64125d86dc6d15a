"""What one job reads and writes, and for what: from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from streammerge import grid
from streammerge.planning.jobs import CopyJob, Job
from streammerge.sources.prepared import Prepared
from streammerge.words import Merged, StatisticValue, Tile

# The statistics that share each read of a tensor before the merge.
Passes = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of the inputs' tensors that are read, those of samples included, and what for."""

    read_bytes: int
    write_bytes: int
    passes: Passes = ()
    samples: Mapping[Tile, list[str]] = field(default_factory=dict)  # and which folds see each

    @property
    def reads(self) -> int:
        """How often the tensor is read, samples apart."""
        return 1 + len(self.passes)


def traffic(job: Job) -> Traffic:
    """Of one job, when no estimate fails."""
    write_bytes = job.target.spec.nbytes
    if isinstance(job, CopyJob):
        return Traffic(job.source.spec.nbytes, write_bytes)
    merged = job.merged
    whole, measured = Tile(0, merged.spec.rows), Tile(0, merged.measured.rows)
    passes = tuple(tuple(names) for names in merged.waves())
    samples = _samples(merged) if passes else {}
    read_bytes = merged.once_bytes + merged.merge_bytes(whole)
    read_bytes += sum(merged.measure_bytes(measured, names) for names in passes)
    read_bytes += sum(merged.measure_bytes(tile, names) for tile, names in samples.items())
    if job.beyond is not None:
        rest = Tile(merged.spec.rows, job.target.spec.rows)
        read_bytes += job.beyond.once_bytes + job.beyond.merge_bytes(rest)
    return Traffic(read_bytes, write_bytes, passes, samples)


def _samples(merged: Merged) -> dict[Tile, list[str]]:
    """The thinned tiles that the first folds of the method want to see, and which folds."""
    merged = merged.merged if isinstance(merged, Prepared) else merged
    tiles = grid.tiles(merged.measured)
    found: dict[Tile, list[str]] = {}
    for name, fold in merged.start(0, {}).items():
        for tile in () if isinstance(fold, StatisticValue) else fold.wants(tiles):
            if tile.thinned:
                found.setdefault(tile, []).append(name)
    return found
