"""The command, stopped at a chosen call of a chosen function, for what is to befall it there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Runs the command, but waits in the n-th call of a function until the file GO is there.
STOPPING = """\
import importlib, itertools, os, time
from pathlib import Path

module, path, when = os.environ["STOP"].split()
*parts, name = path.split(".")
owner = importlib.import_module(module)
for part in parts:
    owner = getattr(owner, part)
original, calls = getattr(owner, name), itertools.count(1)

def stop(*arguments, **options):
    if next(calls) == int(when):
        Path(os.environ["REACHED"]).touch()
        while not Path(os.environ["GO"]).exists():
            time.sleep(0.01)
    return original(*arguments, **options)

setattr(owner, name, stop)
from streammerge.cli import main
main()
"""


@contextmanager
def stopped(
    place: str, marks: Path, *arguments: str | Path, cwd: Path
) -> Iterator[subprocess.Popen[str]]:
    """The command, waiting at a place; the file `marks / go` lets it go on."""
    marks.mkdir()
    files = {"REACHED": str(marks / "reached"), "GO": str(marks / "go")}
    env = {**os.environ, "STOP": place, **files}
    command = [sys.executable, "-c", STOPPING, *map(str, arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=cwd, env=env, stdout=pipe, stderr=pipe, text=True) as one:
        try:
            deadline = time.monotonic() + 60
            while not (marks / "reached").exists():
                assert one.poll() is None, f"it never came to {place}: {one.communicate()}"
                assert time.monotonic() < deadline, f"it did not come to {place} in a minute"
                time.sleep(0.01)
            yield one
        finally:
            one.kill()
