"""The shape of a recipe's document: which keys stand where and what kind of value each takes.

The models say what is allowed; `shaped` tells people what is not, in words and with places. What
depends on the merge method (the parameters) is checked in `parameters.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from streammerge.errors import ConfigError, Problems
from streammerge.recipe.document import Document
from streammerge.recipe.parameters import CATALOGUE
from streammerge.recipe.wording import KeyPath, dotted, nearest, shown

# Line breaks and the like in a path or name would garble every message that quotes it.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def _printable(text: str) -> str:
    if _CONTROL.search(text):
        raise ValueError(text)
    return text


Text = Annotated[str, Field(min_length=1), AfterValidator(_printable)]
FloatName = Literal["float16", "bfloat16", "float32", "float64"]

_FLOAT_NAMES = "float16, bfloat16, float32 or float64"
_PARAMETERS = "a mapping such as {weight: 0.5}"
_RESIDUAL = "true or false: whether the base is the one that this adapter's training started from"
_TOKENIZER = "text: base, union, or the name of an adapter, whose tokenizer it is"
_REFERENCE = "text such as path@revision+adapter@revision, or a mapping with model and lora"


class Shape(BaseModel):
    """Base of the models: no value is converted, no key is let through."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class PathShape(Shape):
    """`{path, revision}`: a path taken literally, whatever it holds."""

    path: Text = Field(description="text: the path of a folder, or a hub id")
    revision: Text | None = Field(None, description="text: a branch, tag or commit")


class PairShape(Shape):
    """`{model: {path, revision}, lora: {path, revision}}`."""

    model: dict[str, Any] = Field(description="a mapping {path, revision}")
    lora: dict[str, Any] | None = Field(None, description="a mapping {path, revision}")


class EntryShape(Shape):
    """An item of `models`."""

    model: Text | dict[str, Any] = Field(description=_REFERENCE)
    name: Text | None = Field(None, description="text")
    assume_residual_base: bool | None = Field(None, description=_RESIDUAL)
    parameters: dict[str, Any] | None = Field(None, description=_PARAMETERS)


class SourceShape(EntryShape):
    """An item of a slice's `sources`."""

    layer_range: Annotated[list[int], Field(min_length=2, max_length=2)] = Field(
        description="the first layer and the one after the last, such as [0, 32]"
    )


class SliceShape(Shape):
    """An item of `slices`."""

    sources: list[Any] = Field(description="a list of {model, layer_range, parameters}")
    parameters: dict[str, Any] | None = Field(None, description=_PARAMETERS)


class AdapterShape(Shape):
    """An item of `adapters`; keys besides these are parameters."""

    model_config = ConfigDict(extra="allow")

    path: Text = Field(description="text: the path of an adapter's folder, or a hub id")
    revision: Text | None = Field(None, description="text: a branch, tag or commit")
    name: Text | None = Field(None, description="text")
    assume_residual_base: bool | None = Field(None, description=_RESIDUAL)
    parameters: dict[str, Any] | None = Field(None, description=_PARAMETERS)


class OutputShape(Shape):
    """`output` as a mapping."""

    path: Text | None = Field(None, description="text: the path of a folder")
    kind: Literal["model", "adapter"] = Field("model", description="model or adapter")
    rank: int | None = Field(None, ge=1, description="a whole number, at least 1")
    energy: float | None = Field(None, gt=0, lt=1, description="a number above 0 and below 1")
    error: float | None = Field(None, gt=0, lt=1, description="a number above 0 and below 1")
    save: list[Literal["embeddings", "norms"]] | None = Field(
        None, description="a list of embeddings and norms, or []"
    )
    shard_size: int | Text | None = Field(None, description="a size such as 2GiB or 512MiB")


class TokenizerShape(Shape):
    """`tokenizer`, the longer form of `tokenizer_source`."""

    source: Text = Field(description=_TOKENIZER)


class RecipeShape(Shape):
    """The whole document."""

    base_model: Text | dict[str, Any] | None = Field(None, description=_REFERENCE)
    merge_method: Text | None = Field(None, description="text: the name of a merge method")
    models: list[Any] | None = Field(None, description="a list of {model, parameters}")
    adapters: list[Any] | None = Field(None, description="a list of {path, weight, ...}")
    slices: list[Any] | None = Field(None, description="a list of one {sources, parameters}")
    parameters: dict[str, Any] | None = Field(None, description=_PARAMETERS)
    dtype: FloatName | None = Field(None, description=_FLOAT_NAMES)
    out_dtype: FloatName | None = Field(None, description=_FLOAT_NAMES)
    seed: int | None = Field(None, ge=0, lt=2**63, description="a whole number from 0 to 2^63 - 1")
    tokenizer_source: Text | None = Field(None, description=_TOKENIZER)
    tokenizer: dict[str, Any] | None = Field(None, description="a mapping such as {source: base}")
    output: Text | dict[str, Any] | None = Field(
        None, description="a path, or a mapping {path, kind, rank, energy, error, save, shard_size}"
    )
    space: Literal["full", "core", "compressed"] | None = Field(
        None, description="full, core or compressed"
    )
    isotropize: bool | None = Field(None, description="true or false")
    name: Text | None = Field(None, description="text")


