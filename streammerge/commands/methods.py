"""The catalogue of methods as text, from the signatures themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import wrap
from typing import Any

from streammerge import grid
from streammerge.declarations import Knob, Knobs, KnobValue, MethodSpec
from streammerge.errors import ConfigError
from streammerge.methods import CATALOGUE, WithOwn
from streammerge.sizes import format_size
from streammerge.sources import applied, together
from streammerge.sources.needs import Needs
from streammerge.words import DType, TensorSpec

# A tensor such as a large model is made of.
_TENSOR = TensorSpec("w", (4096, 4096), DType.BF16)
_INDENT = " " * 18
_WIDTH = 100


def _find(name: str) -> MethodSpec:
    methods = WithOwn(CATALOGUE, (Path.cwd(),))
    found = methods.get(name)
    if found is None:
        from streammerge.recipe.wording import nearest  # brings pydantic: only for an error

        names = [*CATALOGUE, *methods.offered()]
        near = nearest(name, names)
        raise ConfigError(
            "no such merge method",
            found=name,
            expected=", ".join(names),
            remedy=f"did you mean {near}?" if near else "`streammerge methods` lists them",
        )
    return found


def _all() -> list[MethodSpec]:
    """Ours, then those of installed packages."""
    offered = WithOwn(CATALOGUE, ()).offered()
    return [*CATALOGUE.values(), *map(_find, offered)]


def catalogue(name: str | None = None) -> list[dict[str, Any]]:
    """For `--json`: one entry per method."""
    chosen = [_find(name)] if name else _all()
    return [
        {
            "name": spec.name,
            "about": spec.about,
            "needs_base": spec.needs_base,
            "reads": dict(zip(("least", "most"), _reads(spec), strict=True)),
            "memory": _memory(spec),
            "per_model": {k: _knob(v) for k, v in spec.per_model.items()},
            "shared": {k: _knob(v) for k, v in spec.shared.items()},
            "reference": spec.reference,
        }
        for spec in chosen
    ]


def overview() -> str:
    """Some lines for each method: what it does, parameters, reads, memory, paper."""
    lines = []
    for spec in _all():
        about = spec.about.splitlines()[0]
        parameters = ", ".join([*spec.per_model, *spec.shared]) or "no parameters"
        facts = f"{parameters}; {_read_words(spec)}; {_tiles(spec)}"
        facts += f"; {spec.reference}" if spec.reference else ""
        lines += [f"{spec.name:<18}{about}"]
        lines += [_INDENT + line for line in wrap(facts, _WIDTH - len(_INDENT))]
    return "\n".join([*lines, "", "`streammerge methods NAME` explains one."])


def explain(name: str) -> str:
    """One method with its parameters and an example."""
    spec = _find(name)
    lines = [spec.name, "", *(line.strip() for line in spec.about.splitlines()), ""]
    lines += _knob_lines("parameters of each model", spec.per_model)
    lines += _knob_lines("parameters of the merge", spec.shared)
    lines += [f"a tensor is {_read_words(spec)}", f"memory: {_memory(spec)}"]
    if spec.reference:
        lines += [spec.reference]
    return "\n".join([*lines, "", "example", *(f"    {line}" for line in _example(spec))])


def _knob(knob: Knob) -> dict[str, Any]:
    choices = {"choices": list(knob.choices)} if knob.choices else {}
    return {"default": knob.default, "bounds": knob.bounds(), **choices, "about": knob.about}


def _knob_lines(title: str, knobs: Mapping[str, Knob]) -> list[str]:
    if not knobs:
        return []
    lines = [title]
    for name, knob in knobs.items():
        default = "required" if knob.default is None else f"default {_value(knob.default)}"
        bounds = f", {knob.bounds()}" if knob.bounds() else ""
        choices = f"{' | '.join(knob.choices)}: " if knob.choices else ""
        about = f"{choices}{knob.about} ({default}{bounds})"
        first, *rest = wrap(about, _WIDTH - len(_INDENT) - 4)
        lines += [f"    {name:<18}{first}", *(f"    {_INDENT}{line}" for line in rest)]
    return [*lines, ""]


def _value(value: KnobValue) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else f"{value:g}"


def _reads(spec: MethodSpec) -> tuple[int, int]:
    """How often a tensor is read at least and at most, the merge included."""
    counts = [1 + len(Needs(spec, knobs, _TENSOR).waves()) for knobs in _settings(spec)]
    return min(counts), max(counts)


def _settings(spec: MethodSpec) -> Iterator[Knobs]:
    """The defaults, with everything kept and with half of it; and each other setting of one."""
    import numpy as np

    shared = {k: 0.5 if v.default is None else v.default for k, v in spec.shared.items()}
    changes = [{}, *({name: other} for name, v in spec.shared.items() for other in _others(v))]
    for share in (1.0, 0.5):
        per_model = {name: np.full(2, share) for name in spec.per_model}
        for change in changes:
            yield Knobs(per_model, {**shared, **change}, 2, (0, 1))


def _others(knob: Knob) -> Iterator[KnobValue]:
    if isinstance(knob.default, bool):
        yield not knob.default
    elif knob.choices:
        yield from knob.choices
    elif knob.allows(0.5) and not knob.whole:
        yield 0.5


def _read_words(spec: MethodSpec) -> str:
    least, most = _reads(spec)
    if most == 1:
        return "read once"
    return f"read {most} times" if least == most else f"read {least} to {most} times"


def _tiles(spec: MethodSpec) -> str:
    """How many tiles a thread holds, as a function of the number of models."""
    needs = Needs(spec, list(_settings(spec))[-1], _TENSOR)
    if spec.returns != "rows":
        # Without statistics, all models go into one sum; so do the factors of a merged core.
        one, two = (together.tiles_held(n) for n in (1, 2)) if needs.waves() else (3, 3)
    else:
        one, two = (applied.tiles_held(spec, needs, n) for n in (1, 2))
    each = {0: "", 1: " + models"}.get(two - one, f" + {two - one} x models")
    return f"{2 * one - two}{each} tiles a thread"


def _memory(spec: MethodSpec) -> str:
    """In words: of a thread, and of a tensor's statistics."""
    tile = format_size(4 * grid.TILE_ELEMENTS)
    most = 0
    for knobs in _settings(spec):
        most = max(most, Needs(spec, knobs, _TENSOR).state_bytes()[1])
    state = f", up to {format_size(most)} for the statistics of a tensor" if most >> 20 else ""
    return f"{_tiles(spec)}, {tile} each{state}"


def _example(spec: MethodSpec) -> list[str]:
    knobs = {"weight": "0.5", "density": "0.6", "scale": "1"}
    own = ", ".join(f"{name}: {value}" for name, value in knobs.items() if name in spec.per_model)
    own = f", {own}" if own else ""
    names = ("math", "code") if spec.models[1] != 1 else ("math",)
    entries = [f"  - {{path: ./lora-{name}{own}}}" for name in names]
    needed = [name for name, knob in spec.shared.items() if knob.default is None]
    shared = ", ".join(f"{name}: 0.5" for name in needed)
    parameters = [f"parameters: {{{shared}}}"] if needed else []
    return ["base_model: ./llama", f"merge_method: {spec.name}", "adapters:", *entries, *parameters]
