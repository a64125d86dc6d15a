"""A vocabulary that adapters made larger: how large it is, and whose tokenizer goes with it.

Rows that the base lacks are the weighted mean of the models that have them, so these must agree on
how many there are. Embedding and head must grow together, or the output could not be loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from streammerge.adapters.saved import RESIZE
from streammerge.errors import BadInput, ConfigError, Problems
from streammerge.planning.inputs import Inputs, Model
from streammerge.planning.outline import Outline
from streammerge.recipe import Recipe, at
from streammerge.storage.donated import contents, tokenizer_files
from streammerge.storage.heads import is_vocabulary
from streammerge.storage.tokens import tokens_apart
from streammerge.words import Dora, Replacement, Update

_TRAIN_AGAIN = (
    "merge each into its base by itself, bring the results to one vocabulary with transformers' "
    "resize_token_embeddings, and merge those"
)


def settle_vocabulary(
    recipe: Recipe, inputs: Inputs, outline: Outline, problems: Problems
) -> Outline:
    """The outline with the rows of a larger vocabulary, and the folder of its tokenizer.

    Lengths that differ, an embedding that grows without its head, and tokenizers between which
    nothing decides are problems.
    """
    larger = _larger(inputs)
    owners = [name for lengths in larger.values() for name in lengths]
    lengths = {rows for found in larger.values() for rows in found.values()}
    if len(lengths) > 1:
        problems.add(_unequal(larger))
    elif lengths:
        (size,) = lengths
        for problem in _left_behind(inputs, outline, larger, size):
            problems.add(problem)
        _check_weights(recipe, inputs, larger, problems)
        rows = dict.fromkeys(larger, size)
        outline = replace(outline, rows=rows, vocabulary=size)
    growing = [model for model in inputs.models if model.name in owners]
    return _with_tokenizer(recipe, inputs, growing, outline, problems)


def _larger(inputs: Inputs) -> dict[str, dict[str, int]]:
    """Tensor -> model -> rows, of all that have more of them than the donor."""
    found: dict[str, dict[str, int]] = {}
    for model in inputs.models:
        for name, update in model.adapter.updates.items() if model.adapter else ():
            rows = _rows(update)
            if rows > inputs.donor.tensors[name].spec.rows:
                found.setdefault(name, {})[model.name] = rows
    return found


def _rows(update: Update) -> int:
    return update.extent.spec.rows if isinstance(update, Replacement) and not update.rows else 0


def _unequal(larger: Mapping[str, Mapping[str, int]]) -> BadInput:
    lines = {
        f"{model}: {name} has {rows} rows"
        for name, found in larger.items()
        for model, rows in found.items()
    }
    return BadInput(
        "the vocabularies of the adapters differ in size",
        found="; ".join(sorted(lines)),
        expected="one size, so that each row is the same token in all of them",
        remedy=_TRAIN_AGAIN,
    )


def _left_behind(
    inputs: Inputs, outline: Outline, larger: Mapping[str, Mapping[str, int]], size: int
) -> Iterator[BadInput]:
    """What belongs to the vocabulary and did not grow with it."""
    tensors = inputs.donor.tensors
    written = [name for name in tensors if inputs.donor.stored(name) or name in outline.added]
    words = [name for name in written if is_vocabulary(name) and outline.keeps(name)]
    biases = [name for name in written if outline.keeps(name) and _is_bias(inputs, larger, name)]
    short = [name for name in words if name not in larger]
    if biases:
        yield BadInput(
            "the adapter has a larger vocabulary, and the base a bias for each word",
            found=f"{', '.join(larger)} with {size} rows, and {', '.join(biases)}",
            expected="a vocabulary of embeddings and heads alone",
            remedy=RESIZE,
        )
    if short:
        yield BadInput(
            "the adapter has a larger vocabulary for some tensors and not for others",
            found=f"{', '.join(larger)} with {size} rows, {', '.join(short)} without",
            expected="all tensors of the vocabulary with the same rows",
            remedy="save the adapter again with save_pretrained(..., save_embedding_layers=True)",
        )
    for name in larger:
        for model in inputs.models:
            update = model.adapter.updates.get(name) if model.adapter else None
            then = update.then if isinstance(update, Replacement) else None
            if isinstance(then, Dora) and then.norms_of == "columns":
                yield BadInput(
                    "DoRA on an embedding of a larger vocabulary cannot be merged",
                    where=f"{model.name}: {name}",
                    found="lengths that are those of columns over all rows, the new ones too",
                    remedy=RESIZE,
                )


def _is_bias(inputs: Inputs, larger: Mapping[str, object], name: str) -> bool:
    """Whether a tensor is a number for each word: of a head, or BART's `final_logits_bias`."""
    tensors = inputs.donor.tensors
    words = {tensors[one].spec.rows for one in larger}
    shape = tensors[name].spec.shape
    flat = shape[:1] if len(shape) == 1 else shape[1:] if shape[:1] == (1,) else ()
    return name.endswith("bias") and len(flat) == 1 and flat[0] in words


