"""The exact k-th largest magnitude of every model's delta."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from streammerge.declarations import Buffers, Declared, Knobs
from streammerge.statistics.of_stack import check_names, of_each
from streammerge.statistics.select import each_model, part_bytes, select, state_bytes
from streammerge.words import Fold, StatisticValue, TensorSpec


def largest(numel: int, share: float) -> int:
    """How many elements a share to keep stands for: at least one."""
    return max(1, int(share * numel))


@dataclass(frozen=True, slots=True)
class KthMagnitude:
    """Declares the cut that keeps the `max(1, int(density * numel))` largest of each model.

    `keep` is the per-model knob that says which share; where it is 1, everything stays. `count`
    is another rule: of the number of elements and of per-model knobs. `equals` is the shared knob
    that may be "all", to keep all that equal the last one; "first" keeps exactly so many.
    """

    keep: str
    count: Callable[..., int] | None = None
    equals: str | None = None

    def check(self, declared: Declared) -> None:
        if self.keep not in declared.per_model:
            raise TypeError(f"KthMagnitude(keep={self.keep!r}): no such per-model knob")
        if self.equals is not None and self.equals not in declared.shared:
            raise TypeError(f"KthMagnitude(equals={self.equals!r}): no such shared knob")
        if self.count is not None:
            check_names(self.count, declared.per_model | {"numel"})

    def waits_for(self) -> Sequence[str]:
        return ()

    def measured(self, knobs: Knobs) -> Sequence[int]:
        """Those that are pruned at all; of a small tensor even they may turn out to keep all."""
        return [model for model, share in enumerate(knobs.per_model[self.keep]) if share < 1]

    def reads_base(self, knobs: Knobs) -> bool:
        return False

    def reads(self, knobs: Knobs) -> int:
        return int(bool(self.measured(knobs)))

    def state_bytes(self, spec: TensorSpec, knobs: Knobs) -> tuple[int, int]:
        counts = self._counts(spec, knobs)
        return state_bytes(spec, [counts[model] for model in self.measured(knobs)])

    def part_bytes(self, spec: TensorSpec, knobs: Knobs) -> int:
        return part_bytes() * len(self.measured(knobs))

    def buffers(self, knobs: Knobs) -> Buffers:
        return Buffers(1, stacked=False)  # the magnitudes that are collected

    def by_products(self, knobs: Knobs) -> bool:
        return False

    def start(
        self,
        spec: TensorSpec,
        knobs: Knobs,
        values: Mapping[str, StatisticValue],
        state_bytes: int,
    ) -> Fold | StatisticValue:
        all_equal = self.equals is not None and knobs.shared[self.equals] == "all"
        by_slot = dict(enumerate(self._counts(spec, knobs)))
        return select(spec, by_slot, each_model, state_bytes, all_equal=all_equal)

    def _counts(self, spec: TensorSpec, knobs: Knobs) -> Sequence[int]:
        """How many elements each model keeps."""
        if self.count is not None:
            return of_each(self.count, knobs, numel=spec.numel)
        return [largest(spec.numel, share) for share in knobs.per_model[self.keep].tolist()]
