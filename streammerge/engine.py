"""The merge: `merge(config)` is `run(plan(config))`; the main loop is in `building`."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from threadpoolctl import threadpool_limits

from streammerge import events, kernels, system
from streammerge.building import build
from streammerge.declarations import MethodSpec
from streammerge.device import CPU, Device
from streammerge.errors import ConfigError, OutputRefused, Problems
from streammerge.manner import Manner
from streammerge.memory import chosen_budget
from streammerge.methods import CATALOGUE, WithOwn
from streammerge.planning import Plan, make_plan
from streammerge.planning.fingerprint import identify
from streammerge.planning.on_device import device_for
from streammerge.planning.spill import Mode, SpillOptions
from streammerge.planning.tails import zero_tails
from streammerge.publication import (
    check_room_for,
    compare_buffers,
    recorded_changes,
    recorded_misses,
    refuse_overlap,
    there_already,
)
from streammerge.recipe import Recipe, read_recipe, to_yaml
from streammerge.report import Changes, Report
from streammerge.resume import device_before, half_done
from streammerge.storage.bytesource import Io
from streammerge.storage.rundir import clear_state

AS_USUAL = Manner()

# ------------------------------------------------------------------------------------- the faces


def plan(
    config: str | Path | Recipe,
    *,
    memory: str | int | None = None,
    threads: int | None = None,
    device: str = "auto",
    io: Io = "auto",
    spill: Mode = "auto",
    cache: str | Path | None = None,
    keep_cache: bool = False,
    allow_pickle: bool = False,
    out: str | Path | None = None,
    methods: Mapping[str, MethodSpec] = CATALOGUE,
    emit: events.Emit = events.ignore,
) -> Plan:
    """What `merge` would do: opens headers only.

    `config` is the path of a recipe, or a recipe. `memory` bounds the peak resident memory of
    the process, as bytes or as text such as `2GiB`; without it, half of what is free. `threads`
    defaults to the CPUs that the process may use. `device` is "auto", "cpu", "cuda" or "cuda:N":
    auto takes a CUDA device where torch finds one, and goes on with the kind that began. `spill`
    says whether rows that are wanted again are kept on disk: in the folder `cache`, else beside the
    output `out`, and there for good with `keep_cache`. `allow_pickle` reads tensors, and nothing
    else, from pickles of PyTorch where a folder has no safetensors. Raises StreammergeError,
    `Refused` for several problems at once.
    """
    problems = Problems()
    recipe = config if isinstance(config, Recipe) else _read(Path(config), methods, problems)
    budget = chosen_budget(memory)
    made = None
    if recipe is not None:
        options = _spill_options(recipe, config, out, spill, cache, keep=keep_cache)
        chosen = _device(recipe, config, out, device, options, emit)
        warm_up(emit, chosen)
        made = make_plan(
            recipe,
            problems,
            budget_bytes=budget,
            threads=threads or system.usable_cpus(),
            io=io,
            spill=options if chosen.on_host else replace(options, mode="never"),
            allow_pickle=allow_pickle,
            device=chosen,
        )
    problems.raise_any()
    assert made is not None  # else there was a problem
    return made


def _read(path: Path, methods: Mapping[str, MethodSpec], problems: Problems) -> Recipe | None:
    return read_recipe(path, WithOwn(methods, (path.parent, Path.cwd())), problems)


def merge(
    config: str | Path | Recipe,
    *,
    out: str | Path | None = None,
    memory: str | int | None = None,
    threads: int | None = None,
    device: str = "auto",
    io: Io = "auto",
    spill: Mode = "auto",
    cache: str | Path | None = None,
    keep_cache: bool = False,
    allow_pickle: bool = False,
    force: bool = False,
    strict_bytes: bool = False,
    nan: Literal["error", "keep"] = "error",
    methods: Mapping[str, MethodSpec] = CATALOGUE,
    emit: events.Emit = events.ignore,
) -> Report:
    """Merge as the recipe says, into the folder `out`.

    Without `out`, the recipe's `output`, else a folder named like the recipe in the working
    directory. `force` replaces a finished output, once the new one is complete, and what another
    merge left half done; `strict_bytes` refuses to go on with one that other libraries began; `nan`
    says whether values that are not finite are an error. The other arguments are those of `plan`;
    raises StreammergeError, and then the output is absent, or as it was, and the same call goes on
    from what is done.
    """
    made = plan(
        config,
        memory=memory,
        threads=threads,
        device=device,
        io=io,
        spill=spill,
        cache=cache,
        keep_cache=keep_cache,
        allow_pickle=allow_pickle,
        out=out,
        methods=methods,
        emit=emit,
    )
    manner = Manner(force, strict_bytes, keep_nan=nan == "keep", emit=emit)
    return run(made, output_folder(made.recipe, config, out), manner)


def output_folder(recipe: Recipe, config: str | Path | Recipe, out: str | Path | None) -> Path:
    """Where the output goes: the option, else the recipe's, else the name of its file."""
    if out is not None:
        return Path(out).expanduser()
    if recipe.output is not None:
        return Path(os.path.normpath(recipe.folder / Path(recipe.output).expanduser()))
    if isinstance(config, Recipe):
        raise OutputRefused("no output is named", remedy="say where it goes with --out")
    return Path(Path(config).stem)


