"""A function of the stack as the subject of a statistic: the parameters after the stack name knobs
and statistics of the method, or `base` for the base's rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

from streammerge.arrays import Deltas
from streammerge.declarations import Declared, Knobs
from streammerge.words import DeltaStack, StatisticValue


@dataclass(frozen=True, slots=True)
class OfStack:
    """`function(deltas, *, name, ...)`, which may change the deltas in place."""

    function: Callable[..., Any]

    @property
    def names(self) -> Sequence[str]:
        """Of the parameters after the stack."""
        return list(signature(self.function).parameters)[1:]

    @property
    def wants_base(self) -> bool:
        return "base" in self.names

    def check(self, declared: Declared) -> None:
        """Raise TypeError for a name that the method does not declare before."""
        known = declared.per_model | declared.shared | declared.statistics | {"base"}
        check_names(self.function, known | {next(iter(signature(self.function).parameters))})

    def bound(
        self, knobs: Knobs, values: Mapping[str, StatisticValue]
    ) -> Callable[[DeltaStack, Deltas], Any]:
        """The function of a stack and of all its deltas."""
        arguments = knobs.arguments(of_all=False)
        fixed = {name: arguments[name] for name in self.names if name in arguments}
        found = {name: values[name] for name in self.names if name in values}
        return partial(self._call, fixed, found)

    def _call(
        self,
        fixed: Mapping[str, Any],
        found: Mapping[str, StatisticValue],
        stack: DeltaStack,
        deltas: Deltas,
    ) -> Any:
        at_tile = {name: value.at(stack.index) for name, value in found.items()}
        base = {"base": stack.base()} if self.wants_base else {}
        return self.function(deltas, **fixed, **at_tile, **base)


def check_names(function: Callable[..., Any], known: Iterable[str]) -> None:
    """Raise TypeError for a parameter of a function that nothing of this name is declared for."""
    for name in signature(function).parameters:
        if name not in known:
            raise TypeError(f"{function.__name__}: {name!r} is not declared before")


def of_each(function: Callable[..., Any], knobs: Knobs, **fixed: int) -> list[Any]:
    """What a function of per-model knobs, and of what is fixed, gives for each in the stack."""
    names = [name for name in signature(function).parameters if name not in fixed]
    columns = {name: knobs.per_model[name].tolist() for name in names}
    return [
        function(**fixed, **{name: column[model] for name, column in columns.items()})
        for model in range(len(knobs.touching))
    ]


def of_shared(function: Callable[..., Any], knobs: Knobs, **given: int) -> Any:
    """What a function of shared knobs, and of as much as it asks for of what is given, gives."""
    known = {**knobs.shared, **given}
    return function(**{name: known[name] for name in signature(function).parameters})
