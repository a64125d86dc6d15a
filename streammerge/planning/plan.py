"""The plan: everything about a merge that is known before a byte of a tensor is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from streammerge.device import CPU, Device
from streammerge.errors import Problems
from streammerge.planning.adapter_fit import Fitting
from streammerge.planning.adapter_output import AdapterOutput, adapter_output
from streammerge.planning.budget import Flight, Limits
from streammerge.planning.checks import check_layers, check_models, float64_note, template_notes
from streammerge.planning.cost import Demand, predict_seconds
from streammerge.planning.fitting import fitted
from streammerge.planning.inputs import Inputs, open_inputs
from streammerge.planning.jobs import Composer, Job
from streammerge.planning.knobs import TensorKnobs
from streammerge.planning.layout import lay_out_shards
from streammerge.planning.outline import Outline
from streammerge.planning.pairs import Pairs
from streammerge.planning.parts import Assembly
from streammerge.planning.spaces import check_core, split
from streammerge.planning.spill import Chooser, SpillOptions, SpillTotal
from streammerge.planning.tensors import TensorPlan, tensor_plan
from streammerge.planning.ties import settle_ties
from streammerge.planning.vocabulary import settle_vocabulary
from streammerge.recipe import Recipe, fixed, plain
from streammerge.storage.bytesource import Files, Io
from streammerge.storage.folder import INDEX
from streammerge.storage.pickles import Pickles
from streammerge.storage.shard import ShardLayout
from streammerge.storage.spill import SpillStore


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be done, with how much memory, reading and writing how much."""

    recipe: Recipe
    inputs: Inputs
    outline: Outline
    layouts: tuple[ShardLayout, ...]
    adapter: AdapterOutput | None  # what is written instead of a model
    files: Files
    device: Device
    chooser: Chooser
    store: SpillStore
    demand: Demand
    flight: Flight
    pickles_bytes: int  # the peak while torch looked into pickles, with torch; 0 without any
    spilled_at_once: int  # bytes on disk
    budget_bytes: int
    seconds: float
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def tracks(self) -> list[Iterator[Job]]:
        """The jobs of each file of the output, in its order; composed one by one."""
        composer = Composer(self.recipe, self.inputs, self.files, self.chooser, self.store)
        return [_jobs(composer, layout, self.adapter) for layout in self.layouts]

    def jobs(self) -> Iterator[Job]:
        """All of them, file by file."""
        return chain.from_iterable(self.tracks())

    def tensors(self) -> Iterator[TensorPlan]:
        """What happens to each output tensor that has elements, in the order of `jobs`."""
        names = [entry.name for entry in self.recipe.entries]
        return (tensor_plan(job, names) for job in self.jobs())

    def changes(self) -> dict[str, str]:
        """Output tensor -> the base's that it changes."""
        if self.adapter:
            return self.adapter.changes()
        return {name: name for layout in self.layouts for name in layout.extents}

    def spilling(
        self, beside: Path, output: Path, fingerprint: str
    ) -> AbstractContextManager[None]:
        """What is spilled while the merge runs, in the cache or in `beside`; see `SpillStore`."""
        self.store.remove_left(beside, output)
        if not self.demand.spill.nbytes:
            return nullcontext()
        return self.store.opened(beside, output, fingerprint)

    def output_bytes(self) -> int:
        return sum(layout.size_bytes for layout in self.layouts)

    @property
    def projected_bytes(self) -> int:
        """The peak resident memory of all that runs at once: of the merge, or before it begins."""
        return max(self.flight.projected_bytes, self.pickles_bytes)

    @property
    def trims(self) -> bool:
        """Whether what is written is cut to lower ranks before it is part of the output."""
        return self.adapter is not None and self.adapter.missed_share is not None

    def last_file(self) -> str:
        """The file without which nobody takes the output for a model: its index, or all of it."""
        return INDEX if len(self.layouts) > 1 else self.layouts[0].name

    def applied(self) -> dict[str, int]:
        """Adapter -> the tensors that it changes: all that it has, or there would be no plan."""
        return {m.name: len(m.adapter.updates) for m in self.inputs.models if m.adapter}

    def as_dict(self) -> dict[str, Any]:
        """For `--json`; sizes in bytes."""
        return {
            "kind": self.recipe.kind,
            "method": self.recipe.method.name,
            "models": [
                {"name": e.name, "applied_tensors": self.applied().get(e.name), **plain(e.knobs)}
                for e in self.recipe.entries
            ],
            "tensors": {
                "merged": self.demand.merged_tensors,
                "copied": self.demand.copied_tensors,
            },
            "passes": [
                {
                    "statistics": [list(names) for names in waves],
                    "tensors": group.tensors,
                    "reads_of_a_tensor": 1 + len(waves),
                    "read_bytes": group.read_bytes,
                }
                for waves, group in self.demand.passes.items()
            ],
            "read_bytes": self.demand.read_bytes,
            "write_bytes": self.demand.write_bytes,
            "copied_bytes": self.demand.copied_bytes,
            "spilled_bytes": self.demand.spill.nbytes,
            "spilled_at_once_bytes": self.spilled_at_once,
            "spill": [
                self._spill(model, total, spilled=totals is self.demand.spill.spilled)
                for totals in (self.demand.spill.spilled, self.demand.spill.again)
                for model, total in totals.items()
            ],
            "shards": len(self.layouts),
            "device": self.device.name,
            "budget_bytes": self.budget_bytes,
            "projected_peak_bytes": self.projected_bytes,
            "pickles_peak_bytes": self.pickles_bytes,
            "threads": self.flight.threads,
            "seconds": round(self.seconds, 1),
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }

    def _spill(self, model: int, total: SpillTotal, *, spilled: bool) -> dict[str, Any]:
        return {
            "name": self.recipe.entries[model].name,
            "spilled": spilled,
            "tensors": total.tensors,
            "bytes": total.nbytes,
            "seconds_made_again": round(total.seconds_again, 3),
            "seconds_kept": round(total.seconds_kept, 3),
        }