def _known_output(
    recipe: Recipe, config: str | Path | Recipe, out: str | Path | None
) -> Path | None:
    """As `output_folder`; None for a mere plan that names none."""
    named = out is not None or recipe.output is not None or not isinstance(config, Recipe)
    return output_folder(recipe, config, out) if named else None


def _spill_options(
    recipe: Recipe,
    config: str | Path | Recipe,
    out: str | Path | None,
    mode: Mode,
    cache: str | Path | None,
    *,
    keep: bool,
) -> SpillOptions:
    """Without a cache, what is spilled goes beside the output; a mere plan may know of none."""
    if keep and cache is None:
        raise ConfigError(
            "what is spilled beside the output goes when the output is there",
            found="keep_cache without a cache",
            remedy="name a --cache for what --keep-cache is to keep",
        )
    output = _known_output(recipe, config, out)
    beside = output.absolute().parent if output is not None else Path()
    return SpillOptions(mode, None if cache is None else Path(cache).expanduser(), beside, keep)


def _device(
    recipe: Recipe,
    config: str | Path | Recipe,
    out: str | Path | None,
    wanted: str,
    spill: SpillOptions,
    emit: events.Emit,
) -> Device:
    output = _known_output(recipe, config, out)
    before = device_before(output) if output is not None else None
    device, note = device_for(recipe, wanted, spill, before)
    if note is not None:
        emit(events.Note(note))
    return device


def warm_up(emit: events.Emit = events.ignore, device: Device = CPU) -> None:
    """Load what a merge needs, so that the projection of its memory starts from the truth."""
    device.warm_up()
    if kernels.will_compile():
        place = kernels.FOLDER or "nowhere: no place for them can be written"
        emit(events.Note(f"compiling kernels, once, some seconds; kept in {place}"))
    kernels.load()
    ones = np.ones((64, 64), np.float32)
    np.matmul(ones, ones, out=np.empty_like(ones))


def run(plan: Plan, out: Path, manner: Manner = AS_USUAL) -> Report:
    """Carry out a plan into the folder `out`: complete under its name, or not there."""
    started, emit = time.monotonic(), manner.emit
    for warning in (*plan.warnings, *zero_tails(plan.inputs)):
        emit(events.Warned(warning))
    for note in plan.notes:
        emit(events.Note(note))
    refuse_overlap(plan, out)
    recipe_yaml = to_yaml(plan.recipe, portable=True)
    identity = identify(plan.inputs, plan.layouts, recipe_yaml, plan.outline.tokenizer, plan.device)
    changes = Changes(plan.inputs.models, plan.layouts, plan.changes())
    already = there_already(out, identity, manner)
    resumed, beside = 0, None
    if already:
        beside = clear_state(out)
    else:
        check_room_for(plan, out)
        compare_buffers(plan)
        with threadpool_limits(1, "blas"), plan.files:
            resumed = build(plan, out, identity, changes, manner)
    return Report(
        out=out,
        kind=plan.recipe.kind,
        already_done=already,
        half_done=half_done(beside, identity) if beside else None,
        changes=recorded_changes(out),
        missed=recorded_misses(out),
        tensors=plan.demand.merged_tensors + plan.demand.copied_tensors,
        read_bytes=plan.files.read_bytes,
        written_bytes=0 if already else plan.output_bytes(),
        copied_bytes=0 if already else plan.demand.copied_bytes,
        resumed_bytes=resumed,
        spilled_bytes=plan.store.written_bytes,
        seconds=time.monotonic() - started,
        peak_bytes=system.peak_resident_bytes(),
        projected_bytes=plan.projected_bytes,
    )
