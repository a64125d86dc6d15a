"""Tensors that PEFT saves whole, or rows of them, in place of the base's.

Modules named in `modules_to_save`, trained biases, trained tokens, and the embeddings of a model
whose vocabulary changed. PEFT also saves what it only wrapped: the base's weight beside an adapter
on an embedding or a head. That is a copy, bit by bit, and replaces nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from streammerge.adapters.config import LoraConfig
from streammerge.adapters.copies import same_values
from streammerge.adapters.faults import Fault, Findings
from streammerge.storage.heads import is_vocabulary
from streammerge.words import Extent, Replacement, TensorSpec, Update

_TOKENS: Final = re.compile(r"(?P<module>.+?)(\.token_adapter)?\.trainable_tokens_delta(\.[^.]+)?")

# What PEFT puts between a module's name and its parameter's, in the order in which the tensors
# count where a file holds several: what was trained, what was wrapped, what was left behind.
_WRAPPERS: Final = (".modules_to_save", ".token_adapter.base_layer", ".base_layer")
_LEFT_BEHIND: Final = ".original_module"

_SAVE_AGAIN: Final = "save the adapter again with PEFT, with the config of this training beside it"
_TWO_VALUES: Final = Fault(
    "tensors that the file holds twice, with different values",
    "one value for each",
    _SAVE_AGAIN,
)
_OTHER_SHAPE: Final = Fault(
    "tensors of another shape than those of the base that they replace",
    "the shape of the base's tensor; an embedding or a head may have more rows",
    "check that the adapter belongs to this base; a head of another task needs a base that has "
    "this head",
)
# Merged into a base of the new size, what an adapter saved of its vocabulary replaces as it should.
RESIZE: Final = (
    "bring the base to the adapter's vocabulary with transformers' resize_token_embeddings, save "
    "it with the adapter's tokenizer, and merge into that"
)
_LONGER: Final = Fault(
    "biases of the words of a larger vocabulary",
    "a larger vocabulary of embeddings and heads alone: their new rows have places in the output",
    RESIZE,
)
_OTHER_KIND: Final = Fault(
    "tensors that replace others of the base and are no floating-point numbers, or replace such",
    "F64, F32, F16 or BF16 on both sides",
    "save the adapter in one of these types, and merge it into the unquantised base",
)
_NO_ROWS: Final = Fault(
    "trainable tokens whose rows adapter_config.json does not give",
    "as many row numbers in `trainable_token_indices`, or `token_indices`, as the file holds rows, "
    "each once, of the tensor",
    _SAVE_AGAIN,
)


@dataclass(slots=True)
class Saved:
    """What an adapter's file holds of one tensor: all of it, some of its rows, or both."""

    whole: list[Extent]  # the one that counts first
    rows: Extent | None = None


def gather(tensors: Mapping[str, Extent], adapter: str | None) -> dict[str, Saved]:
    """By the name of the tensor that is meant, `lm_head.weight`, as the adapter's model names it.

    `tensors` are those without factors, under their keys less PEFT's outermost prefix; `adapter` is
    the adapter's name, where the keys of its factors carry it.
    """
    found: dict[str, Saved] = {}
    for key, extent in tensors.items():
        tokens = _TOKENS.fullmatch(key)
        name = f"{tokens['module']}.weight" if tokens else _plain(key, adapter)
        saved = found.setdefault(name, Saved([]))
        if tokens:
            saved.rows = extent
        else:
            saved.whole.append(extent)
    for saved in found.values():
        saved.whole.sort(key=lambda extent: _standing(extent.spec.name))
        trained = [one for one in saved.whole if _LEFT_BEHIND not in one.spec.name]
        saved.whole = trained or saved.whole
    return found


def _plain(key: str, adapter: str | None) -> str:
    for wrapper in (*_WRAPPERS, _LEFT_BEHIND):
        for between in (f"{wrapper}.{adapter}.", f"{wrapper}."):
            if between in key:
                return key.replace(between, ".", 1)
    return key


def _standing(key: str) -> int:
    marks = [*_WRAPPERS, _LEFT_BEHIND]
    return next((i for i, mark in enumerate(marks, start=1) if f"{mark}." in key), 0)


