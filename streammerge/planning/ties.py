"""Whether a head stays one with its embedding: only if every model leaves the two equal.

An adapter on one of them unties them, since the other must stay what it was when the adapter was
trained. PEFT's own merge gets this wrong: it writes an embedding's delta into the storage that the
head shares.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from streammerge.adapters.copies import same_update, same_values
from streammerge.errors import BadInput, Problems
from streammerge.planning.inputs import Inputs, Model
from streammerge.planning.outline import Outline
from streammerge.storage.folder import ModelFolder
from streammerge.storage.ties import Tie, hidden_tie

_UNTIE: Final = (
    "load the base with tie_word_embeddings=False in transformers, save it, and merge into that"
)


def settle_tie(inputs: Inputs, problems: Problems) -> tuple[Inputs, Outline]:
    """Whether the output's head is tied, if the donor's is; and the inputs, made to fit that.

    Reads stored tensors where only their bytes tell whether two are equal. While the tie holds,
    updates of the head are left out: they are the embedding's. An adapter on an embedding that a
    head of unknown name shares is a problem. Raises StreammergeError when a file cannot be read.
    """
    for model in inputs.models:
        for problem in _hidden(model):
            problems.add(problem)
    tie = inputs.donor.tie
    if tie is None:
        return inputs, Outline()
    parting = tuple(_parting(inputs, tie))
    if parting:
        added = tuple(name for name in tie.reads if not inputs.donor.stored(name))
        note = f"{tie.head} and {tie.embedding} are no longer one: {', '.join(parting)}"
        return inputs, Outline(added=added, untied=True, notes=(note,))
    models = tuple(_without_head(model, tie) for model in inputs.models)
    return replace(inputs, models=models), Outline(left_out=frozenset(tie.reads))


def _hidden(model: Model) -> Iterator[BadInput]:
    if model.adapter is None or model.folder.tie is not None:
        return
    hidden = hidden_tie(model.folder.tensors, model.folder.config)
    touched = [name for name in hidden if name in model.adapter.updates]
    if touched:
        yield BadInput(
            f"{model.name} changes an embedding that the model's head seems to share",
            where=str(model.folder.path),
            found=f"{', '.join(touched)}, and no head beside it",
            expected="a head that is stored, or one of a name that is known here",
            remedy=_UNTIE,
        )


def _parting(inputs: Inputs, tie: Tie) -> Iterator[str]:
    """Who makes the head differ from the embedding, in words."""
    folders = {folder.path: folder for folder in (inputs.donor, *(m.folder for m in inputs.models))}
    for folder in folders.values():
        if not _is_tied(folder):
            yield f"they differ in {folder.path.name}"
    for model in inputs.models:
        updates = model.adapter.updates if model.adapter else {}
        pairs = ((updates.get(name), updates.get(of)) for name, of in tie.reads.items())
        if not all(same_update(*pair) for pair in pairs):
            yield f"{model.name} does not change them alike"


def _is_tied(folder: ModelFolder) -> bool:
    """Whether the head is the embedding; where both are stored, transformers compares them."""
    if folder.tie is None:
        return False
    stored = [(n, of) for n, of in folder.tie.reads.items() if folder.stored(n)]
    return all(same_values(folder.tensors[n], folder.tensors[of]) for n, of in stored)


def _without_head(model: Model, tie: Tie) -> Model:
    if model.adapter is None or not model.adapter.updates.keys() & tie.reads.keys():
        return model
    updates = {n: one for n, one in model.adapter.updates.items() if n not in tie.reads}
    return replace(model, adapter=replace(model.adapter, updates=updates))
