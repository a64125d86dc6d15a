"""What a run puts into a cache: a folder of its own, and in it a file that says whose it is.

    CACHE/streammerge-<id>/run.json       output, fingerprint, host, process, start
                           spill.zarr, used     see `storage.spill`

A folder is ours when its name and its `run.json` say so. Nothing else in a cache is ever touched,
and of such a folder only these entries are removed.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from streammerge.errors import OutputRefused, StorageError
from streammerge.storage.owner import Owner
from streammerge.storage.room import below

_ABOUT = "run.json"
_NEW = "run.json.new"  # on its way to that name
_NAME = re.compile(r"streammerge-[0-9a-f]{12}")

State = Literal["running", "finished", "left", "elsewhere"]


@dataclass(frozen=True, slots=True)
class CachedRun:
    """One run's folder in a cache, as its `run.json` describes it."""

    path: Path
    output: str
    fingerprint: str
    owner: Owner
    start: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    finished: bool = False

    @property
    def spill(self) -> Path:
        """The Zarr group."""
        return self.path / "spill.zarr"

    @property
    def used(self) -> Path:
        """Files whose chunks nobody wants any more."""
        return self.path / "used"

    def state(self) -> State:
        """`left`: its process is gone. `elsewhere`: on another machine, so nobody can tell."""
        if self.finished:
            return "finished"
        if not self.owner.is_here():
            return "elsewhere"
        return "left" if self.owner.is_dead() else "running"

    def finish(self) -> CachedRun:
        """Say that the merge is complete, of a folder that is kept."""
        done = replace(self, finished=True)
        done.write()
        return done

    def write(self) -> None:
        """Put `run.json` in place, whole or not at all."""
        about = {
            "output": self.output,
            "fingerprint": self.fingerprint,
            "host": self.owner.host,
            "process": self.owner.pid,
            "start": self.start,
            "finished": self.finished,
            "owner": asdict(self.owner),
        }
        new = self.path / _NEW
        new.write_text(json.dumps(about, indent=2) + "\n")
        os.replace(new, self.path / _ABOUT)

    def nbytes(self) -> int:
        """What its files take."""
        return sum(entry.st_size for entry in below(self.path))

    def last_written(self) -> float:
        """When anything in it was last written, in seconds since 1970."""
        return max((entry.st_mtime for entry in below(self.path)), default=0.0)

    def remove(self) -> None:
        """What it spilled, then its `run.json`, then the folder; StorageError where that fails."""
        try:
            self._refuse_others()
            for folder in (self.spill, self.used):
                if folder.exists():
                    shutil.rmtree(folder)
            for name in (_NEW, _ABOUT):
                (self.path / name).unlink(missing_ok=True)
            self.path.rmdir()
        except FileNotFoundError:
            return  # somebody else removed it
        except OSError as error:
            raise StorageError(
                f"cannot be removed: {error.strerror}",
                where=str(error.filename or self.path),
                remedy="remove what was put there by hand, or give this user the right to",
            ) from error

    def _refuse_others(self) -> None:
        ours = {_ABOUT, _NEW, self.spill.name, self.used.name}
        others = {*os.listdir(self.path)} - ours
        if others:
            raise StorageError(
                "the folder holds what streammerge did not put there, so it stays",
                where=str(self.path),
                found=", ".join(sorted(others)),
                remedy="move that elsewhere first",
            )


def create(cache: Path, output: Path, fingerprint: str) -> CachedRun:
    """A new folder in a cache, which is made if need be; OutputRefused where it cannot be used."""
    with _usable(cache):
        path = cache / f"streammerge-{secrets.token_hex(6)}"
        path.mkdir(parents=True)
        made = CachedRun(path, str(output), fingerprint, Owner.this())
        made.write()
    return made


def remove_left(cache: Path, output: Path) -> None:
    """What dead runs of an output left in a cache; OutputRefused where that cannot be used."""
    with _usable(cache):
        for run in runs(cache):
            if run.output == str(output) and run.state() == "left":
                run.remove()


@contextmanager
def _usable(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputRefused(
            f"the cache cannot be used: {error.strerror}",
            where=str(error.filename or cache),
            remedy="name a --cache that you can write to, or merge with --spill never",
        ) from error


def runs(cache: Path) -> Iterator[CachedRun]:
    """What runs left in a cache, by name; whatever else lies there is passed over.

    Raises OSError where the cache cannot be read; one that is not there is empty.
    """
    if not cache.exists():
        return
    for name in sorted(os.listdir(cache)):
        if _NAME.fullmatch(name):
            run = _read(cache / name)
            if run is not None:
                yield run


def _read(path: Path) -> CachedRun | None:
    """None for what is not ours, or not yet."""
    if path.is_symlink() or not (path / _ABOUT).is_file():
        return None
    try:
        about = json.loads((path / _ABOUT).read_text())
        owner = Owner(**about["owner"])
        place = (str(about["output"]), str(about["fingerprint"]))
        return CachedRun(path, *place, owner, str(about["start"]), bool(about["finished"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None
