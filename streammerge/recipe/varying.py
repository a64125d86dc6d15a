"""A parameter as a recipe sets it: one value, or one that differs from tensor to tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streammerge.declarations import KnobValue


@dataclass(frozen=True, slots=True)
class Case:
    """A parameter where a tensor's name holds `filter`; None: everywhere.

    Several values are a gradient: from the first layer to the last, and in between numbers are
    interpolated, while booleans and names change in steps.
    """

    filter: str | None
    values: tuple[KnobValue, ...]

    def at(self, depth: float) -> KnobValue:
        place = depth * (len(self.values) - 1)
        index = int(place)
        low = self.values[index]
        if isinstance(low, bool | str) or place == index:
            return low
        high = self.values[index + 1]
        assert not isinstance(high, str)
        return (1 - (place - index)) * low + (place - index) * high

    def __str__(self) -> str:
        values = ", ".join(_told(value) for value in self.values)
        over = " over the layers" if len(self.values) > 1 else ""
        return f"{self.filter or 'else'} {values}{over}"


@dataclass(frozen=True, slots=True)
class Varying:
    """A parameter that differs from tensor to tensor: the first case that fits counts.

    The last one, and no other, fits everywhere.
    """

    cases: tuple[Case, ...]

    def at(self, name: str, depth: float) -> KnobValue:
        """Of a tensor; the first layer is at depth 0, the last at 1."""
        return next(c for c in self.cases if c.filter is None or c.filter in name).at(depth)

    def __str__(self) -> str:
        told = "; ".join(map(str, self.cases))
        return told.removeprefix("else ") if len(self.cases) == 1 else f"({told})"


# A knob as the recipe sets it.
Parameter = KnobValue | Varying


def at(parameter: Parameter, name: str, depth: float) -> KnobValue:
    """What it is for a tensor; see `Varying.at`."""
    return parameter.at(name, depth) if isinstance(parameter, Varying) else parameter


def fixed(knobs: Mapping[str, Parameter]) -> dict[str, KnobValue]:
    """Those that are the same for every tensor."""
    return {n: value for n, value in knobs.items() if not isinstance(value, Varying)}


def told(parameter: Parameter) -> str:
    """In words."""
    return str(parameter) if isinstance(parameter, Varying) else _told(parameter)


def _told(value: KnobValue) -> str:
    if isinstance(value, bool | str):
        return str(value).lower()
    return f"{value:g}"


def plain(knobs: Mapping[str, Parameter]) -> dict[str, Any]:
    """As they stand in a recipe."""
    return {name: _plain_value(value) for name, value in knobs.items()}


def _plain_value(parameter: Parameter) -> Any:
    if not isinstance(parameter, Varying):
        return parameter
    if len(parameter.cases) == 1:
        return list(parameter.cases[0].values)
    return [_plain_case(case) for case in parameter.cases]


def _plain_case(case: Case) -> dict[str, Any]:
    value = list(case.values) if len(case.values) > 1 else case.values[0]
    return {"value": value} if case.filter is None else {"filter": case.filter, "value": value}