class Replacements:
    """What saved tensors put in place of the base's; whatever does not fit goes to `findings`."""

    def __init__(self, config: LoraConfig, findings: Findings) -> None:
        self._config = config
        self._findings = findings
        self.found: dict[str, Replacement] = {}  # by the base tensor's name
        self.copies = 0  # tensors that are the base's, bit by bit

    def add(self, name: str, saved: Saved, target: Extent) -> None:
        """In place of `target`, for what the adapter's model calls `name`."""
        replacement = self._whole(name, saved, target)
        if saved.rows is not None:
            rows = self._rows(name, saved.rows, replacement.extent if replacement else target)
            replacement = replace(replacement, then=rows) if replacement else rows
        if replacement is not None:
            self.found[target.spec.name] = replacement

    def share(self, embedding: str, head: str) -> None:
        """What is of a tied embedding is of its head, too, unless the head was given its own.

        PEFT ties trained tokens while it trains, and saves the embedding's. An embedding that was
        not trained in full is that of the model which was trained, where its head was the same:
        PEFT saves it beside an adapter on it, and with the head, if the vocabulary was resized, but
        never all that reads it.
        """
        shared = self.found.get(embedding)
        if shared is None or head in self.found:
            return
        if shared.rows is not None or not self._trained(embedding):
            self.found[head] = shared

    def _trained(self, tensor: str) -> bool:
        """Whether the config says that a tensor's module was trained in full."""
        module = tensor.rpartition(".")[0]
        return any(f".{module}".endswith(f".{name}") for name in self._config.modules_to_save)

    def target(self, base: Extent) -> Extent:
        """What further updates of a base's tensor apply to: what replaces all of it, or itself."""
        replacement = self.found.get(base.spec.name)
        return replacement.extent if replacement and replacement.rows is None else base

    def before(self, updates: Mapping[str, Update]) -> dict[str, Update]:
        """All updates of an adapter: a tensor is replaced first, then factors are added to it."""
        return {**updates, **{n: _then(one, updates.get(n)) for n, one in self.found.items()}}

    def _whole(self, name: str, saved: Saved, target: Extent) -> Replacement | None:
        if not saved.whole:
            return None
        first, *others = saved.whole
        if not self._fits(name, first, target):
            return None
        extent = Extent(first.path, first.offset, _called(first.spec, target.spec.name))
        for other in others:
            if other.spec.shape != first.spec.shape or not same_values(first, other):
                self._findings.add(_TWO_VALUES, f"{first.spec.name} and {other.spec.name}")
        if extent.spec.shape == target.spec.shape and same_values(extent, target):
            self.copies += 1
            return None
        return Replacement(extent)

    def _fits(self, name: str, extent: Extent, target: Extent) -> bool:
        ours, theirs = extent.spec, target.spec
        if not (ours.dtype.mergeable and theirs.dtype.mergeable):
            line = f"{name}: {ours.dtype.label}, base {theirs.dtype.label}"
            self._findings.add(_OTHER_KIND, line)
            return False
        if ours.shape != theirs.shape and not _grows(ours, theirs):
            line = f"{name}: {list(ours.shape)}, base {list(theirs.shape)}"
            head = name.removesuffix("bias") + "weight"
            longer = len(ours.shape) == 1 and ours.shape > theirs.shape and is_vocabulary(head)
            self._findings.add(_LONGER if longer else _OTHER_SHAPE, line)
            return False
        return True

    def _rows(self, name: str, extent: Extent, target: Extent) -> Replacement | None:
        indices = self._config.token_indices(name.removesuffix(".weight")) or ()
        ours, theirs = extent.spec, target.spec
        sound = len(set(indices)) == len(indices) and max(indices, default=0) < theirs.rows
        if not sound or len(ours.shape) != 2 or ours.shape != (len(indices), theirs.cols):
            line = f"{name}: {list(ours.shape)} for rows {list(indices)} of {list(theirs.shape)}"
            self._findings.add(_NO_ROWS, line)
            return None
        if not (ours.dtype.mergeable and theirs.dtype.mergeable):
            self._findings.add(_OTHER_KIND, f"{name}: {ours.dtype.label}")
            return None
        return Replacement(extent, indices)


def _then(first: Replacement, last: Update | None) -> Replacement:
    """`last` after all that `first` does."""
    if isinstance(first.then, Replacement):
        return replace(first, then=_then(first.then, last))
    return replace(first, then=last)


def _grows(new: TensorSpec, old: TensorSpec) -> bool:
    """Whether `new` has the rows of a larger vocabulary."""
    wider = len(new.shape) == len(old.shape) == 2 and new.cols == old.cols and new.rows > old.rows
    return wider and is_vocabulary(old.name)


def _called(spec: TensorSpec, name: str) -> TensorSpec:
    return TensorSpec(name, spec.shape, spec.dtype)
