"""The hot loops for the CPU that look at all models of an element; see `cpu`."""

from __future__ import annotations

import numpy as np
from numba import njit, types

from streammerge.kernels.cache import CACHED

_f32 = types.float32[::1]
_f64 = types.float64[::1]
_u32 = types.uint32[::1]
_i64 = types.int64
_rows = types.float32[:, ::1]

# Elements per inner block: three models of it stay in the L1 cache.
BLOCK = 1024

# Of an inner product, sums side by side: as many as hide that an addition waits for the one before.
SUMS = 64

# How `elect` decides a sign, and what it divides by.
WEIGHTED, UNWEIGHTED, COUNT = 0, 1, 2
BY_NONE, BY_WEIGHTS, BY_COUNT = 0, 1, 2


@njit(nogil=True)
def _add_votes(vote, w, row, mode):  # [n], scalar, [n], scalar
    """Add one model's vote to each element."""
    zero, one = np.float32(0), np.float32(1)
    if mode == WEIGHTED:
        for i in range(row.size):
            vote[i] += w * row[i]
    elif mode == UNWEIGHTED:
        for i in range(row.size):
            vote[i] += row[i]
    else:
        for i in range(row.size):
            d = w * row[i]
            vote[i] += one if d > zero else (-one if d < zero else d)  # NaN stays, to be found


@njit(nogil=True)
def _settle(vote, total):  # [n], [n]
    """The vote becomes 1 or -1, the total nothing; NaN where a delta is not finite, to be found."""
    one = np.float32(1)
    for i in range(vote.size):
        total[i] = vote[i] - vote[i]
        vote[i] = one if vote[i] >= np.float32(0) else -one


@njit(nogil=True)
def _add_agreeing(total, vote, row, w, share, mode, divisor):  # [n] three times, -, -, -, [n]
    """Add one model where it agrees with the settled vote, and its share to the divisor."""
    zero = np.float32(0)
    for i in range(row.size):
        d = w * row[i]
        side = row[i] if mode == UNWEIGHTED else d
        agrees = side * vote[i] > zero
        total[i] += d if agrees else zero
        divisor[i] += share if agrees else 0.0


@njit(nogil=True, error_model="numpy")
def _divide(total, divisor, by, least, scale, out):  # [n], [n], -, -, -, [n]
    if by == BY_NONE:
        for i in range(out.size):
            out[i] = scale * total[i]
    elif least > 0.0:
        for i in range(out.size):
            out[i] = scale * (total[i] / np.float32(max(divisor[i], least)))
    else:
        for i in range(out.size):
            divide = 1.0 if abs(divisor[i]) < 1e-8 else divisor[i]
            out[i] = scale * (total[i] / np.float32(divide))


@njit(
    types.void(_rows, _f64, _i64, _i64, types.float64, types.float32, _f32),
    cache=CACHED,
    nogil=True,
)
def elect(deltas, weights, mode, by, least, scale, out):  # [models, n], [models], -, -, -, -, [n]
    """Vote on signs, then the (mean of the) agreeing weighted deltas; `out` may be `deltas[0]`.

    Weights are added up in float64: those that cancel must come to nothing, not to a rounding. A
    divisor of nothing is 1; where `least` is above zero, a smaller one is `least`.
    """
    models, n = deltas.shape
    votes = np.empty(BLOCK, np.float32)
    totals = np.empty(BLOCK, np.float32)
    divisors = np.empty(BLOCK, np.float64)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        size = stop - start
        vote, total, divisor = votes[:size], totals[:size], divisors[:size]
        vote[:] = np.float32(0)
        divisor[:] = 0.0
        for m in range(models):
            _add_votes(vote, np.float32(weights[m]), deltas[m, start:stop], mode)
        _settle(vote, total)
        for m in range(models):
            row, w = deltas[m, start:stop], np.float32(weights[m])
            share = 1.0 if by == BY_COUNT else weights[m]
            _add_agreeing(total, vote, row, w, share, mode, divisor)
        _divide(total, divisor, by, least, scale, out[start:stop])


@njit(nogil=True)
def _add_square_off(row, mean, total):  # [n] three times
    for i in range(row.size):
        off = np.float64(row[i]) - mean[i]
        total[i] += off * off


@njit(types.void(_rows, _i64, _f32), cache=CACHED, nogil=True, error_model="numpy")
def variance(deltas, models, out):  # [n of them, size], scalar, [size]
    """Population variance over `models` models, those that are not there being zero."""
    there = deltas.shape[0]
    means = np.empty(BLOCK, np.float64)
    totals = np.empty(BLOCK, np.float64)
    for start in range(0, out.size, BLOCK):
        stop = min(start + BLOCK, out.size)
        mean, total, target = means[: stop - start], totals[: stop - start], out[start:stop]
        mean[:] = 0.0
        for m in range(there):
            row = deltas[m, start:stop]
            for i in range(row.size):
                mean[i] += np.float64(row[i])
        for i in range(mean.size):
            mean[i] /= models
            total[i] = (models - there) * mean[i] * mean[i]
        for m in range(there):
            _add_square_off(deltas[m, start:stop], mean, total)
        for i in range(target.size):
            target[i] = np.float32(total[i] / models)


@njit(types.void(_rows, _f32), cache=CACHED, nogil=True)
def zero_where_zero(deltas, marks):  # [models, n], [n]
    for m in range(deltas.shape[0]):
        for i in range(marks.size):
            deltas[m, i] = deltas[m, i] if marks[i] != 0 else np.float32(0)


@njit(types.void(_f32, _f32, types.float64), cache=CACHED, nogil=True)
def zero_below(rows, marks, least):  # [n], [n], scalar
    for i in range(rows.size):
        rows[i] = np.float32(0) if np.float64(marks[i]) < least else rows[i]


