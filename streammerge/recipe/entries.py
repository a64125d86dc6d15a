"""`models`, `slices`, `adapters` -> drafts of the entries, before the method is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streammerge.errors import ConfigError, Place, Problems
from streammerge.recipe.document import Document
from streammerge.recipe.references import default_name, identity, parse_part, parse_reference
from streammerge.recipe.schema import (
    AdapterShape,
    EntryShape,
    PairShape,
    PathShape,
    RecipeShape,
    SliceShape,
    SourceShape,
    shaped,
)
from streammerge.recipe.setting import Setting, settings
from streammerge.recipe.values import Reference
from streammerge.recipe.wording import KeyPath

Pair = tuple[Reference, Reference | None]

SLICE: KeyPath = ("slices", 0)


@dataclass(frozen=True, slots=True)
class Draft:
    """An entry whose parameters are not sorted yet; `name` is None where the recipe gives none."""

    name: str | None
    model: Reference
    adapter: Reference | None
    own: list[Setting]
    place: Place
    assume_residual_base: bool = False
    layers: int | None = None


class Drafts:
    """Reads references and entries of a document; adds every problem to `problems`."""

    def __init__(self, document: Document, folder: Path, problems: Problems) -> None:
        self._document = document
        self._folder = folder
        self._problems = problems

    def base(self, shape: RecipeShape) -> Reference | None:
        """The base model."""
        if shape.base_model is None:
            return None
        base, adapter = self._reference(shape.base_model, ("base_model",)) or (None, None)
        if adapter:
            self._problems.add(
                ConfigError(
                    "base_model with an adapter is not supported yet",
                    where=adapter.place,
                    found=f"the adapter {adapter.text!r}",
                    expected="a model alone",
                    remedy="merge that adapter into the base first, and name the result here",
                )
            )
        return base

    def all(self, shape: RecipeShape, base: Reference | None) -> list[Draft]:
        """Models first, then adapters, in the order of the file; or those of a slice."""
        drafts = [*self._models(len(shape.models or ())), *self._of_slice(shape)]
        if shape.adapters and self._document.root.get("base_model") is None:
            self._problems.add(_no_base(self._document.spot(("adapters",)).key))
        for i in range(len(shape.adapters or ())):
            adapted = self._adapter(("adapters", i), base)
            drafts += [adapted] if adapted else []
        self._check_names(drafts)
        self._check_twice(drafts)
        return drafts

    def _models(self, count: int) -> Iterator[Draft]:
        for i in range(count):
            path: KeyPath = ("models", i)
            entry = shaped(EntryShape, self._document, path, self._problems)
            draft = self._draft(entry, path) if entry else None
            if draft:
                yield draft

    def _of_slice(self, shape: RecipeShape) -> list[Draft]:
        """The sources of the only slice: whole models, of as many layers as it says."""
        if shape.slices is None:
            return []
        self._check_slices(shape, len(shape.slices))
        found = shaped(SliceShape, self._document, SLICE, self._problems) if shape.slices else None
        drafts: list[Draft] = []
        for i in range(len(found.sources) if found else 0):
            path: KeyPath = (*SLICE, "sources", i)
            source = shaped(SourceShape, self._document, path, self._problems)
            draft = self._draft(source, path) if source else None
            if source and draft:
                first = drafts[0].layers if drafts else None
                self._check_range(source.layer_range, first, (*path, "layer_range"))
                drafts.append(replace(draft, layers=source.layer_range[1]))
        return drafts

    def _check_slices(self, shape: RecipeShape, count: int) -> None:
        for key in ("models", "adapters"):
            if getattr(shape, key) is not None:
                self._problems.add(
                    ConfigError(
                        f"slices and {key} exclude each other",
                        where=self._document.spot(("slices",)).key,
                        found=f"`slices` beside `{key}`",
                        expected="one of them",
                        remedy=f"remove `slices`, or list what is under `{key}` as its sources",
                    )
                )
        if count != 1:
            where = ("slices", 1) if count else ("slices",)
            self._problems.add(_partial(self._document.spot(where).value, f"{count} slices"))

    def _check_range(self, span: list[int], count: int | None, path: KeyPath) -> None:
        """A part of the layers cannot be had yet, and all sources are equally long."""
        where, found = self._document.spot(path).value, f"[{span[0]}, {span[1]}]"
        if span[0] != 0 or span[1] < 1:
            self._problems.add(_partial(where, found))
        elif count is not None and span[1] != count:
            self._problems.add(
                ConfigError(
                    "the sources of a slice are not equally long",
                    where=where,
                    found=found,
                    expected=f"{count} layers, as of the first",
                    remedy="give all sources the same number of layers",
                )
            )

    def _draft(self, entry: EntryShape, path: KeyPath) -> Draft | None:
        pair = self._reference(entry.model, (*path, "model"))
        if pair is None:
            return None
        own = settings(self._document, (*path, "parameters"), entry.parameters or ())
        residual = bool(entry.assume_residual_base)
        if residual and pair[1] is None:
            place = self._document.spot((*path, "assume_residual_base")).key
            self._problems.add(_no_adapter(place))
        return Draft(entry.name, *pair, own, self._document.spot(path).value, residual)

    def _adapter(self, path: KeyPath, base: Reference | None) -> Draft | None:
        entry = shaped(AdapterShape, self._document, path, self._problems)
        if entry is None:
            return None
        place = self._document.spot((*path, "path")).value
        try:
            adapter = (
                Reference(entry.path, entry.revision, place)
                if entry.revision
                else parse_part(entry.path, entry.path, place, self._folder)
            )
        except ConfigError as problem:
            self._problems.add(problem)
            return None
        if base is None:
            return None
        own = settings(self._document, path, entry.model_extra or ())
        own += settings(self._document, (*path, "parameters"), entry.parameters or ())
        spot, residual = self._document.spot(path), bool(entry.assume_residual_base)
        return Draft(entry.name, base, adapter, own, spot.value, residual)

    def _reference(self, value: str | dict[str, Any], path: KeyPath) -> Pair | None:
        place = self._document.spot(path).value
        if isinstance(value, str):
            try:
                return parse_reference(value, place, self._folder)
            except ConfigError as problem:
                self._problems.add(problem)
                return None
        pair = shaped(PairShape, self._document, path, self._problems)
        model = self._literal((*path, "model")) if pair else None
        adapter = self._literal((*path, "lora")) if pair and pair.lora is not None else None
        return (model, adapter) if model else None

    def _literal(self, path: KeyPath) -> Reference | None:
        shape = shaped(PathShape, self._document, path, self._problems)
        place = self._document.spot((*path, "path")).value
        return Reference(shape.path, shape.revision, place) if shape else None

    def _check_names(self, drafts: list[Draft]) -> None:
        first: dict[str, Draft] = {}
        for draft in drafts:
            if draft.name and first.setdefault(draft.name, draft) is not draft:
                self._problems.add(
                    ConfigError(
                        "two models have the same name",
                        where=draft.place,
                        found=f"{draft.name!r}, as at {first[draft.name].place}",
                        expected="a `name` of its own for each",
                        remedy="change one of the names",
                    )
                )

    def _check_twice(self, drafts: list[Draft]) -> None:
        first: dict[object, Draft] = {}
        for draft in drafts:
            parts = (draft.model, draft.adapter) if draft.adapter else (draft.model,)
            same = tuple(identity(part, self._folder) for part in parts)
            other = first.setdefault(same, draft)
            if other is not draft and not (draft.name and other.name):
                self._problems.add(_twice(draft, other))


def unique_names(drafts: list[Draft]) -> list[str]:
    """The names that the recipe gives, and for the others the last part of the path.

    Where that is taken, it gets the first number that makes it unique: `lora-2`.
    """
    taken = {draft.name for draft in drafts if draft.name}
    names = []
    for draft in drafts:
        name = draft.name
        if name is None:
            stem = default_name(draft.adapter or draft.model)
            name, number = stem, 2
            while name in taken:
                name, number = f"{stem}-{number}", number + 1
            taken.add(name)
        names.append(name)
    return names


def _partial(where: Place, found: str) -> ConfigError:
    return ConfigError(
        "slices that take models apart are not supported yet",
        where=where,
        found=found,
        expected="one slice, of all layers of its models: layer_range [0, number of layers]",
        remedy="merge whole models, or cut them with mergekit first",
    )


def _no_base(where: Place) -> ConfigError:
    return ConfigError(
        "base_model is missing",
        where=where,
        found="`adapters` without `base_model`",
        expected="the model that the adapters were trained on",
        remedy="add `base_model: ...` at the top level",
    )


def _no_adapter(where: Place) -> ConfigError:
    return ConfigError(
        "assume_residual_base stands beside a model without an adapter",
        where=where,
        found="assume_residual_base: true",
        expected="a model with an adapter, such as path+adapter",
        remedy="remove it here; it belongs to the adapter whose training changed its base",
    )


def _twice(draft: Draft, first: Draft) -> ConfigError:
    what = draft.model.text + (f" with {draft.adapter.text}" if draft.adapter else "")
    return ConfigError(
        "the same model is listed twice",
        where=draft.place,
        found=f"{what!r}, as at {first.place}",
        expected="each model and adapter once",
        remedy="remove one, or give each a different `name` if both are meant",
    )
