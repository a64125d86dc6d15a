"""Projected against measured peak memory: every method, budget and model, by the real command.

The promise: measured <= projected <= 1.3 x measured, and measured <= budget. Measured is what
`/usr/bin/time -v` calls the maximum resident set; projected is what the plan said before the first
byte was read. The last line is a run inside a memory cgroup of the budget plus 128 MiB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import bench_inputs
from bench_runs import COMMAND, TIME, timed

from streammerge.methods import CATALOGUE

MIB = 1 << 20
BUDGETS = (384 * MIB, 1024 * MIB, 4096 * MIB)
# The projection may be this much more than what is used.
SLACK = 1.3
CGROUP_EXTRA = 128 * MIB

# A scale, else every tensor of a full model is a plain copy.
OF_MODELS = {"weight": 0.3, "density": 0.5, "scale": 0.5}
# What of the shared parameters makes a method work hardest; and those that it must be given.
SHARED = {"rescale": "l1", "select_topk": 0.5, "t": 0.5}
METHODS = tuple(CATALOGUE)


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of the command."""

    seconds: float
    peak_bytes: int
    projected_bytes: int

    @property
    def ratio(self) -> float:
        return self.projected_bytes / self.peak_bytes

    def verdict(self, budget_bytes: int) -> str:
        """`ok`, or what of the promise does not hold."""
        faults = {
            "over the projection": self.peak_bytes > self.projected_bytes,
            f"projected over {SLACK} x measured": self.ratio > SLACK,
            "over the budget": self.peak_bytes > budget_bytes,
        }
        return ", ".join(fault for fault, holds in faults.items() if holds) or "ok"


def recipe_text(model: str, method: str) -> str:
    """A recipe beside the inputs of a model: adapters, or a full fine-tune as often as it takes."""
    spec = CATALOGUE[method]
    count = min(3, spec.models[1] or 3)
    paths = [f"./lora-{i}" for i in range(count)]
    if model != "llama":
        paths = ["./tuned"] * max(1, spec.models[0])
    own = {name: value for name, value in OF_MODELS.items() if name in spec.per_model}
    shared = {name: value for name, value in SHARED.items() if name in spec.shared}
    key, names = ("adapters", "path") if model == "llama" else ("models", "model")
    entries = [
        {names: path, "name": f"m{i}", **(own if model == "llama" else {"parameters": own})}
        for i, path in enumerate(paths)
    ]
    document = {"base_model": "./base", "merge_method": method, key: entries, "parameters": shared}
    return json.dumps(document)  # which is YAML too


def measure(
    recipe: Path, out: Path, budget_bytes: int, *options: str, cgroup: Path | None = None
) -> Measured:
    """Merge in a process of its own and measure it from outside. Raises CalledProcessError."""
    command = [COMMAND, "merge", str(recipe), "--out", str(out), "--memory", str(budget_bytes)]
    command += ["--json", "--quiet", *options]
    if cgroup is not None:
        enter = f'echo $$ > {cgroup}/cgroup.procs && exec "$@"'
        command = ["sh", "-c", enter, "sh", *command]
    run = timed(command, out)
    return Measured(run.seconds, run.peak_bytes, run.report["projected_bytes"])


# ------------------------------------------------------------------------------------- cgroups


def why_no_cgroup() -> str | None:
    """Why a memory cgroup cannot be made here; None when it can."""
    if os.geteuid() != 0:
        return "needs root"
    if _cgroup_root() is None:
        return "there is no memory cgroup"
    return None


def _cgroup_root() -> Path | None:
    root = Path("/sys/fs/cgroup")
    if (root / "memory" / "memory.limit_in_bytes").exists():
        return root / "memory"
    shared = root / "cgroup.subtree_control"
    if shared.exists() and "memory" in shared.read_text().split():
        return root
    return None


@contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[Path]:
    """A new cgroup that holds so much memory, page cache included; removed at the end."""
    root = _cgroup_root()
    assert root is not None
    folder = root / f"streammerge-{os.getpid()}"
    folder.mkdir()
    try:
        limit = folder / "memory.limit_in_bytes"  # version 1; else version 2
        (limit if limit.exists() else folder / "memory.max").write_text(str(limit_bytes))
        yield folder
    finally:
        folder.rmdir()


def oom_kills(cgroup: Path) -> int:
    """How many processes of the cgroup the kernel has killed for memory."""
    events = next(
        file for name in ("memory.oom_control", "memory.events") if (file := cgroup / name).exists()
    )
    fields = dict(line.split() for line in events.read_text().splitlines())
    return int(fields["oom_kill"])