@njit(nogil=True)
def _count_above(row, epsilon, there):  # [n], scalar, [n]
    for i in range(row.size):
        there[i] += np.uint32(1) if abs(row[i]) > epsilon else np.uint32(0)


@njit(nogil=True)
def _shared(row, epsilon, there):  # [n], scalar, [n]
    """How many elements are above epsilon where more than one is."""
    count = np.uint32(0)  # of a block
    for i in range(row.size):
        both = (abs(row[i]) > epsilon) & (there[i] > np.uint32(1))
        count = np.uint32(count + np.uint32(both))
    return np.int64(count)


@njit(types.void(_rows, types.float32, _f64), cache=CACHED, nogil=True)
def count_contributions(deltas, epsilon, counts):  # [models, n], scalar, [2 * models]
    """Per model, elements above epsilon that it shares with others; then those it has alone."""
    models, n = deltas.shape
    numbers = np.empty(BLOCK, np.uint32)
    above = np.empty(BLOCK, np.uint32)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        there, own = numbers[: stop - start], above[: stop - start]
        there[:] = np.uint32(0)
        for m in range(models):
            _count_above(deltas[m, start:stop], epsilon, there)
        for m in range(models):
            own[:] = np.uint32(0)
            _count_above(deltas[m, start:stop], epsilon, own)
            shared = _shared(deltas[m, start:stop], epsilon, there)
            counts[m] += shared
            counts[models + m] += np.int64(own.sum()) - shared


@njit(nogil=True)
def _add_above(row, epsilon, alone, total, factor):  # [n], scalar, scalar, [n], [n]
    """Add what is above epsilon; the factor is then that of its model."""
    for i in range(row.size):
        above = abs(row[i]) > epsilon
        total[i] = total[i] + row[i] if above else total[i]
        factor[i] = alone if above else factor[i]


@njit(types.void(_rows, types.float32, _f64, _f32), cache=CACHED, nogil=True, error_model="numpy")
def merge_contributions(deltas, epsilon, alone, out):  # [models, n], scalar, [models], [n]
    """The mean of those above epsilon; of one alone, itself times its factor."""
    models, n = deltas.shape
    numbers = np.empty(BLOCK, np.uint32)
    totals = np.empty(BLOCK, np.float32)
    factors = np.empty(BLOCK, np.float32)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        size = stop - start
        there, total, factor = numbers[:size], totals[:size], factors[:size]
        there[:] = np.uint32(0)
        total[:] = np.float32(0)
        factor[:] = np.float32(1)
        for m in range(models):
            row = deltas[m, start:stop]
            _count_above(row, epsilon, there)
            _add_above(row, epsilon, np.float32(alone[m]), total, factor)
        target = out[start:stop]
        for i in range(size):
            mean = total[i] / np.float32(max(there[i], np.uint32(1)))
            target[i] = total[i] * factor[i] if there[i] == np.uint32(1) else mean


@njit(types.float64(_f32, _f32), cache=CACHED, nogil=True, error_model="numpy")
def divergence(model, base):  # [n], [n]
    """Kullback-Leibler divergence of two rows' soft-max, 1e-8 added to each share; not negative."""
    top_of_model, top_of_base = np.float64(model[0]), np.float64(base[0])
    for i in range(model.size):
        top_of_model = max(top_of_model, np.float64(model[i]))
        top_of_base = max(top_of_base, np.float64(base[i]))
    of_model, of_base = 0.0, 0.0
    for i in range(model.size):
        of_model += np.exp(np.float64(model[i]) - top_of_model)
        of_base += np.exp(np.float64(base[i]) - top_of_base)
    total = 0.0
    for i in range(model.size):
        p = np.exp(np.float64(model[i]) - top_of_model) / of_model + 1e-8
        q = np.exp(np.float64(base[i]) - top_of_base) / of_base + 1e-8
        total += p * np.log(p / q)
    return max(total, 0.0)


@njit(types.void(_rows, _rows, _rows), cache=CACHED, nogil=True)
def importance(deltas, base, out):  # [rows, cols] three times
    """Each element's |difference| times the divergence of its row from the base's."""
    rows, cols = deltas.shape
    for r in range(rows):
        for c in range(cols):
            out[r, c] = base[r, c] + deltas[r, c]  # the model's row, for now
        apart = divergence(out[r], base[r])
        for c in range(cols):
            out[r, c] = np.float32(abs(np.float64(deltas[r, c])) * apart)


@njit(nogil=True)
def _add_products(row, other, sums):  # [n], [n], [SUMS]
    whole = row.size // SUMS * SUMS
    for start in range(0, whole, SUMS):
        a, b = row[start : start + SUMS], other[start : start + SUMS]
        for k in range(SUMS):
            sums[k] += np.float64(a[k]) * np.float64(b[k])
    for i in range(whole, row.size):
        sums[i - whole] += np.float64(row[i]) * np.float64(other[i])


@njit(types.void(_rows, types.float64[:, ::1]), cache=CACHED, nogil=True)
def inner_products(rows, sums):  # [models, n], [pairs, SUMS]
    """Add to the sums of each pair (i, j) with j up to i, in this order, in float64."""
    for start in range(0, rows.shape[1], BLOCK):
        stop, pair = min(rows.shape[1], start + BLOCK), 0
        for i in range(rows.shape[0]):
            for j in range(i + 1):
                _add_products(rows[i, start:stop], rows[j, start:stop], sums[pair])
                pair += 1


@njit(types.void(_f32, _f32, _f64), cache=CACHED, nogil=True)
def inner_product(row, other, sums):  # [n], [n], [SUMS]
    _add_products(row, other, sums)
