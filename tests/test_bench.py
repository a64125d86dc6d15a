"""The benchmark covers the catalogue, measures real runs, keeps them and goes on; on kilobytes."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import bench
import bench_growth
import bench_parts
import bench_report
import bench_runs
import bench_works
import pytest
from bench_kept import Kept, Round, Row
from bench_parts import Part
from bench_works import Work

from streammerge.methods import CATALOGUE
from tests.running import TINY

needs_time = pytest.mark.skipif(
    not os.access(bench_runs.TIME, os.X_OK), reason=f"needs {bench_runs.TIME}"
)

ROW = Row("three", "ties", "streammerge", 4.0, 2.0, 100 << 20, 10**9, 2 * 10**9)
HERE = {"cpu": "one", "cpus": 2, "memory_gib": 4, "python": "3.11"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bench_works.inputs(tmp_path_factory.mktemp("inputs") / "llama-tiny", TINY)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_parts.SIZES, "small", TINY)
    monkeypatch.setitem(bench_parts.FOLDERS, "small", "llama-tiny")


def options_of(folder: Path, into: Path, *more: str) -> list[str]:
    names = ["--inputs", str(folder.parent), "--size", "small", "--into", str(into)]
    return [*names, "--rounds", "1", *more]


# ------------------------------------------------------------------------------ what is measured


def test_every_method_has_its_work(folder: Path) -> None:
    for kind in ("adapters", "models"):
        works = [*bench_works.headline(folder), *bench_works.others(folder, kind)]
        of_kind = {work.method for work in works if kind in work.name}
        wanted = {n for n, spec in CATALOGUE.items() if kind == "adapters" or spec.space != "cores"}
        assert of_kind == wanted
        assert len({work.name for work in works}) == len(works)


def test_full_models_are_held_to_reading_what_they_must(folder: Path) -> None:
    works = {work.name: work for work in bench_works.headline(folder)}
    everything = works["3 models, ties"].reads
    limits = {bench.COPY: 3.0, bench.READ: 4.0}

    def limit(name: str) -> float:
        return bench._limit(works[name], limits, everything)

    assert [path.name for path in everything] == ["base", "tuned-0", "tuned-1", "tuned-2"]
    assert limit("3 adapters, ties") == 3.0
    # Four models of the same size are read in 4 s; the copy has read one of them.
    assert limit("3 models, ties") == pytest.approx(3.0 + 3.0)
    assert limit("3 models, linear") == pytest.approx(3.0 + 2.0)  # which leaves the base unread


def test_both_sides_of_spilling_are_there(folder: Path) -> None:
    works = list(bench_works.spilling(folder))
    assert [(len(w.models), w.method, w.options[1]) for w in works] == [
        (count, "ties", mode) for count in (8, 3) for mode in ("auto", "always", "never")
    ]
    for work in works:
        config = json.loads((work.models[0] / "adapter_config.json").read_text())
        assert config["r"] == (256 if len(work.models) == 8 else 16)


def test_peers_stand_beside_the_same_work(folder: Path) -> None:
    parts = list(bench_parts.peers(folder, TINY, 1))
    works = [work for part in parts if part.state == "warm" for work in part.works()]
    tools: dict[tuple[str, bool], list[str]] = {}
    for work in works:
        tools.setdefault((work.method, work.full), []).append(work.tool)
    assert set(tools) == {(m, full) for m in bench_works.HEADLINE for full in (False, True)}
    for (_, full), found in tools.items():
        assert found == ["streammerge", "mergekit", *(() if full else ("PEFT",))]
    recipe = next(w for w in works if w.tool == "mergekit" and not w.full).recipe.read_text()
    assert f"model: {folder}/base+{folder}/lora-0," in recipe


def test_growth_has_the_axes_and_their_ends(folder: Path) -> None:
    found: dict[str, list[float | str]] = {}
    for point in bench_growth.points(folder.parent, folder, bench_parts.SIZES["1b"]):
        found.setdefault(point.axis, []).append(point.x)
    assert found["adapters"][0] == 1 and found["adapters"][-1] == 16
    assert found["rank"][0] == 8 and found["rank"][-1] == 256
    assert found["threads"][-2:] == [16, 64]
    assert (found["budget"][0], found["budget"][-1]) == ("least", "4GiB")
    assert found["model"][0] < 1 and 4.8 < float(found["model"][-1]) < 5.3
    assert set(found) == set(bench_report.AXES)


@needs_time
def test_a_point_of_growth_makes_its_inputs(folder: Path) -> None:
    points = bench_growth.points(folder.parent, folder, TINY)
    firsts = {point.axis: point for point in reversed(list(points))}
    for axis, point in firsts.items():
        works = point.works()
        assert [work.method for work in works] == list(bench_growth.METHODS), axis
        assert all(path.exists() for work in works for path in work.reads)
    for work in firsts["budget"].works():
        assert work.options[0] == "--memory" and work.options[1].endswith("MiB")


# ---------------------------------------------------------------------------------- how it runs


@needs_time
@pytest.mark.usefixtures("tiny")
def test_works_are_measured_and_told(folder: Path, tmp_path: Path) -> None:
    into = tmp_path / "result"
    options = options_of(folder, into, "--only", ", ties", "--state", "cold", "--least")
    assert bench.main(options) == 0
    (part, *rest) = json.loads((into / "bench.json").read_text())["parts"]
    assert {row["work"] for row in part["rows"]} == {"3 adapters, ties", "3 models, ties"}
    for row in part["rows"]:
        assert row["written_bytes"] > 0 and row["ratio"] > 0
        assert row["peak_bytes"] > 64 << 20  # of the merge, not of the shell that started it
    assert any("--memory" in row["work"] for one in rest for row in one["rows"])
    assert "## headline, only , ties, cold" in (into / "bench.md").read_text()
    assert all(svg.read_text().rstrip().endswith("</svg>") for svg in into.glob("*.svg"))
    assert len(list(into.glob("*.svg"))) >= 2


@needs_time
def test_what_runs_ends_with_the_benchmark(tmp_path: Path) -> None:
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    pids = tmp_path / "pids"
    script = f"sleep 100 & echo $! >> {pids}; echo $$ >> {pids}; wait"

    def stop() -> None:
        while not pids.exists() or pids.read_text().count("\n") < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    stopper = threading.Thread(target=stop)
    try:
        stopper.start()
        with pytest.raises(KeyboardInterrupt):
            bench_runs.timed(["sh", "-c", script])
    finally:
        stopper.join()
        signal.signal(signal.SIGINT, usual)
    left = [Path("/proc", pid, "stat") for pid in pids.read_text().split()]
    until = time.monotonic() + 10
    while any(is_running(stat) for stat in left) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(is_running(stat) for stat in left)


def is_running(stat: Path) -> bool:
    """By what the kernel says of a process; one that is dead may wait to be collected."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@needs_time
