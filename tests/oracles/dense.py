"""Merges of whole tensors in float64, straight from the formulas; nothing of the package is used.

An answer says how far float32 arithmetic may be from it before the one rounding to the output's
type. That bound is derived, not tuned: a term that passes through k roundings of float32 is off by
at most k * 2^-24 of its size (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
Rounding keeps order, so what is stored must lie between the rounded ends of that interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Exact = NDArray[np.float64]
Single = NDArray[np.float32]
Mask = NDArray[np.bool_]

UNIT = 2.0**-24  # the relative error of one float32 operation
_SMALLEST = 2.0**-149  # and the absolute one, where results are subnormal
_LEAST_DIVISOR = 1e-8

# (digits, least exponent, greatest finite value) of IEEE types and of bfloat16.
_FORMATS = {
    "BF16": (8, -126, (2 - 2.0**-7) * 2.0**127),
    "F16": (11, -14, 65504.0),
    "F32": (24, -126, (2 - 2.0**-23) * 2.0**127),
}


def rounded(values: Exact, dtype: str) -> Exact:
    """The nearest values of a type, ties to even, as float64; overflow is infinite."""
    if dtype == "F64":
        return np.asarray(values, np.float64)
    digits, least, greatest = _FORMATS[dtype]
    _, exponent = np.frexp(values)  # |value| in [2^(exponent - 1), 2^exponent)
    step = np.ldexp(1.0, np.maximum(exponent - 1, least) - digits + 1)
    with np.errstate(invalid="ignore"):
        near: Exact = np.asarray(
            np.where(np.isfinite(values), np.rint(values / step) * step, values)
        )
    return np.where(np.abs(near) > greatest, np.copysign(np.inf, near), near)


@dataclass(frozen=True, slots=True)
class Vector:
    """A model's tensor, or its task vector, that enters a weighted sum.

    `size` is the sum of the magnitudes of the float32 terms it is made of, such as
    `|W| + s |B| |A|`, and `terms` how many there are.
    """

    value: Exact
    size: Exact
    terms: int = 1


@dataclass(frozen=True, slots=True)
class Answer:
    """What a merge must give, and how near a float32 computation must come."""

    value: Exact
    slack: Exact
    other: Exact | None = None  # where a vote is within its margin: what the other sign gives

    def wrong(self, stored: Exact, dtype: str) -> Mask:
        """Which stored elements are not the answer rounded to their type."""
        bad = ~_between(stored, self.value, self.slack, dtype)
        if self.other is not None:
            bad &= ~_between(stored, self.other, self.slack, dtype)
        return bad

    def doubtful(self) -> float:
        """The share of elements where either sign is right."""
        if self.other is None or not self.value.size:
            return 0.0
        return float(np.mean(~np.isnan(self.other)))


def _between(stored: Exact, value: Exact, slack: Exact, dtype: str) -> Mask:
    low, high = rounded(value - slack, dtype), rounded(value + slack, dtype)
    return (low <= stored) & (stored <= high)


def check(name: str, stored: Exact, dtype: str, answer: Answer) -> None:
    """Raise AssertionError that names the worst element unless all are the answer."""
    assert stored.shape == answer.value.shape, (name, stored.shape, answer.value.shape)
    bad = answer.wrong(stored, dtype)
    if bad.any():
        off = np.where(bad, np.abs(stored - answer.value), -1)
        worst = np.unravel_index(np.argmax(off), off.shape)
        raise AssertionError(
            f"{name} ({dtype}): {bad.sum()} of {bad.size} elements are wrong; "
            f"at {[int(i) for i in worst]} {stored[worst]!r} should be "
            f"{answer.value[worst]!r} within {answer.slack[worst]:.3g}"
        )


def linear(models: Sequence[Vector], weights: Sequence[float], *, normalize: bool = True) -> Answer:
    """`sum w_i x_i`, over `sum w_i` if `normalize`."""
    total = sum(weights) if normalize else 1.0
    return weighted_sum([w / total for w in weights], models)


def task_arithmetic(
    base: Exact,
    deltas: Sequence[Vector],
    weights: Sequence[float],
    *,
    lambda_: float = 1.0,
    normalize: bool = False,
) -> Answer:
    """`base + lambda * sum w_i d_i`, over `sum w_i` if `normalize`."""
    total = sum(weights) if normalize else 1.0
    factors = [1.0, *(lambda_ * w / total for w in weights)]
    return weighted_sum(factors, [Vector(base, np.abs(base)), *deltas])


def passthrough(model: Vector, scale: float = 1.0) -> Answer:
    """`scale * x`."""
    return weighted_sum([scale], [model])


def weighted_sum(factors: Sequence[float | Exact], vectors: Sequence[Vector]) -> Answer:
    """`sum f_i v_i`; a factor may differ by row or column."""
    value = np.zeros(vectors[0].value.shape)
    size = np.zeros(vectors[0].value.shape)
    for factor, vector in zip(factors, vectors, strict=True):
        value = value + factor * vector.value
        size = size + abs(factor) * vector.size
    # Each term: its factor, the scale, a product, a difference, and at most all sums.
    roundings = 4 + sum(vector.terms for vector in vectors)
    return Answer(value, roundings * (UNIT * size + _SMALLEST))


def keep_largest(delta: Single, density: float) -> Exact:
    """The `max(1, int(density * numel))` largest magnitudes; of equal ones the lowest index."""
    flat = delta.reshape(-1).astype(np.float64)
    count = max(1, int(density * flat.size))
    order = np.argsort(-np.abs(flat), kind="stable")
    kept = np.zeros(flat.size)
    kept[order[:count]] = flat[order[:count]]
    return kept.reshape(delta.shape)


def ties(
    base: Exact,
    deltas: Sequence[Single],
    weights: Sequence[float],
    densities: Sequence[float],
    *,
    lambda_: float = 1.0,
    normalize: bool = True,
) -> Answer:
    """TIES of float32 task vectors, taken as they are, so that every threshold is exact."""
    kept = [keep_largest(d, density) for d, density in zip(deltas, densities, strict=True)]
    return voted(base, kept, weights, divide="weights" if normalize else "none", lambda_=lambda_)


def voted(
    base: Exact,
    kept: Sequence[Exact],
    weights: Sequence[float],
    *,
    vote: str = "weighted",
    divide: str = "weights",
    lambda_: float = 1.0,
    least_divisor: float = 0.0,
) -> Answer:
    """The election of TIES.

    The vote is the sign of `sum w_i d_i`, of `sum d_i` (unweighted) or of the sum of the signs of
    the `w_i d_i` (count), zero counting as plus. The `w_i d_i` of that sign (unweighted: whose d_i
    has it) are summed; zeros never agree. They are divided by the sum of their `w_i` or by their
    number; by 1 where that is under 1e-8 in magnitude, by `least_divisor` at least.
    """
    terms = [w * d for w, d in zip(weights, kept, strict=True)]
    zeros = np.zeros(base.shape)
    votes = {"weighted": terms, "unweighted": kept, "count": [np.sign(term) for term in terms]}
    total = sum(votes[vote], zeros)
    sides = kept if vote == "unweighted" else terms
    shares = {"weights": weights, "count": [1.0] * len(terms), "none": None}[divide]
    merged, slack = _of_sign(total >= 0, sides, terms, shares, least_divisor)
    opposite, other_slack = _of_sign(total < 0, sides, terms, shares, least_divisor)
    margin = (len(terms) + 4) * UNIT * sum((np.abs(one) for one in votes[vote]), zeros)
    unclear = (np.abs(total) <= margin) & (margin > 0) & (vote != "count")
    value = base + lambda_ * merged
    other = np.where(unclear, base + lambda_ * opposite, np.nan)
    slack = np.where(unclear, np.maximum(slack, other_slack), slack)
    # lambda itself, its product, and the sum with the base.
    slack = abs(lambda_) * (slack + 3 * UNIT * np.maximum(np.abs(merged), np.abs(opposite)))
    return Answer(value, slack + UNIT * np.abs(base) + 8 * _SMALLEST, other)


def _of_sign(
    plus: Mask,
    sides: Sequence[Exact],
    terms: Sequence[Exact],
    shares: Sequence[float] | None,
    least_divisor: float,
) -> tuple[Exact, Exact]:
    """The (mean of the) terms of the elected sign, and what float32 may miss it by."""
    agrees = [np.where(plus, side > 0, side < 0) for side in sides]
    zeros = np.zeros(plus.shape)
    picked = [np.where(a, t, 0) for a, t in zip(agrees, terms, strict=True)]
    total = sum(picked, zeros)
    slack = (len(terms) + 4) * UNIT * sum((np.abs(term) for term in picked), zeros)
    if shares is None:
        return total, slack
    divisor = sum((a * w for a, w in zip(agrees, shares, strict=True)), zeros)
    absolute = sum((a * abs(w) for a, w in zip(agrees, shares, strict=True)), zeros)
    if least_divisor:
        alone = divisor < least_divisor
        divisor = np.maximum(divisor, least_divisor)
    else:
        alone = np.abs(divisor) < _LEAST_DIVISOR
        divisor = np.where(alone, 1.0, divisor)
    # Weights of both signs may cancel, which magnifies the roundings of their sum.
    relative = np.where(alone, 0, (len(terms) + 2) * UNIT * absolute / np.abs(divisor))
    mean = total / divisor
    return mean, slack / np.abs(divisor) + np.abs(mean) * (relative + 2 * UNIT)
