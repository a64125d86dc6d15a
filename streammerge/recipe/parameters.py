"""Parameters of a recipe -> the values of the merge method's knobs.

A parameter is one of: a knob of the method, which is checked; one that only other methods use,
which has no effect and is warned of; one that would change the result and is not taken yet, which
is refused; or nothing that anyone knows, which is refused with its nearest neighbour.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

from streammerge.declarations import Knob, KnobValue, MethodSpec
from streammerge.errors import ConfigError, Place, Problems
from streammerge.recipe.document import Document, Spot
from streammerge.recipe.wording import KeyPath, dotted, nearest, shown

# Every parameter of the catalogue of methods in docs and of mergekit 0.1.5, for any method.
CATALOGUE = frozenset(
    "weight density normalize lambda rescale int8_mask gamma epsilon t select_topk filter_wise "
    "nuslerp_flatten nuslerp_row_wise normalize_weights eps max_iter tol r alpha scale".split()
)

# Keys of an adapter among which its parameters stand.
_BESIDE = ("path", "revision", "name", "assume_residual_base", "parameters")

# Methods whose divisor is the sum of the weights that agree, element by element.
_VOTING = frozenset({"ties", "dare_ties", "della", "breadcrumbs_ties", "sce"})
_DIVIDING = ("normalize", "normalize_weights")
_LEAST_SUM = 1e-8
_FLOAT32_MAX = 3.4028234663852886e38


@dataclass(frozen=True, slots=True)
class Setting:
    """A parameter as it stands in the document."""

    path: KeyPath
    value: Any
    spot: Spot

    @property
    def key(self) -> str:
        return str(self.path[-1])


def settings(document: Document, path: KeyPath, keys: Iterable[str]) -> list[Setting]:
    """The parameters that stand under some keys of the mapping at a path."""
    paths = [(*path, key) for key in keys]
    return [Setting(at, document.at(at), document.spot(at)) for at in paths]


class Parameters:
    """Sorts parameters by what a method does with them, and checks the values it uses."""

    def __init__(
        self, method: MethodSpec, methods: Mapping[str, MethodSpec], problems: Problems
    ) -> None:
        self._method = method
        self._problems = problems
        knobs = (key for spec in methods.values() for key in (*spec.per_model, *spec.shared))
        self._known = CATALOGUE.union(knobs)
        self._ignored: dict[tuple[str, str], list[Place]] = {}

    def of_all(self, given: Iterable[Setting]) -> dict[str, Setting]:
        """The settings of a recipe's top level that the method uses, each of them checked."""
        used = self._used(given, {**self._method.per_model, **self._method.shared})
        self._values(used, {**self._method.per_model, **self._method.shared})
        return used

    def shared(self, common: Mapping[str, Setting], where: Place) -> dict[str, KnobValue]:
        """Every shared knob; one whose value is wrong is left out."""
        return self._complete(common, self._method.shared, where)

    def of_model(
        self, own: Iterable[Setting], common: Mapping[str, Setting], where: Place
    ) -> dict[str, KnobValue]:
        """Every per-model knob: a model's own, else the top level's, else the default."""
        used = self._used(own, self._method.per_model)
        return self._complete({**common, **used}, self._method.per_model, where)

    def warnings(self) -> list[tuple[Place, str]]:
        """Each key that has no effect, once: its first place, and why with its other places."""
        lines = []
        for (key, why), places in self._ignored.items():
            more = ", ".join(f"{place.line}:{place.column}" for place in places[1:])
            also = f" (also at {more})" if more else ""
            lines.append((places[0], f"`{key}` has no effect: {why}{also}"))
        return lines

    def _used(self, given: Iterable[Setting], knobs: Mapping[str, Knob]) -> dict[str, Setting]:
        used: dict[str, Setting] = {}
        for setting in given:
            if setting.key not in knobs:
                self._not_used(setting)
            elif setting.key in used:
                self._problems.add(_given_twice(setting, used[setting.key]))
            else:
                used[setting.key] = setting
        return used

    def _not_used(self, setting: Setting) -> None:
        key, name = setting.key, self._method.name
        if key in self._method.shared:
            self._ignore(setting, "all models share it, so it belongs under the top `parameters:`")
        elif key in self._known:
            self._ignore(setting, f"{name} does not use it")
        else:
            self._problems.add(self._unknown(setting))

    def _ignore(self, setting: Setting, why: str) -> None:
        self._ignored.setdefault((setting.key, why), []).append(setting.spot.key)

    def _unknown(self, setting: Setting) -> ConfigError:
        mine = [*self._method.per_model, *self._method.shared]
        beside = _BESIDE if setting.path[0] == "adapters" else ()
        near = nearest(setting.key, [*mine, *beside]) or nearest(setting.key, self._known)
        return ConfigError(
            f"{dotted(setting.path)} is not a parameter that any method knows",
            where=setting.spot.key,
            found=f"the key {setting.key!r}",
            expected=f"for {self._method.name}: {', '.join(mine)}",
            remedy=f"did you mean `{near}`?" if near else "remove it",
        )

    def _complete(
        self, used: Mapping[str, Setting], knobs: Mapping[str, Knob], where: Place
    ) -> dict[str, KnobValue]:
        for key, knob in knobs.items():
            if knob.default is None and key not in used:
                self._problems.add(_missing(key, knob, self._method.name, where))
        given = self._values(used, knobs)
        defaults = {k: knob.default for k, knob in knobs.items() if k not in used}
        return {
            key: value for key in knobs if (value := given.get(key, defaults.get(key))) is not None
        }

    def _values(
        self, used: Mapping[str, Setting], knobs: Mapping[str, Knob]
    ) -> dict[str, KnobValue]:
        """The values that are right; each that is wrong is a problem."""
        values: dict[str, KnobValue] = {}
        for key, setting in used.items():
            if key in knobs:
                try:
                    values[key] = _value(setting, knobs[key])
                except ConfigError as problem:
                    self._problems.add(problem)
        return values


