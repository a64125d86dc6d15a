"""How a merge is run: what changes no byte of its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from streammerge import events


def never() -> None:
    """No signal asked to stop."""


@dataclass(frozen=True, slots=True)
class Manner:
    """`stopped` gives the name of the signal that asked to stop, once one did."""

    force: bool = False  # replace a finished output, and what another merge left half done
    strict_bytes: bool = False  # refuse to go on with what other libraries began
    keep_nan: bool = False  # write values that are not finite
    stopped: Callable[[], str | None] = never
    emit: events.Emit = events.ignore
