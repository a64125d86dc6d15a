"""Parameters of a recipe -> the values of the merge method's knobs.

A parameter is one of: a knob of the method, which is checked; one that only other methods use,
which has no effect and is warned of; one that would change the result and is not taken yet, which
is refused; or nothing that anyone knows, which is refused with its nearest neighbour.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from inspect import signature

from streammerge.declarations import Knob, KnobValue, MethodSpec
from streammerge.errors import ConfigError, Place, Problems
from streammerge.recipe.setting import Setting, cases, expected
from streammerge.recipe.varying import Case, Parameter, Varying
from streammerge.recipe.wording import dotted, nearest

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
        """The settings for all models that the method uses, each of them checked."""
        knobs = {**self._method.per_model, **self._method.shared}
        used = self._used(given, knobs)
        for key, setting in used.items():
            cases(setting, knobs[key], self._problems)
        return used

    def shared(self, common: Sequence[Mapping[str, Setting]], where: Place) -> dict[str, Parameter]:
        """Every shared knob; one whose value is wrong is left out.

        `common` is what holds for all models, the innermost level first.
        """
        return self._complete(common, self._method.shared, where)

    def of_model(
        self, own: Iterable[Setting], common: Sequence[Mapping[str, Setting]], where: Place
    ) -> dict[str, Parameter]:
        """Every per-model knob: a model's own, else what holds for all, else the default."""
        used = self._used(own, self._method.per_model)
        return self._complete([used, *common], self._method.per_model, where)

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
        self, levels: Sequence[Mapping[str, Setting]], knobs: Mapping[str, Knob], where: Place
    ) -> dict[str, Parameter]:
        """All knobs; each level says what the ones before leave open, the default the rest."""
        values: dict[str, Parameter] = {}
        for key, knob in knobs.items():
            given = [level[key] for level in levels if key in level]
            value = self._value(key, knob, given, where)
            if value is not None:
                values[key] = value
        return values

    def _value(
        self, key: str, knob: Knob, given: Sequence[Setting], where: Place
    ) -> Parameter | None:
        """None where it is wrong, or missing."""
        every: list[Case] = []
        for setting in given:
            found = cases(setting, knob, self._problems)
            if found is None:
                return None
            if not every and not isinstance(setting.value, list):
                return found[0].values[0]
            for case in found:
                every.append(case)
                if case.filter is None:
                    return Varying(tuple(every))
        if knob.default is None:
            self._problems.add(_missing(key, knob, self._method.name, given, where))
        elif every:
            return Varying((*every, Case(None, (knob.default,))))
        return knob.default


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


def _missing(
    key: str, knob: Knob, method: str, given: Sequence[Setting], where: Place
) -> ConfigError:
    if given:
        return ConfigError(
            f"{method} needs `{key}` for every tensor",
            where=given[-1].spot.value,
            found="filters, and nothing for tensors whose names hold none of them",
            expected=expected(knob),
            remedy="add a last item without a filter: `- value: ...`",
        )
    return ConfigError(
        f"{method} needs the parameter `{key}`",
        where=where,
        found=f"no `{key}` here or at the top level",
        expected=expected(knob),
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
