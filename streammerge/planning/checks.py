"""Whether the full models of a merge fit together: names, kinds and shapes, from headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from streammerge.errors import BadInput, ConfigError, Problems
from streammerge.planning.inputs import Inputs, Model
from streammerge.planning.knobs import Layers
from streammerge.recipe import Recipe
from streammerge.storage.folder import ModelFolder
from streammerge.storage.smallfile import read_small
from streammerge.words import Extent, TensorSpec

# Buffers that some versions of transformers stored and others did not: the donor decides.
_OPTIONAL = ("*.rotary_emb.inv_freq", "*.attn.bias", "*.attn.masked_bias")
_SHOWN = 5


def check_models(inputs: Inputs, problems: Problems) -> list[str]:
    """Compare every full model with the donor; returns notes for the plan."""
    donor = inputs.donor
    notes: list[str] = []
    seen = {donor.path}
    for model in inputs.models:
        if model.folder.path not in seen:
            seen.add(model.folder.path)
            notes += _compare(donor, model, problems)
    for folder in {model.folder.path: model.folder for model in inputs.models}.values():
        notes += (f"{folder.path}: {note}" for note in folder.notes)
    return notes


def check_layers(recipe: Recipe, inputs: Inputs, problems: Problems) -> None:
    """Whether the models have as many layers as a slice of the recipe says."""
    for entry, model in zip(recipe.entries, inputs.models, strict=True):
        counts = sorted(set(Layers(model.folder.tensors).counts.values()), reverse=True)
        if entry.layers is not None and entry.layers not in counts:
            problems.add(
                ConfigError(
                    f"the slice takes {entry.layers} layers of {model.name}, which has others",
                    where=entry.place,
                    found=f"{' or '.join(map(str, counts)) or 'no'} layers in {model.folder.path}",
                    expected="all layers: slices that take models apart are not supported yet",
                    remedy=f"write layer_range: [0, {counts[0]}]" if counts else "use `models:`",
                )
            )


def _compare(donor: ModelFolder, model: Model, problems: Problems) -> Iterator[str]:
    ours, theirs = donor.tensors, model.folder.tensors
    missing = [name for name in ours if name not in theirs and not _optional(name)]
    extra = [name for name in theirs if name not in ours and not _optional(name)]
    for names, theirs_do, ours_do in ((missing, "lacks", "has"), (extra, "has", "lacks")):
        if names:
            problems.add(
                BadInput(
                    f"{model.name} {theirs_do} {_count(names)} that {donor.path.name} {ours_do}",
                    where=str(model.folder.path),
                    found=_some(names),
                    expected=f"the tensors of {donor.path}",
                    remedy=_about_heads(names) or "merge models of one architecture",
                )
            )
    for name in ours:
        if name in theirs:
            _compare_tensor(ours[name], theirs[name], problems)
    optional = [name for name in {*ours} ^ {*theirs} if _optional(name)]
    if optional:
        yield f"{model.name}: {_count(optional)} of buffers follow {donor.path.name}"


def _compare_tensor(ours: Extent, theirs: Extent, problems: Problems) -> None:
    a, b = ours.spec, theirs.spec
    if a.shape != b.shape:
        problems.add(
            BadInput(
                f"the shape of {a.name} differs",
                where=theirs.path,
                found=str(list(b.shape)),
                expected=f"{list(a.shape)} as in {ours.path}",
                remedy=_about_rows(a, b),
            )
        )
    elif a.dtype.kind != b.dtype.kind or (not a.dtype.mergeable and a.dtype != b.dtype):
        problems.add(
            BadInput(
                f"the kind of {a.name} differs",
                where=theirs.path,
                found=b.dtype.label,
                expected=f"{a.dtype.label} as in {ours.path}",
                remedy="merge models that were saved alike",
            )
        )


def _about_rows(a: TensorSpec, b: TensorSpec) -> str:
    if len(a.shape) == 2 and a.shape[1:] == b.shape[1:]:
        return (
            "the vocabularies differ in size: bring both models to one vocabulary with "
            "transformers' resize_token_embeddings, then merge"
        )
    return "merge models of one architecture and size"


def _about_heads(names: list[str]) -> str | None:
    if all(name.endswith("lm_head.weight") for name in names):
        return (
            "one model ties its head to the embedding and the other does not: save both with a "
            "stored lm_head.weight, or both without"
        )
    return None


def _optional(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _OPTIONAL)


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def template_notes(inputs: Inputs) -> Iterator[str]:
    """The output takes the donor's chat template; an adapter may have been trained with another."""
    ours = _template(inputs.donor.path)
    for model in inputs.models:
        theirs = _template(model.adapter.folder.path) if model.adapter else None
        if theirs is not None and theirs != ours:
            yield f"{model.name} has another chat template than {inputs.donor.path.name}"


def _template(folder: Path) -> bytes | None:
    """The chat template of a folder, where it is a file of its own."""
    path = folder / "chat_template.jinja"
    return read_small(path) if path.exists() else None


def float64_note(tensors: Mapping[str, Extent]) -> str | None:
    """F64 loses digits on the way through float32; say so."""
    count = sum(1 for name in tensors if tensors[name].spec.dtype.label == "F64")
    return f"{count} tensors are F64 and are computed in float32" if count else None
