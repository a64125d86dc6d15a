"""The hot loops for the CPU, compiled by numba when this module is imported.

The signatures are explicit, so that importing compiles everything (or loads it from numba's
cache) and nothing is compiled in the middle of a merge. No loop allocates: buffers belong to the
caller. No `fastmath` on values that reach the output: its bits must not depend on the build.

Helpers of these loops have no signature: they are compiled with who calls them, and need not be
loaded. `error_model="numpy"` is for divisors that are not zero: a loop that might raise
ZeroDivisionError is not vectorised.

bfloat16 is carried as raw `uint16` bits, since numpy has no such type.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from streammerge import noise
from streammerge.kernels.cache import CACHED

GOLDEN, FIRST, SECOND = (np.uint64(n) for n in (noise.GOLDEN, noise.FIRST, noise.SECOND))

_f32 = types.float32[::1]
_f64 = types.float64[::1]
_u16 = types.uint16[::1]
# As mapped: not writable, and at any offset, since the format promises no alignment.
_mapped_u16 = types.Array(types.uint16, 1, "C", readonly=True, aligned=False)
_u32 = types.uint32[::1]
_i64 = types.int64
_rows = types.float32[:, ::1]

# Elements that are compared before one is collected: the bits of a word.
WORD = 64
# Elements that are rounded before it is asked whether one was too large; they stay in the L1 cache.
ROUNDED = 1024
# Sums side by side, as many as hide that an addition waits for the one before.
SUMS = 256


@njit(types.void(_mapped_u16, _f32), cache=CACHED, nogil=True)
def bfloat16_to_float32(bits, out):  # [n], [n]
    as_bits = out.view(np.uint32)
    for i in range(bits.size):
        as_bits[i] = np.uint32(bits[i]) << np.uint32(16)


@njit(nogil=True)
def _round_with_care(bits, out):  # [n], [n]
    """As `float32_to_bfloat16`, where some are not finite, or will not be."""
    bad = 0
    for i in range(bits.size):
        b = bits[i]
        if (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
            out[i] = np.uint16((b >> np.uint32(16)) | np.uint32(0x40))
        bad += np.int64((out[i] & np.uint16(0x7F80)) == np.uint16(0x7F80))
    return bad


@njit(_i64(_f32, _u16), cache=CACHED, nogil=True)
def float32_to_bfloat16(rows, out):  # [n], [n]
    """Round to nearest even; returns how many results are not finite. NaN stays a NaN."""
    bits = rows.view(np.uint32)
    bad = 0
    for start in range(0, rows.size, ROUNDED):
        block, target = bits[start : start + ROUNDED], out[start : start + ROUNDED]
        largest = np.uint32(0)
        for i in range(block.size):
            largest = max(largest, block[i] & np.uint32(0x7FFFFFFF))
        for i in range(block.size):
            even = (block[i] >> np.uint32(16)) & np.uint32(1)
            target[i] = np.uint16((block[i] + np.uint32(0x7FFF) + even) >> np.uint32(16))
        if largest >= np.uint32(0x7F7F8000):  # the least that rounds to infinity
            bad += _round_with_care(block, target)
    return bad


@njit(_i64(_f32), cache=CACHED, nogil=True)
def count_not_finite(rows):  # [n]
    bits = rows.view(np.uint32)
    bad = 0
    for i in range(rows.size):
        bad += np.int64((bits[i] & np.uint32(0x7F800000)) == np.uint32(0x7F800000))
    return bad


@njit(types.float64(_f32), cache=CACHED, nogil=True, fastmath={"reassoc"})
def sum_of_squares(rows):  # [n]
    """In float64. Only for the report: reassociation may change its last bits."""
    total = 0.0
    for i in range(rows.size):
        total += np.float64(rows[i]) * np.float64(rows[i])
    return total


@njit(types.float64(_f32, _f32), cache=CACHED, nogil=True, fastmath={"reassoc"})
def sum_of_squared_differences(rows, base):  # [n], [n]
    """In float64. Only for the report: reassociation may change its last bits."""
    total = 0.0
    for i in range(rows.size):
        difference = np.float64(rows[i]) - np.float64(base[i])
        total += difference * difference
    return total


@njit(types.void(_rows, _f64), cache=CACHED, nogil=True)
def squares_of_columns(rows, sums):  # [rows, cols], [cols]
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            sums[j] += np.float64(rows[i, j]) * np.float64(rows[i, j])


@njit(types.void(_rows, _rows, _f64), cache=CACHED, nogil=True)
def squares_of_summed_rows(rows, added, sums):  # [rows, cols], [rows, cols], [rows]
    for i in range(rows.shape[0]):
        a = b = c = d = 0.0  # four sums, since each addition waits for the one before
        for j in range(0, rows.shape[1] - 3, 4):
            a += np.float64(rows[i, j] + added[i, j]) ** 2
            b += np.float64(rows[i, j + 1] + added[i, j + 1]) ** 2
            c += np.float64(rows[i, j + 2] + added[i, j + 2]) ** 2
            d += np.float64(rows[i, j + 3] + added[i, j + 3]) ** 2
        for j in range(rows.shape[1] // 4 * 4, rows.shape[1]):
            a += np.float64(rows[i, j] + added[i, j]) ** 2
        sums[i] = (a + b) + (c + d)


@njit(types.void(_rows, _rows, _f64), cache=CACHED, nogil=True)
def rescale_rows(rows, change, factors):  # [rows, cols], [rows, cols], [rows]
    for i in range(rows.shape[0]):
        factor = factors[i]
        for j in range(rows.shape[1]):
            grown = (factor - 1.0) * np.float64(rows[i, j])
            change[i, j] = np.float32(grown + factor * np.float64(change[i, j]))


@njit(types.void(_rows, _rows, _f64), cache=CACHED, nogil=True)
def rescale_columns(rows, change, factors):  # [rows, cols], [rows, cols], [cols]
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            grown = (factors[j] - 1.0) * np.float64(rows[i, j])
            change[i, j] = np.float32(grown + factors[j] * np.float64(change[i, j]))


@njit(types.void(_f32, types.float32, _f32), cache=CACHED, nogil=True)
def add_scaled(out, factor, rows):  # [n], scalar, [n]
    for i in range(out.size):
        out[i] += factor * rows[i]


@intrinsic
def _lowest_bit(context, word):
    """The place of the lowest bit that is set in a uint64 that is not zero."""

    def build(context, builder, signature, arguments):
        zero_may_be_anything = ir.Constant(ir.IntType(1), 1)
        return builder.cttz(arguments[0], zero_may_be_anything)

    return types.uint64(types.uint64), build


@njit(types.UniTuple(_i64, 2)(_f32, types.uint32, types.uint32, _u32), cache=CACHED, nogil=True)
def count_and_collect(rows, low, high, found):  # [n], scalar, scalar, [>= n]
    """How many magnitudes are at or above `high`, and how many in `[low, high)`.

    Magnitudes are compared by their bits, which order non-negative floats. Those in between are
    written to the front of `found`, which has room for all. A run of elements is compared without
    a branch, into a word with a bit for each; only the bits that are set are then gone through.
    """
    bits = rows.view(np.uint32)
    above = inside = 0
    width = np.uint32(high - low)
    whole = rows.size // WORD * WORD
    for start in range(0, whole, WORD):
        over = np.uint32(0)  # as wide as a key, so that many are compared at once
        word = np.uint64(0)
        for i in range(WORD):
            key = bits[start + i] & np.uint32(0x7FFFFFFF)
            over = np.uint32(over + np.uint32(key >= high))
            word |= np.uint64(np.uint32(key - low) < width) << np.uint64(i)
        above += np.int64(over)
        while word != np.uint64(0):
            found[inside] = bits[start + np.int64(_lowest_bit(word))] & np.uint32(0x7FFFFFFF)
            inside += 1
            word &= word - np.uint64(1)
    for i in range(whole, rows.size):
        key = bits[i] & np.uint32(0x7FFFFFFF)
        above += np.int64(key >= high)
        if np.uint32(key - low) < width:
            found[inside] = key
            inside += 1
    return above, inside


@njit(_i64(_u32, types.uint32), cache=CACHED, nogil=True)
def count_below(keys, key):  # [n], scalar
    count = np.uint32(0)  # as wide as a key, so that eight or more are compared at once
    for i in range(keys.size):
        count = np.uint32(count + np.uint32(keys[i] < key))
    return np.int64(count)


@njit(types.void(_u32, types.uint32, types.uint32, _u32), cache=CACHED, nogil=True)
def add_to_bins(keys, low, shift, bins):  # [n], scalar, scalar, [bins]
    for i in range(keys.size):
        bins[(keys[i] - low) >> shift] += np.uint32(1)


@njit(types.void(_f32, types.uint32, _i64), cache=CACHED, nogil=True)
def keep_largest(rows, threshold, quota):  # [n], scalar, scalar
    """Zero what is under the threshold's magnitude, and equals of it beyond the first `quota`."""
    bits = rows.view(np.uint32)
    for i in range(rows.size):
        key = bits[i] & np.uint32(0x7FFFFFFF)
        if key < threshold:
            bits[i] = np.uint32(0)
        elif key == threshold:
            if quota > 0:
                quota -= 1
            else:
                bits[i] = np.uint32(0)


