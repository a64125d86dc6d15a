"""The real command, killed by the kernel at its n-th call of a kind; needs strace.

https://man7.org/linux/man-pages/man1/strace.1.html, fault injection.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import streammerge as sm
from tests.faults.seam import make_inputs
from tests.running import COMMAND, digest

# strace counts each thread's calls of each kind by themselves. Not all kinds occur everywhere.
CALLS = ("pwrite64", "fsync", "fdatasync", "rename", "unlink", "unlinkat", "copy_file_range")
OTHERS = ("renameat2", "ftruncate", "fallocate", "mkdir", "rmdir", "flock", "sync_file_range")

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace"),
]


def strace(injection: str, recipe: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """A merge under strace, of which the output alone is looked at."""
    options = ["-f", "-qq", "-o", "/dev/null", "-e", f"inject={injection}"]
    command = [COMMAND, "merge", str(recipe), "--out", str(out), "--quiet", "--threads", "1"]
    arguments = ["strace", *options, *command]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=100)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return digest(sm.merge(recipe, out=tmp_path_factory.mktemp("u") / "out").out)


def test_killed_at_every_durable_call(
    recipe: Path, undisturbed: str, tmp_path: Path, record_property: Any
) -> None:
    """Of each kind, until a run comes through."""
    tries = 0
    for call in (*CALLS, *OTHERS):
        for nth in range(1, 200):
            outs = tmp_path / f"{call}-{nth}"
            outs.mkdir()
            out = outs / "out"
            done = strace(f"{call}:signal=SIGKILL:when={nth}", recipe, out)
            if done.returncode == 0:
                break
            tries += 1
            assert not out.exists() or digest(out) == undisturbed, (call, nth)
            sm.merge(recipe, out=out)
            assert digest(out) == undisturbed, (call, nth)
            assert [path.name for path in outs.iterdir()] == ["out"], (call, nth)
    for name in ("tries", "survived", "equal"):
        record_property(name, tries)
    assert tries >= 30


@pytest.mark.parametrize(
    ("injection", "code"),
    [
        ("fdatasync:error=EIO:when=2", 74),
        ("fsync:error=EIO:when=1", 74),
        ("pwrite64:error=ENOSPC:when=3+", 74),
        ("fallocate:error=ENOSPC", 74),
        ("rename:error=EIO", 74),
        ("flock:error=ENOSYS", 0),
        ("copy_file_range:error=EXDEV", 0),
        ("fallocate:error=EOPNOTSUPP", 0),
        ("pwrite64:error=EINTR:when=1+3", 0),
    ],
)
def test_an_error_of_the_kernel_is_told_or_gone_round(
    recipe: Path, undisturbed: str, tmp_path: Path, injection: str, code: int
) -> None:
    (tmp_path / "outs").mkdir()
    out = tmp_path / "outs" / "out"
    done = strace(injection, recipe, out)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if code:
        assert not out.exists()
        sm.merge(recipe, out=out)
    assert digest(out) == undisturbed
    assert [path.name for path in out.parent.iterdir()] == ["out"]
