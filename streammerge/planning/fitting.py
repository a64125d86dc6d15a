"""What is spilled, how much is in flight, and whether memory and the cache's disk allow it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from streammerge import system
from streammerge.errors import BudgetError, OutputRefused
from streammerge.planning.budget import Flight, Start, fit
from streammerge.planning.cost import Demand, add_up, spilled_at_once
from streammerge.planning.jobs import Job
from streammerge.planning.spill import Chooser, SpillOptions


@dataclass(frozen=True, slots=True)
class Fitted:
    """Jobs added up, with what was chosen for them."""

    chooser: Chooser
    demand: Demand
    flight: Flight
    spilled_at_once: int  # bytes on disk
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """What a merge has to do with: memory of the process, threads, and what the output takes."""

    budget_bytes: int
    threads: int
    output_bytes: int


def fitted(
    jobs: Callable[[Chooser], Iterable[Job]], options: SpillOptions, limits: Limits
) -> Fitted:
    """As the options say; under `auto` nothing is spilled where memory or disk are too small.

    `jobs` composes all jobs of the merge with what is chosen. Raises BudgetError or OutputRefused
    where it does not fit.
    """
    try:
        return _fitted(jobs, options, limits)
    except (BudgetError, OutputRefused) as problem:
        if options.mode != "auto":
            raise
        without = _fitted(jobs, replace(options, mode="never"), limits)
        return replace(without, note=f"nothing is spilled: {problem.what}")


def _fitted(
    jobs: Callable[[Chooser], Iterable[Job]], options: SpillOptions, limits: Limits
) -> Fitted:
    chooser = Chooser(options, limits.threads)
    demand = add_up(jobs(chooser))
    start = Start(system.resident_bytes(), system.peak_resident_bytes())
    flight = fit(demand, start, limits.budget_bytes, limits.threads)
    at_once = spilled_at_once(demand, flight.window, keep=options.keep)
    if at_once:
        options.check_room(at_once, limits.output_bytes)
    return Fitted(chooser, demand, flight, at_once)
