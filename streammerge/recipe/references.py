"""`path@revision+adapter@revision` -> references to a model and an adapter."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePath

from streammerge.errors import ConfigError, Place
from streammerge.recipe.values import Reference

# A model's snapshot in the hub's cache, and in it the model's id with `--` for `/`.
_HUB_CACHE = re.compile(r"(?:^|/)models--([^/]+)/snapshots/[^/]+/?$")

_MAPPING_FORM = "{model: {path: ..., revision: ...}, lora: {path: ..., revision: ...}}"


def parse_reference(text: str, place: Place, folder: Path) -> tuple[Reference, Reference | None]:
    """The model and the adapter that a text names.

    A text that is an existing path as a whole is that path, whatever it holds.

    Raises ConfigError when a `+` or `@` is one too many or has nothing on one side.
    """
    if existing_path(text, folder):
        return Reference(text, None, place), None
    parts = text.split("+")
    if len(parts) > 2:
        raise _ambiguous(text, place, "one `+`, between the model and its adapter")
    model, *adapter = (parse_part(part, text, place, folder) for part in parts)
    return model, adapter[0] if adapter else None


def parse_part(part: str, text: str, place: Place, folder: Path) -> Reference:
    """`path@revision`, the one half of `text`; an existing path as a whole is that path."""
    if existing_path(part, folder):
        return Reference(part, None, place)
    path, at, revision = part.partition("@")
    if not path or "@" in revision or (at and not revision):
        raise _ambiguous(text, place, "a path, or a path, one `@` and a revision")
    return Reference(path, revision or None, place)


def existing_path(text: str, folder: Path) -> str | None:
    """The resolved path of a text that is one, from the recipe's folder or else from here."""
    for start in (folder, Path()):
        path = start / text
        if text and os.path.exists(path):
            return os.path.realpath(path)
    return None


def identity(reference: Reference, folder: Path) -> tuple[str, str | None]:
    """What two references to the same thing have in common."""
    return existing_path(reference.text, folder) or reference.text, reference.revision


def without_folders(text: str, folder: Path) -> str:
    """A reference that says nothing of where things lie: the last part of a path.

    A folder of the hub's cache becomes the model's id, and hub ids stay.
    """
    if cached := _HUB_CACHE.search(text):
        return cached[1].replace("--", "/")
    if text.startswith(("/", "~", ".")) or existing_path(text, folder):
        return PurePath(text).name or "model"
    return text


def default_name(reference: Reference) -> str:
    """The last part of the path or hub id."""
    if cached := _HUB_CACHE.search(reference.text):
        return cached[1].rpartition("--")[2]
    return PurePath(reference.text).name or "model"


def written(
    model: Reference, adapter: Reference | None, folder: Path
) -> str | dict[str, dict[str, str]]:
    """The text that `parse_reference` reads back to the two, or the mapping where none does."""
    parts = [part for part in (model, adapter) if part]
    text = "+".join(part.text + (f"@{part.revision}" if part.revision else "") for part in parts)
    if is_plain(model) and (adapter is None or is_plain(adapter)):
        whole_path = text != model.text and existing_path(text, folder)
        if not whole_path:
            return text
    return {
        key: {"path": part.text} | ({"revision": part.revision} if part.revision else {})
        for key, part in zip(("model", "lora"), parts, strict=False)
    }


def is_plain(reference: Reference) -> bool:
    """Whether neither `+` nor `@` stands in the path or the revision."""
    return not set("+@") & set(reference.text + (reference.revision or ""))


def _ambiguous(text: str, place: Place, expected: str) -> ConfigError:
    return ConfigError(
        "it is not clear where the path, the revision and the adapter begin and end",
        where=place,
        found=repr(text),
        expected=expected,
        remedy=f"if `+` or `@` belongs to a path, write {_MAPPING_FORM}",
    )
