"""The exact k-th largest magnitude of whole tensors, as folds over tiles.

    SampledBracket   reads a thin sample and brackets each threshold
    Counting         reads everything once: counts above the bracket, collects what is inside
    Thresholds       the value: a threshold, and how many equals each tile keeps

A bracket that misses is moved, one that holds too much is binned and narrowed; both cost another
read and neither changes the result, which is exact whatever the sample. Zeros never matter: to
keep or to trim them is the same.

"Keep k" follows one rule everywhere: the k largest stay, and of equal magnitudes at the threshold
those with the lowest index. A slot is one k of one tensor: a model's delta, or something computed
from all of them, which may have several.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from streammerge.kernels.prune import (
    ABOVE_ALL,
    KEEP_ALL_EQUAL,
    Cut,
    count_below,
    count_nonzero,
    keys,
)
from streammerge.scratch import Scratch
from streammerge.statistics import tally
from streammerge.statistics.tally import Bracket, Part, Tally, collect
from streammerge.words import DeltaStack, Fold, StatisticValue, TensorSpec, Tile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from streammerge.arrays import Rows
    from streammerge.statistics.tally import Keys

# Tensors smaller than this are not worth a sample: everything is inside the bracket.
_SAMPLE_FROM = 1 << 15
# Every eighth row, within these bounds: reading a row of a full model reads all its columns. Of a
# large tensor more rows and more columns, so that a bracket holds few enough of its many elements.
_LEAST_ROWS = 128
_SAMPLE_ROWS = 512
_SAMPLE_ELEMENTS = 192 << 10
_LARGEST_SAMPLE = 2 << 20
_SAMPLED_SHARE = 1 / 64
# A wider bracket holds more to collect; one that misses costs a read of one tensor.
_SPREADS = 3.5
# State of a slot, at most; the share of a LoRA's delta inside a bracket around its median, from
# the smallest sample, at rank 4 (half of that at rank 16); and the power by which it falls as
# samples grow, as measured.
_MOST_STATE_BYTES = 20 << 20
_HELD_SHARE = 2 / 21
_HELD_POWER = 0.4

# The rows of each of some slots; the next may overwrite the last.
Look = Callable[[DeltaStack, Iterable[int]], Iterator[tuple[int, "Rows"]]]
# The k of every slot, once it is known how many elements are not zero.
Recount = Callable[[int], Mapping[int, int]]


def part_bytes() -> int:
    """The most that a measured part holds of one slot."""
    return max(4 * tally.BINS, 8 * tally.MOST_KEYS)


def state_bytes(spec: TensorSpec, counts: Collection[int]) -> tuple[int, int]:
    """The state that the slots of some k cannot do without, and the most they could make use of.

    One of them at a time goes over to bins, and holds both.
    """
    bins = _least_state_bytes()
    most = sum(max(bins, min(_held_bytes(spec, k), _MOST_STATE_BYTES)) for k in counts)
    return (len(counts) + 1) * bins, most + bins


def _held_bytes(spec: TensorSpec, k: int) -> int:
    """Keys inside a bracket: fewer where nearly all or nearly none are above it."""
    above = min(1.0, max(0.0, k / max(1, spec.numel)))
    share = _HELD_SHARE * (_SAMPLE_ELEMENTS / _sample_elements(spec)) ** _HELD_POWER
    return int(4 * spec.numel * share * 2 * math.sqrt(above * (1 - above)))


def _sample_elements(spec: TensorSpec) -> int:
    return max(_SAMPLE_ELEMENTS, min(_LARGEST_SAMPLE, int(spec.numel * _SAMPLED_SHARE)))


def _least_state_bytes() -> int:
    return 8 * tally.BINS


def select(
    spec: TensorSpec,
    counts: Mapping[int, int],
    look: Look,
    state_bytes: int,
    *,
    recount: Recount | None = None,
    whole_rows: bool = False,
    all_equal: bool = False,
    exact: bool = False,
) -> Fold | StatisticValue:
    """The fold that finds the `counts[slot]` largest of each slot.

    `recount` mends counts that depend on how many elements are not zero. `whole_rows`: what is
    looked at needs all columns of a row. `all_equal`: those equal to the last that stays stay too.
    `exact`: a threshold is wanted where everything stays, too.
    """
    thresholds = Thresholds(len(counts), all_equal=all_equal)
    pending = {}
    for slot, k in counts.items():
        if k <= 0 and recount is None:
            thresholds.keep_none(slot)
        elif k < spec.numel or exact:
            pending[slot] = Bracket(k)
    if not pending:
        return thresholds
    state_bytes -= _least_state_bytes()  # of one that goes over to bins, and holds both
    subject = Subject(spec, look, recount, whole_rows)
    if spec.numel < _SAMPLE_FROM or subject.sample() == Tile(0, spec.rows):
        return Counting(subject, pending, thresholds, state_bytes)
    return SampledBracket(subject, pending, thresholds, state_bytes)


@dataclass(frozen=True, slots=True)
class Subject:
    """What is looked at."""

    spec: TensorSpec
    look: Look
    recount: Recount | None = None
    whole_rows: bool = False

    def sample(self) -> Tile:
        """A thinned tile. The steps are odd, so that they do not beat with head sizes."""
        elements = _sample_elements(self.spec)
        most_rows = int(_SAMPLE_ROWS * math.sqrt(elements / _SAMPLE_ELEMENTS))
        rows = max(_LEAST_ROWS, min(most_rows, self.spec.rows // 8))
        if self.whole_rows:
            rows = max(1, min(rows, elements // self.spec.cols))
        row_step = -(-self.spec.rows // rows) | 1
        sampled = len(range(0, self.spec.rows, row_step))
        col_step = -(-self.spec.cols * sampled // elements) | 1
        return Tile(0, self.spec.rows, row_step, 1 if self.whole_rows else col_step)


def each_model(stack: DeltaStack, slots: Iterable[int]) -> Iterator[tuple[int, Rows]]:
    """A slot for each model: its delta."""
    for model in slots:
        yield model, stack.one(model)


@dataclass(slots=True)
class Thresholds:
    """Per slot: the key of the threshold, the equals to keep, and where the equals lie."""

    slots: int
    keys: dict[int, int] = field(default_factory=dict)
    quotas: dict[int, int] = field(default_factory=dict)
    equals_before: dict[int, NDArray[np.int64]] = field(default_factory=dict)  # [tiles + 1]
    all_equal: bool = False

    def keep_none(self, slot: int) -> None:
        self.keys[slot] = ABOVE_ALL

    def at(self, tile_index: int) -> Cut:
        """The cut of one tile: what is left of the quota once earlier tiles took theirs."""
        thresholds, quotas = [], []
        for slot in range(self.slots):
            threshold = self.keys.get(slot, 0)
            quota = KEEP_ALL_EQUAL
            if slot in self.equals_before and not self.all_equal:
                before = self.equals_before[slot]
                left = self.quotas[slot] - int(before[tile_index])
                here = int(before[tile_index + 1] - before[tile_index])
                quota = KEEP_ALL_EQUAL if left >= here else max(0, left)
            thresholds.append(threshold)
            quotas.append(quota)
        return Cut(tuple(thresholds), tuple(quotas))


class SampledBracket:
    """A thin sample of rows and columns, from which a bracket for each slot's threshold."""

    def __init__(
        self,
        subject: Subject,
        pending: dict[int, Bracket],
        thresholds: Thresholds,
        state_bytes: int,
    ) -> None:
        self._subject = subject
        self._spec = subject.spec
        self._pending = pending
        self._thresholds = thresholds
        self._state_bytes = state_bytes
        self._found: dict[int, Bracket] = {}

    def wants(self, grid: Sequence[Tile]) -> Sequence[Tile]:
        return [self._subject.sample()]

    def measure(self, stack: DeltaStack, scratch: Scratch) -> dict[int, Bracket]:
        """What the sample says: it is thrown away here, so that no part is as large as one."""
        found = {}
        for slot, rows in self._subject.look(stack, self._pending):
            sample = scratch.array("found", rows.shape, np.uint32)
            keys(rows, sample)
            found[slot] = _bracket(sample, self._k(slot, sample), self._spec)
        return found

    def _k(self, slot: int, sample: Keys) -> int:
        """As far as the sample tells, where it depends on how many elements are not zero."""
        if self._subject.recount is None:
            return self._pending[slot].k
        share = np.count_nonzero(sample) / sample.size
        return self._subject.recount(int(share * self._spec.numel))[slot]

    def absorb(self, tile_index: int, part: dict[int, Bracket]) -> None:
        self._found = part

    def finish(self) -> Fold:
        return Counting(self._subject, self._found, self._thresholds, self._state_bytes)