@njit(types.void(_f32, types.uint32), cache=CACHED, nogil=True)
def keep_at_least(rows, threshold):  # [n], scalar
    """Zero what is under the threshold's magnitude."""
    bits = rows.view(np.uint32)
    for i in range(rows.size):
        small = (bits[i] & np.uint32(0x7FFFFFFF)) < threshold
        bits[i] = np.uint32(0) if small else bits[i]


@njit(types.void(_f32, types.uint32, _i64), cache=CACHED, nogil=True)
def drop_largest(rows, threshold, quota):  # [n], scalar, scalar
    """Zero what is above the threshold's magnitude, and the first `quota` equals of it."""
    bits = rows.view(np.uint32)
    for i in range(rows.size):
        key = bits[i] & np.uint32(0x7FFFFFFF)
        if key > threshold:
            bits[i] = np.uint32(0)
        elif key == threshold and quota > 0:
            quota -= 1
            bits[i] = np.uint32(0)


@njit(nogil=True, inline="always")
def _drawn(key, index):  # scalar, scalar
    """53 random bits of an element; see `noise.uniform`."""
    z = key + GOLDEN * (index + np.uint64(1))
    z = (z ^ (z >> np.uint64(30))) * FIRST
    z = (z ^ (z >> np.uint64(27))) * SECOND
    return (z ^ (z >> np.uint64(31))) >> np.uint64(11)


