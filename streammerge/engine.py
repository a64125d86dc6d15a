"""The merge: `merge(config)` is `run(plan(config))`; what a thread does for it is in `work`."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from streammerge import events, kernels, system
from streammerge.errors import OutputRefused, Problems
from streammerge.memory import default_budget
from streammerge.methods import CATALOGUE
from streammerge.planning import Plan, make_plan
from streammerge.planning.fingerprint import Identity, identify
from streammerge.publication import compare_buffers, is_complete, refuse_overlap, write_companions
from streammerge.recipe import Recipe, read_recipe, to_yaml
from streammerge.report import Changes, Report
from streammerge.scheduler import Copy, Course, Finish, Item, Measure, Merge, drive
from streammerge.sinks.shards import ShardsSink
from streammerge.sizes import parse_size
from streammerge.storage.bytesource import Io
from streammerge.storage.journal import Journal
from streammerge.storage.rundir import RunDirectory, check_output, clear_state
from streammerge.words import MethodSpec
from streammerge.work import Worker

PROGRESS_SECONDS = 0.2


# ------------------------------------------------------------------------------------- the faces


def plan(
    config: str | Path | Recipe,
    *,
    memory: str | int | None = None,
    threads: int | None = None,
    io: Io = "auto",
    methods: Mapping[str, MethodSpec] = CATALOGUE,
    emit: events.Emit = events.ignore,
) -> Plan:
    """What `merge` would do: opens headers only.

    `config` is the path of a recipe, or a recipe. `memory` bounds the peak resident memory of
    the process, as bytes or as text such as `2GiB`; without it, half of what is free. `threads`
    defaults to the CPUs that the process may use. Raises StreammergeError, `Refused` for several
    problems at once.
    """
    problems = Problems()
    recipe = config if isinstance(config, Recipe) else read_recipe(Path(config), methods, problems)
    budget = parse_size(memory) if isinstance(memory, str) else memory
    warm_up(emit)
    made = None
    if recipe is not None:
        made = make_plan(
            recipe,
            problems,
            budget_bytes=budget or default_budget(),
            threads=threads or system.usable_cpus(),
            io=io,
        )
    problems.raise_any()
    assert made is not None  # else there was a problem
    return made


def merge(
    config: str | Path | Recipe,
    *,
    out: str | Path | None = None,
    memory: str | int | None = None,
    threads: int | None = None,
    io: Io = "auto",
    force: bool = False,
    methods: Mapping[str, MethodSpec] = CATALOGUE,
    emit: events.Emit = events.ignore,
) -> Report:
    """Merge as the recipe says, into the folder `out`.

    Without `out`, the recipe's `output`, else a folder named like the recipe in the working
    directory. `force` replaces an output of another merge. The other arguments are those of
    `plan`; raises StreammergeError, and then the output is absent, or as it was.
    """
    made = plan(config, memory=memory, threads=threads, io=io, methods=methods, emit=emit)
    return run(made, output_folder(made.recipe, config, out), force=force, emit=emit)


def output_folder(recipe: Recipe, config: str | Path | Recipe, out: str | Path | None) -> Path:
    """Where the output goes: the option, else the recipe's, else the name of its file."""
    if out is not None:
        return Path(out).expanduser()
    if recipe.output is not None:
        return Path(os.path.normpath(recipe.folder / Path(recipe.output).expanduser()))
    if isinstance(config, Recipe):
        raise OutputRefused("no output is named", remedy="say where it goes with --out")
    return Path(Path(config).stem)


def warm_up(emit: events.Emit = events.ignore) -> None:
    """Load what a merge needs, so that the projection of its memory starts from the truth."""
    if kernels.will_compile():
        place = kernels.FOLDER or "nowhere: no place for them can be written"
        emit(events.Note(f"compiling kernels, once, some seconds; kept in {place}"))
    kernels.load()
    ones = np.ones((64, 64), np.float32)
    np.matmul(ones, ones, out=np.empty_like(ones))


