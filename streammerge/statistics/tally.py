"""What one read tells of magnitudes against a bracket, tile by tile and added up.

Magnitudes are compared as keys (see `kernels.prune`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from streammerge.kernels.prune import ABOVE_ALL, count_and_collect, count_below
from streammerge.scratch import Scratch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Keys = NDArray[np.uint32]

BINS = 1 << 16
# A part with more distinct keys than there are bins is sent as bins, so that no part is large; keys
# as they come, which take half of the room of keys with their counts, may be twice as many.
# Half as many cost adapters of rank 4 another read: their brackets are wide.
MOST_KEYS = BINS
_PROBE_STEP = 8
# Guesses that are interpolated before the rest is halved.
_INTERPOLATED = 6
_LEAST_STEP = 1 << 20  # an eighth of an octave


@dataclass(frozen=True, slots=True)
class Bracket:
    """The k-th largest key is believed to lie in `[low, high)`."""

    k: int
    low: int = 1
    high: int = ABOVE_ALL


@dataclass(frozen=True, slots=True)
class Part:
    """One slot's magnitudes of one tile: those inside the bracket, collected or binned."""

    above: int  # elements at or above the bracket
    held: Keys | None  # [n], sorted where `up_to` is there, else as they came
    up_to: NDArray[np.uint32] | None  # [n], how many elements are up to each; None: each is one
    bins: NDArray[np.uint32] | None  # [BINS]
    nonzero: int = 0  # counted where a k depends on it

    @property
    def nbytes(self) -> int:
        arrays = (self.held, self.up_to, self.bins)
        return sum(array.nbytes for array in arrays if array is not None)

    def below(self, key: int) -> int:
        """How many elements inside the bracket are under the key."""
        assert self.held is not None
        if self.up_to is None:
            return count_below(self.held, key)
        index = int(np.searchsorted(self.held, np.uint32(key)))
        return int(self.up_to[index - 1]) if index else 0

    @property
    def inside(self) -> int:
        if self.bins is not None:
            return int(self.bins.sum(dtype=np.int64))
        assert self.held is not None
        return len(self.held) if self.up_to is None else int(self.up_to[-1])


def _shift(bracket: Bracket) -> int:
    """The keys of a bracket, less its low end, fit into BINS when shifted right by this."""
    return max(0, (bracket.high - bracket.low - 1).bit_length() - BINS.bit_length() + 1)


def collect(rows: NDArray[np.float32], bracket: Bracket, scratch: Scratch) -> Part:
    """Sorted only where that makes the part smaller: sorting costs more than all the rest."""
    above, found = count_and_collect(rows, bracket.low, bracket.high, scratch)
    if _many_equal(found):
        return _counted(above, found, bracket)
    if len(found) > 2 * MOST_KEYS:
        return _binned(above, found, bracket)
    return Part(above, found.copy(), None, None)


def _many_equal(found: Keys) -> bool:
    """Whether it seems that counting equals would pay, as of differences of bfloat16 models.

    Told from some of them. Where it is wrong, a part is larger than it need be.
    """
    probe = np.sort(found[::_PROBE_STEP])
    return 4 * int(np.count_nonzero(probe[1:] == probe[:-1])) >= len(probe) > 0


def _counted(above: int, found: Keys, bracket: Bracket) -> Part:
    """Distinct keys with how often they are there, or bins where these are too many."""
    found.sort()
    steps = found[1:] != found[:-1]
    distinct = min(1, len(found)) + int(np.count_nonzero(steps))
    if distinct > MOST_KEYS:
        return _binned(above, found, bracket)
    lasts = np.append(np.flatnonzero(steps), len(found) - 1)  # of each run of equal keys
    return Part(above, found[lasts], (lasts + 1).astype(np.uint32), None)


def _binned(above: int, found: Keys, bracket: Bracket) -> Part:
    from streammerge.kernels import cpu

    bins = np.zeros(BINS, np.uint32)
    cpu.add_to_bins(found, np.uint32(bracket.low), np.uint32(_shift(bracket)), bins)
    return Part(above, None, None, bins)


class Tally:
    """The parts of one slot: held as they come, or binned, which takes no more than BINS."""

    def __init__(self, bracket: Bracket) -> None:
        self.bracket = bracket
        self.above = 0
        self.nonzero = 0
        self.parts: list[Part] = []
        self.bins: NDArray[np.int64] | None = None
        self.held_bytes = 0

    def add(self, part: Part) -> None:
        self.above += part.above
        self.nonzero += part.nonzero
        if self.bins is not None:
            self._bin(part)
            return
        self.parts.append(part)
        self.held_bytes += part.nbytes
        if part.bins is not None:
            self.start_bins()

    @property
    def shrinks(self) -> bool:
        """Whether it can go over to bins; of a single key they would tell nothing."""
        return self.bins is None and self.bracket.high - self.bracket.low > 1

    def start_bins(self) -> None:
        self.bins = np.zeros(BINS, np.int64)
        for part in self.parts:
            self._bin(part)
        self.parts.clear()
        self.held_bytes = self.bins.nbytes

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

    def recount(self, k: int) -> None:
        """Look for another k in the same bracket."""
        self.bracket = replace(self.bracket, k=k)

    def missed(self) -> Bracket | None:
        """The bracket beside this one, the threshold being out there; None where it is inside.

        It is wider, so that few steps lead anywhere, but not all that is left: that would seldom
        fit into the state.
        """
        k, low, high = self.bracket.k, self.bracket.low, self.bracket.high
        wider = max(_LEAST_STEP, 4 * (high - low))
        if self.above >= k:
            return Bracket(k, high, min(ABOVE_ALL, high + wider))
        if self.above + self.inside < k:
            return Bracket(k, max(1, low - wider), low)
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
        """The k-th largest key: the last of the bracket with no more than so many below it.

        No copy of the parts is made; each guess counts through them. Keys lie so evenly in a
        bracket that interpolation takes a few; where it does not, bisection finds the end.
        """
        most = self.inside - (self.bracket.k - self.above)
        low, high = self.bracket.low, self.bracket.high
        below_low, below_high, guesses = 0, self.inside, 0
        while high - low > 1:
            evenly = (most + 0.5 - below_low) / (below_high - below_low)
            share = evenly if guesses < _INTERPOLATED else 0.5
            guesses += 1
            middle = min(high - 1, low + max(1, int(share * (high - low))))
            below = self.below(middle)
            if below <= most:
                low, below_low = middle, below
            else:
                high, below_high = middle, below
        return low

    def below(self, key: int) -> int:
        return sum(part.below(key) for part in self.parts)
