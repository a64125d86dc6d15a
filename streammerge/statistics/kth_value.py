"""The exact k-th largest magnitude of something that is computed from all models together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING

from streammerge.declarations import Buffers, Declared, Knobs
from streammerge.statistics.of_stack import OfStack, check_names, of_shared
from streammerge.statistics.select import each_model, part_bytes, select, state_bytes
from streammerge.words import DeltaStack, Fold, StatisticValue, TensorSpec

if TYPE_CHECKING:
    from streammerge.arrays import Rows


@dataclass(frozen=True, slots=True)
class KthValue:
    """Declares cuts of `of(deltas, ...)`, rows without a sign, one for each of some counts.

    A count is a function of shared knobs, of `numel`, and of `nonzero`, the number of elements
    that are not zero. `unless` tells from shared knobs that nothing is cut. `whole_rows` says that
    an element depends on all of its row. `temporaries` are the buffers of a tile that `of`
    allocates, its result among them.
    """

    of: Callable[..., Rows]
    counts: tuple[Callable[..., int], ...]
    unless: Callable[..., bool] | None = None
    whole_rows: bool = False
    temporaries: int = 1

    def check(self, declared: Declared) -> None:
        OfStack(self.of).check(declared)
        for count in self.counts:
            check_names(count, declared.shared | {"numel", "nonzero"})
        if self.unless is not None:
            check_names(self.unless, declared.shared)

    def waits_for(self) -> Sequence[str]:
        return OfStack(self.of).names

    def measured(self, knobs: Knobs) -> Sequence[int]:
        return range(len(knobs.touching)) if self.reads(knobs) else ()

    def reads_base(self, knobs: Knobs) -> bool:
        return OfStack(self.of).wants_base

    def reads(self, knobs: Knobs) -> int:
        return int(self.unless is None or not of_shared(self.unless, knobs))

    def state_bytes(self, spec: TensorSpec, knobs: Knobs) -> tuple[int, int]:
        return state_bytes(spec, list(self._counts(spec, knobs, spec.numel).values()))

    def part_bytes(self, spec: TensorSpec, knobs: Knobs) -> int:
        return part_bytes() * len(self.counts)

    def buffers(self, knobs: Knobs) -> Buffers:
        return Buffers(1, self.temporaries)  # the magnitudes that are collected

    def by_products(self, knobs: Knobs) -> bool:
        return False

    def start(
        self,
        spec: TensorSpec,
        knobs: Knobs,
        values: Mapping[str, StatisticValue],
        state_bytes: int,
    ) -> Fold | StatisticValue:
        if not self.reads(knobs):
            everything = dict.fromkeys(range(len(self.counts)), spec.numel)
            return select(spec, everything, each_model, state_bytes)
        of = OfStack(self.of).bound(knobs, values)

        def look(stack: DeltaStack, slots: Iterable[int]) -> Iterator[tuple[int, Rows]]:
            rows = of(stack, stack.all())
            yield from ((slot, rows) for slot in slots)

        counts = partial(self._counts, spec, knobs)
        mended = any("nonzero" in signature(one).parameters for one in self.counts)
        return select(
            spec,
            counts(spec.numel),
            look,
            state_bytes,
            recount=counts if mended else None,
            whole_rows=self.whole_rows,
            exact=True,
        )

    def _counts(self, spec: TensorSpec, knobs: Knobs, nonzero: int) -> dict[int, int]:
        """Slot -> k, where so many elements are not zero."""
        given = {"numel": spec.numel, "nonzero": nonzero}
        return {i: of_shared(one, knobs, **given) for i, one in enumerate(self.counts)}
