"""What the benchmark measures, part by part, the most telling ones first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import bench_growth
import bench_runs
import bench_works
from bench_inputs import LLAMA_1B, Config
from bench_works import Work

State = Literal["warm", "cold"]
STATES: tuple[State, ...] = ("warm", "cold")

# Name -> the model that is measured, and the folder of its inputs.
SIZES: dict[str, Config] = {"1b": LLAMA_1B, "small": (512, 2048, 8, 128, 32000)}
FOLDERS = {"1b": "llama", "small": "llama-small"}


@dataclass(frozen=True, slots=True)
class Part:
    """Works whose rounds are interleaved. `works` makes their inputs when they are not there."""

    name: str
    works: Callable[[], Sequence[Work]]
    rounds: int
    state: State = "warm"
    x: float | str | None = None  # place on an axis of growth
    throwaway: tuple[Path, ...] = ()  # inputs of this part alone


def methods(
    folder: Path, config: Config, rounds: int, states: Sequence[State], only: Sequence[str]
) -> Iterator[Part]:
    """The catalogue: what the issue of speed is about, then spill, then the rest."""
    groups: dict[str, Callable[[Path], Iterator[Work]]] = {
        "headline": bench_works.headline,
        "spill": bench_works.spilling,
        "methods on adapters": partial(bench_works.others, kind="adapters"),
        "methods on models": partial(bench_works.others, kind="models"),
    }
    for name, group in groups.items():
        for state in states if name != "spill" else states[:1]:
            works = partial(chosen, group, folder, config, only)
            yield Part(", only ".join((name, *only)), works, rounds, state)


def chosen(
    group: Callable[[Path], Iterator[Work]], folder: Path, config: Config, only: Sequence[str]
) -> list[Work]:
    """The works of a group whose names have all the texts, over inputs that are there then."""
    every = group(bench_works.inputs(folder, config))
    return [work for work in every if all(text in work.name for text in only)]


def least(folder: Path, config: Config) -> Part:
    """The peak under the least budget that runs."""

    def works() -> list[Work]:
        every = chosen(bench_works.headline, folder, config, ())
        return [work.under("--memory", bench_runs.least_budget(work.recipe)) for work in every]

    return Part("least budget", works, 1)


def peers(folder: Path, config: Config, rounds: int) -> Iterator[Part]:
    """The merges that other tools do too, ours beside theirs; cold tells what they read."""
    for state in STATES:
        for kind in ("adapters", "models"):
            for method in bench_works.HEADLINE:
                group = partial(bench_works.peers, method=method, kind=kind)
                works = partial(chosen, group, folder, config, ())
                yield Part(f"peers: {kind}, {method}", works, rounds, state)


def growth(root: Path, folder: Path, config: Config) -> Iterator[Part]:
    """A part for each point of each axis."""
    for point in bench_growth.points(root, folder, config):
        yield Part(point.axis, point.works, 1, x=point.x, throwaway=point.throwaway)
