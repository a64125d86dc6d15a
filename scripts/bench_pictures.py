"""The benchmark's pictures: ratios as bars, growth as curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_kept import Round, Row

MIB = 1 << 20
COLOURS = {"warm": "#b5532a", "cold": "#3a6ea5", "linear": "#b5532a", "ties": "#3a6ea5"}
Measured = Sequence[tuple[Round, list[Row]]]  # each part with its medians


def draw(measured: Measured, axes: Mapping[str, str], folder: Path) -> None:
    """A picture of each group of works, `NAME.svg`, and `growth.svg`, of what there is."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "streammerge"  # else every file differs
    groups = list(dict.fromkeys(one.group for one, _ in measured if one.x is None))
    for name in groups:
        parts = [(one.state, rows) for one, rows in measured if one.group == name and one.x is None]
        _draw_ratios(parts, folder / file_name(name))
    curves = [axis for axis in axes if any(one.part == axis and one.x for one, _ in measured)]
    if curves:
        _draw_growth(measured, {axis: axes[axis] for axis in curves}, folder / "growth.svg")


def file_name(group: str) -> str:
    """Of the picture of a group of works."""
    return f"{'-'.join(group.replace(',', '').split())}.svg"


def _draw_ratios(parts: Sequence[tuple[str, list[Row]]], path: Path) -> None:
    """A bar for each work and state, ratios on a logarithmic axis where they differ much."""
    from matplotlib import pyplot

    names = list(dict.fromkeys(row.work for _, rows in parts for row in rows))
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.36 * len(names)), layout="constrained")
    height = 0.8 / len(parts)
    for number, (state, rows) in enumerate(parts):
        places = [names.index(row.work) + number * height for row in rows]
        ratios = [row.ratio for row in rows]
        bars = axes.barh(places, ratios, height, label=state, color=COLOURS[state])
        axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=7)
    ratios = [row.ratio for _, rows in parts for row in rows]
    if max(ratios) > 20 * min(ratios):
        axes.set_xscale("log")
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(names))], names, fontsize=8)
    axes.set_ylim(len(names) - 0.1, -0.5)
    axes.margins(x=0.1)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("seconds of the merge / seconds of reading its inputs and writing its output")
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    _save(figure, path)


def _draw_growth(measured: Measured, axes: Mapping[str, str], path: Path) -> None:
    """Two rows: seconds, and the peak of memory; a column for each axis."""
    from matplotlib import pyplot

    size = (3.1 * len(axes), 5.4)
    figure, panels = pyplot.subplots(
        2, len(axes), figsize=size, layout="constrained", squeeze=False
    )
    for column, (axis, label) in enumerate(axes.items()):
        points = [(one, rows) for one, rows in measured if one.part == axis and one.x is not None]
        xs = _places([one.x for one, _ in points])
        for method in dict.fromkeys(row.method for _, rows in points for row in rows):
            some = [next(row for row in rows if row.method == method) for _, rows in points]
            for panel, values in (
                (panels[0][column], [row.seconds for row in some]),
                (panels[1][column], [row.peak_bytes / MIB for row in some]),
            ):
                panel.plot(xs, values, "o-", label=method, color=COLOURS[method])
        copies = [next(iter(one.limits.values())) for one, _ in points]
        panels[0][column].plot(xs, copies, "k:", label="copy of the base")
        for panel in panels[:, column]:
            _ticks(panel, xs, [str(one.x) for one, _ in points], label)
    panels[0][0].set_ylabel("seconds")
    panels[1][0].set_ylabel("peak memory, MiB")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    _save(figure, path)


def _places(values: Sequence[float | str | None]) -> list[float]:
    """Numbers that double from step to step go evenly, and so does text."""
    return [float(number) for number in range(len(values))]


def _ticks(panel: Any, xs: Sequence[float], names: Sequence[str], label: str) -> None:
    panel.set_xticks(xs, names, fontsize=8)
    panel.set_xlabel(label)
    panel.set_ylim(bottom=0)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
