"""Running and measuring: one command at a time, from outside, as a user would time it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

COMMAND = str(Path(sys.executable).with_name("streammerge"))
TIME = "/usr/bin/time"
# Bytes in what `time` counts as one input or output.
BLOCK = 512


@dataclass(frozen=True, slots=True)
class Run:
    """One process: its wall time, its peak resident memory, and what it said of itself."""

    seconds: float
    peak_bytes: int
    report: dict[str, Any] = field(default_factory=dict)
    disk_read_bytes: int = 0  # what the kernel fetched for it: none of what was in the page cache
    disk_written_bytes: int = 0
    cache_bytes: int = 0


def timed(command: Sequence[str | Path], out: Path | None = None, **options: Any) -> Run:
    """Run a command to its end; `out` is removed afterwards. Raises CalledProcessError."""
    with tempfile.NamedTemporaryFile("r") as report:
        whole = [TIME, "-v", "-o", report.name, *map(str, command)]
        started = time.monotonic()
        try:
            stdout = _output(whole, **options)
            seconds = time.monotonic() - started
        finally:
            if out is not None:
                shutil.rmtree(out, ignore_errors=True)
                os.sync()  # or the next run would wait for the disk to forget this one
        told = report.read()
    said = json.loads(stdout) if stdout.startswith("{") else {}
    return Run(
        seconds,
        _number(told, r"Maximum resident set size \(kbytes\)") << 10,
        said,
        _number(told, "File system inputs") * BLOCK,
        _number(told, "File system outputs") * BLOCK,
    )


def _output(command: Sequence[str], **options: Any) -> str:
    """What a command prints. It ends with us: left behind, it would disturb the next run."""
    process: subprocess.Popen[str] = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True, **options
    )
    try:
        stdout, _ = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stdout)
    return stdout


@contextmanager
def _fresh(beside: Path) -> Iterator[Path]:
    """A new folder for what a run writes: no merge goes on with what a stopped one left."""
    for left in beside.glob("bench-*.out"):
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(".out", "bench-", beside, ignore_cleanup_errors=True) as name:
        yield Path(name)


def _number(told: str, what: str) -> int:
    found = re.search(rf"{what}: (\d+)", told)
    assert found, f"{TIME} -v did not say: {what}"
    return int(found[1])


def merge(recipe: Path, *options: str) -> Run:
    """The real command; the output is removed again."""
    with _fresh(recipe.parent) as place:
        out = place / "out"
        command: list[str | Path] = [COMMAND, "merge", recipe, "--out", out, "--quiet", "--json"]
        return timed([*command, *options], env=_as_installed())


def _as_installed() -> dict[str, str]:
    """An environment in which a checkout keeps its byte code, as pip makes it for a package."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def merge_by_mergekit(recipe: Path, python: Path) -> Run:
    """mergekit's command. Merged adapters go to a cache of its own, which is measured too."""
    with _fresh(recipe.parent) as place:
        command: list[str | Path] = [python.with_name("mergekit-yaml"), recipe, place / "out"]
        command += ["--lora-merge-cache", place / "cache", "--no-copy-tokenizer", "--quiet"]
        run = timed(command, env=_alone())
        return replace(run, cache_bytes=_size(place / "cache"))


def merge_by_peft(base: Path, method: str, adapters: Iterable[Path], python: Path) -> Run:
    """PEFT's `add_weighted_adapter`, see peft_merge.py."""
    script = Path(__file__).with_name("peft_merge.py")
    with _fresh(base.parent) as place:
        return timed([python, script, base, place / "out", method, *adapters], env=_alone())


def _alone() -> dict[str, str]:
    """The environment of a tool that must find neither this package nor the network, and that
    talks of errors only."""
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    quiet["PYTHONWARNINGS"] = "ignore"
    return {**os.environ, **quiet, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def copy(base: Path) -> Run:
    """The limit: the model's files copied byte for byte, and on the disk."""
    script = 'cp -r --reflink=never "$1" "$2" && sync -f "$2"'
    with _fresh(base.parent) as place:
        return timed(["sh", "-c", script, "sh", base, place / "copy"])


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
