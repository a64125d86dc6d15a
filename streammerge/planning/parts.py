"""What takes part in the merge of one tensor, and by which source it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from streammerge.arrays import PerModel
from streammerge.declarations import Knobs
from streammerge.planning.inputs import Inputs, Model
from streammerge.planning.knobs import TensorKnobs
from streammerge.recipe import Recipe
from streammerge.sources.adapted import Adapted, Change
from streammerge.sources.combined import Combined
from streammerge.sources.dense import Dense
from streammerge.sources.dora import DoraOfColumns, DoraOfRows
from streammerge.sources.low_rank import Product
from streammerge.sources.replaced import Replaced
from streammerge.sources.scaled import Scaled
from streammerge.storage.bytesource import Files
from streammerge.words import Addition, Dora, Extent, Factors, Replacement, Source, Update


@dataclass(frozen=True, slots=True)
class Parts:
    """The models that the method is handed; `models[i]` is that of entry `positions[i]`."""

    base: Dense | None
    models: Sequence[Source]
    positions: tuple[int, ...]
    knobs: Knobs

    def known_factors(self, combined: Combined) -> list[float] | None:
        """The models' factors in a weighted sum that adds to the base as it is.

        None where they wait for a statistic, differ within the tensor, or scale the base.
        """
        if combined.waves():
            return None
        found = combined.coefficients({})
        factors = [found.models[position] for position in self.positions]
        numbers = [factor for factor in factors if isinstance(factor, float)]
        return numbers if found.base == 1.0 and len(numbers) == len(factors) else None


class Assembly:
    """Puts sources together for one tensor at a time."""

    def __init__(self, recipe: Recipe, inputs: Inputs, files: Files) -> None:
        self._inputs = inputs
        self._files = files
        self._knobs = TensorKnobs(recipe, inputs.donor.tensors)
        self._seed = recipe.seed
        self._nothing_at = {
            name: knob.nothing_at
            for name, knob in recipe.method.per_model.items()
            if knob.nothing_at is not None
        }
        self._on_deltas = recipe.method.on_deltas(has_base=recipe.base is not None)

    def parts(self, name: str) -> Parts:
        """The models that take part in a tensor; the base's own delta is nothing."""
        base = Dense(self._files, self._inputs.base.tensors[name]) if self._inputs.base else None
        sources = self._sources(name, base)
        per_model, part = self._knobs.per_model(name), tuple(range(len(sources)))
        if self._on_deltas:
            still = {i for i in part if sources[i] is base} | self._nothing(per_model)
            part = tuple(i for i in part if i not in still)
        knobs = Knobs(per_model, self._knobs.shared(name), len(sources), part, self._seed)
        return Parts(base, [sources[i] for i in part], part, knobs)

    def _nothing(self, per_model: Mapping[str, PerModel]) -> set[int]:
        """The models whose task vector a knob makes zero."""
        found: set[int] = set()
        for name, value in self._nothing_at.items():
            found.update(np.flatnonzero(per_model[name] == value).tolist())
        return found

    def owners(self, name: str, rows: int) -> Iterator[tuple[Replacement, float]]:
        """What holds all rows of a larger vocabulary, and with which weight."""
        ones = np.ones(len(self._inputs.models))
        weights = self._knobs.per_model(name).get("weight", ones)
        for model, weight in zip(self._inputs.models, weights, strict=True):
            update = model.adapter.updates.get(name) if model.adapter else None
            if isinstance(update, Replacement) and update.extent.spec.rows == rows:
                yield update, float(weight)

    def all_rows(self, update: Replacement) -> Source:
        """A tensor that an adapter holds, with all its rows."""
        return self._replaced(Dense(self._files, update.extent), update, on_base=False)

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
        if update.rows is None and extent.spec.rows > known.rows:  # of a larger vocabulary
            extent = replace(extent, spec=replace(extent.spec, shape=known.shape))
        new: Source = Dense(self._files, extent)
        if update.rows is not None:
            new = Replaced(self._files, rows, update.extent, update.rows, on_base=on_base)
        return self._adapted(new, update.then, on_base=False) if update.then else new

    def _stored(self, model: Model, name: str) -> Extent:
        """The model's own tensor; the donor's for buffers that only the donor stores."""
        own = model.folder.tensors
        return own[name] if name in own else self._inputs.donor.tensors[name]
