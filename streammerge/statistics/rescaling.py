"""How much to scale what pruning left of each model, so that its size is what it was before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from streammerge.declarations import Buffers, Declared, Knobs
from streammerge.kernels.weighted import sum_of_magnitudes
from streammerge.statistics.given import Same
from streammerge.statistics.of_stack import OfStack, check_names, of_each
from streammerge.statistics.sums import Summing
from streammerge.words import DeltaStack, Fold, StatisticValue, TensorSpec

if TYPE_CHECKING:
    from streammerge.arrays import Deltas, PerModel

# Under it a norm is nothing, and what is left stays as it is.
_LEAST_NORM = 1e-7


@dataclass(frozen=True, slots=True)
class Rescaling:
    """Declares a factor for each model: 1, over the share that is kept, or to the old L1 norm.

    The shared knob `rescale` says which: none, density or l1. `of` prunes the stack; `share` says
    which share of a model's elements is kept, of their number and of per-model knobs (None: `of`
    divides by it itself, element by element). The value is float64 `[models]` of the stack.
    """

    of: Callable[..., Any]
    share: Callable[..., float] | None = None
    keep: str = "density"  # the per-model knob that is 1 where nothing is pruned
    temporaries: int = 0  # buffers of a tile that `of` allocates

    def check(self, declared: Declared) -> None:
        if "rescale" not in declared.shared or self.keep not in declared.per_model:
            raise TypeError(f"Rescaling: `rescale` and {self.keep!r} must be declared before")
        OfStack(self.of).check(declared)
        if self.share is not None:
            check_names(self.share, declared.per_model | {"numel"})

    def waits_for(self) -> Sequence[str]:
        return OfStack(self.of).names

    def measured(self, knobs: Knobs) -> Sequence[int]:
        """All, since the stack is pruned as a whole."""
        return range(len(knobs.touching)) if self._by_norms(knobs) else ()

    def reads_base(self, knobs: Knobs) -> bool:
        return False

    def reads(self, knobs: Knobs) -> int:
        return int(self._by_norms(knobs))

    def state_bytes(self, spec: TensorSpec, knobs: Knobs) -> tuple[int, int]:
        state = 2 * 8 * len(knobs.touching)
        return state, state

    def part_bytes(self, spec: TensorSpec, knobs: Knobs) -> int:
        return 2 * 8 * len(knobs.touching)

    def buffers(self, knobs: Knobs) -> Buffers:
        return Buffers(passing=self.temporaries)

    def by_products(self, knobs: Knobs) -> bool:
        return False

    def start(
        self,
        spec: TensorSpec,
        knobs: Knobs,
        values: Mapping[str, StatisticValue],
        state_bytes: int,
    ) -> Fold | StatisticValue:
        if self._by_norms(knobs):
            prune = OfStack(self.of).bound(knobs, values)
            return Summing(partial(_norms, prune), _ratio)
        factors = np.ones(len(knobs.touching))
        if knobs.shared["rescale"] == "density" and self.share is not None:
            shares = of_each(self.share, knobs, numel=spec.numel)
            factors = 1 / np.array(shares, np.float64)
        return Same(factors)

    def _by_norms(self, knobs: Knobs) -> bool:
        pruned = any(share < 1 for share in knobs.per_model[self.keep])
        return pruned and knobs.shared["rescale"] == "l1"


def _norms(
    prune: Callable[[DeltaStack, Deltas], Deltas], stack: DeltaStack, deltas: Deltas
) -> PerModel:
    """The L1 norm of each model in a tile, before and after, `[2, models]`."""
    before = [sum_of_magnitudes(delta) for delta in deltas]
    after = [sum_of_magnitudes(delta) for delta in prune(stack, deltas)]
    return np.array([before, after], np.float64)


def _ratio(norms: PerModel) -> PerModel:
    before, after = norms
    nothing = (before < _LEAST_NORM) | (after < _LEAST_NORM)
    return np.asarray(np.where(nothing, 1.0, before / np.where(nothing, 1.0, after)))
