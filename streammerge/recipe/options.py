"""Options of a command line -> a Recipe, by the same road as a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streammerge.declarations import MethodSpec
from streammerge.errors import Problems
from streammerge.recipe.read import parse_recipe
from streammerge.recipe.references import existing_path
from streammerge.recipe.values import Recipe
from streammerge.recipe.write import dump

COMMAND_LINE = "<command line>"


def build_recipe(
    *,
    base: str | None,
    adapters: Sequence[str],
    models: Sequence[str],
    method: str,
    methods: Mapping[str, MethodSpec],
    problems: Problems,
    out_dtype: str | None = None,
    seed: int | None = None,
    output: str | None = None,
    shard_size: str | None = None,
) -> Recipe | None:
    """The recipe of a command line's options; problems and None as in `read_recipe`.

    An adapter or a model may end in `=WEIGHT`. Relative paths start at the working directory.
    """
    keys: dict[str, Any] = {
        "base_model": base,
        "merge_method": method,
        "models": [_model(*_weighted(option)) for option in models],
        "adapters": [_adapter(*_weighted(option)) for option in adapters],
        "out_dtype": out_dtype,
        "seed": seed,
        "output": {"path": output, "shard_size": shard_size} if shard_size else output,
    }
    text = dump({key: value for key, value in keys.items() if value not in (None, [])})
    return parse_recipe(text, COMMAND_LINE, Path(), methods, problems)


def extraction(
    *,
    tuned: str,
    base: str,
    ranks: Mapping[str, float | None],
    saved: Sequence[str],
    methods: Mapping[str, MethodSpec],
    problems: Problems,
    out_dtype: str | None = None,
    seed: int | None = None,
) -> Recipe | None:
    """The recipe of a fine-tune's difference from its base, as an adapter.

    `ranks` are the keys under `output` that say how large it may be: rank, energy, error.
    """
    asked = {key: value for key, value in ranks.items() if value is not None}
    keys: dict[str, Any] = {
        "base_model": base,
        "merge_method": "task_arithmetic",
        "models": [{"model": tuned}],
        "out_dtype": out_dtype,
        "seed": seed,
        "output": {"kind": "adapter", **asked, "save": list(saved)},
    }
    text = dump({key: value for key, value in keys.items() if value is not None})
    return parse_recipe(text, COMMAND_LINE, Path(), methods, problems)


def _weighted(option: str) -> tuple[str, float | None]:
    """`PATH=WEIGHT`; an existing path as a whole is that path, whatever it ends in."""
    path, equals, weight = option.rpartition("=")
    if not equals or existing_path(option, Path()):
        return option, None
    try:
        return path, float(weight)
    except ValueError:
        return option, None


def _model(path: str, weight: float | None) -> dict[str, Any]:
    return {"model": path} | ({} if weight is None else {"parameters": {"weight": weight}})


def _adapter(path: str, weight: float | None) -> dict[str, Any]:
    return {"path": path} | ({} if weight is None else {"weight": weight})
