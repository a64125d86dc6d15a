"""Room on a file system: what a folder takes there, and whether an output fits."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path

from streammerge import system
from streammerge.errors import OutputRefused, Problems
from streammerge.sizes import format_size


def check_room(folder: Path, sizes: Sequence[int]) -> None:
    """Raise `OutputRefused`, for all that is short, unless files of those sizes fit.

    What the folder holds already is taken to be part of them: an unfinished run goes on there.
    """
    problems = Problems()
    there = list(below(folder))
    free = os.statvfs(_existing(folder))
    room = system.free_bytes(str(_existing(folder))) + taken_bytes(folder)
    if room < sum(sizes):
        found, expected = f"{format_size(room)} free", format_size(sum(sizes))
        problems.add(_short("not enough space for the output", folder, found, expected))
    files = free.f_favail + len(there)
    if free.f_files and files < len(sizes):  # no count: files take nothing but space there
        found, expected = f"{files} free inodes", f"{len(sizes)} for as many files"
        problems.add(_short("not enough inodes for the output", folder, found, expected))
    most, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if most != resource.RLIM_INFINITY and most < max(sizes):
        problems.add(
            OutputRefused(
                "files of the output would be larger than this process may write",
                where=str(folder),
                found=f"a limit of {format_size(most)} (ulimit -f)",
                expected=format_size(max(sizes)),
                remedy="raise the limit, or choose a smaller --shard-size",
            )
        )
    problems.raise_any()


def _short(what: str, folder: Path, found: str, expected: str) -> OutputRefused:
    remedy = "make room on that disk, or choose an --out on another"
    return OutputRefused(what, where=str(folder), found=found, expected=expected, remedy=remedy)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def taken_bytes(folder: Path) -> int:
    """What the files of a folder take on the disk, reserved or written."""
    return sum(one.st_blocks * 512 for one in below(folder))


def below(folder: Path) -> Iterator[os.stat_result]:
    """Every file below a folder, which others may be at work in."""
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                yield os.lstat(os.path.join(parent, name))
            except FileNotFoundError:  # a running merge removes what it has used
                continue
