"""The exact k-th largest magnitude of every model's delta, as folds over tiles.

    SampledBracket   reads a thin sample and brackets each threshold
    Counting         reads everything once: counts above the bracket, collects what is inside
    Thresholds       the value: a threshold, and how many equals each tile keeps

A bracket that misses is moved, one that holds too much is binned and narrowed; both cost another
read and neither changes the result, which is exact whatever the sample. Zeros never matter: to
keep or to trim them is the same.

Magnitudes are compared as keys (see `kernels.prune`). "Keep k" follows one rule everywhere:
the k largest stay, and of equal magnitudes at the threshold those with the lowest index.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from streammerge.kernels.prune import ABOVE_ALL, KEEP_ALL_EQUAL, Cut, count_and_collect, keys
from streammerge.memory import Scratch
from streammerge.words import (
    Declared,
    DeltaStack,
    Fold,
    Knobs,
    StatisticValue,
    TensorSpec,
    Tile,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Keys = NDArray[np.uint32]

BINS = 1 << 16
# A part with more distinct keys than there are bins is sent as bins, so that no part is large.
# Half as many cost adapters of rank 4 another read: their brackets are wide.
_MOST_KEYS = BINS
# Tensors smaller than this are not worth a sample: everything is inside the bracket.
_SAMPLE_FROM = 1 << 15
# Every eighth row, within these bounds: reading a row of a full model reads all its columns.
_LEAST_ROWS = 64
_SAMPLE_ROWS = 1024
_SAMPLE_ELEMENTS = 96 << 10  # so many that a sample is no larger than any other part
# Low-rank deltas are clustered by rows, so the spread is taken between rows; an estimate that
# treats elements as independent missed on the first real tensor.
_SPREADS = 4.5


@dataclass(frozen=True, slots=True)
class KthMagnitude:
    """Declares the cut that keeps the `max(1, int(density * numel))` largest of each model."""

    keep: str  # the per-model knob that says which share to keep

    def check(self, declared: Declared) -> None:
        if self.keep not in declared.per_model:
            raise TypeError(f"KthMagnitude(keep={self.keep!r}): no such per-model knob")

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
        models = len(self.measured(knobs))
        return 8 * BINS * models, 4 * spec.numel * models

    def part_bytes(self, spec: TensorSpec, knobs: Knobs) -> int:
        return len(self.measured(knobs)) * max(4 * BINS, 8 * _MOST_KEYS, 4 * _SAMPLE_ELEMENTS)

    def buffers(self, knobs: Knobs) -> int:
        return 2  # a delta, and the magnitudes that are collected

    def by_products(self, knobs: Knobs) -> bool:
        return False

    def start(
        self,
        spec: TensorSpec,
        knobs: Knobs,
        values: Mapping[str, StatisticValue],
        state_bytes: int,
    ) -> Fold | StatisticValue:
        densities = [float(density) for density in knobs.per_model[self.keep]]
        quotas = [max(1, int(density * spec.numel)) for density in densities]
        pending = {model: Bracket(keep) for model, keep in enumerate(quotas) if keep < spec.numel}
        thresholds = Thresholds(len(quotas))
        if not pending:
            return thresholds
        each = max(8 * BINS, state_bytes // len(pending))
        if spec.numel < _SAMPLE_FROM:
            return Counting(spec, pending, thresholds, each)
        return SampledBracket(spec, pending, thresholds, each)


@dataclass(frozen=True, slots=True)
class Bracket:
    """The k-th largest key is believed to lie in `[low, high)`."""

    k: int
    low: int = 1
    high: int = ABOVE_ALL


@dataclass(slots=True)
class Thresholds:
    """Per model: the key of the threshold, the equals to keep, and where the equals lie."""

    models: int
    keys: dict[int, int] = field(default_factory=dict)
    quotas: dict[int, int] = field(default_factory=dict)
    equals_before: dict[int, NDArray[np.int64]] = field(default_factory=dict)  # [tiles + 1]

    def at(self, tile_index: int) -> Cut:
        """The cut of one tile: what is left of the quota once earlier tiles took theirs."""
        thresholds, quotas = [], []
        for model in range(self.models):
            threshold = self.keys.get(model, 0)
            quota = KEEP_ALL_EQUAL
            if model in self.equals_before:
                before = self.equals_before[model]
                left = self.quotas[model] - int(before[tile_index])
                here = int(before[tile_index + 1] - before[tile_index])
                quota = KEEP_ALL_EQUAL if left >= here else max(0, left)
            thresholds.append(threshold)
            quotas.append(quota)
        return Cut(tuple(thresholds), tuple(quotas))


class SampledBracket:
    """A thin sample of rows and columns, from which a bracket for each model's threshold."""

    def __init__(
        self, spec: TensorSpec, pending: dict[int, Bracket], thresholds: Thresholds, each: int
    ) -> None:
        self._spec = spec
        self._pending = pending
        self._thresholds = thresholds
        self._each = each
        self._sampled: dict[int, Keys] = {}

    def wants(self, grid: Sequence[Tile]) -> Sequence[Tile]:
        """One thinned tile. The steps are odd, so that they do not beat with head sizes."""
        rows = max(_LEAST_ROWS, min(_SAMPLE_ROWS, self._spec.rows // 8))
        row_step = -(-self._spec.rows // rows) | 1
        sampled = len(range(0, self._spec.rows, row_step))
        col_step = -(-self._spec.cols * sampled // _SAMPLE_ELEMENTS) | 1
        return [Tile(0, self._spec.rows, row_step, col_step)]

    def measure(self, stack: DeltaStack, scratch: Scratch) -> dict[int, Keys]:
        return {model: keys(stack.one(model)) for model in self._pending}

    def absorb(self, tile_index: int, part: dict[int, Keys]) -> None:
        self._sampled = part

    def finish(self) -> Fold:
        pending = {
            model: _bracket(self._sampled[model], bracket.k, self._spec.numel)
            for model, bracket in self._pending.items()
        }
        return Counting(self._spec, pending, self._thresholds, self._each)


def _bracket(sample: Keys, k: int, numel: int) -> Bracket:
    """Where the k-th largest of `numel` lies, from sampled keys `[rows, cols]`."""
    ordered = np.sort(sample.reshape(-1))
    size = ordered.size
    share = k / numel
    middle = ordered[min(size - 1, int((1 - share) * size))]
    by_row = np.mean(sample >= middle, axis=1)
    if len(by_row) == 1:
        blocks = np.array_split(sample[0] >= middle, min(16, size))
        by_row = np.array([np.mean(block) for block in blocks])
    spread = _SPREADS * (float(np.std(by_row)) + 1 / size) / len(by_row) ** 0.5
    top = int((1 - share + spread) * size) + 1
    bottom = int((1 - share - spread) * size) - 1
    high = int(ordered[top]) + 1 if top < size else ABOVE_ALL
    low = int(ordered[bottom]) if bottom >= 0 else 1
    return Bracket(k, max(1, low), max(2, high))


@dataclass(frozen=True, slots=True)
class Part:
    """One model's magnitudes of one tile: those inside the bracket, collected or binned."""

    above: int  # elements at or above the bracket
    held: Keys | None  # [n], sorted
    up_to: NDArray[np.uint32] | None  # [n], how many elements are up to each; None: each is one
    bins: NDArray[np.uint32] | None  # [BINS]

    @property
    def nbytes(self) -> int:
        arrays = (self.held, self.up_to, self.bins)
        return sum(array.nbytes for array in arrays if array is not None)

    def below(self, key: int) -> int:
        """How many elements inside the bracket are under the key."""
        assert self.held is not None
        index = int(np.searchsorted(self.held, np.uint32(key)))
        if self.up_to is None or index == 0:
            return index
        return int(self.up_to[index - 1])

    @property
    def inside(self) -> int:
        if self.bins is not None:
            return int(self.bins.sum(dtype=np.int64))
        assert self.held is not None
        return len(self.held) if self.up_to is None else int(self.up_to[-1])


def _shift(bracket: Bracket) -> int:
    """The keys of a bracket, less its low end, fit into BINS when shifted right by this."""
    return max(0, (bracket.high - bracket.low - 1).bit_length() - BINS.bit_length() + 1)


def _add_to_bins(found: Keys, bracket: Bracket, bins: NDArray[np.uint32]) -> None:
    from streammerge.kernels import cpu

    cpu.add_to_bins(found, np.uint32(bracket.low), np.uint32(_shift(bracket)), bins)


def _collect(rows: NDArray[np.float32], bracket: Bracket, scratch: Scratch) -> Part:
    above, found = count_and_collect(rows, bracket.low, bracket.high, scratch)
    found.sort()
    steps = found[1:] != found[:-1]
    distinct = min(1, len(found)) + int(np.count_nonzero(steps))
    if distinct > _MOST_KEYS:
        bins = np.zeros(BINS, np.uint32)
        _add_to_bins(found, bracket, bins)
        return Part(above, None, None, bins)
    if 2 * distinct >= len(found):  # to count equals would not make it smaller
        return Part(above, found.copy(), None, None)
    lasts = np.append(np.flatnonzero(steps), len(found) - 1)  # of each run of equal keys
    return Part(above, found[lasts], (lasts + 1).astype(np.uint32), None)


class _Tally:
    """The parts of one model: held as they come, binned once they hold too much."""

    def __init__(self, bracket: Bracket, most_bytes: int) -> None:
        self.bracket = bracket
        self.above = 0
        self.parts: list[Part] = []
        self.bins: NDArray[np.int64] | None = None
        self._most_bytes = most_bytes
        self._held = 0

    def add(self, part: Part) -> None:
        self.above += part.above
        if self.bins is None:
            self.parts.append(part)
            self._held += part.nbytes
            narrow = self.bracket.high - self.bracket.low == 1  # binned, it would stay as it is
            if part.bins is not None or (self._held > self._most_bytes and not narrow):
                self._start_bins()
        else:
            self._bin(part)

    def _start_bins(self) -> None:
        self.bins = np.zeros(BINS, np.int64)
        for part in self.parts:
            self._bin(part)
        self.parts.clear()

    def _bin(self, part: Part) -> None:
        assert self.bins is not None
        if part.bins is not None:
            self.bins += part.bins
            return
        assert part.held is not None
        index = (part.held - np.uint32(self.bracket.low)) >> np.uint32(_shift(self.bracket))
        counts = 1 if part.up_to is None else np.diff(part.up_to, prepend=0)
        np.add.at(self.bins, index, counts)

    @property
    def inside(self) -> int:
        if self.bins is not None:
            return int(self.bins.sum())
        return sum(part.inside for part in self.parts)

    @property
    def too_few(self) -> bool:
        """Whether fewer than k are not zero: then everything is kept."""
        return self.bracket.low == 1 and self.above + self.inside < self.bracket.k

    def missed(self) -> Bracket | None:
        """The bracket beside this one in which the threshold must lie; None where it is inside."""
        k, low, high = self.bracket.k, self.bracket.low, self.bracket.high
        if self.above >= k:
            return Bracket(k, high, ABOVE_ALL)
        if self.above + self.inside < k:
            return Bracket(k, 1, low)
        return None

    def narrowed(self) -> Bracket:
        """The bin that holds the threshold."""
        assert self.bins is not None
        from_the_top = np.cumsum(self.bins[::-1])
        index = BINS - 1 - int(np.searchsorted(from_the_top, self.bracket.k - self.above))
        low = self.bracket.low + (index << _shift(self.bracket))
        high = min(self.bracket.high, low + (1 << _shift(self.bracket)))
        return Bracket(self.bracket.k, low, high)

    def key(self) -> int:
        """The k-th largest key, by bisection over keys: no copy of the parts is made."""
        wanted = self.bracket.k - self.above  # the threshold is this many from the top, inside
        inside = self.inside
        keys = range(self.bracket.low, self.bracket.high)
        under = bisect_left(keys, True, key=lambda key: inside - self.below(key) < wanted)
        return self.bracket.low + under - 1

    def below(self, key: int) -> int:
        return sum(part.below(key) for part in self.parts)


class Counting:
    """One read of the whole tensor against a bracket for each model."""

    def __init__(
        self, spec: TensorSpec, pending: dict[int, Bracket], thresholds: Thresholds, each: int
    ) -> None:
        self._spec = spec
        self._thresholds = thresholds
        self._each = each
        self._pending = pending
        self._tallies = {model: _Tally(bracket, each) for model, bracket in pending.items()}

    def wants(self, grid: Sequence[Tile]) -> Sequence[Tile]:
        return grid

    def measure(self, stack: DeltaStack, scratch: Scratch) -> dict[int, Part]:
        return {
            model: _collect(stack.one(model), bracket, scratch)
            for model, bracket in self._pending.items()
        }

    def absorb(self, tile_index: int, part: dict[int, Part]) -> None:
        for model, tally in self._tallies.items():
            tally.add(part[model])

    def finish(self) -> Fold | StatisticValue:
        """All thresholds, or a further read for those that missed or held too much."""
        pending: dict[int, Bracket] = {}
        for model, tally in self._tallies.items():
            if tally.too_few:
                continue  # no threshold
            moved = tally.missed()
            if moved is not None:
                pending[model] = moved
            elif tally.bins is None:
                self._settle(model, tally)
            else:
                pending[model] = tally.narrowed()
        if pending:
            return Counting(self._spec, pending, self._thresholds, self._each)
        return self._thresholds

    def _settle(self, model: int, tally: _Tally) -> None:
        threshold = tally.key()
        self._thresholds.keys[model] = threshold
        up_to = [part.below(threshold + 1) - part.below(threshold) for part in tally.parts]
        equals = np.cumsum([0, *up_to], dtype=np.int64)
        larger = tally.above + tally.inside - tally.below(threshold + 1)
        quota = tally.bracket.k - larger
        self._thresholds.quotas[model] = quota
        if quota < equals[-1]:
            self._thresholds.equals_before[model] = equals
