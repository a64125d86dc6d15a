"""The journal: what is written comes back, and what is torn or damaged does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from streammerge.errors import StorageError
from streammerge.storage.journal import VERSION, Journal, read_lines

RECORDS = [{"tensor": "a", "tile": i, "norms": [0.1 * i, float("inf")]} for i in range(5)]


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    path = tmp_path / "journal"
    with Journal(path, {"recipe": "ünïcode"}) as one:
        one.append(RECORDS[:2])
        one.append(RECORDS[2:])
    return path


def test_what_is_written_comes_back(journal: Path) -> None:
    lines = list(read_lines(journal))
    assert [line.record for line in lines] == [
        {"journal": VERSION, "recipe": "ünïcode"},
        *RECORDS,
    ]
    assert lines[0].start == 0
    assert [line.start for line in lines[1:]] == [line.stop for line in lines[:-1]]
    assert lines[-1].stop == journal.stat().st_size


def test_every_torn_end_gives_the_whole_lines_before_it(journal: Path) -> None:
    data = journal.read_bytes()
    ends = [line.stop for line in read_lines(journal)]
    for size in range(len(data)):
        journal.write_bytes(data[:size])
        assert [line.stop for line in read_lines(journal)] == [end for end in ends if end <= size]


def test_every_flipped_bit_is_found(journal: Path) -> None:
    data = journal.read_bytes()
    lines = [line.record for line in read_lines(journal)]
    starts = [line.start for line in read_lines(journal)]
    for place in range(len(data)):
        for bit in (0, 5):
            spoiled = bytearray(data)
            spoiled[place] ^= 1 << bit
            journal.write_bytes(spoiled)
            found = [line.record for line in read_lines(journal)]
            before = sum(start <= place for start in starts) - 1
            assert found == lines[:before]


def test_it_goes_on_where_it_is_told(journal: Path) -> None:
    stop = list(read_lines(journal))[3].stop
    with Journal(journal, end=stop) as one:
        one.append([{"more": 1}])
    assert [line.record for line in read_lines(journal)][4:] == [{"more": 1}]


def test_an_old_journal_is_never_begun_anew(journal: Path) -> None:
    with pytest.raises(StorageError, match="File exists") as caught:
        Journal(journal, {"recipe": "another"})
    assert caught.value.where == str(journal)
