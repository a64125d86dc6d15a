"""The knobs of one tensor: what the recipe says for its name and for its place among the layers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property

import numpy as np

from streammerge.arrays import PerModel
from streammerge.declarations import KnobValue
from streammerge.errors import ConfigError, Problems
from streammerge.recipe import Case, Recipe, Varying, at, check_together, check_weights


class TensorKnobs:
    """Looks up the knobs of a merge tensor by tensor; `names` are those of all tensors."""

    def __init__(self, recipe: Recipe, names: Collection[str]) -> None:
        self._recipe = recipe
        self._names = names
        self._same = None if recipe.varies else self._per_model("", 0.0)

    def per_model(self, name: str) -> Mapping[str, PerModel]:
        """Knob -> its value for every model of the recipe."""
        if self._same is not None:
            return self._same
        return self._per_model(name, self._layers.depth(name))

    def shared(self, name: str) -> Mapping[str, KnobValue]:
        depth = self._layers.depth(name) if self._recipe.varies else 0.0
        return {knob: at(value, name, depth) for knob, value in self._recipe.shared.items()}

    def warnings(self) -> Iterator[str]:
        """Filters that are in no tensor's name, and gradients over a model without layers."""
        cases = list(self._cases())
        for text in dict.fromkeys(case.filter for case in cases):
            if text is not None and not any(text in name for name in self._names):
                yield f"the filter {text!r} has no effect: it is in no tensor's name"
        if any(len(case.values) > 1 for case in cases) and not self._layers.counts:
            yield "no layers are told by the tensors' names: all take a gradient's first value"

    def check(self, problems: Problems) -> None:
        """Whether those that differ go together everywhere; tells of the first tensor where not."""
        for name in self._names if self._recipe.varies else ():
            try:
                self._check(name)
            except ConfigError as problem:
                problem.what = f"in {name}, {problem.what}"
                problems.add(problem)
                return

    def _check(self, name: str) -> None:
        entries, method = self._recipe.entries, self._recipe.method
        depth = self._layers.depth(name)
        knobs = [{n: at(one, name, depth) for n, one in e.knobs.items()} for e in entries]
        for entry, one in zip(entries, knobs, strict=True):
            check_together(method, one, entry.place)
        if "weight" in method.per_model:
            weights = [float(one["weight"]) for one in knobs]
            check_weights(method, weights, self.shared(name), entries[0].place)

    def _cases(self) -> Iterator[Case]:
        for knobs in (self._recipe.shared, *(entry.knobs for entry in self._recipe.entries)):
            for value in knobs.values():
                yield from value.cases if isinstance(value, Varying) else ()

    def _per_model(self, name: str, depth: float) -> dict[str, PerModel]:
        return {
            knob: np.array([at(e.knobs[knob], name, depth) for e in self._recipe.entries], float)
            for knob in self._recipe.method.per_model
        }

    @cached_property
    def _layers(self) -> Layers:
        return Layers(self._names)


class Layers:
    """Which layer a tensor is of: the first number in its name, one of as many as count on from 0.

    So experts within a layer are no layers, and each of a model's towers counts its own.
    """

    def __init__(self, names: Iterable[str]) -> None:
        found: dict[str, set[int]] = {}
        for name in names:
            split = _split(name)
            if split is not None:
                found.setdefault(split[0], set()).add(split[1])
        # What stands before the number -> how many layers it counts.
        self.counts = {tower: len(every) for tower, every in found.items() if _whole(every)}

    def depth(self, name: str) -> float:
        """0 for the first layer and what belongs to none, 1 for the last, and for a single one."""
        tower, layer = _split(name) or ("", 0)
        count = self.counts.get(tower)
        if count is None:
            return 0.0
        return layer / (count - 1) if count > 1 else 1.0


def _split(name: str) -> tuple[str, int] | None:
    """What stands before the first number of a name, and the number."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isascii() and part.isdigit():
            return ".".join(parts[:index]), int(part)
    return None


def _whole(layers: set[int]) -> bool:
    return max(layers) == len(layers) - 1
