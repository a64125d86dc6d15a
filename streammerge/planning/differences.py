"""What sets two merges apart, in words: told when a result or a half-done one is of another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import ndiff
from typing import Any

from streammerge.planning.fingerprint import Identity

_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Differences:
    """Lines, each one thing that differs."""

    merge: tuple[str, ...]  # recipe, inputs, grid, version: another merge
    elsewhere: tuple[str, ...]  # the machine and its libraries: the last bits may differ

    def __bool__(self) -> bool:
        return bool(self.merge or self.elsewhere)


def differences(then: Identity, now: Identity) -> Differences:
    """What changed between two merges; empty when their outputs are the same byte for byte."""
    merge = [
        *_of_recipes(then.recipe, now.recipe),
        *_of_inputs(then.inputs, now.inputs),
        *_of_layouts(then.layout, now.layout),
        *_changed("grid", then.grid, now.grid),
        *_changed("streammerge", then.version, now.version),
    ]
    names = sorted({*then.environment, *now.environment})
    elsewhere = [
        line
        for name in names
        for line in _changed(name, then.environment.get(name), now.environment.get(name))
    ]
    return Differences(tuple(merge), tuple(elsewhere))


def _changed(name: str, then: object, now: object) -> Iterator[str]:
    if then != now:
        yield f"{name}: {_shown(then)} then, {_shown(now)} now"


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _of_recipes(then: str, now: str) -> Iterator[str]:
    lines = [line for line in ndiff(then.splitlines(), now.splitlines()) if line[0] in "-+"]
    for line in lines[:_SHOWN]:
        yield f"the recipe had `{line[2:]}`" if line[0] == "-" else f"the recipe has `{line[2:]}`"
    if len(lines) > _SHOWN:
        yield f"{len(lines) - _SHOWN} more lines of the recipe"


def _of_inputs(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    yield from _of_weights("the base model", then.get("base"), now.get("base"))
    before = {model["name"]: model for model in then.get("models", [])}
    for model in now["models"]:
        name, known = model["name"], before.get(model["name"])
        if known is None:
            continue  # the recipe says so
        yield from _of_weights(name, known.get("weights"), model["weights"])
        yield from _of_weights(name, known.get("adapter"), model.get("adapter"))
        if known.get("adapter_config_sha256") != model.get("adapter_config_sha256"):
            yield f"adapter_config.json of {name}"
    files = {**then.get("donated", {})}, now["donated"]
    for file in sorted({*files[0], *files[1]}):
        if files[0].get(file) != files[1].get(file):
            yield f"{file}, which the output takes over"


def _of_weights(
    name: str, then: Mapping[str, Any] | None, now: Mapping[str, Any] | None
) -> Iterator[str]:
    if then == now:
        return
    if then is None or now is None or then.get("tensors") != now.get("tensors"):
        count = [f"{one.get('tensors')} tensors" if one else "none" for one in (then, now)]
        yield f"the weights of {name}: {count[0]} then, {count[1]} now"
    elif then.get("specs_sha256") != now.get("specs_sha256"):
        yield f"names, types or shapes of the weights of {name}"
    else:
        yield f"the weights of {name}"


def _of_layouts(then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    if then != now:
        yield "the files of the output: other shards, types, or another order of the tensors"
