"""What a finished merge has to say: what each model changed, what was moved, where it is."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from streammerge.arrays import PerModel
from streammerge.planning.adapter_output import AdapterOutput
from streammerge.planning.inputs import Model
from streammerge.sinks.receipts import Sums
from streammerge.sizes import format_size
from streammerge.storage.shard import ShardLayout


@dataclass(frozen=True, slots=True)
class Change:
    """One model's part in a merge.

    `relative` is the mean over its tensors of |update| / |base| (Frobenius norms), the update
    being all by which the model differs from the base, before weight and pruning: for an adapter
    on another model that model's difference too. Tensors that are copied are not measured. None
    where there is no base to compare with.
    """

    name: str
    applied: int  # tensors
    total: int  # tensors that it could change
    relative: float | None

    def __str__(self) -> str:
        line = f"{self.name}: {self.applied} of {self.total} tensors applied"
        if self.relative is None:
            return line
        return f"{line}, mean relative change {100 * self.relative:.2g} %"


@dataclass(frozen=True, slots=True)
class Missed:
    """What factors of a rank miss of the merged update of one tensor; Frobenius norms."""

    rank: int
    update: float
    missed: float

    @property
    def relative(self) -> float:
        """|missed| / |update|, 0 where there is no update."""
        return self.missed / self.update if self.update else 0.0


def describe_missed(missed: Mapping[str, Missed]) -> list[str]:
    """A line on what factors miss of all updates together, and where most; none if nothing."""
    if not missed:
        return []
    ranks = sorted({one.rank for one in missed.values()})
    span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    whole = Missed(
        ranks[-1],
        math.hypot(*(one.update for one in missed.values())),
        math.hypot(*(one.missed for one in missed.values())),
    )
    worst = max(missed, key=lambda name: missed[name].relative)
    return [
        f"the factors, of {span}, miss {100 * whole.relative:.2g} % of the merged update, at most "
        f"{100 * missed[worst].relative:.2g} % of a tensor's ({worst})"
    ]


@dataclass(frozen=True, slots=True)
class HalfDone:
    """A merge that was stopped, or is under way, and is to replace the output that is there."""

    path: str
    nbytes: int  # on the disk
    same_merge: bool
    at_work: str | None  # the process that may be

    def __str__(self) -> str:
        which = "a rebuild of it" if self.same_merge else "another merge, to replace it,"
        command = "this command" if self.same_merge else "the command of that merge"
        rows = {"go on": f"{command} with --force", "discard": f"rm -r {shlex.quote(self.path)}"}
        if self.at_work:
            rows = {"at work": f"{self.at_work}; if it is gone:", **rows}
        head = f"{which} lies half done in {self.path}, {format_size(self.nbytes)}"
        return "\n".join([head, *(f"  {key + ':':<10}{text}" for key, text in rows.items())])


@dataclass(frozen=True, slots=True)
class Written:
    """The shards of an output as they are, and what is known of them."""

    layouts: tuple[ShardLayout, ...]
    sums: Sums
    adapter: AdapterOutput | None
    missed: Mapping[str, Missed]  # what factors miss, by the base's tensor


class Changes:
    """Adds up squared norms, tile by tile in grid order, so that any order gives the same sums."""

    def __init__(
        self,
        models: Sequence[Model],
        layouts: Sequence[ShardLayout],
        changes: Mapping[str, str],
    ) -> None:
        """`changes` tells of an output tensor which one of the base it changes."""
        self._models = models
        self._changes = changes
        extents = {n: one for layout in layouts for n, one in layout.extents.items()}
        self._tensors = {tensor: extents[name] for name, tensor in changes.items()}
        self._tiles: dict[str, dict[int, PerModel]] = {}
        self._applied = [0] * len(self._models)
        self._ratios: list[list[tuple[str, float]]] = [[] for _ in self._models]
        self._missed: dict[str, Missed] = {}

    def add(
        self, tensor: str, index: int, pieces: int, models: Sequence[int], norms: PerModel
    ) -> None:
        """Take the squared norms of a tile: of the base, then of each model's update.

        And where the merged update is approximated, of that and of what is missed.
        """
        if not models:
            return  # the base's own tensor in another dtype
        tensor = self._changes[tensor]
        tiles = self._tiles.setdefault(tensor, {})
        tiles[index] = norms
        if len(tiles) < pieces:
            return
        del self._tiles[tensor]
        base, *others = np.sum([tiles[i] for i in sorted(tiles)], axis=0).tolist()
        updates, approximation = others[: len(models)], others[len(models) :]
        if approximation:
            update, missed = approximation
            rank = self._tensors[tensor].spec.shape[1]  # of B, [out, rank]
            self._missed[tensor] = Missed(rank, math.sqrt(update), math.sqrt(missed))
        for model, squared in zip(models, updates, strict=True):
            if not self._models[model].takes_part(tensor):
                continue
            self._applied[model] += 1
            if base > 0 and math.isfinite(squared / base):
                self._ratios[model].append((tensor, math.sqrt(squared / base)))

    def copied(self, tensor: str, path: str) -> None:
        """A tensor that was copied from a file: it is the model's whose file that is."""
        tensor = self._changes[tensor]
        for index, model in enumerate(self._models):
            if model.stores(tensor, path) and model.takes_part(tensor):
                self._applied[index] += self._is_merged(tensor)

    def result(self) -> tuple[Change, ...]:
        found = []
        for model, applied, ratios in zip(self._models, self._applied, self._ratios, strict=True):
            values = [value for _, value in sorted(ratios)]
            mean = math.fsum(values) / len(values) if values else None
            total = sum(1 for name in self._tensors if self._is_merged(name, model))
            found.append(Change(model.name, applied, total, mean))
        return tuple(found)

    def missed(self) -> dict[str, Missed]:
        """What factors miss, by tensor; empty where all of them are exact."""
        return {name: self._missed[name] for name in sorted(self._missed)}

    def _is_merged(self, tensor: str, model: Model | None = None) -> bool:
        """Whether a tensor counts: one with elements to merge, in which the model takes part."""
        spec = self._tensors[tensor].spec
        counts = spec.dtype.mergeable and spec.numel > 0
        return counts and (model is None or model.takes_part(tensor))


@dataclass(frozen=True, slots=True)
class Report:
    """A finished merge."""

    out: Path
    kind: Literal["model", "adapter"]
    already_done: bool  # the output was there, complete, before
    half_done: HalfDone | None  # and beside it what is to replace it
    changes: tuple[Change, ...]
    missed: Mapping[str, Missed]  # of an adapter as output
    tensors: int
    read_bytes: int
    written_bytes: int
    copied_bytes: int
    resumed_bytes: int  # of those written, by an earlier run that was stopped
    spilled_bytes: int
    seconds: float
    peak_bytes: int
    projected_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        missed = {name: one.relative for name, one in self.missed.items()}
        return {**asdict(self), "out": str(self.out), "missed": missed}
