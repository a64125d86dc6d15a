"""From the names in a recipe to opened folders: headers only, all problems at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from streammerge.adapters import (
    AdapterFolder,
    ResolvedAdapter,
    open_adapter,
    resolve_adapter,
    with_named_head,
)
from streammerge.errors import ConfigError, Problems, StreammergeError
from streammerge.recipe import Entry, Recipe, Reference
from streammerge.storage.bytesource import Stamp
from streammerge.storage.folder import ModelFolder, open_model
from streammerge.storage.header import Header
from streammerge.storage.pickles import Pickles
from streammerge.storage.references import display_name, resolve

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Model:
    """An entry of the recipe with its folders opened."""

    name: str
    folder: ModelFolder
    adapter: ResolvedAdapter | None
    on_base: bool  # whether its own folder is the merge's base

    def takes_part(self, tensor: str) -> bool:
        """A full model does everywhere, an adapter of the base where it has an update."""
        return self.adapter is None or not self.on_base or tensor in self.adapter.updates

    def stores(self, tensor: str, path: str) -> bool:
        """Whether the file at `path` is where this model's tensor lies."""
        if self.adapter and tensor in self.adapter.updates:
            return self.adapter.folder.header.path == path
        own = self.folder.tensors.get(tensor)
        return own is not None and own.path == path


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything that a merge reads from."""

    base: ModelFolder | None
    models: tuple[Model, ...]

    @property
    def donor(self) -> ModelFolder:
        """The folder that gives names, shapes, dtypes, config and tokenizer."""
        return self.base or self.models[0].folder

    def headers(self) -> tuple[Header, ...]:
        """Of every file of weights, each once, in the order of the recipe."""
        found: dict[str, Header] = {}
        folders = [*([self.base] if self.base else []), *(model.folder for model in self.models)]
        for folder in folders:
            found.update({header.path: header for header in folder.shards})
        for model in self.models:
            if model.adapter:
                header = model.adapter.folder.header
                found[header.path] = header
        return tuple(found.values())

    def stamps(self) -> Mapping[str, Stamp]:
        return {h.path: Stamp(h.size_bytes, h.mtime_ns, h.inode) for h in self.headers()}


class _Opener:
    """Opens each folder once, and keeps what went wrong."""

    def __init__(self, recipe: Recipe, problems: Problems, pickles: Pickles | None) -> None:
        self._places: Sequence[Path] = (recipe.folder, Path.cwd())
        self._problems = problems
        self._pickles = pickles
        self._models: dict[str, ModelFolder | None] = {}

    def path(self, reference: Reference) -> Path | None:
        text, revision = reference.text, reference.revision
        return self._try(lambda: resolve(text, revision, self._places), reference)

    def model(self, reference: Reference) -> ModelFolder | None:
        path = self.path(reference)
        if path is None:
            return None
        key = os.path.realpath(path)
        if key not in self._models:
            opened = lambda: open_model(path, self._pickles)  # noqa: E731
            self._models[key] = self._try(opened, reference)
        return self._models[key]

    def adapter(self, entry: Entry) -> AdapterFolder | None:
        path = self.path(entry.adapter) if entry.adapter else None
        if path is None or entry.adapter is None:
            return None
        residual = entry.assume_residual_base
        opened = lambda: open_adapter(  # noqa: E731
            path, entry.name, self._pickles, assume_residual_base=residual
        )
        return self._try(opened, entry.adapter)

    def resolved(
        self, entry: Entry, folder: AdapterFolder | None, model: ModelFolder
    ) -> ResolvedAdapter | None:
        if folder is None or entry.adapter is None:
            return None
        resolved = lambda: resolve_adapter(folder, model.tensors, model.config, model.ties)  # noqa: E731
        return self._try(resolved, entry.adapter)

    def _try(self, action: Callable[[], _T], reference: Reference) -> _T | None:
        try:
            return action()
        except StreammergeError as error:
            error.where = error.where or reference.place
            self._problems.add(error)
            return None


def open_inputs(
    recipe: Recipe, problems: Problems, pickles: Pickles | None = None
) -> Inputs | None:
    """Open everything that the recipe names; None when something could not be opened."""
    opener = _Opener(recipe, problems, pickles)
    before = len(problems)
    base = opener.model(recipe.base) if recipe.base else None
    opened = [(entry, opener.model(entry.model), opener.adapter(entry)) for entry in recipe.entries]
    named = _with_named_heads((folder, adapter) for _, folder, adapter in opened)
    base = named.get(base.path, base) if base else None
    models = []
    for entry, folder, adapter in opened:
        if folder is not None:
            folder = named.get(folder.path, folder)
            resolved = opener.resolved(entry, adapter, folder)
            models.append(Model(entry.name, folder, resolved, folder is base))
    if len(problems) > before:
        return None
    inputs = Inputs(base, tuple(models))
    _refuse_twins(recipe, inputs, problems)
    return inputs


def _with_named_heads(
    opened: Iterable[tuple[ModelFolder | None, AdapterFolder | None]],
) -> dict[Path, ModelFolder]:
    """The folders under adapters, with heads of unknown names that an adapter on them tells."""
    found: dict[Path, ModelFolder] = {}
    for folder, adapter in opened:
        if folder is not None and adapter is not None:
            known = found.get(folder.path, folder)
            found[folder.path] = with_named_head(known, adapter)
    return found


def _refuse_twins(recipe: Recipe, inputs: Inputs, problems: Problems) -> None:
    """Two entries of the same folder and adapter are most likely a slip."""
    seen: dict[tuple[str, str | None], str] = {}
    for entry, model in zip(recipe.entries, inputs.models, strict=True):
        adapter = os.path.realpath(model.adapter.folder.path) if model.adapter else None
        key = os.path.realpath(model.folder.path), adapter
        default = display_name(model.adapter.folder.path if model.adapter else model.folder.path)
        if key in seen and entry.name == default:
            problems.add(
                ConfigError(
                    f"the same model twice, as {seen[key]} and {entry.name}",
                    where=entry.place,
                    remedy="give them a name each if that is meant",
                )
            )
        seen.setdefault(key, entry.name)
