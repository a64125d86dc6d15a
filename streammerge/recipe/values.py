"""A recipe as a value: what the user asked for, checked, with every default written out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from streammerge.declarations import MethodSpec
from streammerge.errors import Place
from streammerge.recipe.varying import Parameter, Varying
from streammerge.words import DType


@dataclass(frozen=True, slots=True)
class Reference:
    """A model or adapter as the recipe names it; not resolved to a folder yet.

    `text` is a path or a hub id. Where it was written is no part of what it is: two references
    are equal when text and revision are.
    """

    text: str
    revision: str | None
    place: Place = field(compare=False)


@dataclass(frozen=True, slots=True)
class Entry:
    """One model that takes part: a model, or a model with an adapter applied to it.

    `name` is unique within the recipe. `knobs` holds every per-model knob of the method, with
    defaults applied. `assume_residual_base` is the user's word that the model is the one which the
    adapter's initialisation left behind. `layers` is how many the recipe says that the model has.
    """

    name: str
    model: Reference
    adapter: Reference | None
    knobs: Mapping[str, Parameter]
    place: Place = field(compare=False)
    assume_residual_base: bool = False
    layers: int | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the user asked for. Planning turns it into jobs; the engine never sees it.

    `shared` holds every shared knob of the method, with defaults applied. `out_dtype` is the
    recipe's `out_dtype`, else its `dtype`. `tokenizer` is the name of the entry whose adapter gives
    it, "base" or "union"; None where the inputs decide. `output` is a path and `shard_bytes` the
    most bytes of an output file. Of an adapter as output, `rank` is the most that it may have, None
    for as much as it takes; `energy` is the least share of the squared norm of an update that its
    factors keep, and `error` the most of its norm that they miss; `saved` are the kinds of tensors
    that it holds whole where they are no low-rank matrices, None where such are refused. Relative
    paths start at `folder`: the recipe file's, or the working directory.
    `warnings` are whole lines, one for each key that has no effect, with its places.
    """

    method: MethodSpec
    base: Reference | None
    entries: tuple[Entry, ...]
    shared: Mapping[str, Parameter]
    out_dtype: DType | None
    seed: int
    tokenizer: str | None
    output: str | None
    shard_bytes: int | None
    kind: Literal["model", "adapter"]
    rank: int | None
    energy: float | None
    error: float | None
    saved: tuple[Literal["embeddings", "norms"], ...] | None
    space: Literal["full", "core", "compressed"]  # compressed: in `rank` shared directions
    isotropize: bool  # not in full space: the merged singular values become their mean
    folder: Path
    warnings: tuple[str, ...] = field(compare=False)

    @property
    def varies(self) -> bool:
        """Whether a knob differs from tensor to tensor."""
        every = [self.shared, *(entry.knobs for entry in self.entries)]
        return any(isinstance(value, Varying) for knobs in every for value in knobs.values())

    @property
    def missed_share(self) -> float | None:
        """The most of an update's squared norm that its factors may miss; None: ranks are given."""
        lost = None if self.energy is None else 1 - self.energy
        wrong = None if self.error is None else self.error**2
        return min((one for one in (lost, wrong) if one is not None), default=None)
