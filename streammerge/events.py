"""What the engine reports while it works. How it looks to a person or a log is for others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Note:
    """Something worth a line."""

    text: str


@dataclass(frozen=True, slots=True)
class Warned:
    """Something that is probably not meant."""

    text: str


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the merge is; `done` and `total` count bytes written or measured.

    `resumed` of those done were done by an earlier run.
    """

    done: int
    total: int
    resumed: int
    tensor: str
    written_bytes: int
    seconds: float
    resident_bytes: int


Event = Note | Warned | Progress
Emit = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Report to nobody."""
