"""The error tree. Each error says what, where, the numbers and the remedy, and owns its exit code.

    StreammergeError            70  a bug, unless a subclass says otherwise
    |-- ConfigError             78  the recipe or a setting asks for something that cannot be
    |   |-- BudgetError         78  the merge does not fit; carries the least budget that would do
    |   `-- MethodError         78  a merge method of the user's own fails
    |-- InputMissing            66  a file or folder that was named is not there
    |-- BadInput                65  an input holds something that must not be merged
    |   `-- InputChanged        65  an input is not what it was when the merge was planned
    |-- OutputRefused           73  the output cannot be created where it was asked for
    |-- StorageError            74  reading or writing failed
    |-- Interrupted             75  a signal asked to stop; the same command goes on
    `-- Refused                 the first of 78, 66, 65, 73 that applies: several problems at once

Exit codes follow sysexits.h.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where in a text file something stands; line and column count from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


class StreammergeError(Exception):
    """Base of every error that streammerge raises on purpose.

    `what` is one sentence; `where` a place, a file or a tensor; `found` and `expected` the values
    that disagree; `remedy` what the reader can do about it.
    """

    exit_code = 70
    # Whether the same command may succeed later, so that what is done of a merge is worth keeping.
    resumable = True

    def __init__(
        self,
        what: str,
        *,
        where: Place | str | None = None,
        found: str | None = None,
        expected: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.found = found
        self.expected = expected
        self.remedy = remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        head = self.what if self.where is None else f"{self.where}: {self.what}"
        rows = (("found", self.found), ("expected", self.expected), ("remedy", self.remedy))
        return "\n".join([head, *(f"  {key + ':':<10}{text}" for key, text in rows if text)])


class ConfigError(StreammergeError):
    """The recipe or a setting asks for something that cannot be."""

    exit_code = 78


class BudgetError(ConfigError):
    """The merge does not fit the budget; `least_bytes` is the smallest that would do."""

    def __init__(self, what: str, *, least_bytes: int, found: str, remedy: str) -> None:
        self.least_bytes = least_bytes
        super().__init__(what, found=found, remedy=remedy)


class MethodError(ConfigError):
    """A merge method of the user's own fails, or returns what it must not."""


class InputMissing(StreammergeError):
    """A file or folder that was named is not there."""

    exit_code = 66


class BadInput(StreammergeError):
    """An input holds something that must not be merged."""

    exit_code = 65
    resumable = False


class InputChanged(BadInput):
    """An input is not what it was when the merge was planned."""

    resumable = True


class OutputRefused(StreammergeError):
    """The output cannot be created where it was asked for."""

    exit_code = 73


class StorageError(StreammergeError):
    """Reading or writing failed."""

    exit_code = 74


class Interrupted(StreammergeError):
    """A signal asked to stop; what is done is kept, and the same command goes on from there."""

    exit_code = 75


class Refused(StreammergeError):
    """Several problems at once; each is in `problems`, in the order of their places."""

    def __init__(self, problems: list[StreammergeError]) -> None:
        self.problems = tuple(problems)
        present = {problem.exit_code for problem in problems}
        self.exit_code = next((code for code in (78, 66, 65, 73) if code in present), 70)
        super().__init__(f"{len(problems)} problems")

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in getattr(self, "problems", ()))


class Problems:
    """Collects what is wrong, so that the user sees all of it at once."""

    def __init__(self) -> None:
        self._found: list[StreammergeError] = []

    def add(self, problem: StreammergeError) -> None:
        """Take one problem; a `Refused` is taken apart. What was said already is not said twice."""
        for one in problem.problems if isinstance(problem, Refused) else (problem,):
            if str(one) not in {str(known) for known in self._found}:
                self._found.append(one)

    def raise_any(self) -> None:
        """Raise the only problem, or all of them as `Refused`; return when there is none."""
        if len(self._found) == 1:
            raise self._found[0]
        if self._found:
            raise Refused(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[StreammergeError]:
        return iter(self._found)
