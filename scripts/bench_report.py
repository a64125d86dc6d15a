"""The benchmark's results for people: a table and pictures."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

MIB = 1 << 20
LABELS = {
    "model": "model, GB",
    "adapters": "adapters",
    "rank": "rank of three adapters",
    "budget": "--memory",
    "threads": "--threads",
}


def machine() -> dict[str, Any]:
    """What the numbers were measured on, in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), "?")
    cpus = len(os.sched_getaffinity(0))
    return {"cpu": model, "cpus": cpus, "python": platform.python_version()}


def markdown(result: dict[str, Any]) -> str:
    """All tables."""
    about = result["machine"]
    lines = [f"{about['cpus']} CPUs of {about['cpu']}, Python {about['python']}.", ""]
    for state, limits in result["limits"].items():
        told = ", ".join(f"{name} {run['seconds']:.1f} s" for name, run in limits.items())
        lines.append(f"{state}: {told}")
    lines.append("")
    lines += _table(
        ["work", "state", "seconds", "limit", "ratio", "peak", "read", "written", "spilled"],
        (_cells(row) for row in result["rows"]),
    )
    if result["least"]:
        rows = ([r["work"], r["least"], _mib(r["peak_bytes"])] for r in result["least"])
        lines += ["", *_table(["work", "least budget", "peak"], rows)]
    for axis, points in result["growth"].items():
        titles = [LABELS[axis], "method", "seconds", "ratio to the copy", "peak"]
        lines += ["", *_table(titles, (_growth_cells(point) for point in points))]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    seconds = [f"{row['seconds']:.1f}", f"{row['limit_seconds']:.1f}", f"{row['ratio']:.2f}"]
    sizes = [f"{row[key] / 1e9:.2f} GB" for key in ("read_bytes", "written_bytes", "spilled_bytes")]
    return [row["work"], row["state"], *seconds, _mib(row["peak_bytes"]), *sizes]


def _growth_cells(point: dict[str, Any]) -> list[str]:
    ratio = point["seconds"] / point["limit_seconds"]
    return [
        str(point["x"]),
        point["method"],
        f"{point['seconds']:.1f}",
        f"{ratio:.2f}",
        _mib(point["peak_bytes"]),
    ]


def _table(titles: Sequence[str], rows: Iterator[list[str]]) -> Iterator[str]:
    for cells in (titles, ["---"] * len(titles), *rows):
        yield f"| {' | '.join(cells)} |"


def _mib(nbytes: int) -> str:
    return f"{nbytes / MIB:.0f} MiB"


# ------------------------------------------------------------------------------------- pictures


def draw(result: dict[str, Any], folder: Path) -> None:
    """`bench.svg`: the ratio of every work; `growth.svg`: seconds along each axis."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "streammerge"  # else every file differs
    _draw_ratios(result["rows"], folder / "bench.svg")
    if result["growth"]:
        _draw_growth(result["growth"], folder / "growth.svg")


def _draw_ratios(rows: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["work"] for row in rows))
    states = list(dict.fromkeys(row["state"] for row in rows))
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.32 * len(names)), layout="constrained")
    height = 0.8 / len(states)
    for number, state in enumerate(states):
        ratios = {row["work"]: row["ratio"] for row in rows if row["state"] == state}
        places = [names.index(name) + number * height for name in ratios]
        bars = axes.barh(places, list(ratios.values()), height, label=state)
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(names))], names, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("time of the merge / time of reading its inputs and writing its output")
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _draw_growth(growth: dict[str, list[dict[str, Any]]], path: Path) -> None:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(growth), figsize=(15, 3.2), layout="constrained")
    for axes, (axis, points) in zip(panels, growth.items(), strict=True):
        for method in dict.fromkeys(point["method"] for point in points):
            some = [point for point in points if point["method"] == method]
            axes.plot([p["x"] for p in some], [p["seconds"] for p in some], "o-", label=method)
        limits = {p["x"]: p["limit_seconds"] for p in points}
        axes.plot(list(limits), list(limits.values()), "k:", label="copy")
        axes.set_ylim(bottom=0)
        axes.set_xlabel(LABELS[axis])
        axes.set_ylabel("seconds")
        axes.legend(frameon=False, fontsize=7)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