def _bracket(sample: Keys, k: int, spec: TensorSpec) -> Bracket:
    """Where the k-th largest key of the tensor lies, from sampled keys `[rows, cols]`."""
    size = sample.size
    under = 1 - k / spec.numel  # the share of keys under the threshold
    middle = _in_order(sample, min(size - 1, int(under * size)))
    spread = _SPREADS * _error(sample >= middle, spec)
    top = int((under + spread) * size) + 1
    bottom = int((under - spread) * size) - 1
    high = _in_order(sample, top) + 1 if top < size else ABOVE_ALL
    low = _in_order(sample, bottom) if bottom >= 0 else 1
    return Bracket(k, max(1, low), max(2, high))


def _in_order(sample: Keys, index: int) -> int:
    """The key at an index of the sample in ascending order, by bisection over keys."""
    flat = sample.reshape(-1)
    return bisect_right(range(ABOVE_ALL), index, key=lambda key: count_below(flat, key + 1))


def _error(chosen: NDArray[np.bool_], spec: TensorSpec) -> float:
    """The standard error of the share that is chosen in a sample `[rows, cols]`.

    Low-rank deltas are clustered by rows and by columns: what tells of the whole is how many of
    each were drawn, not how many elements. Of those that were all drawn nothing is unknown.
    """
    variance = 0.0
    for axis, whole in ((1, spec.rows), (0, spec.cols)):
        shares = np.asarray(np.mean(chosen, axis=axis, dtype=np.float32))
        drawn = len(shares)
        if 1 < drawn < whole:
            left = 1 - drawn / whole
            variance += left * float(np.var(shares, ddof=1, dtype=np.float64)) / drawn
    return math.sqrt(variance) + 1 / chosen.size