def check_weights(
    method: MethodSpec,
    weights: list[float],
    shared: Mapping[str, KnobValue],
    where: Place,
) -> None:
    """Raise ConfigError when `normalize` would divide by weights that sum to nothing.

    What a method of the user's own does with them only its author knows.
    """
    total = math.fsum(weights)
    if abs(total) >= _LEAST_SUM or method.digest:
        return
    key = next((key for key in _DIVIDING if shared.get(key) is True), None)
    if key and method.name not in _VOTING:
        raise ConfigError(
            f"the weights sum to zero, and `{key}` divides by their sum",
            where=where,
            found=f"`weight` {', '.join(f'{weight:g}' for weight in weights)}; sum {total:g}",
            expected=f"a sum of at least {_LEAST_SUM:g}, plus or minus",
            remedy=f"change the weights, or add `{key}: false` under the top `parameters:`",
        )


def check_together(method: MethodSpec, knobs: Mapping[str, KnobValue], where: Place) -> None:
    """Raise ConfigError when one model's knobs do not go together."""
    if method.check is None:
        return
    names = signature(method.check).parameters
    if all(name in knobs for name in names):
        wrong = method.check(**{name: knobs[name] for name in names})
        if wrong is not None:
            raise ConfigError(
                f"{' and '.join(names)} do not go together",
                where=where,
                found=", ".join(f"{name} {knobs[name]}" for name in names),
                expected=wrong,
                remedy=f"change one of {', '.join(names)}",
            )


def _value(setting: Setting, knob: Knob) -> KnobValue:
    value, switch = setting.value, isinstance(knob.default, bool)
    if switch and isinstance(value, bool):
        return value
    if isinstance(value, list):
        raise _wrong(setting, knob, "a list: gradients and filters are not supported yet")
    if knob.choices:
        return _choice(setting, knob)
    if switch or isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(setting, knob)
    if not math.isfinite(value) or not knob.allows(value) or (knob.whole and value % 1):
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
        expected=_expected(knob),
        remedy=_remedy(setting, knob),
    )


def _expected(knob: Knob) -> str:
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


def _missing(key: str, knob: Knob, method: str, where: Place) -> ConfigError:
    return ConfigError(
        f"{method} needs the parameter `{key}`",
        where=where,
        found=f"no `{key}` here or at the top level",
        expected=_expected(knob),
        remedy=f"add `{key}: ...` under `parameters:`",
    )


def _given_twice(setting: Setting, first: Setting) -> ConfigError:
    return ConfigError(
        f"{dotted(setting.path)} is given twice",
        where=setting.spot.key,
        found=f"the same parameter at {first.spot.key}",
        expected="each parameter once",
        remedy="remove one of the two",
    )
