"""Rounds of the benchmark as they come, one JSON line each: one that was stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One work in one round: what it took, and what its limit took in the same round."""

    work: str
    method: str
    tool: str
    seconds: float
    limit_seconds: float
    peak_bytes: int
    read_bytes: int
    written_bytes: int
    spilled_bytes: int = 0
    cache_bytes: int = 0  # left on disk beside the output

    @property
    def ratio(self) -> float:
        return self.seconds / self.limit_seconds


@dataclass(frozen=True, slots=True)
class Round:
    """All works of a part, measured one after the other; `x` is the place on an axis of growth.

    Parts whose names differ after a colon are told in one table.
    """

    part: str
    state: str
    date: str
    limits: Mapping[str, float]  # seconds
    rows: tuple[Row, ...]
    x: float | str | None = None
    machine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def group(self) -> str:
        return self.part.partition(":")[0]


class Kept:
    """The rounds in a file, of one machine: numbers of two do not go together."""

    def __init__(self, path: Path, machine: Mapping[str, Any]) -> None:
        """Raises SystemExit when the file holds rounds of another machine."""
        self._path = path
        self._machine = machine
        for kept in self.rounds():
            if kept.machine != machine:
                raise SystemExit(
                    f"{path} holds numbers of {dict(kept.machine)}, this is {dict(machine)}; "
                    "remove it, or name another folder with --into"
                )

    def rounds(self) -> Iterator[Round]:
        """All that are whole; a line that was cut off is left out."""
        text = self._path.read_text() if self._path.exists() else ""
        for line in text.splitlines(keepends=True):
            if line.endswith("\n"):
                fields = json.loads(line)
                rows = tuple(Row(**row) for row in fields.pop("rows"))
                yield Round(rows=rows, **fields)

    def count(self, part: str, state: str, x: float | str | None) -> int:
        """How many rounds of a part there are."""
        found = [(kept.part, kept.state, kept.x) for kept in self.rounds()]
        return found.count((part, state, x))

    def add(self, measured: Round) -> None:
        """Keep a round, on a line of its own."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        text = self._path.read_text() if self._path.exists() else ""
        line = json.dumps({**asdict(measured), "machine": dict(self._machine)}) + "\n"
        if text and not text.endswith("\n"):  # what a stop cut off
            self._path.write_text(text[: text.rfind("\n") + 1])
        with open(self._path, "a") as file:
            file.write(line)