def _check_weights(
    recipe: Recipe, inputs: Inputs, larger: Mapping[str, Mapping[str, int]], problems: Problems
) -> None:
    """The new rows are a mean, whatever the method does with the others."""
    for name, owners in larger.items():
        models = zip(recipe.entries, inputs.models, strict=True)
        weights = [
            float(at(entry.knobs.get("weight", 1.0), name, 0.0))  # of none of the layers
            for entry, model in models
            if model.name in owners
        ]
        if abs(sum(weights)) < 1e-8:
            problems.add(
                ConfigError(
                    f"the weights of the models that have the new rows of {name} sum to zero",
                    where=recipe.entries[0].place,
                    found=", ".join(f"{weight:g}" for weight in weights),
                    expected="a sum that can be divided by",
                    remedy="give them other weights",
                )
            )


# -------------------------------------------------------------------------------------- tokenizer


def _with_tokenizer(
    recipe: Recipe, inputs: Inputs, growing: list[Model], outline: Outline, problems: Problems
) -> Outline:
    if recipe.tokenizer == "union":
        for problem in _not_united(inputs, growing):
            problems.add(problem)
        return outline
    if recipe.tokenizer is not None:
        return _as_named(recipe, inputs, outline, problems)
    holding = {model.name: files for model in growing if (files := _tokenizer(model))}
    if not holding:
        note = "the vocabulary grows, and no adapter holds a tokenizer: the donor's is kept"
        return replace(outline, notes=(*outline.notes, note)) if growing else outline
    first, *others = holding.values()
    if any(contents(files) != contents(first) for files in others):
        problems.add(
            ConfigError(
                "several adapters change the vocabulary, and their tokenizers differ",
                found=", ".join(holding),
                expected="one that names the tokens of the output",
                remedy=f"name it: tokenizer_source: {next(iter(holding))}",
            )
        )
    return _of(outline, next(iter(holding)), next(iter(first.values())).parent)


def _not_united(inputs: Inputs, growing: list[Model]) -> Iterator[ConfigError]:
    """Why the union of the tokenizers is not the donor's."""
    donor, found = inputs.donor.path, [f"{model.name} has more tokens" for model in growing]
    for path in dict.fromkeys(model.folder.path for model in inputs.models):
        apart = tokens_apart(donor, path) if path != donor else None
        found += [f"{path}: {apart}"] if apart else []
    if found:
        yield ConfigError(
            "a union of tokenizers that differ is not supported yet",
            found="; ".join(found),
            expected=f"the tokens of {donor}, by the same numbers",
            remedy="where rows are the same tokens all the same, write tokenizer_source: base",
        )


def _as_named(recipe: Recipe, inputs: Inputs, outline: Outline, problems: Problems) -> Outline:
    if recipe.tokenizer == "base":
        return outline
    named = next((model for model in inputs.models if model.name == recipe.tokenizer), None)
    files = _tokenizer(named) if named else {}
    if not files:
        names = ["base", *(model.name for model in inputs.models if _tokenizer(model))]
        problems.add(
            ConfigError(
                "tokenizer_source names no adapter that holds a tokenizer",
                found=str(recipe.tokenizer),
                expected=f"one of {', '.join(names)}",
                remedy="name one of these, or leave it out",
            )
        )
        return outline
    return _of(outline, str(recipe.tokenizer), next(iter(files.values())).parent)


def _of(outline: Outline, name: str, folder: Path) -> Outline:
    notes = (*outline.notes, f"the tokenizer is that of {name}")
    return replace(outline, tokenizer=folder, notes=notes)


def _tokenizer(model: Model) -> dict[Path, Path]:
    return tokenizer_files(model.adapter.folder.path) if model.adapter else {}
