"""The benchmark's results for people: tables, and what bench_pictures draws."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import bench_pictures
from bench_kept import Round, Row

MIB = 1 << 20
AXES = {
    "model": "model, GB",
    "adapters": "adapters of rank 16",
    "rank": "rank of three adapters",
    "budget": "--memory",
    "threads": "--threads",
}


def machine() -> dict[str, Any]:
    """What the numbers were measured on, in words and without a name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), "?")
    cpus = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": model,
        "cpus": cpus,
        "memory_gib": round(memory / (1 << 30)),
        "python": platform.python_version(),
    }


def title(part: str, state: str, x: float | str | None) -> str:
    """A part in words."""
    return f"{part}, {state}" if x is None else f"growth: {part} {x}"


def write(rounds: Sequence[Round], into: Path) -> str:
    """Write bench.json, bench.md and the pictures; returns the Markdown."""
    into.mkdir(parents=True, exist_ok=True)
    told = {"parts": [_told(some) for some in _parts(rounds)]}
    (into / "bench.json").write_text(json.dumps(told, indent=2) + "\n")
    text = markdown(rounds)
    (into / "bench.md").write_text(text)
    every = _groups(rounds) + [part for part in _parts(rounds) if part[0].x is not None]
    bench_pictures.draw([(some[0], middle(some)) for some in every], AXES, into)
    return text


def _parts(rounds: Iterable[Round]) -> list[list[Round]]:
    """The rounds of each part."""
    found: dict[tuple[object, ...], list[Round]] = {}
    for one in rounds:
        found.setdefault((one.part, one.state, one.x), []).append(one)
    return list(found.values())


def _groups(rounds: Iterable[Round]) -> list[list[Round]]:
    """The rounds that one table tells: those on no axis, group by group and state by state."""
    found: dict[tuple[str, str], list[Round]] = {}
    for one in rounds:
        if one.x is None:
            found.setdefault((one.group, one.state), []).append(one)
    return list(found.values())


def middle(rounds: Sequence[Round]) -> list[Row]:
    """For each work the median of the ratios and of the seconds, and the largest peak.

    Its limit is the seconds over the ratio, so the three agree.
    """
    runs: dict[str, list[Row]] = {}
    for one in rounds:
        for row in one.rows:
            runs.setdefault(row.work, []).append(row)
    return [_middle(rows) for rows in runs.values()]


def _middle(rows: Sequence[Row]) -> Row:
    seconds = median(row.seconds for row in rows)
    limit = seconds / median(row.ratio for row in rows)
    peak = max(row.peak_bytes for row in rows)
    return Row(
        **{**asdict(rows[0]), "seconds": seconds, "limit_seconds": limit, "peak_bytes": peak}
    )


def _told(rounds: Sequence[Round]) -> dict[str, Any]:
    first = rounds[0]
    return {
        "part": first.part,
        "state": first.state,
        "x": first.x,
        "rounds": len(rounds),
        "dates": sorted({one.date for one in rounds}),
        "machine": dict(first.machine),
        "limits": _limits(rounds),
        "rows": [{**asdict(row), "ratio": row.ratio} for row in middle(rounds)],
    }


def _limits(rounds: Sequence[Round]) -> dict[str, float]:
    """Medians, in seconds."""
    names = dict.fromkeys(name for one in rounds for name in one.limits)
    return {
        name: median(one.limits[name] for one in rounds if name in one.limits) for name in names
    }


# --------------------------------------------------------------------------------------- tables

TITLES = "work, seconds, limit, ratio, peak, read, written, spilled, cache".split(", ")


def markdown(rounds: Sequence[Round]) -> str:
    """All tables."""
    lines = list(_head(rounds))
    every = _parts(rounds)
    for group in _groups(rounds):
        count = max(len(part) for part in every if part[0] in group)
        limits = ", ".join(f"{name} {value:.1f} s" for name, value in _limits(group).items())
        lines += ["", f"## {title(group[0].group, group[0].state, None)}", ""]
        rows = middle(group)
        lines += [f"Rounds: {count}; {limits}.", "", *_table(TITLES, map(_cells, rows))]
        lines += [line for told in _spilling(rows) for line in ("", told)]
        picture = f"![{group[0].group}]({bench_pictures.file_name(group[0].group)})"
        lines += [] if picture in lines else ["", picture]  # one for all states
    for axis, name in AXES.items():
        points = [part for part in every if part[0].part == axis and part[0].x is not None]
        if points:
            titles = [name, "method", "seconds", "ratio to the copy", "peak"]
            lines += ["", f"## growth: {axis}", "", *_table(titles, _growth(points))]
    if any(one.x is not None for one in rounds):
        lines += ["", "![growth](growth.svg)"]
    return "\n".join(lines) + "\n"


def _head(rounds: Sequence[Round]) -> Iterator[str]:
    if not rounds:
        yield "Nothing is measured yet."
        return
    about = rounds[0].machine
    dates = sorted({one.date for one in rounds})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    yield (
        f"{about['cpus']} CPUs of {about['cpu']}, {about['memory_gib']} GiB, Python "
        f"{about['python']}, {span}."
    )


def _cells(row: Row) -> list[str]:
    seconds = [f"{row.seconds:.1f}", f"{row.limit_seconds:.1f}", f"{row.ratio:.2f}"]
    moved = (row.read_bytes, row.written_bytes, row.spilled_bytes, row.cache_bytes)
    return [row.work, *seconds, _mib(row.peak_bytes), *map(_gigabytes, moved)]


def _spilling(rows: Sequence[Row]) -> Iterator[str]:
    """Whether `--spill auto` chose well: promised within 5 % of the better of the two."""
    ratios = {row.work: row.ratio for row in rows}
    for work in ratios:
        both = [work.replace("--spill auto", f"--spill {mode}") for mode in ("always", "never")]
        if "--spill auto" in work and all(other in ratios for other in both):
            times = ratios[work] / min(ratios[other] for other in both)
            yield f"{work}: {times:.2f} times the better of always and never."


def _growth(points: Iterable[Sequence[Round]]) -> Iterator[list[str]]:
    for rounds in points:
        for row in middle(rounds):
            told = [f"{row.seconds:.1f}", f"{row.ratio:.2f}", _mib(row.peak_bytes)]
            yield [str(rounds[0].x), row.method, *told]


def _table(titles: Sequence[str], rows: Iterable[list[str]]) -> Iterator[str]:
    for cells in (titles, ["---"] * len(titles), *rows):
        yield f"| {' | '.join(cells)} |"


def _mib(nbytes: int) -> str:
    return f"{nbytes / MIB:.0f} MiB"


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes else ""
