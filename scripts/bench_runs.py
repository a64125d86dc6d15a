"""Running and measuring: one command at a time, from outside, as a user would time it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

COMMAND = str(Path(sys.executable).with_name("streammerge"))
TIME = "/usr/bin/time"


@dataclass(frozen=True, slots=True)
class Run:
    """One process: its wall time, its peak resident memory, and what it said of itself."""

    seconds: float
    peak_bytes: int
    report: dict[str, Any] = field(default_factory=dict)


def timed(command: Sequence[str | Path], out: Path | None = None, **options: Any) -> Run:
    """Run a command to its end; `out` is removed afterwards. Raises CalledProcessError."""
    with tempfile.NamedTemporaryFile("r") as report:
        whole = [TIME, "-v", "-o", report.name, *map(str, command)]
        started = time.monotonic()
        try:
            done = subprocess.run(whole, stdout=subprocess.PIPE, text=True, check=True, **options)
            seconds = time.monotonic() - started
        finally:
            if out is not None:
                shutil.rmtree(out, ignore_errors=True)
        kib = re.search(r"Maximum resident set size \(kbytes\): (\d+)", report.read())
    assert kib, f"{TIME} -v did not say the maximum resident set"
    said = json.loads(done.stdout) if done.stdout.startswith("{") else {}
    return Run(seconds, int(kib[1]) << 10, said)


def merge(recipe: Path, *options: str) -> Run:
    """The real command; the output is removed again."""
    out = recipe.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    return timed([COMMAND, "merge", recipe, "--out", out, "--quiet", "--json", *options], out)


def copy(base: Path) -> Run:
    """The limit: the model's files copied byte for byte, and on the disk."""
    target = base.parent / "copy"
    shutil.rmtree(target, ignore_errors=True)
    script = 'cp -r --reflink=never "$1" "$2" && sync -f "$2"'
    return timed(["sh", "-c", script, "sh", base, target], target)


def read(folders: Iterable[Path]) -> Run:
    """Reading every weight file, for merges that read more than the base."""
    files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
    return timed(["sh", "-c", 'cat "$@" > /dev/null', "sh", *files])


def least_budget(recipe: Path) -> str:
    """What the plan names when it is offered too little."""
    command = [COMMAND, "plan", str(recipe), "--memory", "1MiB"]
    done = subprocess.run(command, capture_output=True, text=True)
    least = re.search(r"--memory (\S+) is the least", done.stderr)
    assert least, done.stderr
    return least[1]


def settle(folders: Iterable[Path], *, cold: bool) -> None:
    """Put all weight files into the page cache, or out of it."""
    os.sync()
    for folder in folders:
        for path in folder.glob("*.safetensors"):
            with open(path, "rb") as file:
                if cold:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                else:
                    while file.read(1 << 24):
                        pass


def middle(runs: Sequence[Run]) -> Run:
    """The run of median time, with the largest peak."""
    ordered = sorted(runs, key=lambda run: run.seconds)
    chosen = ordered[len(ordered) // 2]
    seconds = median(run.seconds for run in runs)
    return Run(seconds, max(run.peak_bytes for run in runs), chosen.report)