@njit(types.void(_f32, types.uint64, types.uint64, types.uint64), cache=CACHED, nogil=True)
def drop(rows, key, first, limit):  # [n], scalar, scalar, scalar
    """Zero the elements, of flat index `first` and on, whose bits are not under the limit."""
    bits = rows.view(np.uint32)
    for i in range(rows.size):
        kept = _drawn(key, first + np.uint64(i)) < limit
        bits[i] = bits[i] if kept else np.uint32(0)


# A key of 31 bits in digits of 11, 11 and 9: so their counts fit into the L1 cache.
DIGIT, LAST_DIGIT = 1 << 11, 1 << 9
_LOW_BITS, _SHIFT, _LAST_SHIFT = np.uint32(DIGIT - 1), np.uint32(11), np.uint32(22)


@njit(nogil=True)
def _starts(counts):  # [digits]
    """How many of each digit there are becomes where the first of each goes."""
    total = np.uint32(0)
    for digit in range(counts.size):
        here = counts[digit]
        counts[digit] = total
        total = np.uint32(total + here)


@njit(types.void(_f32, _u32, _u32, _u32), cache=CACHED, nogil=True)
def rank(row, ranks, columns, counts):  # [cols] three times, [2 * DIGIT + LAST_DIGIT]
    """The rank of each element by its magnitude, 0 the smallest, of equal ones the first column.

    A radix sort of the columns from the lowest digit, whose last pass says where each would go.
    """
    bits = row.view(np.uint32)
    low, middle, high = counts[:DIGIT], counts[DIGIT : 2 * DIGIT], counts[2 * DIGIT :]
    counts[:] = np.uint32(0)
    for c in range(row.size):
        key = bits[c] & np.uint32(0x7FFFFFFF)
        low[key & _LOW_BITS] += np.uint32(1)
        middle[(key >> _SHIFT) & _LOW_BITS] += np.uint32(1)
        high[key >> _LAST_SHIFT] += np.uint32(1)
    _starts(low)
    _starts(middle)
    _starts(high)
    for c in range(row.size):
        digit = bits[c] & _LOW_BITS
        ranks[low[digit]] = np.uint32(c)
        low[digit] += np.uint32(1)
    for i in range(row.size):
        digit = (bits[ranks[i]] >> _SHIFT) & _LOW_BITS
        columns[middle[digit]] = ranks[i]
        middle[digit] += np.uint32(1)
    for i in range(row.size):
        digit = (bits[columns[i]] & np.uint32(0x7FFFFFFF)) >> _LAST_SHIFT
        ranks[columns[i]] = high[digit]
        high[digit] += np.uint32(1)


@njit(nogil=True, error_model="numpy")
def _drop_by_share(row, ranks, key, first, low, high, divide):  # [cols], [cols], scalars
    last = max(1, row.size - 1)
    for c in range(row.size):
        share = low + (high - low) * ranks[c] / last
        number = np.float64(_drawn(key, first + np.uint64(c))) * 2.0**-53
        value = np.float32(row[c] / share) if divide else row[c]
        row[c] = value if number < share else np.float32(0)


@njit(
    types.void(
        _rows, types.uint64, types.uint64, types.float64, types.float64, types.boolean, _u32, _u32,
        _u32,
    ),
    cache=CACHED,
    nogil=True,
)  # fmt: skip
def drop_by_rank(rows, key, first, low, high, divide, ranks, columns, counts):
    """Keep with a probability from `low`, of each row's smallest, to `high`, of its largest.

    `divide`: what stays is divided by its probability. The last three are as those of `rank`.
    """  # [rows, cols], scalars, [cols], [cols], [2 * DIGIT + LAST_DIGIT]
    cols = rows.shape[1]
    if cols == 1:
        low = high = 0.5 * (low + high)
    for r in range(rows.shape[0]):
        rank(rows[r], ranks, columns, counts)
        start = first + np.uint64(r) * np.uint64(cols)
        _drop_by_share(rows[r], ranks, key, start, low, high, divide)


@njit(types.float64(_f32), cache=CACHED, nogil=True)
def sum_of_magnitudes(rows):  # [n]
    """In float64, as many sums side by side as are added at once, always in this order."""
    sums = np.zeros(SUMS)
    whole = rows.size // SUMS * SUMS
    for start in range(0, whole, SUMS):
        block = rows[start : start + SUMS]
        for i in range(SUMS):
            sums[i] += abs(np.float64(block[i]))
    for i in range(whole, rows.size):
        sums[i - whole] += abs(np.float64(rows[i]))
    total = 0.0
    for i in range(SUMS):
        total += sums[i]
    return total