class Counting:
    """One read of the whole tensor against a bracket for each slot."""

    def __init__(
        self,
        subject: Subject,
        pending: dict[int, Bracket],
        thresholds: Thresholds,
        state_bytes: int,
    ) -> None:
        self._subject = subject
        self._spec = subject.spec
        self._thresholds = thresholds
        self._state_bytes = state_bytes
        self._pending = pending
        self._tallies = {slot: Tally(one) for slot, one in pending.items()}

    def wants(self, grid: Sequence[Tile]) -> Sequence[Tile]:
        return grid

    def measure(self, stack: DeltaStack, scratch: Scratch) -> dict[int, Part]:
        return {
            slot: self._collect(rows, self._pending[slot], scratch)
            for slot, rows in self._subject.look(stack, self._pending)
        }

    def _collect(self, rows: Rows, bracket: Bracket, scratch: Scratch) -> Part:
        part = collect(rows, bracket, scratch)
        if self._subject.recount is None:
            return part
        return replace(part, nonzero=count_nonzero(rows))

    def absorb(self, tile_index: int, part: dict[int, Part]) -> None:
        tallies = self._tallies.values()
        for slot, one in self._tallies.items():
            one.add(part[slot])
        while sum(one.held_bytes for one in tallies) > self._state_bytes:
            shrink = [one for one in tallies if one.shrinks]
            if not shrink:
                break
            max(shrink, key=lambda one: one.held_bytes).start_bins()

    def finish(self) -> Fold | StatisticValue:
        """All thresholds, or a further read for those that missed or held too much."""
        pending: dict[int, Bracket] = {}
        for slot, one in self._tallies.items():
            if self._subject.recount is not None:
                one.recount(self._subject.recount(one.nonzero)[slot])
            if one.bracket.k <= 0:
                self._thresholds.keep_none(slot)
                continue
            if one.too_few:
                continue  # no threshold
            moved = one.missed()
            if moved is not None:
                pending[slot] = moved
            elif one.bins is None:
                self._settle(slot, one)
            else:
                pending[slot] = one.narrowed()
        if pending:
            return Counting(self._subject, pending, self._thresholds, self._state_bytes)
        return self._thresholds

    def _settle(self, slot: int, one: Tally) -> None:
        threshold = one.key()
        self._thresholds.keys[slot] = threshold
        up_to = [part.below(threshold + 1) - part.below(threshold) for part in one.parts]
        equals = np.cumsum([0, *up_to], dtype=np.int64)
        larger = one.above + one.inside - one.below(threshold + 1)
        quota = one.bracket.k - larger
        self._thresholds.quotas[slot] = quota
        if quota < equals[-1]:
            self._thresholds.equals_before[slot] = equals
