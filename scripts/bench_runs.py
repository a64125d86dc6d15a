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
            done = subprocess.run(whole, stdout=subprocess.PIPE, text=True, check=True, **options)
            seconds = time.monotonic() - started
        finally:
            if out is not None:
                shutil.rmtree(out, ignore_errors=True)
        told = report.read()
    said = json.loads(done.stdout) if done.stdout.startswith("{") else {}
    return Run(
        seconds,
        _number(told, r"Maximum resident set size \(kbytes\)") << 10,
        said,
        _number(told, "File system inputs") * BLOCK,
        _number(told, "File system outputs") * BLOCK,
    )


def _number(told: str, what: str) -> int:
    found = re.search(rf"{what}: (\d+)", told)
    assert found, f"{TIME} -v did not say: {what}"
    return int(found[1])


def merge(recipe: Path, *options: str) -> Run:
    """The real command; the output is removed again."""
    out = recipe.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    return timed([COMMAND, "merge", recipe, "--out", out, "--quiet", "--json", *options], out)


def merge_by_mergekit(recipe: Path, python: Path) -> Run:
    """mergekit's command. Merged adapters go to a cache of its own, which is measured too."""
    out, cache = recipe.parent / "out", recipe.parent / "cache"
    for folder in (out, cache):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        command: list[str | Path] = [python.with_name("mergekit-yaml"), recipe, out]
        command += ["--lora-merge-cache", cache, "--no-copy-tokenizer", "--quiet"]
        run = timed(command, out, env=_alone())
        return replace(run, cache_bytes=_size(cache))
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def merge_by_peft(base: Path, method: str, adapters: Iterable[Path], python: Path) -> Run:
    """PEFT's `add_weighted_adapter`, see peft_merge.py."""
    out = base.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    script = Path(__file__).with_name("peft_merge.py")
    return timed([python, script, base, out, method, *adapters], out, env=_alone())


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
