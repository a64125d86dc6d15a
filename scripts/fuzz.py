"""Hostile headers, indices, recipes and adapter configs: each is read or refused, and nothing else.

    scripts/fuzz                        a minute for each of the four
    scripts/fuzz --seconds 600 recipe   ten for one

Hypothesis makes the files, see tests/properties/hostile.py. Where atheris is installed (`pip
install atheris`), it steers hypothesis to what reaches new lines of streammerge. Prints how many
files there were; one that fails is shown, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

HAS_ATHERIS = importlib.util.find_spec("atheris") is not None
KINDS = ("header", "index", "recipe", "adapter")
SELF_TEST = "self-test"  # a kind that fails, to see that failures are seen


# ------------------------------------------------------------------------ in a process of its own


def as_test(contents: Any, check: Callable[[bytes], object]) -> Any:
    """A hypothesis test that the check raises nothing."""
    from hypothesis import HealthCheck, given, settings

    @settings(
        max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(contents)
    def holds(raw: bytes) -> None:
        check(raw)

    return holds


def contents_of(kind: str) -> tuple[Any, Callable[[Path, bytes], None]]:
    if kind == SELF_TEST:
        from hypothesis import strategies as st

        return st.sampled_from([b"fine", b"!!"]), _refuse_marks
    from tests.properties.hostile import HOSTILE

    return HOSTILE[kind].contents, HOSTILE[kind].check


def _refuse_marks(folder: Path, raw: bytes) -> None:
    assert raw != b"!!"


def by_hypothesis(kind: str, seconds: float) -> int:
    """Returns how many files were tried; raises for one that fails."""
    contents, check = contents_of(kind)
    folder, tried = Path(tempfile.mkdtemp()), itertools.count()
    holds = as_test(contents, lambda raw: (next(tried), check(folder, raw)))
    deadline = time.monotonic() + seconds  # imports do not count
    while time.monotonic() < deadline:
        holds()
    return next(tried)


def by_atheris(kind: str, seconds: float) -> None:
    """Never returns; libFuzzer prints how many runs there were, and we the file that fails."""
    import atheris

    with atheris.instrument_imports(include=["streammerge"]):
        import streammerge.planning.inputs  # all readers
        import streammerge.recipe  # noqa: F401
    contents, check = contents_of(kind)
    folder = Path(tempfile.mkdtemp())

    def shown(raw: bytes) -> None:
        try:
            check(folder, raw)
        except Exception:
            print(f"the file: {raw!r}", file=sys.stderr)
            raise

    options = [f"-max_total_time={int(seconds)}", f"-artifact_prefix={folder}/"]
    command = [sys.argv[0], *options, "-print_final_stats=1"]
    atheris.Setup(command, as_test(contents, shown).hypothesis.fuzz_one_input)
    atheris.Fuzz()


# ------------------------------------------------------------------------------------- all of it


def fuzz(kind: str, seconds: float, *, steered: bool) -> dict[str, Any]:
    """Try one kind for so long, in a process of its own."""
    engine = "atheris" if steered else "hypothesis"
    command = [sys.executable, __file__, "--seconds", str(seconds), "--worker", engine, kind]
    with tempfile.TemporaryDirectory() as folder:  # the process may end in the middle of its work
        env = {**os.environ, "TMPDIR": folder}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    said = done.stdout + done.stderr
    found = re.search(r"(?:number_of_executed_units:|^cases) *(\d+)", said, re.MULTILINE)
    if done.returncode:
        print(
            "\n".join(line for line in said.splitlines() if not _is_progress(line)), file=sys.stderr
        )
    cases = int(found[1]) if found else 0
    return {"kind": kind, "engine": engine, "cases": cases, "failed": done.returncode != 0}


def _is_progress(line: str) -> bool:
    """What libFuzzer says while it works."""
    return line.startswith(("#", "INFO: "))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--seconds", type=float, default=60, help="for each kind")
    parser.add_argument("--hypothesis", action="store_true", help="without atheris")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", choices=["atheris", "hypothesis"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    kinds = options.kinds or KINDS
    if unknown := {*kinds} - {*KINDS, SELF_TEST}:
        parser.error(f"no such kind: {', '.join(sorted(unknown))}")
    if options.worker == "atheris":
        by_atheris(kinds[0], options.seconds)
    if options.worker:
        print("cases", by_hypothesis(kinds[0], options.seconds))
        return 0
    steered = HAS_ATHERIS and not options.hypothesis
    results = [fuzz(kind, options.seconds, steered=steered) for kind in kinds]
    if options.json:
        print(json.dumps(results))
    else:
        for one in results:
            outcome = "FAILED" if one["failed"] else "read or refused, all of them"
            print(f"{one['kind']:<8} {one['engine']:<10} {one['cases']:>9} files  {outcome}")
    return int(any(one["failed"] for one in results))


if __name__ == "__main__":
    sys.exit(main())
