"""What a method must know of one tensor first: its statistics, in waves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from streammerge.declarations import Buffers, Knobs, MethodSpec, Statistic
from streammerge.memory import share_out
from streammerge.scratch import Scratch
from streammerge.words import DeltaStack, Fold, StatisticValue, TensorSpec


class Needs:
    """The statistics of a method for one tensor; those that wait for none share a read."""

    def __init__(self, method: MethodSpec, knobs: Knobs, spec: TensorSpec) -> None:
        self._statistics = method.statistics
        self._knobs = knobs
        self._spec = spec

    def start(
        self, state_bytes: int, values: Mapping[str, StatisticValue]
    ) -> dict[str, Fold | StatisticValue]:
        """See `Merged.start`; a value that needs no read is there for those that wait for it."""
        known = dict(values)
        found: dict[str, Fold | StatisticValue] = {}
        states = self._states(state_bytes)
        for name, statistic in self._statistics.items():
            if name in known or not all(other in known for other in self._waits_for(statistic)):
                continue
            found[name] = one = statistic.start(self._spec, self._knobs, known, states.get(name, 0))
            if isinstance(one, StatisticValue):
                known[name] = one
        return found

    def _states(self, state_bytes: int) -> dict[str, int]:
        """What there is of the state for each statistic that takes a read."""
        reading = {n: one for n, one in self._statistics.items() if one.reads(self._knobs)}
        wants = [one.state_bytes(self._spec, self._knobs) for one in reading.values()]
        return dict(zip(reading, share_out(state_bytes, wants), strict=True))

    def measure(
        self, folds: Mapping[str, Fold], stack: DeltaStack, scratch: Scratch
    ) -> dict[str, Any]:
        return {name: fold.measure(stack, scratch) for name, fold in folds.items()}

    def found(self, values: Mapping[str, StatisticValue], index: int) -> dict[str, Any]:
        """What the method is handed for a tile of the grid."""
        return {name: value.at(index) for name, value in values.items()}

    def waves(self) -> Sequence[Sequence[str]]:
        """See `Merged.waves`."""
        over: dict[str, int] = {}  # after how many reads
        waves: list[list[str]] = []
        for name, statistic in self._statistics.items():
            first = max((over[other] for other in self._waits_for(statistic)), default=0)
            over[name] = first + statistic.reads(self._knobs)
            waves += [[] for _ in range(over[name] - len(waves))]
            for wave in waves[first : over[name]]:
                wave.append(name)
        return waves

    def _waits_for(self, statistic: Statistic) -> Sequence[str]:
        return [name for name in statistic.waits_for() if name in self._statistics]

    def measured(self, names: Iterable[str]) -> Sequence[int]:
        """The places in the stack of the models that some statistics read."""
        some = (self._statistics[name].measured(self._knobs) for name in names)
        return sorted({model for models in some for model in models})

    def reads(self, model: int) -> int:
        """How often the rows of a model of the stack are wanted, by the merge and before it."""
        return 1 + sum(model in self.measured(wave) for wave in self.waves())

    def reads_base(self, names: Iterable[str]) -> bool:
        """Whether some statistics look at the base's rows."""
        return any(self._statistics[name].reads_base(self._knobs) for name in names)

    def state_bytes(self) -> tuple[int, int]:
        """See `Merged.state_bytes`."""
        both = [one.state_bytes(self._spec, self._knobs) for one in self._reading()]
        return sum(least for least, _ in both), sum(most for _, most in both)

    def part_bytes(self) -> int:
        return sum(one.part_bytes(self._spec, self._knobs) for one in self._reading())

    def buffers(self) -> tuple[int, int]:
        """Buffers of a tile to measure, the stack not counted: kept in the scratch; in passing.

        Statistics share them. One is for the rows of those that look at one model after the other,
        when they have a wave for themselves.
        """
        each = [Buffers(), *(one.buffers(self._knobs) for one in self._reading())]
        rows = int(any(not one.stacked for one in each))
        return rows + max(one.kept for one in each), max(one.passing for one in each)

    def stacks(self) -> bool:
        """Whether the rows of all models are held at once to measure a tile."""
        reading = self._reading()
        return len(reading) > 1 or any(one.buffers(self._knobs).stacked for one in reading)

    def by_products(self) -> bool:
        """Whether the inner products of the deltas are all that is looked at before the merge."""
        return all(one.by_products(self._knobs) for one in self._reading())

    def _reading(self) -> Sequence[Statistic]:
        return [one for one in self._statistics.values() if one.reads(self._knobs)]
