"""`@method`: the function's signature is the whole declaration of a merge method.

    first argument      `Deltas` or `Weights`: whether the base is subtracted; `Vectors`: it is
                        where there is one; `Cores`: it is, and what is handed over are whole
                        matrices, small ones in a common orthonormal basis
    Annotated[PerModel, Knob(...)]     a parameter of each model
    Annotated[X, Knob(...)]            a parameter of the merge: X is float, bool, int (a whole
                        number) or Literal[...] (one of these names)
    Annotated[X, SomeStatistic(...)]   something the engine finds out first, handed over per tile;
                        it may refer to knobs and statistics that are declared before it
    base: Base          the base's rows of the tile
    return type         `Rows`: called for every tile; `Coefficients`: called once per tensor,
                        with None for the stack and the knobs of all models; `Core`, of a method
                        on cores: called once per tensor

A method may be written in torch: `Annotated[torch.Tensor, "deltas"]`, or "weights" or "either",
stands for the stack, `torch.Tensor` for PerModel and Rows.

A parameter whose name is a Python keyword carries a trailing underscore: `lambda_`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from inspect import Parameter, signature
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from streammerge.arrays import Base, Core, Cores, Deltas, PerModel, Rows, Vectors, Weights
from streammerge.declarations import (
    Coefficients,
    Declared,
    Knob,
    Knobs,
    MethodSpec,
    Space,
    Statistic,
)
from streammerge.methods.on_torch import is_tensor, on_arrays

_SPACES: Mapping[Any, Space] = {
    Deltas: "deltas",
    Weights: "weights",
    Vectors: "either",
    Cores: "cores",
}


def method(
    *,
    models: tuple[int, int | None] = (1, None),
    reference: str = "",
    temporaries: int | None = None,
    nanoseconds: float = 0.0,
    check: Callable[..., str | None] | None = None,
    alone: Callable[[Knobs], float | None] | None = None,
) -> Callable[[Callable[..., Any]], MethodSpec]:
    """Register a typed function as a merge method, named like the function.

    `models` bounds how many models take part; `reference` is the paper; `temporaries` is how many
    buffers of a tile's rows the function allocates itself, which the plan counts (by default one
    for each model, and one); `nanoseconds` is what it costs for each element of a model beyond
    the usual, measured on one core, for the predicted time. `check` says what is wrong with a
    model's knobs, which its parameters name, taken together. `alone` says by which factor the
    delta of a model that touches a tensor alone is added as it is, None where it is not: the
    tensor is then read once, and one that replaces the base's is copied. Raises TypeError when
    the signature leaves an argument undeclared.
    """

    def register(function: Callable[..., Any]) -> MethodSpec:
        return replace(
            _declare(function),
            models=models,
            reference=reference,
            temporaries=temporaries,
            nanoseconds=nanoseconds,
            check=check,
            alone=alone,
        )

    return register


def _declare(function: Callable[..., Any]) -> MethodSpec:
    hints = get_type_hints(function, include_extras=True)
    first, *others = signature(function).parameters.values()
    per_model: dict[str, Knob] = {}
    shared: dict[str, Knob] = {}
    statistics: dict[str, Statistic] = {}
    wants_base = any(hints.get(parameter.name) == Base for parameter in others)
    for parameter in others:
        if hints.get(parameter.name) == Base:
            continue
        kind, declared = _annotation(function, parameter, hints)
        name = parameter.name.rstrip("_")
        if not isinstance(declared, Knob):
            known = Declared(frozenset(per_model), frozenset(shared), frozenset(statistics))
            declared.check(known)
            statistics[parameter.name] = declared
        elif kind == PerModel or is_tensor(kind):
            per_model[name] = declared
        else:
            shared[name] = _of_type(declared, kind)
    space = _space(function, hints.get(first.name))
    on_torch = is_tensor(hints.get(first.name))
    return MethodSpec(
        name=function.__name__,
        function=on_arrays(function) if on_torch else function,
        on_torch=on_torch,
        space=space,
        returns=_returns(function, space, hints.get("return")),
        per_model=MappingProxyType(per_model),
        shared=MappingProxyType(shared),
        statistics=MappingProxyType(statistics),
        wants_base=wants_base,
    )


def _of_type(knob: Knob, kind: Any) -> Knob:
    """What the type of a shared parameter says of its values."""
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    return replace(knob, whole=kind is int, choices=choices)


def _annotation(
    function: Callable[..., Any], parameter: Parameter, hints: Mapping[str, Any]
) -> tuple[Any, Any]:
    """`(type, declaration)` of an `Annotated[type, declaration]` keyword-only argument."""
    hint = hints.get(parameter.name)
    if get_origin(hint) is not Annotated or parameter.kind is not Parameter.KEYWORD_ONLY:
        raise TypeError(
            f"{function.__name__}: {parameter.name} must be keyword-only and "
            f"Annotated[type, Knob(...) or a statistic]"
        )
    kind, declared, *_ = get_args(hint)
    if not isinstance(declared, Knob) and not hasattr(declared, "start"):
        raise TypeError(f"{function.__name__}: {parameter.name} declares no Knob and no statistic")
    return kind, declared


def _space(function: Callable[..., Any], hint: Any) -> Space:
    if is_tensor(hint) and get_args(hint)[1:] and get_args(hint)[1] in get_args(Space):
        space: Space = get_args(hint)[1]
        return space
    if hint not in _SPACES:
        raise TypeError(
            f"{function.__name__}: the first argument must be Deltas, Weights, Vectors or Cores"
        )
    return _SPACES[hint]


def _returns(
    function: Callable[..., Any], space: Space, hint: Any
) -> Literal["rows", "coefficients", "core"]:
    if space == "cores":
        if hint == Core:
            return "core"
        raise TypeError(f"{function.__name__}: the return type must be Core, as it is of Cores")
    if hint is Coefficients:
        return "coefficients"
    if hint == Rows or is_tensor(hint):
        return "rows"
    raise TypeError(f"{function.__name__}: the return type must be Rows or Coefficients")


def load(package: str, names: Iterable[str]) -> Mapping[str, MethodSpec]:
    """The methods of a package, one module each that defines a method of the module's name."""
    found: dict[str, MethodSpec] = {}
    for name in names:
        spec = getattr(importlib.import_module(f"{package}.{name}"), name, None)
        if not isinstance(spec, MethodSpec):
            raise TypeError(f"{package}.{name} defines no @method called {name}")
        found[name] = spec
    return MappingProxyType(found)
