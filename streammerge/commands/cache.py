"""What runs left in a cache, and cleaning it: only what `storage.cachedir` knows for its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streammerge.errors import ConfigError, InputMissing, Problems, StorageError
from streammerge.sizes import format_size
from streammerge.storage.cachedir import CachedRun, State, runs

# A run whose process is gone is stale once nothing was written for so long.
STALE_SECONDS = 24 * 3600

_WORDS: dict[State, str] = {
    "running": "running",
    "finished": "finished, kept by --keep-cache",
    "left": "its process is gone",
    "elsewhere": "of another machine",
}


@dataclass(frozen=True, slots=True)
class Found:
    """A run in a cache, as it is now."""

    run: CachedRun
    state: State
    nbytes: int
    idle_seconds: float

    @property
    def stale(self) -> bool:
        """Its owner is gone, and nothing was written for a day."""
        return self.state == "left" and self.idle_seconds >= STALE_SECONDS

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "run": self.run.path.name,
            "output": self.run.output,
            "state": self.state,
            "stale": self.stale,
            "bytes": self.nbytes,
            "idle_seconds": round(self.idle_seconds),
            "host": self.run.owner.host,
            "process": self.run.owner.pid,
            "start": self.run.start,
            "fingerprint": self.run.fingerprint,
        }

    def __str__(self) -> str:
        stale = ", stale" if self.stale else ""
        return (
            f"{self.run.path.name}  {format_size(self.nbytes)}  {_WORDS[self.state]}{stale}\n"
            f"  for {self.run.output}\n"
            f"  by {self.run.owner}, since {self.run.start}"
        )


def examine(cache: Path) -> list[Found]:
    """Every run in a cache. Raises InputMissing or StorageError where it cannot be read."""
    if not cache.is_dir():
        raise InputMissing("no such cache", where=str(cache), remedy="name the folder of --cache")
    try:
        found, now = list(runs(cache)), time.time()
    except OSError as error:
        what, remedy = f"cannot be read: {error.strerror}", "give this user the right to read it"
        raise StorageError(what, where=str(cache), remedy=remedy) from error
    return [Found(r, r.state(), r.nbytes(), max(0.0, now - r.last_written())) for r in found]


def describe(found: Sequence[Found]) -> str:
    """The runs for a person."""
    if not found:
        return "no run left anything here"
    total = format_size(sum(one.nbytes for one in found))
    return "\n".join([*map(str, found), f"{total} in all"])


def clean(cache: Path, names: Sequence[str], *, finished: bool, stale: bool) -> list[Found]:
    """Remove the runs that are named, finished or stale; returns them.

    Nothing is removed where a name is not of a run there, or of one at work.
    """
    found = examine(cache)
    _check_names(cache, names, found)
    chosen = [
        one
        for one in found
        if one.run.path.name in names
        or (finished and one.state == "finished")
        or (stale and one.stale)
    ]
    for one in chosen:
        one.run.remove()
    return chosen


def _check_names(cache: Path, names: Sequence[str], found: Sequence[Found]) -> None:
    known = {one.run.path.name: one for one in found}
    problems = Problems()
    for name in names:
        if name not in known:
            problems.add(
                InputMissing(
                    "no run of that name is in this cache",
                    where=str(cache / name),
                    found=", ".join(known) or "no run at all",
                    remedy=f"`streammerge cache list {cache}` shows what is there",
                )
            )
        elif known[name].state == "running":
            problems.add(
                ConfigError(
                    "this run is at work",
                    where=str(cache / name),
                    found=str(known[name].run.owner),
                    remedy="wait for it, or stop it first",
                )
            )
    problems.raise_any()
