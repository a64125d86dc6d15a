"""The name of a tied head, where only an adapter that was trained on it says what it is."""

from __future__ import annotations

from collections.abc import Iterator

from streammerge.adapters.faults import Findings
from streammerge.adapters.folder import AdapterFolder
from streammerge.adapters.keys import sort_tensors
from streammerge.adapters.saved import gather
from streammerge.storage.folder import ModelFolder
from streammerge.storage.ties import hidden_tie


def with_named_head(model: ModelFolder, adapter: AdapterFolder) -> ModelFolder:
    """The model with its tied head, if it seems to have one and the adapter tells its name.

    Where the config ties a head that no file holds, and the adapter has one tensor that the model
    lacks, of the shape of the embedding, then that is this head. Else the model as it is.
    """
    hidden = hidden_tie(model.tensors, model.config)
    unknown = {name: shape for name, shape in _shapes(adapter) if name not in model.tensors}
    if len(hidden) != 1 or len(unknown) != 1:
        return model
    ((head, shape),) = unknown.items()
    return model.with_head(head, *hidden) if shape == model.tensors[hidden[0]].spec.shape else model


def _shapes(adapter: AdapterFolder) -> Iterator[tuple[str, tuple[int, ...]]]:
    """What an adapter changes, under its own names, and the shape of that."""
    contents = sort_tensors(adapter.header.tensors, Findings(adapter.header.path))
    for pair in contents.pairs:
        yield f"{pair.module}.weight", pair.update_shape
    for name, saved in gather(contents.saved, contents.name).items():
        if saved.whole:
            yield name, saved.whole[0].spec.shape
