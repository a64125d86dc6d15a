"""The catalogue of methods as text, from the signatures themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streammerge.errors import ConfigError
from streammerge.methods import CATALOGUE
from streammerge.words import Knob, Knobs, KnobValue, MethodSpec


def _find(name: str) -> MethodSpec:
    if name not in CATALOGUE:
        from streammerge.recipe.wording import nearest  # brings pydantic: only for an error

        near = nearest(name, CATALOGUE)
        raise ConfigError(
            "no such merge method",
            found=name,
            expected=", ".join(CATALOGUE),
            remedy=f"did you mean {near}?" if near else "`streammerge methods` lists them",
        )
    return CATALOGUE[name]


def catalogue(name: str | None = None) -> list[dict[str, Any]]:
    """For `--json`: one entry per method."""
    chosen = [_find(name)] if name else list(CATALOGUE.values())
    return [
        {
            "name": spec.name,
            "about": spec.about,
            "needs_base": spec.needs_base,
            "reads": _reads(spec),
            "per_model": {k: _knob(v) for k, v in spec.per_model.items()},
            "shared": {k: _knob(v) for k, v in spec.shared.items()},
            "reference": spec.reference,
        }
        for spec in chosen
    ]


def overview() -> str:
    """A line for each method: parameters, how often a tensor is read, what it does."""
    lines = []
    for spec in CATALOGUE.values():
        parameters = ", ".join([*spec.per_model, *spec.shared])
        about = spec.about.splitlines()[0]
        lines += [f"{spec.name:<16} {about}", f"{'':<16} {parameters}; {_read_words(spec)}"]
    return "\n".join([*lines, "", "`streammerge methods NAME` explains one."])


def explain(name: str) -> str:
    """One method with its parameters and an example."""
    spec = _find(name)
    lines = [spec.name, "", *(line.strip() for line in spec.about.splitlines()), ""]
    lines += _knob_lines("parameters of each model", spec.per_model)
    lines += _knob_lines("parameters of the merge", spec.shared)
    lines += [f"a tensor is {_read_words(spec)}"]
    if spec.reference:
        lines += [spec.reference]
    return "\n".join([*lines, "", "example", *(f"    {line}" for line in _example(spec))])


def _knob(knob: Knob) -> dict[str, Any]:
    return {"default": knob.default, "bounds": knob.bounds(), "about": knob.about}


def _knob_lines(title: str, knobs: Mapping[str, Knob]) -> list[str]:
    if not knobs:
        return []
    lines = [title]
    for name, knob in knobs.items():
        default = "required" if knob.default is None else f"default {_value(knob.default)}"
        bounds = f", {knob.bounds()}" if knob.bounds() else ""
        lines.append(f"    {name:<12} {knob.about} ({default}{bounds})")
    return [*lines, ""]


def _value(value: KnobValue) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


def _reads(spec: MethodSpec) -> int:
    """How often a tensor is read at most, the merge included."""
    import numpy as np

    pruned = {name: np.array([0.5]) for name in spec.per_model}
    knobs = Knobs(pruned, {}, 1, (0,))
    return 1 + max((one.reads(knobs) for one in spec.statistics.values()), default=0)


def _read_words(spec: MethodSpec) -> str:
    reads = _reads(spec)
    if reads == 1:
        return "read once"
    return f"read {reads} times, once where no statistic is needed"


def _example(spec: MethodSpec) -> list[str]:
    density = ", density: 0.6" if "density" in spec.per_model else ""
    parameter = "weight: 0.5" if "weight" in spec.per_model else next(iter(spec.per_model)) + ": 1"
    entries = [f"  - {{path: ./lora-math, {parameter}{density}}}"]
    if spec.models[1] != 1:
        entries.append(f"  - {{path: ./lora-code, {parameter}{density}}}")
    return ["base_model: ./llama", f"merge_method: {spec.name}", "adapters:", *entries]