# --------------------------------------------------------------------------------------- table


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table."""

    model: str
    method: str
    budget_bytes: int
    measured: Measured | None
    verdict: str

    def cells(self) -> list[str]:
        head = [self.model, self.method, _mib(self.budget_bytes)]
        if self.measured is None:
            return [*head, "", "", "", "", self.verdict]
        m = self.measured
        numbers = [
            _mib(m.projected_bytes),
            _mib(m.peak_bytes),
            f"{m.ratio:.2f}",
            f"{m.seconds:.0f}",
        ]
        return [*head, *numbers, self.verdict]


TITLES = "model method budget projected measured ratio seconds verdict".split()
WIDTHS = (20, 16, 9, 10, 9, 6, 8, 8)


def _mib(nbytes: int) -> str:
    return f"{nbytes / MIB:.0f} MiB"


def _line(cells: Sequence[str]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()


def _markdown(rows: Sequence[Row]) -> str:
    lines = [TITLES, ["---"] * len(TITLES), *(row.cells() for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def run_row(folder: Path, model: str, method: str, budget_bytes: int) -> Row:
    recipe = folder / f"{method}.yaml"
    recipe.write_text(recipe_text(model, method))
    try:
        measured = measure(recipe, folder / "out", budget_bytes)
    except subprocess.CalledProcessError as error:
        return Row(model, method, budget_bytes, None, f"exit code {error.returncode}")
    return Row(model, method, budget_bytes, measured, measured.verdict(budget_bytes))


def run_in_cgroup(folder: Path, model: str, method: str, budget_bytes: int) -> Row:
    """A run that the kernel would kill if it held more than the budget and 128 MiB."""
    label = f"{model} in a cgroup"
    if reason := why_no_cgroup():
        return Row(label, method, budget_bytes, None, f"skipped: {reason}")
    recipe = folder / f"{method}.yaml"
    recipe.write_text(recipe_text(model, method))
    with memory_cgroup(budget_bytes + CGROUP_EXTRA) as cgroup:
        try:
            measured = measure(recipe, folder / "out", budget_bytes, cgroup=cgroup)
        except subprocess.CalledProcessError as error:
            verdict = f"exit code {error.returncode}, {oom_kills(cgroup)} OOM kills"
            return Row(label, method, budget_bytes, None, verdict)
        killed = oom_kills(cgroup)
    verdict = f"{killed} OOM kills" if killed else measured.verdict(budget_bytes)
    return Row(label, method, budget_bytes, measured, verdict)


def inputs_of(root: Path, model: str) -> Path:
    """The folder with a model's inputs, made when it is not there: 2.6 GB, or 4.2 GB."""
    folder = root / model
    if not (folder / "made").exists():
        print(f"making {folder}", file=sys.stderr, flush=True)
        if model == "llama":
            bench_inputs.make_llama(folder / "base")
            for seed in range(3):
                bench_inputs.make_adapter(folder / f"lora-{seed}", seed=seed)
        else:
            bench_inputs.make_embedding(folder)
        (folder / "made").touch()
    return folder


def warm_up(root: Path) -> None:
    """Compile the kernels, which takes memory that no later run takes."""
    folder = root / "tiny"
    config = (64, 128, 1, 64, 300)
    bench_inputs.make_llama(folder / "base", config)
    for seed in range(3):
        bench_inputs.make_adapter(folder / f"lora-{seed}", config, seed=seed)
    row = run_row(folder, "llama", "ties", BUDGETS[0])
    if row.measured is None:
        raise SystemExit(f"the warm-up failed with {row.verdict}")


def table(
    root: Path, models: Sequence[str], methods: Sequence[str], budgets: Sequence[int]
) -> Iterator[Row]:
    """Run it all, row by row."""
    warm_up(root)
    for model in models:
        folder = inputs_of(root, model)
        for method in methods:
            if model == "embedding" and CATALOGUE[method].space == "cores":
                continue  # its fine-tune is no low-rank update
            for budget_bytes in budgets:
                yield run_row(folder, model, method, budget_bytes)
        if "ties" in methods:
            yield run_in_cgroup(folder, model, "ties", min(budgets))


def _arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    root = os.environ.get("STREAMMERGE_BENCH", ".bench")
    add = parser.add_argument
    add(
        "--inputs",
        type=Path,
        default=Path(root),
        help="where inputs are, or get made (%(default)s)",
    )
    add("--model", action="append", choices=["llama", "embedding"], help="default: both")
    add("--method", action="append", choices=METHODS, help="default: all")
    add("--budget", action="append", type=int, metavar="MIB", help="default: 384, 1024 and 4096")
    add("--markdown", type=Path, metavar="FILE", help="write the table there as well")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """0 when every run keeps the promise."""
    options = _arguments(arguments)
    if not os.access(TIME, os.X_OK):
        raise SystemExit(f"{TIME} is missing; on Debian: apt install time")
    budgets = [mib * MIB for mib in options.budget] if options.budget else BUDGETS
    models = options.model or ["llama", "embedding"]
    rows: list[Row] = []
    print(_line(TITLES))
    for row in table(options.inputs, models, options.method or METHODS, budgets):
        rows.append(row)
        print(_line(row.cells()), flush=True)
    if options.markdown:
        options.markdown.write_text(_markdown(rows))
    broken = [row for row in rows if row.verdict != "ok" and not row.verdict.startswith("skipped")]
    print(f"{len(rows) - len(broken)} of {len(rows)} runs keep the promise")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