ITEMS = {
    EntryShape: "a mapping such as {model: path, parameters: {weight: 0.5}}",
    SourceShape: "a mapping such as {model: path, layer_range: [0, 32]}",
    SliceShape: "a mapping such as {sources: [{model: path, layer_range: [0, 32]}, ...]}",
    AdapterShape: "a mapping such as {path: ./lora-math, weight: 0.5}",
}

# Keys of mergekit's configurations that change the result and have no counterpart here yet.
KEYS_NOT_YET = {
    "modules": "list whole models under `models`",
    "tokens": "where all models have the same tokens, leave it out",
    "pad_to_multiple_of": "leave it out: the embedding keeps its rows",
    "chat_template": "remove it to take the base model's template",
    "override_architecture": "remove it; names and shapes of tensors are all that is used",
}

S = TypeVar("S", bound=Shape)


def shaped(shape: type[S], document: Document, path: KeyPath, problems: Problems) -> S | None:
    """The value at a path as a shape, without the keys that are wrong; each is a problem.

    None when what is left is not enough to make one.
    """
    value = document.at(path)
    try:
        return shape.model_validate(value)
    except ValidationError as failure:
        errors = failure.errors(include_url=False, include_context=False)
    for error in errors:
        problems.add(_told(error, shape, document, path))
    wrong = {error["loc"][0] for error in errors if error["loc"]}
    try:
        return shape.model_validate({key: value[key] for key in value if key not in wrong})
    except (ValidationError, TypeError, IndexError):
        return None


def _told(
    error: ErrorDetails, shape: type[Shape], document: Document, path: KeyPath
) -> ConfigError:
    """One of pydantic's errors in words for people."""
    if not error["loc"]:  # no mapping, or one with a key that no text can be
        keys = f"a mapping of {', '.join(shape.model_fields)}"
        return _wrong(document, path, ITEMS.get(shape, keys), required=True)
    key = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        return _unknown(document, (*path, key), shape.model_fields)
    field = shape.model_fields[key]
    expected = field.description or ""
    if error["type"] == "missing":
        return missing(document, (*path, key), expected)
    return _wrong(document, (*path, key), expected, required=field.is_required())


def missing(document: Document, path: KeyPath, expected: str) -> ConfigError:
    """A key that must be there is not."""
    return ConfigError(
        f"{dotted(path)} is missing",
        where=document.spot(path[:-1]).value,
        found=f"no key `{path[-1]}` here",
        expected=expected,
        remedy=f"add `{path[-1]}: ...`",
    )


def _wrong(document: Document, path: KeyPath, expected: str, *, required: bool) -> ConfigError:
    spot, value = document.spot(path), document.at(path)
    if expected.startswith("text") and isinstance(value, bool | int | float):
        remedy = f'if it is meant as text, put it in quotes: "{spot.spelled}"'
    else:
        remedy = "correct it" if required else "correct it, or leave it out"
    return ConfigError(
        f"{dotted(path)} is not valid",
        where=spot.value,
        found=shown(value, spot.spelled),
        expected=expected,
        remedy=remedy,
    )


def _unknown(document: Document, path: KeyPath, choices: Iterable[str]) -> ConfigError:
    """A key that does not belong where it stands."""
    key = str(path[-1])
    where, found = document.spot(path).key, f"the key {key!r}"
    if key in KEYS_NOT_YET:
        return ConfigError(
            f"{dotted(path)} is not supported yet",
            where=where,
            found=found,
            remedy=KEYS_NOT_YET[key],
        )
    if key in CATALOGUE:
        remedy = f"`{key}` is a parameter: put it under `parameters:`"
    elif near := nearest(key, choices):
        remedy = f"did you mean `{near}`?"
    else:
        remedy = "remove it"
    return ConfigError(
        f"{dotted(path)} is not a key that anything here knows",
        where=where,
        found=found,
        expected=", ".join(choices),
        remedy=remedy,
    )
