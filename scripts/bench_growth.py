"""How the cost of a merge grows: with the model, the adapters, their rank, the budget, threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import bench_inputs
import bench_runs
import bench_works
from bench_inputs import Config
from bench_works import Work

METHODS = ("linear", "ties")
ADAPTERS = (1, 2, 4, 8, 16)
RANKS = (8, 16, 32, 64, 128, 256)
LAYERS = (0.0625, 0.5, 1.0, 2.25)  # times those of the model; at full size 0.6 to 5 GB
BUDGETS = ("least", "512MiB", "1GiB", "4GiB")
THREADS = (1, 2, 4, 8, 16, 64)
THREE = ("lora-0", "lora-1", "lora-2")


@dataclass(frozen=True, slots=True)
class Point:
    """One place on one axis. `works` makes the inputs that are not there."""

    axis: str
    x: float | str
    works: Callable[[], Sequence[Work]]
    throwaway: tuple[Path, ...] = ()


def points(root: Path, folder: Path, config: Config) -> Iterator[Point]:
    """All axes; `folder` holds the benchmark's model, others are made in `root`."""
    for count in ADAPTERS:
        yield Point("adapters", count, partial(_of_adapters, folder, config, count))
    for threads in THREADS:
        works = partial(_with_option, folder, config, "--threads", str(threads))
        yield Point("threads", threads, works)
    for budget in BUDGETS:
        yield Point("budget", budget, partial(_with_option, folder, config, "--memory", budget))
    for rank in RANKS:
        gone = tuple(folder / f"rank-{seed}" for seed in range(3))
        yield Point("rank", rank, partial(_of_rank, folder, config, rank, gone), gone)
    for part in LAYERS:
        larger = (*config[:2], max(1, round(part * config[2])), *config[3:])
        place = root / f"growth-{larger[2]}"
        yield Point("model", _gigabytes(larger), partial(_of_model, place, larger), (place,))


def _gigabytes(config: Config) -> float:
    """Of a model in bfloat16."""
    shapes = bench_inputs.llama_tensors(config, head=False).values()
    return round(2 * sum(map(math.prod, shapes)) / 1e9, 2)


def _of_adapters(folder: Path, config: Config, count: int) -> list[Work]:
    bench_works.inputs(folder, config)
    models = [folder / f"lora-{seed}" for seed in range(count)]
    for seed, model in enumerate(models):
        bench_works.once(model, partial(bench_inputs.make_adapter, config=config, seed=seed))
    return _both(folder, models)


def _of_rank(folder: Path, config: Config, rank: int, models: Sequence[Path]) -> list[Work]:
    bench_works.inputs(folder, config)
    for seed, model in enumerate(models):
        bench_inputs.make_adapter(model, config, rank=rank, seed=50 + seed)
    return _both(folder, models)


def _of_model(folder: Path, config: Config) -> list[Work]:
    bench_inputs.make_llama(folder / "base", config)
    for seed, name in enumerate(THREE):
        bench_inputs.make_adapter(folder / name, config, seed=seed)
    return _both(folder, [folder / name for name in THREE])


def _with_option(folder: Path, config: Config, option: str, value: str) -> list[Work]:
    bench_works.inputs(folder, config)
    works = _both(folder, [folder / name for name in THREE])
    if value != "least":
        return [work.under(option, value) for work in works]
    return [work.under(option, bench_runs.least_budget(work.recipe)) for work in works]


def _both(folder: Path, models: Sequence[Path]) -> list[Work]:
    return [bench_works.adapted(folder, method, method, models) for method in METHODS]