def run(plan: Plan, out: Path, *, force: bool = False, emit: events.Emit = events.ignore) -> Report:
    """Carry out a plan into the folder `out`: complete under its name, or not there."""
    started = time.monotonic()
    for warning in plan.warnings:
        emit(events.Warned(warning))
    for note in plan.notes:
        emit(events.Note(note))
    refuse_overlap(plan, out)
    recipe_yaml = to_yaml(plan.recipe, portable=True)
    identity = identify(plan.inputs, plan.layouts, recipe_yaml, plan.outline.tokenizer)
    changes = Changes(plan.inputs.models, plan.layouts)
    already = not force and is_complete(plan, out, identity)
    if already:
        clear_state(out)
    else:
        check_output(out, force=force)
        compare_buffers(plan)
        with threadpool_limits(1, "blas"), plan.files:
            _build(plan, out, identity, changes, emit, started)
    return Report(
        out=out,
        already_done=already,
        changes=changes.result(),
        tensors=plan.demand.merged_tensors + plan.demand.copied_tensors,
        read_bytes=plan.files.read_bytes,
        written_bytes=0 if already else plan.output_bytes(),
        copied_bytes=0 if already else plan.demand.copied_bytes,
        seconds=time.monotonic() - started,
        peak_bytes=system.peak_resident_bytes(),
        projected_bytes=plan.flight.projected_bytes,
    )


# --------------------------------------------------------------------------------- the main loop


def _build(
    plan: Plan,
    out: Path,
    identity: Identity,
    changes: Changes,
    emit: events.Emit,
    started: float,
) -> None:
    """In a state folder of its own, which goes again whatever happens, then under its name."""
    opening = {"fingerprint": identity.fingerprint}
    with RunDirectory(out) as state:
        with (
            Journal(state.journal, opening) as journal,
            ShardsSink(state.output, plan.layouts, journal) as sink,
        ):
            _merge_all(plan, sink, changes, _Meter(plan, emit, started))
            sink.commit()
        write_companions(plan, state.output, identity, sink, changes)
        state.publish()


def _merge_all(plan: Plan, sink: ShardsSink, changes: Changes, meter: _Meter) -> None:
    flight = plan.flight
    worker = Worker(plan, sink)
    courses = (Course(job, flight.state_bytes, flight.parts_ahead) for job in plan.jobs())
    with ThreadPoolExecutor(flight.threads, "worker") as pool:
        finished = drive(
            courses,
            lambda item: pool.submit(worker.work, item),
            capacity=2 * flight.threads,
            window=flight.window,
        )
        for item, result in finished:
            _note_down(item, result, sink, changes)
            meter.count(item)


def _note_down(item: Item, result: Any, sink: ShardsSink, changes: Changes) -> None:
    """Keep the record of a finished item; only the main thread does."""
    if isinstance(item, Merge):
        receipt, norms = result
        sink.record(receipt)
        changes.add(receipt.tensor, item.index, item.pieces, item.job.models, norms)
    elif isinstance(item, Copy):
        sink.record(result)
        if item.index == 0:
            changes.copied(result.tensor, item.job.source.path)


class _Meter:
    """Reports progress a few times a second, in bytes of output measured or written."""

    def __init__(self, plan: Plan, emit: events.Emit, started: float) -> None:
        self._emit = emit
        self._started = started
        self._written = self._done = 0
        self._total = plan.demand.progress_bytes
        self._last = 0.0

    def count(self, item: Item) -> None:
        if isinstance(item, Finish):
            return
        spec = item.job.target.spec
        if isinstance(item, Copy):
            nbytes = item.length
        else:
            rows, cols = item.tile.shape(spec)
            nbytes = rows * cols * spec.dtype.itemsize
        self._done += nbytes
        self._written += 0 if isinstance(item, Measure) else nbytes
        now = time.monotonic()
        if now - self._last >= PROGRESS_SECONDS or self._done >= self._total:
            self._last = now
            self._emit(
                events.Progress(
                    done=min(self._done, self._total),
                    total=self._total,
                    tensor=spec.name,
                    written_bytes=self._written,
                    seconds=now - self._started,
                    resident_bytes=system.resident_bytes(),
                )
            )
