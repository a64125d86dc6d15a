"""Run the tests of every fault, and print what was tried and what survived.

    scripts/faults               the table of faults
    scripts/faults --bad-inputs  the table of bad inputs
    scripts/faults --json        the faults as JSON: 24 ids
    scripts/faults --markdown    a table for docs/faults.md

Faults and their tests are in tests/faults/rows.py. A test of one case is one try; the tests that go
through the file calls of a merge tell how many they made, and try every one here, where the suite
takes one of two to four. Some ten minutes. Exit 1 if a fault was not tried without a reason.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.faults.rows import BAD_INPUTS, FAULTS, Row  # noqa: E402


@dataclass(slots=True)
class Result:
    """What came of a row."""

    id: int
    fault: str
    tries: int = 0
    survived: int = 0
    equal: int = 0  # with the bytes of an undisturbed run, or refused with nothing touched
    reason: str = ""  # why not all was tried


# What a test that tries many times says of itself.
COUNTS = ("tries", "survived", "equal")


class Collector:
    """Adds up the reports of pytest by the rows that name their tests."""

    def __init__(self, rows: Mapping[int, Row]) -> None:
        self.results = {number: Result(number, row.what) for number, row in rows.items()}
        self._rows = rows

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and not (report.when == "setup" and report.outcome != "passed"):
            return
        told = {name: int(str(value)) for name, value in report.user_properties if name in COUNTS}
        passed = int(report.outcome == "passed")
        for number, row in self._rows.items():
            if not any(_is_of(report.nodeid, test) for test in row.tests):
                continue
            result = self.results[number]
            if report.outcome == "skipped":
                result.reason = str(report.longrepr[-1]) if report.longrepr else "skipped"  # type: ignore[index]
                continue
            result.tries += told.get("tries", 1)
            result.survived += told.get("survived", passed)
            result.equal += told.get("equal", passed)


def _is_of(node: str, test: str) -> bool:
    """Whether a collected test is the one that a row names, or one of its cases."""
    node = node.removeprefix("tests/")
    return node == test or ("[" not in test and node.partition("[")[0] == test)


def as_text(results: list[Result]) -> Iterator[str]:
    """A table for a terminal."""
    yield f"{'fault':<70} {'tries':>5} {'survived':>8} {'bytes equal':>11}"
    for one in results:
        name = f"{one.id:>2} {one.fault}"[:70]
        yield f"{name:<70} {one.tries:>5} {one.survived:>8} {one.equal:>11}  {one.reason}".rstrip()


def as_markdown(results: list[Result]) -> Iterator[str]:
    """The same for a page."""
    yield "| | fault | tries | survived | bytes equal |"
    yield "|---|---|---|---|---|"
    for one in results:
        numbers = f"{one.tries} | {one.survived} | {one.equal}"
        yield f"| {one.id} | {one.fault} | {numbers} |{' ' + one.reason if one.reason else ''}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--bad-inputs", action="store_true")
    options = parser.parse_args()
    rows = BAD_INPUTS if options.bad_inputs else FAULTS
    collector = Collector(rows)
    tests = sorted({f"tests/{test}" for row in rows.values() for test in row.tests})
    os.environ["EVERY_CALL"] = "1"
    arguments = ["-q", "--no-header", "-p", "no:cacheprovider", f"--rootdir={ROOT}", *tests]
    sys.stdout, kept = sys.stderr, sys.stdout  # the table alone goes to standard output
    code = pytest.main(arguments, plugins=[collector])
    sys.stdout = kept
    results = list(collector.results.values())
    if options.json:
        print(json.dumps([asdict(result) for result in results]))
    else:
        print("\n".join(as_markdown(results) if options.markdown else as_text(results)))
    untried = any(one.tries == 0 and not one.reason for one in results)
    return int(code) or int(untried)


if __name__ == "__main__":
    sys.exit(main())
