"""Every row of the tables has its tests, and they are there."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.faults.rows import BAD_INPUTS, FAULTS, Row

TESTS = Path(__file__).parents[1]


@cache
def names_in(file: str) -> frozenset[str]:
    """The names of all test functions of a file, in classes too."""
    tree = ast.parse((TESTS / file).read_text("utf-8"))
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return frozenset(node.name for node in functions if node.name.startswith("test_"))


def test_the_tables_are_complete() -> None:
    assert list(BAD_INPUTS) == list(range(1, 44))
    assert list(FAULTS) == list(range(1, 25))
    assert all(row.tests for row in (*BAD_INPUTS.values(), *FAULTS.values()))


def test_the_page_has_every_row_and_nothing_that_was_lost() -> None:
    """Its numbers are those of the day it was made; scripts/faults has today's."""
    page = (TESTS.parent / "docs" / "faults.md").read_text()
    for table in (FAULTS, BAD_INPUTS):
        for number, row in table.items():
            line = next(line for line in page.splitlines() if f"| {number} | {row.what} |" in line)
            tries, survived, equal = line.rstrip(" |").split(" | ")[-3:]
            assert int(tries) > 0 and tries == survived == equal, line


@pytest.mark.parametrize("row", [*BAD_INPUTS.values(), *FAULTS.values()], ids=lambda row: row.what)
def test_the_names_in_a_row_are_there(row: Row) -> None:
    for test in row.tests:
        file, _, name = test.partition("::")
        assert name.partition("[")[0] in names_in(file), test
