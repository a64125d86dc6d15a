"""One job per output tensor: a copy of stored bytes, or a merge. Composed when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from streammerge import grid
from streammerge.arrays import PerModel, Rows
from streammerge.planning.inputs import Inputs
from streammerge.planning.pairs import Pairs
from streammerge.planning.parts import Assembly
from streammerge.planning.spill import Choice, Chooser
from streammerge.planning.spilling import Spilling
from streammerge.recipe import Recipe
from streammerge.scratch import Scratch
from streammerge.sources.applied import Applied
from streammerge.sources.combined import Combined
from streammerge.sources.dense import Dense
from streammerge.sources.direct import Direct
from streammerge.sources.factor_rows import Added
from streammerge.sources.prepared import Prepared
from streammerge.sources.weighted import WeightedSum
from streammerge.storage.bytesource import Files
from streammerge.storage.shard import ShardLayout
from streammerge.storage.spill import SpillStore
from streammerge.words import Extent, Merged, Source, StatisticValue, Tile


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
    wanted more than once. `after` is one of the same file that is to be over before this one
    begins, as this takes over what it found."""

    merged: Merged
    target: Extent
    models: tuple[int, ...]
    beyond: Merged | None = None
    choices: tuple[Choice, ...] = ()
    after: MergeJob | None = None

    @property
    def spilled_bytes(self) -> int:
        """What is kept on disk while the tensor is merged."""
        return sum(choice.nbytes for choice in self.choices if choice.spilled)

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
        self.assembly = Assembly(recipe, inputs, files)
        self.pairs = Pairs(recipe, files)
        self._on_deltas = recipe.method.on_deltas(has_base=recipe.base is not None)

    def jobs(self, layout: ShardLayout) -> Iterator[Job]:
        """In the order of the file; tensors without elements need none."""
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
        parts = self.assembly.parts(name)
        base, part = parts.base, parts.positions
        if self._on_deltas and base is not None and not part:
            return self._unchanged(base, target)
        pair = self.pairs.in_core(name, parts)
        if pair is not None and base is not None:
            return MergeJob(Direct(Added(base, pair)), target, part)
        whole = self._method.alone(parts.knobs) if self._method.alone and len(part) == 1 else None
        if whole is not None:
            return self._weighted(base, parts.models, [whole], part, target)
        chosen, choices = self._spilling.apply(parts.knobs, base, parts.models)
        if self._method.returns == "rows":
            applied = Applied(self._method, parts.knobs, base, chosen)
            return _merge_job(applied, chosen, target, part, choices)
        merged = Combined(self._files, self._method, parts.knobs, base, chosen)
        numbers = parts.known_factors(merged)
        if numbers is None:
            return _merge_job(merged, chosen, target, part, choices)
        return self._weighted(base, chosen, numbers, part, target)

    def update(self, name: str) -> Merged:
        """The merge of a tensor without its base, of a method that is handed differences."""
        parts = self.assembly.parts(name)
        base, models = parts.base, parts.models
        if self._method.returns == "rows":
            applied = Applied(self._method, parts.knobs, base, models, update_only=True)
            return _prepared(applied, models)
        combined = Combined(self._files, self._method, parts.knobs, base, models, update_only=True)
        return _prepared(combined, models)

    def _larger(self, name: str, known: Job, target: Extent) -> Job:
        """`known`, with the rows that the base lacks: the weighted mean of the models' that have
        them. What one model stores and nothing changes is copied with all its rows."""
        owners = list(self.assembly.owners(name, target.spec.rows))
        if isinstance(known, CopyJob):
            own, source = owners[0][0].extent, known.source
            if len(owners) == 1 and (own.path, own.offset) == (source.path, source.offset):
                return CopyJob(own, target)
            rows = Dense(self._files, source)
            merged = WeightedSum(self._files, None, [rows], [1.0], "weights")
            known = MergeJob(merged, known.target, ())
        total = sum(weight for _, weight in owners)
        shares = [weight / total for _, weight in owners]
        sources = [self.assembly.all_rows(update) for update, _ in owners]
        beyond = WeightedSum(self._files, None, sources, shares, "weights")
        return replace(known, target=target, beyond=beyond)

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
    return MergeJob(_prepared(merged, models), target, part, choices=choices)


def _prepared(merged: Merged, models: Sequence[Source]) -> Merged:
    """What the models must be given first is measured before everything else."""
    wanted = any(model.own_statistics for model in models)
    return Prepared(merged, models) if wanted else merged
