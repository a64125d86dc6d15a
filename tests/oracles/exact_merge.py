"""What a merge must be: float64 from the stored factors, by formulas written out in full.

Nothing of the package is used here. Files are read byte by byte; scales, and which weights lie
transposed, are asked of PEFT. torch and PEFT are imported inside the functions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peft_models import load

Exact = NDArray[np.float64]
Mask = NDArray[np.bool_]

STEP = 2.0**-24  # the relative error of one float32 operation
UNCLEAR = 2.0**-20  # of a tensor's largest: a threshold or a vote so near may fall either way
ROUNDING = {"F32": STEP, "F64": STEP, "BF16": 2.0**-8, "F16": 2.0**-11}  # F64 holds float32 results
# Under its normal range (6e-5) float16 rounds by an absolute step; the others' is beyond notice.
LEAST_ROUNDING = {"F16": 2.0**-25}
_NUMPY = {"F32": "<f4", "F64": "<f8", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class Stored:
    """One tensor as it lies in a file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def values(self) -> Exact:
        """Its elements, exactly."""
        raw = np.frombuffer(self.data, _NUMPY[self.dtype])
        if self.dtype == "BF16":
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.reshape(self.shape).astype(np.float64)


def read_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder's safetensors files, in the order of the files' data."""
    found: dict[str, Stored] = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = (start + offset for offset in entry["data_offsets"])
            found[name] = Stored(entry["dtype"], tuple(entry["shape"]), raw[begin:end])
    return found


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one weight: its factors, exactly, and PEFT's scale of them."""

    scale: float
    a: Exact  # [r, in]
    b: Exact  # [out, r]
    transposed: bool  # whether the base stores the weight as [in, out]

    @property
    def rank(self) -> int:
        return len(self.a)

    @property
    def delta(self) -> Exact:
        """`s B A`, as the base stores it."""
        return self._product(self.scale, self.b, self.a)

    @property
    def size(self) -> Exact:
        """`s |B| |A|`, which bounds the errors of the product."""
        return self._product(abs(self.scale), np.abs(self.b), np.abs(self.a))

    def _product(self, scale: float, b: Exact, a: Exact) -> Exact:
        product: Exact = scale * (b @ a)
        return product.T if self.transposed else product


def updates_by_peft(model: Path, adapter: Path) -> dict[str, Update]:
    """An adapter's updates by the names of the base's tensors, with PEFT's own scales."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    adapted: Any = PeftModel.from_pretrained(load(model), adapter)
    modules = dict(adapted.get_base_model().named_modules())
    layers = {name: module for name, module in modules.items() if isinstance(module, LoraLayer)}
    return {f"{name}.weight": _update(layer) for name, layer in layers.items()}


def _update(layer: Any) -> Update:
    """What one of PEFT's layers computes; it holds the factors in float32, which is exact."""
    a, b = (
        side["default"].weight.detach().numpy().astype(np.float64)
        for side in (layer.lora_A, layer.lora_B)
    )
    return Update(layer.scaling["default"], a, b, layer.fan_in_fan_out)


@dataclass(frozen=True)
class Entry:
    """One model of a merge: stored tensors, an adapter's updates of them, and its parameters."""

    tensors: Mapping[str, Stored]
    updates: Mapping[str, Update] = field(default_factory=dict)
    weight: float = 1.0
    density: float = 1.0


@dataclass(frozen=True)
class Answer:
    """The exact result, the slack of float32 arithmetic, and where either answer is right."""

    exact: Exact
    slack: Exact
    unclear: Mask | None = None


def assert_close(name: str, ours: Stored, answer: Answer) -> None:
    """Hold a merged tensor to `|ours - exact| <= u |exact| + slack`."""
    bound = ROUNDING[ours.dtype] * np.abs(answer.exact) + answer.slack
    bound += LEAST_ROUNDING.get(ours.dtype, 0.0)
    error = np.abs(ours.values() - answer.exact)
    wrong = ~(error <= bound)  # so that a NaN is wrong
    if answer.unclear is not None:
        wrong &= ~answer.unclear
    if wrong.any():
        worst = np.unravel_index(np.argmax(np.where(wrong, error, 0)), error.shape)
        raise AssertionError(
            f"{name}: {wrong.sum()} of {wrong.size} elements are off; at {[*map(int, worst)]} "
            f"{ours.values()[worst]!r} is {error[worst]:.3g} from {answer.exact[worst]!r}, "
            f"allowed {bound[worst]:.3g}"
        )


def weighted_deltas(name: str, base: Mapping[str, Stored], entries: Sequence[Entry]) -> Answer:
    """`base + sum w_i d_i`: task arithmetic."""
    origin = base[name].values()
    exact, magnitude, steps = origin.copy(), np.abs(origin), 2
    for entry in entries:
        difference, delta, size, rank = _parts(name, base, entry)
        exact += entry.weight * (difference + delta)
        magnitude += abs(entry.weight) * (np.abs(difference) + size)
        steps += rank + (2 if difference.any() else 0)
    return Answer(exact, steps * STEP * magnitude)


