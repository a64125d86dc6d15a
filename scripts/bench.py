"""How long merges take, as a ratio to copying the model's files in the same run.

Every round runs the copy, the reading of all inputs, and each merge once, one after the other;
medians over the rounds. Warm: inputs in the page cache. Cold: dropped from it before each run.
Ratios are of one state and one run only: the machine may be another one tomorrow.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bench_growth
import bench_report
import bench_runs
from bench_runs import Run
from bench_works import Work, inputs, works

# What merges are compared with.
COPY, READ = "copy of the base", "reading base and models"


def measure(chosen: Sequence[Work], rounds: int, *, cold: bool) -> dict[str, Run]:
    """Name -> the median run of each work, and of what it is compared with."""
    runs: dict[str, list[Run]] = defaultdict(list)
    for number in range(rounds):
        for name, run in _round(chosen, cold):
            runs[name].append(run)
            print(f"round {number + 1}: {name}: {run.seconds:.1f} s", file=sys.stderr, flush=True)
    return {name: bench_runs.middle(some) for name, some in runs.items()}


def _round(chosen: Sequence[Work], cold: bool) -> Iterator[tuple[str, Run]]:
    base = chosen[0].base
    bench_runs.settle([base], cold=cold)
    yield COPY, bench_runs.copy(base)
    whole = next((work for work in chosen if not work.only_base), None)
    if whole is not None:
        bench_runs.settle(whole.reads, cold=cold)
        yield READ, bench_runs.read(whole.reads)
    for work in chosen:
        bench_runs.settle(work.reads, cold=cold)
        yield work.name, bench_runs.merge(work.recipe, *work.options)


def rows_of(chosen: Sequence[Work], found: dict[str, Run], state: str) -> Iterator[dict[str, Any]]:
    """One row for each work: seconds, ratio to its limit, memory, bytes."""
    for work in chosen:
        run = found[work.name]
        limit = found[COPY].seconds
        if not work.only_base:  # reading all, writing one: the copy reads the base already
            extra = sum(_weights(folder) for folder in work.reads if folder != work.base)
            everything = sum(_weights(folder) for folder in work.reads)
            limit += found[READ].seconds * extra / max(1, everything)
        yield {
            "work": work.name,
            "state": state,
            "seconds": run.seconds,
            "limit_seconds": limit,
            "ratio": run.seconds / limit,
            "peak_bytes": run.peak_bytes,
            "read_bytes": run.report["read_bytes"],
            "written_bytes": run.report["written_bytes"],
            "spilled_bytes": run.report.get("spilled_bytes", 0),
        }


def _weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def least_rows(chosen: Sequence[Work]) -> Iterator[dict[str, Any]]:
    """Peak resident memory under the least budget that runs."""
    for work in chosen:
        try:
            least = bench_runs.least_budget(work.recipe)
            run = bench_runs.merge(work.recipe, "--memory", least)
        except subprocess.CalledProcessError as error:
            yield {"work": work.name, "least": f"exit code {error.returncode}", "peak_bytes": 0}
            continue
        yield {"work": work.name, "least": least, "peak_bytes": run.peak_bytes}


def _arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    root = os.environ.get("STREAMMERGE_BENCH", ".bench")
    add("--inputs", type=Path, default=Path(root), help="where inputs are made (%(default)s)")
    add("--only", action="append", default=[], metavar="TEXT", help="works whose names have it")
    add("--rounds", type=int, default=3, help="(%(default)s)")
    add("--state", action="append", choices=["warm", "cold"], help="default: both")
    add("--least", action="store_true", help="also the peak under the least budget that runs")
    add("--growth", action="store_true", help="also how the cost grows: some 40 minutes")
    add("--into", type=Path, default=Path(".bench/result"), help="JSON, Markdown and pictures")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = _arguments(arguments)
    if not os.access(bench_runs.TIME, os.X_OK):
        raise SystemExit(f"{bench_runs.TIME} is missing; on Debian: apt install time")
    every = list(works(inputs(options.inputs)))
    chosen = [w for w in every if all(text in w.name for text in options.only)]
    if not chosen:
        raise SystemExit("no work has that in its name: " + "; ".join(w.name for w in every))
    bench_runs.merge(chosen[0].recipe)  # compiles the kernels, once
    result: dict[str, Any] = {"machine": bench_report.machine(), "rows": [], "limits": {}}
    for state in options.state or ["warm", "cold"]:
        found = measure(chosen, options.rounds, cold=state == "cold")
        result["limits"][state] = {n: asdict(found[n]) for n in (COPY, READ) if n in found}
        result["rows"] += rows_of(chosen, found, state)
    result["least"] = list(least_rows(chosen)) if options.least else []
    result["growth"] = bench_growth.measure(options.inputs) if options.growth else {}
    options.into.mkdir(parents=True, exist_ok=True)
    (options.into / "bench.json").write_text(json.dumps(result, indent=2) + "\n")
    text = bench_report.markdown(result)
    (options.into / "bench.md").write_text(text)
    bench_report.draw(result, options.into)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