def make_plan(
    recipe: Recipe,
    problems: Problems,
    *,
    budget_bytes: int,
    threads: int,
    io: Io,
    spill: SpillOptions,
    allow_pickle: bool = False,
    device: Device = CPU,
) -> Plan | None:
    """Open the inputs' headers, check them, and decide; None when there are problems.

    `budget_bytes` bounds the peak resident memory of the whole process. A merge that cannot fit is
    one of the problems (BudgetError).
    """
    pickles = Pickles(budget_bytes) if allow_pickle else None
    inputs = open_inputs(recipe, problems, pickles)
    if inputs is None:
        return None
    notes = check_models(inputs, problems)
    check_layers(recipe, inputs, problems)
    knobs = TensorKnobs(recipe, inputs.donor.tensors)
    knobs.check(problems)
    problems.raise_any()
    inputs, outline = settle_ties(inputs, problems)
    outline = settle_vocabulary(recipe, inputs, outline, problems)
    problems.raise_any()
    notes += [*outline.notes, *_notes(inputs)]
    warnings = [*recipe.warnings, *knobs.warnings(), *_scaled_base(recipe, inputs)]
    warnings += _adapter_warnings(inputs)
    files = Files(inputs.stamps(), io)
    found = split(inputs)
    assembly, pairs = Assembly(recipe, inputs, files), Pairs(recipe, files)
    notes += check_core(recipe, found, assembly, pairs, problems)
    fitting = Fitting(recipe, inputs, assembly, pairs, problems)
    fit_of = fitting.fit(found) if recipe.kind == "adapter" else None
    problems.raise_any()
    adapter = adapter_output(recipe, inputs, outline, fit_of) if fit_of else None
    warnings += fit_of.warnings() if fit_of else []
    notes += adapter.notes() if adapter else []
    layouts = lay_out_shards(inputs.donor, outline, recipe.out_dtype, recipe.shard_bytes)
    layouts = (adapter.layout(),) if adapter else layouts
    store = SpillStore(spill.cache, keep=spill.keep)

    def jobs(chooser: Chooser) -> Iterator[Job]:
        composer = Composer(recipe, inputs, files, chooser, store)
        return chain.from_iterable(_jobs(composer, layout, adapter) for layout in layouts)

    limits = Limits(budget_bytes, threads, mapped=files.mapped)
    fit = fitted(jobs, spill, limits, sum(layout.size_bytes for layout in layouts))
    notes += [fit.note] if fit.note else []
    seconds = predict_seconds(
        fit.demand,
        len(inputs.models),
        _ranks(inputs) + (adapter.sketched_rank if adapter else 0),
        fit.flight.threads,
        recipe.method.nanoseconds,
    )
    return Plan(
        recipe=recipe,
        inputs=inputs,
        outline=outline,
        layouts=layouts,
        adapter=adapter,
        files=files,
        device=device,
        chooser=fit.chooser,
        store=store,
        demand=fit.demand,
        flight=fit.flight,
        pickles_bytes=pickles.peak_bytes if pickles else 0,
        spilled_at_once=fit.spilled_at_once,
        budget_bytes=budget_bytes,
        seconds=seconds,
        notes=tuple(dict.fromkeys(notes)),
        warnings=tuple(warnings),
    )


def _notes(inputs: Inputs) -> Iterator[str]:
    """What the folders tell, and what their adapters do."""
    yield from template_notes(inputs)
    note = float64_note(inputs.donor.tensors)
    yield from [note] if note else []
    for model in inputs.models:
        if model.adapter:
            yield from (f"{model.name}: {line}" for line in model.adapter.notes)


def _adapter_warnings(inputs: Inputs) -> list[str]:
    adapters = [(model.name, model.adapter) for model in inputs.models if model.adapter]
    return [f"{name}: {line}" for name, adapter in adapters for line in adapter.warnings]


def _jobs(composer: Composer, layout: ShardLayout, adapter: AdapterOutput | None) -> Iterator[Job]:
    return adapter.jobs(composer, layout) if adapter else composer.jobs(layout)


def _ranks(inputs: Inputs) -> int:
    """The sum of the adapters' ranks, each taken as its first tensor's."""
    adapters = [model.adapter for model in inputs.models if model.adapter]
    firsts = [next(iter(adapter.updates.values())) for adapter in adapters]
    return sum(first.rank for first in firsts)


def _scaled_base(recipe: Recipe, inputs: Inputs) -> list[str]:
    """`linear` without normalisation scales the base, which is seldom meant."""
    if (
        recipe.varies
        or recipe.method.space != "weights"
        or recipe.shared.get("normalize") is not False
    ):
        return []
    total = sum(float(fixed(entry.knobs).get("weight", 1.0)) for entry in recipe.entries)
    if abs(total - 1) < 1e-6 or not any(model.adapter for model in inputs.models):
        return []
    return [
        f"normalize: false with weights that sum to {total:g} scales the base by {total:g}; "
        "task_arithmetic adds adapters to the base as it is"
    ]
