"""How many tiles and tensors are in flight under a memory budget.

The projection starts from what the process holds after warm-up and adds what the plan asks for.
The budget changes how much happens at once and never the grid, so never the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nlargest

from streammerge import system
from streammerge.memory import MIB, over_budget
from streammerge.planning.cost import MOST_JOBS, Demand, sampled_at_once

# Room for the state of statistics: so much for each thread, up to the first of the sizes, keeps all
# threads busy; with less than the largest tensor can use, it may be read once more.
_STATE_BYTES = 10 * MIB
_STATES = tuple(size * MIB for size in (96, 48, 24, 12, 4, 1))
# What Python, the pool and the journal take besides the buffers: chosen, and held to by
# scripts/memory.
_FIXED_BYTES = 8 * MIB
# What zarr takes: 7 MiB for the metadata of a group and its arrays, and some more of them.
_SPILL_BYTES = 10 * MIB
_STACK_BYTES = MIB
# What a thread has mapped beyond its tile: the page-cache folios at both ends.
_MAPPED_BYTES = 2 * system.LARGEST_FOLIO


@dataclass(frozen=True, slots=True)
class Flight:
    """What is in flight at once, and the peak resident memory that follows."""

    threads: int
    window: int  # tensors
    state_bytes: int  # of the statistics of all of them
    projected_bytes: int

    @property
    def parts_ahead(self) -> int:
        """How far measured parts may be ahead of the one that is absorbed next."""
        return 2 * self.threads


@dataclass(frozen=True, slots=True)
class Start:
    """Memory of the process before the merge: now, and at most so far."""

    resident_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What a merge has to do with: memory of the process, threads, and how inputs are read."""

    budget_bytes: int
    threads: int
    mapped: bool


def project(
    demand: Demand, start: Start, threads: int, window: int, state_bytes: int, *, mapped: bool
) -> Flight:
    """The peak with so much in flight."""
    states = nlargest(window, (state.within(state_bytes) for state in demand.states))
    # Who needs more than there is room for gets it when it is alone.
    held = min(sum(states), max(state_bytes, *states)) if states else 0
    held += sum(demand.resident_bytes[:window])
    flight = Flight(threads, window, state_bytes, 0)
    needed = (
        threads * (demand.worker_bytes + _STACK_BYTES + mapped * _MAPPED_BYTES)
        + sampled_at_once(demand, threads)
        + held
        + flight.parts_ahead * demand.part_bytes
        + _FIXED_BYTES
        + (_SPILL_BYTES if demand.spill.nbytes else 0)
    )
    peak = max(start.peak_bytes, start.resident_bytes + needed)
    return Flight(threads, window, state_bytes, peak)


def fit(demand: Demand, start: Start, limits: Limits) -> Flight:
    """The most in flight that stays under the budget; BudgetError names the least that would."""
    options = [
        project(demand, start, workers, window, state, mapped=limits.mapped)
        for workers in range(limits.threads, 0, -1)
        for state in _rooms(demand, workers)
        for window in sorted({min(MOST_JOBS, max(2, workers)), 2, 1}, reverse=True)
    ]
    for flight in options:
        if flight.projected_bytes <= limits.budget_bytes:
            return flight
    least = min(flight.projected_bytes for flight in options)
    raise over_budget("this merge", least, limits.budget_bytes)


def _rooms(demand: Demand, threads: int) -> Sequence[int]:
    """Sizes of the room for statistics' state, the largest first."""
    largest = max((state.most for state in demand.states), default=0)
    top = max(largest, min(_STATES[0], _STATE_BYTES * threads))
    return [top, *(size for size in _STATES if size < top)]
