"""What a kill costs: time before plus time after, against an undisturbed merge and one start-up.

    python scripts/resume.py RECIPE FOLDER

The merge into FOLDER is killed (SIGKILL) when 25, 50 and 75 % of its bytes are in its journal, and
run again. Times are of the processor, user and system, since they do not depend on who else works
on the machine.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from streammerge.storage.journal import read_lines  # noqa: E402

RUNS = 3
SHARES = (0.25, 0.5, 0.75)


def command(*arguments: str, journal: Path | None = None, kill_at: float = 0) -> float:
    """Seconds of the processor that the command took; killed once so many bytes are written."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.execv(sys.executable, [sys.executable, "-m", "streammerge", *arguments])
    killed = False
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            wanted = -signal.SIGKILL if journal else 0
            if os.waitstatus_to_exitcode(status) != wanted:
                raise SystemExit(f"{arguments}: exit {os.waitstatus_to_exitcode(status)}")
            return usage.ru_utime + usage.ru_stime
        if journal and not killed and written(journal) >= kill_at:
            os.kill(child, signal.SIGKILL)
            killed = True
        time.sleep(0.01)


def written(journal: Path) -> int:
    """The bytes that the receipts of a journal speak of."""
    if not journal.exists():
        return 0
    return sum(line.record.get("bytes", 0) for line in read_lines(journal))


def main(recipe: str, folder: str) -> None:
    out = Path(folder) / "out"
    merge = ("merge", recipe, "--out", str(out), "--quiet")
    times = []
    for _ in range(RUNS):
        shutil.rmtree(out, ignore_errors=True)
        times.append(command(*merge))
    total = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    undisturbed = statistics.median(times)
    start_up = command("plan", recipe)
    print(f"undisturbed {undisturbed:.2f} s, of which start-up and plan {start_up:.2f} s")
    for share in SHARES:
        shutil.rmtree(out)
        journal = out.parent / f".{out.name}.streammerge" / "journal"
        before = command(*merge, journal=journal, kill_at=share * total)
        after = command(*merge)
        ratio = (before + after - start_up) / undisturbed
        print(f"killed at {share:.0%}: {before:.2f} + {after:.2f} s, ratio {ratio:.2f}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
