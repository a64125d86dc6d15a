"""A parameter as it stands in the document -> its value, or how it differs from tensor to tensor.

As in mergekit, a value is a scalar; a gradient, which is a list of values from the first layer to
the last; or a list of `{filter, value}`, of which the first counts whose text is in the tensor's
name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from streammerge.declarations import Knob, KnobValue
from streammerge.errors import ConfigError, Problems
from streammerge.recipe.document import Document, Spot
from streammerge.recipe.varying import Case
from streammerge.recipe.wording import KeyPath, dotted, nearest, shown

_FLOAT32_MAX = 3.4028234663852886e38
_EVERYWHERE = "*"


@dataclass(frozen=True, slots=True)
class Setting:
    """A parameter, or a part of one, as it stands in the document."""

    document: Document
    path: KeyPath

    @property
    def key(self) -> str:
        return str(self.path[-1])

    @property
    def value(self) -> Any:
        return self.document.at(self.path)

    @property
    def spot(self) -> Spot:
        return self.document.spot(self.path)

    def inner(self, *keys: str | int) -> Setting:
        """A part of a list or mapping."""
        return Setting(self.document, (*self.path, *keys))


def settings(document: Document, path: KeyPath, keys: Iterable[str]) -> list[Setting]:
    """The parameters that stand under some keys of the mapping at a path."""
    return [Setting(document, (*path, key)) for key in keys]


def cases(setting: Setting, knob: Knob, problems: Problems) -> tuple[Case, ...] | None:
    """What a parameter says; a scalar is one case, everywhere. None when there are problems."""
    value, mine = setting.value, Problems()
    if not isinstance(value, list):
        found = [Case(None, _values(setting, knob, mine))]
    elif value and all(isinstance(item, dict) for item in value):
        found = [_filtered(setting.inner(i), knob, mine) for i in range(len(value))]
    else:
        found = [Case(None, _gradient(setting, knob, mine))]
    for problem in mine:
        problems.add(problem)
    return None if len(mine) else tuple(found)


def _filtered(item: Setting, knob: Knob, problems: Problems) -> Case:
    name, keys = item.value.get("filter"), ("filter", "value")
    unknown = [key for key in item.value if key not in keys]
    for key in unknown:
        problems.add(_not_an_item(item.inner(key), nearest(key, keys)))
    if name is not None and not isinstance(name, str):
        problems.add(_not_an_item(item.inner("filter")))
    if "value" not in item.value:
        if not unknown:  # else that is most likely what it was to be
            problems.add(_not_an_item(item))
        return Case(name, ())
    value = item.inner("value")
    if isinstance(value.value, list):
        values = _gradient(value, knob, problems)
    else:
        values = _values(value, knob, problems, in_list=True)
    return Case(None if name == _EVERYWHERE else name, values)


def _gradient(setting: Setting, knob: Knob, problems: Problems) -> tuple[KnobValue, ...]:
    if knob.whole:
        problems.add(_wrong(setting, knob, "a list, between whose whole numbers there are others"))
        return ()
    if not setting.value:
        problems.add(_wrong(setting, knob, "an empty list"))
    every = [setting.inner(index) for index in range(len(setting.value))]
    return tuple(v for one in every for v in _values(one, knob, problems, in_list=True))


def _values(
    setting: Setting, knob: Knob, problems: Problems, *, in_list: bool = False
) -> tuple[KnobValue, ...]:
    """The one value, or none where it is wrong."""
    try:
        return (_scalar(setting, knob, in_list=in_list),)
    except ConfigError as problem:
        problems.add(problem)
        return ()


def _not_an_item(setting: Setting, near: str | None = None) -> ConfigError:
    return ConfigError(
        f"{dotted(setting.path)} is not valid",
        where=setting.spot.key if near else setting.spot.value,
        found=f"the key {setting.key!r}" if near else shown(setting.value, setting.spot.spelled),
        expected="{filter: part of a tensor's name, value: ...}, the last one without a filter",
        remedy=f"did you mean `{near}`?" if near else "correct it",
    )


def _scalar(setting: Setting, knob: Knob, *, in_list: bool = False) -> KnobValue:
    value, switch = setting.value, isinstance(knob.default, bool)
    if switch and isinstance(value, bool):
        return value
    if knob.choices:
        return _choice(setting, knob)
    if switch or isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(setting, knob)
    allowed = knob.allows(value) or (in_list and value == knob.nothing_at)
    if not math.isfinite(value) or not allowed or (knob.whole and value % 1):
        raise _wrong(setting, knob)
    if abs(value) > _FLOAT32_MAX:
        raise _wrong(setting, knob, f"{setting.spot.spelled}, which is infinite in float32")
    return int(value) if knob.whole else float(value)


def _choice(setting: Setting, knob: Knob) -> str:
    """One of the names of a knob."""
    value = setting.value
    if knob.switch and isinstance(value, bool):
        return knob.switch[value]
    if isinstance(value, str) and value in knob.choices:
        return value
    raise _wrong(setting, knob)


def _wrong(setting: Setting, knob: Knob, found: str | None = None) -> ConfigError:
    return ConfigError(
        f"{dotted(setting.path)} is not valid",
        where=setting.spot.value,
        found=found or shown(setting.value, setting.spot.spelled),
        expected=expected(knob),
        remedy=_remedy(setting, knob),
    )


def expected(knob: Knob) -> str:
    if isinstance(knob.default, bool):
        return "true or false"
    if knob.choices:
        return f"one of {', '.join(knob.choices)}"
    number = "a whole number" if knob.whole else "a finite number"
    return f"{number} {knob.bounds()}".strip()


def _remedy(setting: Setting, knob: Knob) -> str:
    kind = "true or false" if isinstance(knob.default, bool) else "one number"
    kind = "one of these" if knob.choices else kind
    quotes = " without quotes" if isinstance(setting.value, str) and not knob.choices else ""
    if knob.default is None:
        return f"write {kind}{quotes}"
    default = str(knob.default).lower().removesuffix(".0")
    return f"write {kind}{quotes}, or leave it out for the default, {default}"
