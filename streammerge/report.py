"""What a finished merge has to say: what each model changed, what was moved, where it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from streammerge.arrays import PerModel


@dataclass(frozen=True, slots=True)
class Change:
    """One model's part in a merge.

    `relative` is the mean over its tensors of |update| / |base| (Frobenius norms), the update
    being the model's own, before weight and pruning; None where there is no base to compare with.
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


class Changes:
    """Adds up squared norms, tile by tile in grid order, so that any order gives the same sums."""

    def __init__(self, names: Sequence[str], totals: Mapping[str, int]) -> None:
        self._names = tuple(names)
        self._totals = totals
        self._tiles: dict[str, dict[int, PerModel]] = {}
        self._applied = [0] * len(names)
        self._ratios: list[list[tuple[str, float]]] = [[] for _ in names]

    def add(
        self, tensor: str, index: int, pieces: int, models: Sequence[int], norms: PerModel
    ) -> None:
        """Take the squared norms `[1 + models]` of a tile: of the base, then of each update."""
        tiles = self._tiles.setdefault(tensor, {})
        tiles[index] = norms
        if len(tiles) < pieces:
            return
        del self._tiles[tensor]
        base, *updates = np.sum([tiles[i] for i in sorted(tiles)], axis=0).tolist()
        for model, squared in zip(models, updates, strict=True):
            self._applied[model] += 1
            if base > 0 and not math.isnan(squared):
                self._ratios[model].append((tensor, math.sqrt(squared / base)))

    def copied(self, model: int) -> None:
        """A tensor that is this model's stored bytes."""
        self._applied[model] += 1

    def result(self) -> tuple[Change, ...]:
        found = []
        for name, applied, ratios in zip(self._names, self._applied, self._ratios, strict=True):
            values = [value for _, value in sorted(ratios)]
            mean = math.fsum(values) / len(values) if values else None
            total = self._totals.get(name, applied)
            found.append(Change(name, applied, total, mean))
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Report:
    """A finished merge."""

    out: Path
    already_done: bool  # the output was there, complete, before
    changes: tuple[Change, ...]
    tensors: int
    read_bytes: int
    written_bytes: int
    copied_bytes: int
    seconds: float
    peak_bytes: int
    projected_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "out": str(self.out)}
