"""How long merges take, as a ratio to copying the model's files in the same run.

Every round runs the copy, the reading of all inputs, and each merge once, one after the other;
a ratio is to the copy of its own round, and the median over the rounds is told. Warm: inputs in
the page cache. Cold: dropped from it before each run. Rounds are kept as they come: the same
command, run again, goes on with what is missing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import bench_parts
import bench_report
import bench_runs
from bench_kept import Kept, Round, Row
from bench_parts import SIZES, STATES, Part
from bench_runs import Run
from bench_works import Work

# What merges are compared with.
COPY, READ = "copy of the base", "reading base and models"
DOCS = Path("docs/performance")


def measure(part: Part, peers: Path) -> Round:
    """One round of a part. Raises CalledProcessError when a command fails."""
    works = part.works()
    cold = part.state == "cold"
    bench_runs.settle([works[0].base], cold=cold)
    limits = {COPY: bench_runs.copy(works[0].base).seconds}
    full = [work.reads for work in works if work.full]
    everything = max(full, key=len) if full else ()
    if everything:
        bench_runs.settle(everything, cold=cold)
        limits[READ] = bench_runs.read(everything).seconds
    rows = []
    for work in works:
        bench_runs.settle(work.reads, cold=cold)
        rows.append(_row(work, _run(work, peers), _limit(work, limits, everything)))
        print(f"  {work.name}: {rows[-1].seconds:.1f} s", file=sys.stderr, flush=True)
    date = datetime.now(UTC).date().isoformat()
    return Round(part.name, part.state, date, limits, tuple(rows), part.x)


def _run(work: Work, peers: Path) -> Run:
    if work.tool == "mergekit":
        return bench_runs.merge_by_mergekit(work.recipe, peers)
    if work.tool == "PEFT":
        return bench_runs.merge_by_peft(work.base, work.method, work.models, peers)
    return bench_runs.merge(work.recipe, *work.options)


def _limit(work: Work, limits: dict[str, float], everything: Sequence[Path]) -> float:
    """Reading all once and writing one, in seconds: the copy reads one model already. Adapters
    are small beside it."""
    if not work.full:
        return limits[COPY]
    beyond = sum(map(_weights, work.reads)) - _weights(work.base)
    return limits[COPY] + limits[READ] * beyond / sum(map(_weights, everything))


def _weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _row(work: Work, run: Run, limit_seconds: float) -> Row:
    """Ours counts its bytes itself; of others the kernel tells what went to and from the disk."""
    said = run.report
    return Row(
        work=work.name,
        method=work.method,
        tool=work.tool,
        seconds=run.seconds,
        limit_seconds=limit_seconds,
        peak_bytes=run.peak_bytes,
        read_bytes=said["read_bytes"] if said else run.disk_read_bytes,
        written_bytes=said["written_bytes"] if said else run.disk_written_bytes,
        spilled_bytes=said["spilled_bytes"] if said else 0,
        cache_bytes=run.cache_bytes,
    )


def parts(options: argparse.Namespace) -> Iterator[Part]:
    """What was asked for, the most telling first."""
    folder = options.inputs / bench_parts.FOLDERS[options.size]
    config = SIZES[options.size]
    states = options.state or STATES
    of_methods = list(
        bench_parts.methods(folder, config, options.rounds, states, tuple(options.only))
    )
    yield from of_methods[: len(states)]
    if options.growth:
        yield from bench_parts.growth(options.inputs, folder, config)
    if options.least:
        yield bench_parts.least(folder, config)
    if options.peers:
        yield from bench_parts.peers(folder, config, options.peers_runs)
    yield from of_methods[len(states) :]


def run(every: Sequence[Part], kept: Kept, options: argparse.Namespace) -> None:
    """Measure what is not kept yet, until the time is up. Raises KeyboardInterrupt."""
    until = time.monotonic() + 60 * options.minutes
    for part in every:
        while missing(part, kept):
            if time.monotonic() > until:
                return
            print(bench_report.title(part.name, part.state, part.x), file=sys.stderr, flush=True)
            kept.add(measure(part, options.peers_python))
        for folder in part.throwaway:
            shutil.rmtree(folder, ignore_errors=True)


def missing(part: Part, kept: Kept) -> bool:
    """Whether a part has too few rounds."""
    return kept.count(part.name, part.state, part.x) < part.rounds


def _arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    root = os.environ.get("STREAMMERGE_BENCH", ".bench")
    add("--inputs", type=Path, default=Path(root), help="where inputs are made (%(default)s)")
    add("--size", choices=list(SIZES), default="1b", help="of the model (%(default)s)")
    add("--only", action="append", default=[], metavar="TEXT", help="works whose names have it")
    add("--rounds", type=int, default=3, help="(%(default)s)")
    add("--state", action="append", choices=STATES, help="default: both")
    add("--least", action="store_true", help="also the peak under the least budget that runs")
    add("--growth", action="store_true", help="also how the cost grows")
    add("--peers", action="store_true", help="also mergekit and PEFT: gigabytes of memory")
    add("--peers-runs", type=int, default=3, metavar="N", help="rounds of that (%(default)s)")
    add("--peers-python", type=Path, default=Path(".venv-mergekit/bin/python"), metavar="FILE")
    add("--minutes", type=float, default=20, help="begin no round later (%(default)g)")
    add("--all", action="store_true", help="also the least budgets and the growth")
    add("--write-docs", action="store_true", help=f"the result goes to {DOCS}")
    add("--into", type=Path, default=Path(".bench/result"), help="JSON, Markdown and pictures")
    options = parser.parse_args(arguments)
    options.least |= options.all
    options.growth |= options.all
    options.into = DOCS if options.write_docs else options.into
    return options


def main(arguments: Sequence[str]) -> int:
    """0 when everything is measured, 75 when some is left for the next run."""
    options = _arguments(arguments)
    if not os.access(bench_runs.TIME, os.X_OK):
        raise SystemExit(f"{bench_runs.TIME} is missing; on Debian: apt install time")
    every = [part for part in parts(options) if not options.only or part.works()]
    if not every:
        raise SystemExit(f"no work has that in its name: {' '.join(options.only)}")
    kept = Kept(options.into / "runs.jsonl", {**bench_report.machine(), "size": options.size})
    bench_runs.merge(every[0].works()[0].recipe)  # compiles the kernels, once
    try:
        run(every, kept, options)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    finally:
        print(bench_report.write(list(kept.rounds()), options.into))
    left = [bench_report.title(p.name, p.state, p.x) for p in every if missing(p, kept)]
    if left:
        print(f"left for the same command again: {'; '.join(left)}", file=sys.stderr)
    return 75 if left else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # told as after Ctrl-C
    sys.exit(main(sys.argv[1:]))
