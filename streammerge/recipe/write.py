"""A Recipe -> its canonical YAML, which reads back to an equal recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import yaml

from streammerge.recipe.document import RESOLVERS, YAML_TAG
from streammerge.recipe.references import is_plain, without_folders, written
from streammerge.recipe.values import Entry, Recipe, Reference
from streammerge.recipe.varying import plain
from streammerge.words import FLOAT_NAMES


def to_yaml(recipe: Recipe, *, portable: bool = False) -> str:
    """The canonical YAML: every parameter that applies is written out.

    `portable` is for the output's folder, whose files must not depend on where anything lies:
    paths are reduced to their last part and the output's path is left out.
    """
    subject = _portable(recipe) if portable else recipe
    first = _first_shorthand(subject)
    dtypes = {dtype: name for name, dtype in FLOAT_NAMES.items()}
    document: dict[str, Any] = {
        "base_model": subject.base and written(subject.base, None, subject.folder),
        "merge_method": subject.method.name,
        "models": [_model(entry, subject) for entry in subject.entries[:first]],
        "adapters": [
            _adapter(entry, entry.adapter) for entry in subject.entries[first:] if entry.adapter
        ],
        "parameters": plain(subject.shared),
        "space": None if subject.space == "full" else subject.space,
        "isotropize": subject.isotropize or None,
        "out_dtype": subject.out_dtype and dtypes[subject.out_dtype],
        "seed": subject.seed,
        "tokenizer_source": subject.tokenizer,
        "output": _output(subject),
    }
    text = dump({key: value for key, value in document.items() if value not in (None, [], {})})
    if portable and recipe.method.digest:  # of the user's own: another file is another merge
        text += f"# {subject.method.name}: sha256 {recipe.method.digest}\n"
    return text


def dump(document: Mapping[str, Any]) -> str:
    """YAML of plain values that this package's reader, and PyYAML's own, read back to them."""
    # One line per entry, however long its paths are: places then say which entry is meant.
    return yaml.dump(
        dict(document),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=None,
        width=10**6,
    )


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or our reader would take for anything but text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in RESOLVERS:
    _Dumper.add_implicit_resolver(YAML_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), list(_first))


def _first_shorthand(recipe: Recipe) -> int:
    """The first entry from which on all can stand under `adapters`, which come after `models`."""
    first = len(recipe.entries)
    while first and _is_shorthand(recipe.entries[first - 1], recipe.base):
        first -= 1
    return first


def _is_shorthand(entry: Entry, base: Reference | None) -> bool:
    return base == entry.model and entry.adapter is not None and is_plain(entry.adapter)


def _model(entry: Entry, recipe: Recipe) -> dict[str, Any]:
    reference = written(entry.model, entry.adapter, recipe.folder)
    knobs = {"parameters": plain(entry.knobs)} if entry.knobs else {}
    return {"model": reference, "name": entry.name} | _residual(entry) | knobs


def _adapter(entry: Entry, adapter: Reference) -> dict[str, Any]:
    revision = {"revision": adapter.revision} if adapter.revision else {}
    named = {"path": adapter.text} | revision | {"name": entry.name}
    return named | _residual(entry) | plain(entry.knobs)


def _residual(entry: Entry) -> dict[str, bool]:
    return {"assume_residual_base": True} if entry.assume_residual_base else {}


def _output(recipe: Recipe) -> str | dict[str, Any] | None:
    if recipe.shard_bytes is None and recipe.kind == "model":
        return recipe.output
    said: dict[str, Any] = {
        "path": recipe.output,
        "kind": None if recipe.kind == "model" else recipe.kind,
        "rank": recipe.rank,
        "energy": recipe.energy,
        "error": recipe.error,
        "save": None if recipe.saved is None else list(recipe.saved),
        "shard_size": recipe.shard_bytes,
    }
    return {key: value for key, value in said.items() if value is not None}


def _portable(recipe: Recipe) -> Recipe:
    entries = (
        replace(
            entry,
            model=_without_folders(entry.model, recipe.folder),
            adapter=entry.adapter and _without_folders(entry.adapter, recipe.folder),
        )
        for entry in recipe.entries
    )
    base = recipe.base and _without_folders(recipe.base, recipe.folder)
    method = replace(recipe.method, name=PurePath(recipe.method.name).name)
    return replace(recipe, method=method, base=base, entries=tuple(entries), output=None)


def _without_folders(reference: Reference, folder: Path) -> Reference:
    return replace(reference, text=without_folders(reference.text, folder))