def weighted_mean(name: str, entries: Sequence[Entry]) -> Answer:
    """`sum w_i x_i / sum w_i`: linear, normalised."""
    total = sum(entry.weight for entry in entries)
    shape = entries[0].tensors[name].shape
    exact, magnitude, steps = np.zeros(shape), np.zeros(shape), 2
    full = {id(entry.tensors) for entry in entries}
    for entry in entries:
        rows = entry.tensors[name].values()
        share = entry.weight / total
        exact += share * rows
        magnitude += abs(share) * np.abs(rows)
        if name in entry.updates:
            update = entry.updates[name]
            exact += share * update.delta
            magnitude += abs(share) * update.size
            steps += update.rank
    steps += 2 * (len(full) - 1)
    return Answer(exact, steps * STEP * magnitude)


def ties(
    name: str,
    base: Mapping[str, Stored],
    entries: Sequence[Entry],
    *,
    scale: float = 1.0,
    normalize: bool = True,
) -> Answer:
    """TIES: trim by magnitude (lowest index first), weighted vote, mean of what agrees.

    Takes part in float32 what the method is given in float32, the task vectors; the rest is
    float64. An entry that leaves the tensor alone has no say.
    """
    origin = base[name].values()
    parts = [(entry, *_parts(name, base, entry)) for entry in entries]
    parts = [part for part in parts if part[1].any() or part[4]]
    if not parts:
        return Answer(origin, np.zeros(origin.shape))
    unclear = np.zeros(origin.shape, np.bool_)
    terms, sizes, ranks = [], [], []
    for entry, difference, delta, size, rank in parts:
        vector = (difference.astype(np.float32) + delta.astype(np.float32)).astype(np.float64)
        kept, near = _largest(vector, entry.density)
        if rank:  # a product may be off in its last bits; a difference of stored values is not
            unclear |= near
        terms.append(entry.weight * np.where(kept, vector, 0))
        sizes.append(np.abs(difference) + size)
        ranks.append(rank)
    vote = reduce(np.add, terms)
    voters = reduce(np.add, [(term != 0).astype(int) for term in terms])
    largest = max(np.abs(term).max() for term in terms)
    unclear |= (np.abs(vote) < UNCLEAR * largest) & (voters > 1)
    weights = [part[0].weight for part in parts]
    agree = [np.where(vote >= 0, term > 0, term < 0) for term in terms]
    total = reduce(np.add, [np.where(a, t, 0) for a, t in zip(agree, terms, strict=True)])
    magnitude = reduce(
        np.add, [a * abs(w) * s for a, w, s in zip(agree, weights, sizes, strict=True)]
    )
    condition = np.ones(origin.shape)
    if normalize:
        divisor = reduce(np.add, [a * w for a, w in zip(agree, weights, strict=True)])
        divisor = np.where(np.abs(divisor) < 1e-8, 1.0, divisor)
        absolute = reduce(np.add, [a * abs(w) for a, w in zip(agree, weights, strict=True)])
        condition = np.maximum(1, absolute / np.abs(divisor))  # of a sum of weights of both signs
        total, magnitude = total / divisor, magnitude / np.abs(divisor)
    exact = origin + scale * total
    slack = (max(ranks) + 2 * len(terms) + 4) * STEP
    return Answer(exact, slack * (np.abs(origin) + abs(scale) * condition * magnitude), unclear)


def _parts(name: str, base: Mapping[str, Stored], entry: Entry) -> tuple[Exact, Exact, Exact, int]:
    """A task vector in two: the difference of stored weights, and the adapter's delta (its size
    and rank beside it)."""
    difference = entry.tensors[name].values() - base[name].values()
    update = entry.updates.get(name)
    if update is None:
        return difference, np.zeros(difference.shape), np.zeros(difference.shape), 0
    return difference, update.delta, update.size, update.rank


def _largest(vector: Exact, density: float) -> tuple[Mask, Mask]:
    """The `max(1, int(density n))` largest magnitudes, and what is too near the cut to tell."""
    magnitudes = np.abs(vector).reshape(-1)
    keep = max(1, int(density * magnitudes.size))
    order = np.argsort(-magnitudes, kind="stable")
    kept = np.zeros(magnitudes.size, np.bool_)
    kept[order[:keep]] = True
    near = np.zeros(magnitudes.size, np.bool_)
    if keep < magnitudes.size:
        cut = magnitudes[order[keep - 1 : keep + 1]].mean()
        near = np.abs(magnitudes - cut) < UNCLEAR * magnitudes.max()
    return kept.reshape(vector.shape), near.reshape(vector.shape)
