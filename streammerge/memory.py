"""The memory budget: what the user allows, or half of what is free."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from streammerge import system
from streammerge.errors import BudgetError
from streammerge.sizes import format_size, parse_size

MIB = 1 << 20
LEAST_DEFAULT = 256 * MIB
# Processes start with a MiB more or less; the least budget that is named must do for the next one.
_START_SPREAD = 4 * MIB


def chosen_budget(memory: str | int | None) -> int:
    """Bytes that the user allows, as a number or as text such as `2GiB`, else the default."""
    budget = parse_size(memory, "--memory") if isinstance(memory, str) else memory
    return budget or default_budget()


def default_budget(environ: Mapping[str, str] = os.environ) -> int:
    """Bytes: half of the least of free memory, what the cgroup leaves, and the job's grant.

    At least 256 MiB; a merge that needs more than there is gets refused by the plan.
    """
    limits = [
        system.memory_available(),
        system.cgroup_memory_left(),
        system.scheduler_memory(environ, system.usable_cpus()),
    ]
    return max(LEAST_DEFAULT, min(limit for limit in limits if limit is not None) // 2)


def share_out(nbytes: int, wants: Sequence[tuple[int, int]]) -> list[int]:
    """Bytes for each that wants some: its least, and of the rest by what it could make use of.

    `wants` are the least and the most of each; nobody gets more than the most.
    """
    rest = max(0, nbytes - sum(least for least, _ in wants))
    beyond = [most - least for least, most in wants]
    scale = min(1.0, rest / max(1, sum(beyond)))
    return [least + int(more * scale) for (least, _), more in zip(wants, beyond, strict=True)]


def over_budget(
    what: str, needed_bytes: int, budget_bytes: int, otherwise: str = ""
) -> BudgetError:
    """The error for what does not fit the budget; it names the least that would do."""
    least = -(-(needed_bytes + _START_SPREAD) // MIB) * MIB
    return BudgetError(
        f"{what} does not fit the memory budget",
        least_bytes=least,
        found=f"a budget of {format_size(budget_bytes)}",
        remedy=f"--memory {least // MIB}MiB is the least that would do{otherwise}",
    )