def test_no_merge_goes_on_with_what_a_stopped_one_left(folder: Path) -> None:
    (work,) = (w for w in bench_works.headline(folder) if w.name == "3 adapters, ties")
    left = folder / "bench-before.out" / "out"
    left.mkdir(parents=True)
    (folder / "out").mkdir()
    (folder / "out" / "kept").touch()
    run = bench_runs.merge(work.recipe)
    assert run.report["resumed_bytes"] == 0 and run.report["written_bytes"] > 0
    assert not list(folder.glob("bench-*.out"))
    assert (folder / "out" / "kept").exists()  # which is not ours


@needs_time
@pytest.mark.usefixtures("tiny")
def test_a_stopped_benchmark_tells_what_it_has_and_what_is_left(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measure(part: Part, peers: Path) -> Round:
        if part.state == "cold":
            raise KeyboardInterrupt
        return Round(part.name, part.state, "2026-01-01", {bench.COPY: 2.0}, (ROW,))

    monkeypatch.setattr(bench, "measure", measure)
    assert bench.main(options_of(folder, tmp_path, "--only", "q and v")) == 75
    told = capsys.readouterr()
    assert "left for the same command again: headline, only q and v, cold" in told.err
    assert "| three | 4.0 |" in told.out and (tmp_path / "bench.md").read_text() in told.out


@pytest.mark.usefixtures("tiny")
def test_a_name_that_nothing_has_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no work has that in its name: nothing"):
        bench.main(options_of(folder, tmp_path, "--only", "nothing"))


def test_what_is_kept_is_not_measured_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured: list[str] = []

    def measure(part: Part, peers: Path) -> Round:
        measured.append(part.name)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return Round(part.name, part.state, "2026-01-01", {bench.COPY: 2.0}, (ROW,))

    monkeypatch.setattr(bench, "measure", measure)
    parts = [Part(name, no_works, rounds=2) for name in ("first", "second")]
    options = argparse.Namespace(minutes=1, peers_python=Path("python"))
    with pytest.raises(KeyboardInterrupt):
        bench.run(parts, Kept(tmp_path / "runs.jsonl", HERE), options)
    kept = Kept(tmp_path / "runs.jsonl", HERE)
    assert [bench.missing(part, kept) for part in parts] == [True, True]
    bench.run(parts, kept, options)
    assert [bench.missing(part, kept) for part in parts] == [False, False]
    assert measured == ["first", "first", "first", "second", "second"]
    later = argparse.Namespace(minutes=-1, peers_python=Path("python"))
    more = [*parts, Part("third", no_works, rounds=1)]
    bench.run(more, kept, later)
    assert [bench.missing(part, kept) for part in more] == [False, False, True]


def no_works() -> Sequence[Work]:
    return []


def test_rounds_of_another_machine_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    Kept(path, HERE).add(Round("part", "warm", "2026-01-01", {bench.COPY: 1.0}, (ROW,)))
    with pytest.raises(SystemExit, match="holds numbers of"):
        Kept(path, {**HERE, "cpus": 64})


def test_a_line_that_was_cut_off_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    kept = Kept(path, HERE)
    first = Round("part", "warm", "2026-01-01", {bench.COPY: 1.0}, (ROW,), 4, HERE)
    kept.add(first)
    whole = path.read_text()
    path.write_text(whole + whole[:40])
    assert list(Kept(path, HERE).rounds()) == [first]
    kept.add(replace(first, x="least"))
    assert [one.x for one in Kept(path, HERE).rounds()] == [4, "least"]
    assert kept.count("part", "warm", 4) == kept.count("part", "warm", "least") == 1


# ---------------------------------------------------------------------------------- how it looks


def test_medians_are_of_ratios_within_a_round() -> None:
    rows = [
        replace(ROW, seconds=4.0, limit_seconds=2.0),  # 2
        replace(ROW, seconds=9.0, limit_seconds=3.0, peak_bytes=200 << 20),  # 3
        replace(ROW, seconds=5.0, limit_seconds=1.0),  # 5
    ]
    rounds = [Round("part", "warm", "2026-01-01", {bench.COPY: 1.0}, (row,)) for row in rows]
    (found,) = bench_report.middle(rounds)
    assert (found.seconds, found.ratio) == (5.0, pytest.approx(3.0))
    assert found.peak_bytes == 200 << 20


def test_the_report_of_growth_and_of_a_table(tmp_path: Path) -> None:
    works = [replace(ROW, work=method, method=method) for method in bench_growth.METHODS]
    limits = {bench.COPY: 2.0}
    rounds = [Round("headline", "warm", "2026-01-01", limits, tuple(works), machine=HERE)]
    rounds += [
        Round("budget", "warm", "2026-01-02", limits, tuple(works), x) for x in ("least", "4GiB")
    ]
    text = bench_report.write(rounds, tmp_path)
    assert "| ties | 4.0 | 2.0 | 2.00 | 100 MiB | 1.00 GB | 2.00 GB |  |  |" in text
    assert "| least | linear | 4.0 | 2.00 | 100 MiB |" in text
    assert "2 CPUs of one, 4 GiB, Python 3.11, 2026-01-01 to 2026-01-02." in text
    pictures = {path.name for path in tmp_path.glob("*.svg")}
    assert pictures == {"headline.svg", "growth.svg"}
    assert set(re.findall(r"\]\((.*?)\)", text)) == pictures


def test_auto_is_held_to_the_better_of_always_and_never(tmp_path: Path) -> None:
    seconds = {"auto": 4.2, "always": 4.0, "never": 6.0}
    rows = [replace(ROW, work=f"8 with --spill {m}", seconds=s) for m, s in seconds.items()]
    rounds = [Round("spill", "warm", "2026-01-01", {bench.COPY: 2.0}, tuple(rows), machine=HERE)]
    text = bench_report.write(rounds, tmp_path)
    assert "8 with --spill auto: 1.05 times the better of always and never." in text
    assert text.count("the better of") == 1


def test_parts_of_one_group_share_a_table_and_a_picture(tmp_path: Path) -> None:
    tools = [replace(ROW, work=f"three, {tool}", tool=tool) for tool in ("mergekit", "PEFT")]
    rounds = [
        Round(f"peers: {row.tool}", "warm", "2026-01-01", limits, (row,), machine=HERE)
        for row, limits in zip(
            tools, ({bench.COPY: 2.0}, {bench.COPY: 4.0, bench.READ: 1.0}), strict=True
        )
    ]
    text = bench_report.write(rounds, tmp_path)
    assert text.count("## peers, warm") == text.count("| work |") == 1
    assert "Rounds: 1; copy of the base 3.0 s, reading base and models 1.0 s." in text
    assert "| three, mergekit |" in text and "| three, PEFT |" in text
    assert [path.name for path in tmp_path.glob("*.svg")] == ["peers.svg"]
