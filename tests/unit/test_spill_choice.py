"""What is spilled: by costs that are given here, so that no clock decides a test."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from streammerge import system
from streammerge.errors import OutputRefused
from streammerge.planning import spill
from streammerge.planning.spill import Chooser, SpillOptions, Wanted
from streammerge.storage.diskspeed import DiskSpeed, measure

ELEMENTS = 4 << 20
FAST = DiskSpeed(write=0.2e-9, read=0.2e-9)
SLOW = DiskSpeed(write=10e-9, read=5e-9)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What was timed, and how often; the page cache is fast, the disk itself slow."""
    seen: Counter[str] = Counter()

    def disk(folder: Path, *, through: bool) -> DiskSpeed:
        seen["disk" if through else "page cache"] += 1
        return SLOW if through else FAST

    def product(rank: int) -> float:
        seen["product"] += 1
        return rank * 0.03e-9

    monkeypatch.setattr(spill, "measure", disk)
    monkeypatch.setattr(spill, "_time_product", product)
    return seen


def choices(
    rank: int, reads: int, models: int, *, mode: spill.Mode = "auto", elements: int = ELEMENTS
) -> set[bool]:
    chooser = Chooser(SpillOptions(mode), threads=2)
    wanted = [Wanted(model, rank, reads) for model in range(models)]
    return {choice.spilled for choice in chooser.choose(elements, wanted)}


@pytest.mark.parametrize(
    ("rank", "reads", "models", "spilled"),
    [
        (256, 2, 8, True),
        (256, 2, 1, True),
        (16, 2, 3, False),
        (8, 4, 3, False),
        (64, 3, 3, True),
        (0, 4, 3, False),  # stored rows
    ],
)
def test_what_pays_is_spilled(
    timed: Counter[str], rank: int, reads: int, models: int, spilled: bool
) -> None:
    assert choices(rank, reads, models) == {spilled}


def test_rows_that_are_wanted_once_need_no_choice(timed: Counter[str]) -> None:
    assert choices(256, 1, 8) == choices(256, 1, 8, mode="always") == set()


def test_nothing_is_timed_where_nothing_can_pay(timed: Counter[str]) -> None:
    choices(16, 2, 3)
    choices(256, 2, 8, mode="always")
    choices(256, 2, 8, mode="never")
    assert not timed


def test_each_thing_is_timed_once(timed: Counter[str]) -> None:
    chooser = Chooser(SpillOptions(), threads=2)
    for _ in range(3):
        chooser.choose(ELEMENTS, [Wanted(0, 256, 2), Wanted(1, 128, 2)])
    assert timed == {"product": 2, "page cache": 1}


def test_more_than_the_page_cache_holds_goes_at_the_speed_of_the_disk(
    timed: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "memory_available", lambda: 1 << 30)
    monkeypatch.setattr(system, "cgroup_memory_left", lambda: None)
    assert choices(256, 2, 1) == {True}
    assert choices(256, 2, 8, elements=64 << 20) == {False}
    assert timed["disk"] == timed["page cache"] == 1


def test_always_and_never(timed: Counter[str]) -> None:
    assert choices(16, 2, 3, mode="always") == {True}
    assert choices(256, 9, 8, mode="never") == {False}


def test_costs_are_sums_of_what_is_done(timed: Counter[str]) -> None:
    (choice,) = Chooser(SpillOptions(), 2).choose(10**8, [Wanted(5, 100, 3)])
    assert choice.nbytes == 4 * 10**8
    assert choice.seconds_again == pytest.approx(3 * 0.3)
    array = 0.005
    assert choice.seconds_kept == pytest.approx(0.3 + 0.08 + 2 * 0.08 + array)


def test_a_small_tensor_is_not_worth_an_array(timed: Counter[str]) -> None:
    assert choices(256, 2, 8, elements=1 << 16) == {False}


def test_a_disk_that_cannot_be_timed_is_taken_for_an_ordinary_one(tmp_path: Path) -> None:
    gone = SpillOptions(cache=tmp_path / "not" / "there")
    assert gone.place == tmp_path
    (tmp_path / "file").write_text("")
    chooser = Chooser(SpillOptions(cache=tmp_path), 2)
    assert chooser.choose(ELEMENTS, [Wanted(0, 256, 2)])


@pytest.mark.parametrize("through", [False, True])
def test_the_disk_is_really_timed_and_left_as_it_was(tmp_path: Path, through: bool) -> None:
    speed = measure(tmp_path, through=through)
    assert 1e-11 < speed.write < 1e-6 and 1e-11 < speed.read < 1e-6
    assert not list(tmp_path.iterdir())


def test_room_is_checked_with_the_output_where_they_share_a_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "free_bytes", lambda folder: 1000)
    options = SpillOptions(cache=tmp_path / "cache", beside=tmp_path)
    options.check_room(600, 400)
    with pytest.raises(OutputRefused, match="too little room") as raised:
        options.check_room(600, 401)
    assert raised.value.where == str(tmp_path) and raised.value.found == "1000 B free"
    assert "1001 B" in str(raised.value.expected) and "--spill never" in str(raised.value.remedy)
