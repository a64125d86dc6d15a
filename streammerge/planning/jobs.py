"""One job per output tensor: a copy of stored bytes, or a merge. Composed when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from streammerge import grid
from streammerge.arrays import PerModel, Rows
from streammerge.memory import Scratch
from streammerge.planning.inputs import Inputs, Model
from streammerge.planning.spill import Choice, Chooser
from streammerge.planning.spilling import Spilling
from streammerge.recipe import Recipe
from streammerge.sources.adapted import Adapted, Change
from streammerge.sources.applied import Applied
from streammerge.sources.combined import Combined
from streammerge.sources.dense import Dense
from streammerge.sources.dora import DoraOfColumns, DoraOfRows
from streammerge.sources.low_rank import Product
from streammerge.sources.prepared import Prepared
from streammerge.sources.replaced import Replaced
from streammerge.sources.scaled import Scaled
from streammerge.sources.weighted import WeightedSum
from streammerge.storage.bytesource import Files
from streammerge.storage.shard import ShardLayout
from streammerge.storage.spill import SpillStore
from streammerge.words import (
    Addition,
    Dora,
    Extent,
    Factors,
    Knobs,
    Merged,
    Replacement,
    Source,
    StatisticValue,
    Tile,
    Update,
)


@dataclass(frozen=True, slots=True)
class CopyJob:
    """A tensor whose stored bytes are the result."""

    source: Extent
    target: Extent


@dataclass(frozen=True, slots=True)
class MergeJob:
    """A tensor that is computed. `models` are the positions in the recipe of those that take part,
    in the order in which the merge reports their norms. `beyond` gives the rows that the base
    lacks, where the target has more of them than `merged`. `choices` are of those whose rows are
    wanted more than once."""

    merged: Merged
    target: Extent
    models: tuple[int, ...]
    beyond: Merged | None = None
    choices: tuple[Choice, ...] = ()

    def tiles(self) -> list[Tile]:
        """All tiles of the target in file order; none holds rows of both kinds."""
        tiles = grid.tiles(self.merged.spec)
        if self.beyond is not None:
            first, spec = self.merged.spec.rows, self.target.spec
            rest = replace(spec, shape=(spec.rows - first, *spec.shape[1:]))
            tiles += [Tile(first + tile.start, first + tile.stop) for tile in grid.tiles(rest)]
        return tiles

    def merge(
        self, tile: Tile, index: int, values: Mapping[str, StatisticValue], scratch: Scratch
    ) -> tuple[Rows, PerModel]:
        """As `Merged.merge`. Rows that the base lacks change nothing about it."""
        if self.beyond is None or tile.start < self.merged.spec.rows:
            return self.merged.merge(tile, index, values, scratch)
        rows, _ = self.beyond.merge(tile, index, {}, scratch)
        return rows, np.zeros(1 + len(self.models))

    def release(self) -> None:
        self.merged.release()
        if self.beyond is not None:
            self.beyond.release()


Job = CopyJob | MergeJob


class Composer:
    """Puts sources together for one tensor at a time; see `Chooser` for what is spilled."""

    def __init__(
        self, recipe: Recipe, inputs: Inputs, files: Files, chooser: Chooser, store: SpillStore
    ) -> None:
        self._method = recipe.method
        self._inputs = inputs
        self._files = files
        self._spilling = Spilling(recipe.method, inputs, chooser, store)
        self._shared = recipe.shared
        self._seed = recipe.seed
        self._per_model = {
            name: np.array([entry.knobs[name] for entry in recipe.entries], np.float64)
            for name in recipe.method.per_model
        }
        self._on_deltas = recipe.method.on_deltas(has_base=recipe.base is not None)

    def jobs(self, layouts: Sequence[ShardLayout]) -> Iterator[Job]:
        """In the order of the output's files; tensors without elements need none."""
        for layout in layouts:
            for name, target in layout.extents.items():
                if target.spec.numel:
                    yield self.job(name, target)

    def job(self, name: str, target: Extent) -> Job:
        donor = self._inputs.donor.tensors[name]
        if not donor.spec.dtype.mergeable:
            return CopyJob(donor, target)
        if target.spec.shape != donor.spec.shape:
            known = replace(target, spec=replace(target.spec, shape=donor.spec.shape))
            return self._larger(name, self._merged(name, known), target)
        return self._merged(name, target)

    def _merged(self, name: str, target: Extent) -> Job:
        base = Dense(self._files, self._inputs.base.tensors[name]) if self._inputs.base else None
        sources = self._sources(name, base)
        part = tuple(range(len(sources)))
        if self._on_deltas:  # the base's own delta is nothing
            part = tuple(i for i in part if sources[i] is not base)
            if base is not None and not part:
                return self._unchanged(base, target)
        knobs = Knobs(self._per_model, self._shared, len(sources), part, self._seed)
        chosen, choices = self._spilling.apply(knobs, base, [sources[i] for i in part])
        if self._method.returns == "rows":
            applied = Applied(self._method, knobs, base, chosen)
            return _merge_job(applied, chosen, target, part, choices)
        merged = Combined(self._files, self._method, knobs, base, chosen)
        found = None if merged.waves() else merged.coefficients({})
        factors = [found.models[i] for i in part] if found else []
        numbers = [factor for factor in factors if isinstance(factor, float)]
        if found is None or found.base != 1.0 or len(numbers) < len(part):
            return _merge_job(merged, chosen, target, part, choices)
        return self._weighted(base, chosen, numbers, part, target)

    def _larger(self, name: str, known: Job, target: Extent) -> Job:
        """`known`, with the rows that the base lacks: the weighted mean of the models' that have
        them. What one model stores and nothing changes is copied with all its rows."""
        owners = list(self._owners(name, target.spec.rows))
        if isinstance(known, CopyJob):
            own = owners[0][0].extent
            if len(owners) == 1 and (own.path, own.offset) == (
                known.source.path,
                known.source.offset,
            ):
                return CopyJob(own, target)
            source = Dense(self._files, known.source)
            merged = WeightedSum(self._files, None, [source], [1.0], "weights")
            known = MergeJob(merged, known.target, ())
        total = sum(weight for _, weight in owners)
        shares = [weight / total for _, weight in owners]
        sources = [
            self._replaced(Dense(self._files, update.extent), update, on_base=False)
            for update, _ in owners
        ]
        beyond = WeightedSum(self._files, None, sources, shares, "weights")
        return replace(known, target=target, beyond=beyond)

    def _owners(self, name: str, rows: int) -> Iterator[tuple[Replacement, float]]:
        """What holds all rows of a larger vocabulary, and with which weight."""
        weights = self._per_model.get("weight", np.ones(len(self._inputs.models)))
        for model, weight in zip(self._inputs.models, weights, strict=True):
            update = model.adapter.updates.get(name) if model.adapter else None
            if isinstance(update, Replacement) and update.extent.spec.rows == rows:
                yield update, float(weight)

    def _sources(self, name: str, base: Dense | None) -> list[Source]:
        """Each model's tensor; the base itself for those that leave it alone."""
        stored: dict[str, Dense] = {}
        if base is not None:
            stored[base.extent.path] = base
        sources: list[Source] = []
        for model in self._inputs.models:
            extent = self._stored(model, name)
            rows = stored.setdefault(extent.path, Dense(self._files, extent))
            update = model.adapter.updates.get(name) if model.adapter else None
            if update is None:
                sources.append(rows)
            else:
                on_base = rows is base and self._on_deltas
                sources.append(self._adapted(rows, update, on_base=on_base))
        return sources

    def _adapted(self, rows: Source, update: Update, *, on_base: bool) -> Source:
        """The source that does what an adapter asks for."""
        change: Change
        match update:
            case Replacement():
                return self._replaced(rows, update, on_base=on_base)
            case Factors():
                change = Product(self._files, [update])
            case Addition():
                change = Scaled(self._files, update)
            case Dora():
                kind = DoraOfRows if update.norms_of == "rows" else DoraOfColumns
                change = kind(self._files, rows, update)
        return Adapted(rows, change, on_base=on_base)

    def _replaced(self, rows: Source, update: Replacement, *, on_base: bool) -> Source:
        """A tensor, or rows of one, that the adapter holds itself; the model's own are no part."""
        extent, known = update.extent, rows.spec
        if (
            update.rows is None and extent.spec.rows > known.rows
        ):  # the first of a larger vocabulary
            extent = replace(extent, spec=replace(extent.spec, shape=known.shape))
        new: Source = Dense(self._files, extent)
        if update.rows is not None:
            new = Replaced(self._files, rows, update.extent, update.rows, on_base=on_base)
        return self._adapted(new, update.then, on_base=False) if update.then else new

    def _stored(self, model: Model, name: str) -> Extent:
        """The model's own tensor; the donor's for buffers that only the donor stores."""
        own = model.folder.tensors
        return own[name] if name in own else self._inputs.donor.tensors[name]

    def _weighted(
        self,
        base: Dense | None,
        models: Sequence[Source],
        factors: Sequence[float],
        part: tuple[int, ...],
        target: Extent,
    ) -> Job:
        space: Literal["deltas", "weights"] = "deltas" if self._on_deltas else "weights"
        merged = WeightedSum(self._files, base, models, factors, space)
        same = merged.same_as()
        if same is not None:
            return self._as_it_is(same, target, part)
        return _merge_job(merged, models, target, part)

    def _as_it_is(self, source: Source, target: Extent, part: tuple[int, ...]) -> Job:
        """A tensor whose rows are the result: by difference, many would be off by a rounding."""
        if isinstance(source, Dense) and source.spec.dtype == target.spec.dtype:
            return CopyJob(source.extent, target)
        alone = [1.0, *[0.0] * (len(part) - 1)]  # the others that take part are the same rows
        merged = WeightedSum(self._files, None, [source] * len(part), alone, "weights")
        return _merge_job(merged, [source], target, part)

    def _unchanged(self, base: Dense, target: Extent) -> Job:
        """The base's own tensor, cast where the output's dtype differs."""
        if base.spec.dtype == target.spec.dtype:
            return CopyJob(base.extent, target)
        return MergeJob(WeightedSum(self._files, base, [base], [1.0], "weights"), target, ())


def _merge_job(
    merged: Merged,
    models: Sequence[Source],
    target: Extent,
    part: tuple[int, ...],
    choices: tuple[Choice, ...] = (),
) -> MergeJob:
    """What the models must be given first is measured before everything else."""
    if any(model.own_statistics for model in models):
        merged = Prepared(merged, models)
    return MergeJob(merged, target, part, choices=choices)
