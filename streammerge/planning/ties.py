"""Whether a head stays one with its embedding: only if every model leaves the two equal.

An adapter on one of them unties them, since the other must stay what it was when the adapter was
trained. PEFT's own merge gets this wrong: it writes an embedding's delta into the storage that the
head shares.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from streammerge.adapters.copies import same_update, same_values
from streammerge.errors import BadInput, Problems
from streammerge.planning.inputs import Inputs, Model
from streammerge.planning.outline import Outline
from streammerge.storage.folder import ModelFolder
from streammerge.storage.ties import hidden_tie, scales_its_head
from streammerge.words import Replacement

_UNTIE: Final = (
    "load the base with tie_word_embeddings=False in transformers, save it, and merge into that"
)


def settle_ties(inputs: Inputs, problems: Problems) -> tuple[Inputs, Outline]:
    """Whether what is tied in the donor stays so in the output; and the inputs, made to fit that.

    Reads stored tensors where only their bytes tell whether two are equal. While a tie holds,
    updates of the head are left out: they are the embedding's. An adapter on an embedding that a
    head of unknown name shares is a problem. Raises StreammergeError when a file cannot be read.
    """
    for model in inputs.models:
        for problem in _hidden(model):
            problems.add(problem)
    donor = inputs.donor
    reasons = {name: list(_parting(inputs, name, of)) for name, of in donor.ties.items()}
    if not any(reasons.values()):
        return _tied(inputs, donor.ties), Outline(left_out=frozenset(donor.ties))
    if scales_its_head(donor.config):
        return _each_by_itself(inputs, reasons)
    added = tuple(name for name in donor.ties if not donor.stored(name))
    return inputs, Outline(added=added, untied=True, notes=(_note(donor, reasons),))


def _each_by_itself(inputs: Inputs, reasons: Mapping[str, Sequence[str]]) -> tuple[Inputs, Outline]:
    """Where the config has no word for untying, and values that differ say it, tensor by tensor."""
    donor = inputs.donor
    still = frozenset(name for name, why in reasons.items() if not why)
    new = {n: why for n, why in reasons.items() if why and _is_one(donor, n, donor.ties[n])}
    stays = "; `tie_word_embeddings` stays as it is, since it scales what the head reads"
    notes = (_note(donor, new) + stays,) if new else ()
    added = tuple(name for name in reasons if name not in still and not donor.stored(name))
    return _tied(inputs, still), Outline(added=added, left_out=still, notes=notes)


def _note(donor: ModelFolder, reasons: Mapping[str, Sequence[str]]) -> str:
    parted = [name for name, why in reasons.items() if why]
    sources = dict.fromkeys(donor.ties[name] for name in parted)
    said = dict.fromkeys(line for why in reasons.values() for line in why)
    return f"{', '.join(parted)} and {', '.join(sources)} are no longer one: {', '.join(said)}"


def _hidden(model: Model) -> Iterator[BadInput]:
    """Trained tokens are the head's, too, and need not know its name."""
    if model.adapter is None:
        return
    hidden = hidden_tie(model.folder.tensors, model.folder.config)
    updates = {name: model.adapter.updates.get(name) for name in hidden}
    touched = [name for name, one in updates.items() if one and not _of_tokens(one)]
    if touched:
        yield BadInput(
            f"{model.name} changes an embedding that the model's head seems to share",
            where=str(model.folder.path),
            found=f"{', '.join(touched)}, and no head beside it",
            expected="a head that is stored, or one of a name that is known here",
            remedy=_UNTIE,
        )


def _of_tokens(update: object) -> bool:
    return isinstance(update, Replacement) and update.rows is not None and update.then is None


def _parting(inputs: Inputs, name: str, of: str) -> Iterator[str]:
    """Who makes a tensor differ from the one that it is in the donor, in words."""
    folders = {folder.path: folder for folder in (inputs.donor, *(m.folder for m in inputs.models))}
    for folder in folders.values():
        if not _is_one(folder, name, of):
            yield f"they differ in {folder.path.name}"
    for model in inputs.models:
        updates = model.adapter.updates if model.adapter else {}
        if not same_update(updates.get(name), updates.get(of)):
            yield f"{model.name} does not change them alike"


def _is_one(folder: ModelFolder, name: str, of: str) -> bool:
    """Whether one tensor is another; where both are stored, transformers compares them."""
    if folder.ties.get(name) != of:
        return False
    return not folder.stored(name) or same_values(folder.tensors[name], folder.tensors[of])


def _tied(inputs: Inputs, left_out: Collection[str]) -> Inputs:
    return replace(inputs, models=tuple(_without(model, left_out) for model in inputs.models))


def _without(model: Model, left_out: Collection[str]) -> Model:
    if model.adapter is None or not model.adapter.updates.keys() & set(left_out):
        return model
    updates = {n: one for n, one in model.adapter.updates.items() if n not in left_out}
    return replace(model, adapter=replace(model.adapter, updates=updates))
