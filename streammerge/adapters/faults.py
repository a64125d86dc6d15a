"""What can be wrong with the tensors of an adapter, gathered so that each kind is said once.

An adapter for another model is wrong in all of its 448 tensors in the same way. One problem that
counts them and names the first few is worth reading; 448 problems are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from streammerge.errors import BadInput, Problems

# The way out for everything that a merge of full models can express.
MERGE_FIRST: Final = (
    "merge it into its base with PEFT (merge_and_unload), save that and list it under `models`"
)
NAMES_SHOWN: Final = 5
_INDENT: Final = "\n" + " " * 12  # under the first name, where StreammergeError prints `found:`


@dataclass(frozen=True, slots=True)
class Fault:
    """A kind of problem: one sentence, what would be right, and what the reader can do."""

    what: str
    expected: str
    remedy: str = MERGE_FIRST


def listed(lines: list[str]) -> str:
    """The first few lines below each other, and how many more there are."""
    more = len(lines) - NAMES_SHOWN
    return _INDENT.join([*lines[:NAMES_SHOWN], *([f"and {more} more"] if more > 0 else [])])


class Findings:
    """Collects what is wrong with the tensors of one file, by kind."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._lines: dict[Fault, list[str]] = {}

    def add(self, fault: Fault, line: str) -> None:
        """Note one more tensor, or pair of tensors, that has this fault."""
        self._lines.setdefault(fault, []).append(line)

    def report(self, problems: Problems) -> None:
        """Hand on one problem for each kind, in the order of their first appearance."""
        for fault, lines in self._lines.items():
            problems.add(
                BadInput(
                    f"{fault.what} ({len(lines)} found)",
                    where=self._where,
                    found=listed(lines),
                    expected=fault.expected,
                    remedy=fault.remedy,
                )
            )
