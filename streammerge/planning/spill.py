"""Whether rows that are wanted more than once are kept on disk: what either way costs.

Made again: reads x making. Kept: making + a write + (reads - 1) x reading. Both in seconds of one
thread. Making is the product of a band by the model's rank; stored rows cost nothing to speak of,
since they are no more bytes than what would be kept. Where rough rates do not rule it out, the
product and the disk are timed: whatever comes of it, the bytes of the output are the same.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from threadpoolctl import threadpool_limits

from streammerge import grid, system
from streammerge.errors import OutputRefused
from streammerge.kernels.product import multiply
from streammerge.sizes import format_size
from streammerge.storage.diskspeed import DiskSpeed, measure

Mode = Literal["auto", "always", "never"]

# Of one thread, on the machine of docs/performance.md: seconds per element and rank, per byte.
_ROUGH_MAKING = 0.036e-9
_ROUGH_DISK = DiskSpeed(0.25e-9, 0.3e-9)  # the page cache
# Where spilling would cost this many times what it spares, even so, nothing is timed.
_HOPELESS = 3.0
# To make an array by zarr and remove it; counted for each model of it, on the safe side.
_ARRAY_SECONDS = 0.005
# What is in flight stays in the page cache up to this share of free memory; kernels start to
# write back, and then to hold writers up, at shares about as large.
_CACHED_SHARE = 0.1
# Tensors in flight at once, at least.
_WINDOW = 2


@dataclass(frozen=True, slots=True)
class SpillOptions:
    """How a merge may spill. `cache` None: beside the output, in `beside` or below it."""

    mode: Mode = "auto"
    cache: Path | None = None
    beside: Path = Path()
    keep: bool = False

    @property
    def place(self) -> Path:
        """A folder that is there already, on the file system in question."""
        return _existing(self.cache or self.beside)

    def check_room(self, spilled_bytes: int, output_bytes: int) -> None:
        """Raise OutputRefused where the cache is too small for what is spilled at once.

        On the disk of the output, that must fit too.
        """
        place, also = self.place, ""
        if os.stat(place).st_dev == os.stat(_existing(self.beside)).st_dev:
            spilled_bytes += output_bytes
            also = ", the output on the same disk included"
        free = system.free_bytes(str(place))
        if spilled_bytes > free:
            raise OutputRefused(
                "the cache has too little room for what would be spilled",
                where=str(place),
                found=f"{format_size(free)} free",
                expected=f"{format_size(spilled_bytes)}{also}",
                remedy="name a --cache on a larger disk, or merge with --spill never",
            )


def _existing(place: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    place = place.absolute()
    while not place.is_dir():
        place = place.parent
    return place


@dataclass(frozen=True, slots=True)
class Wanted:
    """Rows that a merge of one tensor wants `reads` times of one model."""

    model: int  # its position in the recipe
    rank: int
    reads: int


@dataclass(frozen=True, slots=True)
class Choice:
    """What was decided for one model's rows of one tensor, and what either way costs."""

    wanted: Wanted
    nbytes: int
    seconds_again: float
    seconds_kept: float
    spilled: bool


class Chooser:
    """Decides for one merge; timings are made when they are first in doubt, and kept."""

    def __init__(self, options: SpillOptions, threads: int) -> None:
        self._options = options
        self._threads = threads
        self._making = cache(_time_product)

    @property
    def place(self) -> Path:
        """Where rows are spilled to: the cache, or beside the output."""
        return self._options.cache or self._options.beside.absolute()

    def choose(self, elements: int, wanted: Iterable[Wanted]) -> tuple[Choice, ...]:
        """For a tensor of so many elements; those that are wanted once need no choice."""
        again = [one for one in wanted if one.reads > 1]
        in_flight = _WINDOW * 4 * elements * len(again)
        return tuple(self._choice(elements, one, in_flight) for one in again)

    def _choice(self, elements: int, wanted: Wanted, in_flight: int) -> Choice:
        mode = self._options.mode
        costs = _costs(elements, wanted, wanted.rank * _ROUGH_MAKING, _ROUGH_DISK)
        if mode == "auto" and not _hopeless(wanted, *costs):
            costs = _costs(elements, wanted, self._making(wanted.rank), self._disk(in_flight))
        spilled = costs[1] < costs[0] if mode == "auto" else mode == "always"
        return Choice(wanted, 4 * elements, *costs, spilled)

    def _disk(self, in_flight: int) -> DiskSpeed:
        """Seconds per byte; a disk itself is shared by all threads."""
        if in_flight < self._page_cache:
            return self._cached
        disk = self._through
        return DiskSpeed(disk.write * self._threads, disk.read * self._threads)

    @cached_property
    def _page_cache(self) -> int:
        left = system.cgroup_memory_left()
        free = system.memory_available()
        return int(_CACHED_SHARE * (free if left is None else min(free, left)))

    @cached_property
    def _cached(self) -> DiskSpeed:
        return self._measure(through=False)

    @cached_property
    def _through(self) -> DiskSpeed:
        return self._measure(through=True)

    def _measure(self, *, through: bool) -> DiskSpeed:
        try:
            return measure(self._options.place, through=through)
        except OSError:  # a plan is made also where nothing can be written; a merge will say it
            return _ROUGH_DISK


def _costs(elements: int, wanted: Wanted, making: float, disk: DiskSpeed) -> tuple[float, float]:
    """Seconds of making the rows again each time, and of keeping them."""
    make, nbytes = elements * making, 4 * elements
    kept = make + _ARRAY_SECONDS + nbytes * (disk.write + (wanted.reads - 1) * disk.read)
    return wanted.reads * make, kept


def _hopeless(wanted: Wanted, again: float, kept: float) -> bool:
    """Whether writing and reading cost far more than the makings that they would spare."""
    make = again / wanted.reads
    return kept - make > _HOPELESS * (again - make)


def _time_product(rank: int) -> float:
    """Seconds per element of a tile's product of factors of this rank: the best of three."""
    left = np.ones((grid.TILE_ELEMENTS // 2048, rank), np.float32)
    right = np.ones((rank, 2048), np.float32)
    out = np.empty((len(left), 2048), np.float32)
    seconds = []
    with threadpool_limits(1, "blas"):
        for _ in range(3):
            started = time.perf_counter()
            multiply(left, right, out)
            seconds.append(time.perf_counter() - started)
    return min(seconds) / out.size


@dataclass(slots=True)
class SpillTotal:
    """Sums over the tensors of one model: of those that are spilled, or of those that are not."""

    tensors: int = 0
    nbytes: int = 0
    seconds_again: float = 0.0
    seconds_kept: float = 0.0

    def add(self, choice: Choice) -> None:
        self.tensors += 1
        self.nbytes += choice.nbytes
        self.seconds_again += choice.seconds_again
        self.seconds_kept += choice.seconds_kept


@dataclass(slots=True)
class SpillTotals:
    """Model -> its total, of what is spilled and of what is made again."""

    spilled: dict[int, SpillTotal] = field(default_factory=dict)
    again: dict[int, SpillTotal] = field(default_factory=dict)

    def add(self, choices: Sequence[Choice]) -> None:
        for choice in choices:
            totals = self.spilled if choice.spilled else self.again
            totals.setdefault(choice.wanted.model, SpillTotal()).add(choice)

    @property
    def nbytes(self) -> int:
        """Of all that is spilled in the course of the merge."""
        return sum(total.nbytes for total in self.spilled.values())

    @property
    def seconds_spared(self) -> float:
        """Of one thread."""
        return sum(t.seconds_again - t.seconds_kept for t in self.spilled.values())
