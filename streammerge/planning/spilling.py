"""Whose rows of a tensor are spilled, put into an array of their own."""

from __future__ import annotations

from collections.abc import Sequence

from streammerge.declarations import Knobs, MethodSpec
from streammerge.planning.inputs import Inputs
from streammerge.planning.spill import Choice, Chooser, Wanted
from streammerge.sources.needs import Needs
from streammerge.sources.spilled import Spilled
from streammerge.sources.together import low_rank
from streammerge.storage.spill import Kind, SpillArray, SpillStore
from streammerge.words import Source


class Spilling:
    """Chooses for the models of one tensor after the other."""

    def __init__(
        self, method: MethodSpec, inputs: Inputs, chooser: Chooser, store: SpillStore
    ) -> None:
        self._method = method
        self._models = inputs.models
        self._chooser = chooser
        self._store = store
        self._on_deltas = method.on_deltas(has_base=inputs.base is not None)

    def apply(
        self, knobs: Knobs, base: Source | None, models: Sequence[Source]
    ) -> tuple[list[Source], tuple[Choice, ...]]:
        """The models with those that were chosen spilled, and what was chosen for each of them."""
        choices = self._choices(knobs, base, models)
        kept = [choice.wanted.model for choice in choices if choice.spilled]
        if not kept:
            return list(models), choices
        names = [self._models[model].name for model in kept]
        kind: Kind = "deltas" if self._on_deltas else "weights"
        array = SpillArray(self._store, models[0].spec, names, kind)
        spilled = [
            Spilled(source, array, kept.index(model)) if model in kept else source
            for model, source in zip(knobs.touching, models, strict=True)
        ]
        return spilled, choices

    def _choices(
        self, knobs: Knobs, base: Source | None, models: Sequence[Source]
    ) -> tuple[Choice, ...]:
        """None for rows that are wanted once, or never, as where products tell everything."""
        spec = models[0].spec
        needs = Needs(self._method, knobs, spec)
        by_products = self._method.returns == "coefficients" and needs.by_products()
        if by_products and low_rank(base, models):
            return ()
        wanted = (
            Wanted(model, self._rank(model, spec.name), needs.reads(place))
            for place, model in enumerate(knobs.touching)
        )
        return self._chooser.choose(spec.numel, wanted)

    def _rank(self, model: int, name: str) -> int:
        adapter = self._models[model].adapter
        update = adapter.updates.get(name) if adapter else None
        return update.rank if update else 0
