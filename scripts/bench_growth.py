"""How the cost of a merge grows: with the model, the adapters, their rank, the budget, threads."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_inputs
import bench_runs
from bench_works import inputs

HIDDEN, MIDDLE, LAYERS, KEY_VALUE, VOCABULARY = bench_inputs.LLAMA_1B
METHODS = ("linear", "ties")
ADAPTERS = (1, 2, 4, 8, 16)
RANKS = (8, 16, 32, 64, 128, 256)
LAYER_COUNTS = (4, 8, 16, 36)  # 0.6 to 5 GB
BUDGETS = ("least", "512MiB", "1GiB", "4GiB")
THREADS = (1, 2, 4, 8)


def measure(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Axis -> points: method, x, seconds, the copy's seconds just before, peak memory."""
    folder = inputs(root)
    axes = {
        "model": _models(root),
        "adapters": _adapters(folder),
        "rank": _ranks(folder),
        "budget": _options(folder, "--memory", BUDGETS),
        "threads": _options(folder, "--threads", map(str, THREADS)),
    }
    return {axis: list(_told(axis, points)) for axis, points in axes.items()}


def _told(axis: str, points: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for point in points:
        print(f"{axis} {point['x']}, {point['method']}: {point['seconds']:.1f} s", file=sys.stderr)
        yield point


def _point(folder: Path, x: object, adapters: list[str], *options: str) -> Iterator[dict[str, Any]]:
    base = folder / "base"
    for method in METHODS:
        density = ", density: 0.5" if method == "ties" else ""
        entries = "".join(f"  - {{path: ./{name}{density}}}\n" for name in adapters)
        recipe = folder / f"growth-{method}.yaml"
        recipe.write_text(f"base_model: ./base\nmerge_method: {method}\nadapters:\n{entries}")
        chosen = [bench_runs.least_budget(recipe) if o == "least" else o for o in options]
        bench_runs.settle([base, *(folder / name for name in adapters)], cold=False)
        limit = bench_runs.copy(base)
        run = bench_runs.merge(recipe, *chosen)
        yield {
            "x": x,
            "method": method,
            "seconds": run.seconds,
            "limit_seconds": limit.seconds,
            "peak_bytes": run.peak_bytes,
        }


def _models(root: Path) -> Iterator[dict[str, Any]]:
    for layers in LAYER_COUNTS:
        folder = root / f"growth-{layers}"
        config = (HIDDEN, MIDDLE, layers, KEY_VALUE, VOCABULARY)
        bench_inputs.make_llama(folder / "base", config)
        for seed in range(3):
            bench_inputs.make_adapter(folder / f"lora-{seed}", config, seed=seed)
        size = sum(file.stat().st_size for file in folder.glob("base/*.safetensors"))
        yield from _point(folder, round(size / 1e9, 2), ["lora-0", "lora-1", "lora-2"])
        shutil.rmtree(folder)


def _adapters(folder: Path) -> Iterator[dict[str, Any]]:
    names = [f"lora-{seed}" for seed in range(max(ADAPTERS))]
    for seed, name in enumerate(names):
        if not (folder / name).exists():
            bench_inputs.make_adapter(folder / name, seed=seed)
    for count in ADAPTERS:
        yield from _point(folder, count, names[:count])


def _ranks(folder: Path) -> Iterator[dict[str, Any]]:
    for rank in RANKS:
        names = [f"rank-{seed}" for seed in range(3)]
        for seed, name in enumerate(names):
            bench_inputs.make_adapter(folder / name, rank=rank, seed=50 + seed)
        yield from _point(folder, rank, names)
        for name in names:
            shutil.rmtree(folder / name)


def _options(folder: Path, option: str, values: Any) -> Iterator[dict[str, Any]]:
    for value in values:
        yield from _point(folder, value, ["lora-0", "lora-1", "lora-2"], option, value)
