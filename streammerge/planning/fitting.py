"""What is spilled, how much is in flight, and whether memory and the cache's disk allow it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from streammerge import system
from streammerge.errors import BudgetError, OutputRefused
from streammerge.planning.budget import Flight, Limits, Start, fit
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


def fitted(
    jobs: Callable[[Chooser], Iterable[Job]],
    options: SpillOptions,
    limits: Limits,
    output_bytes: int,
) -> Fitted:
    """As the options say; under `auto` nothing is spilled where memory or disk are too small.

    `jobs` composes all jobs of the merge with what is chosen; the output takes room on the disk,
    too. Raises BudgetError or OutputRefused where it does not fit.
    """
    try:
        return _fitted(jobs, options, limits, output_bytes)
    except (BudgetError, OutputRefused) as problem:
        if options.mode != "auto":
            raise
        without = _fitted(jobs, replace(options, mode="never"), limits, output_bytes)
        return replace(without, note=f"nothing is spilled: {problem.what}")


def _fitted(
    jobs: Callable[[Chooser], Iterable[Job]],
    options: SpillOptions,
    limits: Limits,
    output_bytes: int,
) -> Fitted:
    chooser = Chooser(options, limits.threads)
    demand = add_up(jobs(chooser))
    start = Start(system.resident_bytes(), system.peak_resident_bytes())
    flight = fit(demand, start, limits)
    at_once = spilled_at_once(demand, flight.window, keep=options.keep)
    if at_once:
        options.check_room(at_once, output_bytes)
    return Fitted(chooser, demand, flight, at_once)
