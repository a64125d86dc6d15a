"""Methods that decide element by element, on whole float32 task vectors, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.oracles.dense import UNIT, Answer, Exact, Single, voted


def sce(base: Exact, deltas: Sequence[Single], select_topk: float) -> Answer:
    """Of all models, zeros included: select by variance, weigh by mean squares, erase by sign."""
    stack = np.array(deltas, np.float64)
    if select_topk < 1 and base.size:
        spread = stack.var(axis=0).astype(np.float32).reshape(-1)
        count = int(select_topk * np.count_nonzero(spread))
        chosen = np.zeros(spread.size, bool)
        chosen[np.argsort(-spread, kind="stable")[:count]] = True
        stack = stack * chosen.reshape(base.shape)
    squares = np.array([float(np.mean(one**2)) if one.size else 0.0 for one in stack])
    total = squares.sum()
    weights = np.full(len(stack), 1 / len(stack)) if total < 1e-6 else squares / total
    return voted(base, list(stack), weights.tolist(), vote="unweighted", least_divisor=1e-6)


def nearswap(base: Exact, delta: Single, t: float) -> Answer:
    """`weight * model + (1 - weight) * base`."""
    d = delta.astype(np.float64)
    weight = np.clip(t / np.maximum(np.abs(d), 1e-6), 0, 1)
    value = weight * (base + d) + (1 - weight) * base
    return Answer(value, UNIT * (np.abs(base) + 6 * np.abs(weight * d)) + 2.0**-146)


def importance(base: Exact, model: Exact) -> Exact:
    """|difference| times the divergence of the rows' soft-max."""

    def shares(rows: Exact) -> Exact:
        power = np.exp(rows - rows.max(axis=-1, keepdims=True))
        return np.asarray(power / power.sum(axis=-1, keepdims=True) + 1e-8)

    p, q = shares(model), shares(base)
    divergence = np.maximum((p * np.log(p / q)).sum(axis=-1, keepdims=True), 0)
    return np.abs(model - base) * divergence


def arcee_fusion(base: Exact, delta: Single) -> Answer:
    """Differences at or above median + 1.5 IQR of importance; either way where it is too near."""
    d = delta.astype(np.float64)
    if not d.size:
        return Answer(base, np.zeros(base.shape))
    model = (base.astype(np.float32) + delta).astype(np.float64)
    found = importance(np.atleast_1d(base), np.atleast_1d(model)).reshape(base.shape)
    found = found * np.where(model == base, 1, np.abs(d) / np.maximum(np.abs(model - base), 1e-300))
    ordered = np.sort(found.reshape(-1))
    low, middle, high = (ordered[int(q * (d.size - 1))] for q in (0.25, 0.5, 0.75))
    least = middle + 1.5 * (high - low)
    near = (np.abs(found - least) <= 1e-5 * least) & (d != 0)
    value = base + np.where(found >= least, d, 0)
    other = np.where(near, base + np.where(found >= least, 0, d), np.nan)
    return Answer(value, UNIT * np.abs(value), other)


def ram(
    base: Exact, deltas: Sequence[Single], *, epsilon: float = 1e-5, alone: Sequence[float] = ()
) -> Answer:
    """The mean of the contributions over epsilon; a lone one times its model's factor."""
    stack = np.array(deltas, np.float64)
    there = np.abs(np.array(deltas)) > np.float32(epsilon)
    count = there.sum(axis=0)
    factors = np.array(alone or [1.0] * len(stack)).reshape(-1, *[1] * base.ndim)
    lone = (there * (count == 1) * stack * factors).sum(axis=0)
    shared = (there * (count > 1) * stack).sum(axis=0) / np.maximum(count, 1)
    size = (there * np.abs(stack)).sum(axis=0)
    slack = UNIT * (np.abs(base) + (len(stack) + 4) * 2 * size)
    return Answer(base + lone + shared, slack + 2.0**-146)


def ramplus(
    base: Exact, deltas: Sequence[Single], *, epsilon: float, r: float, alpha: float
) -> Answer:
    """With lone contributions amplified by how much a model shares."""
    there = np.abs(np.array(deltas)) > np.float32(epsilon)
    count = there.sum(axis=0)
    shared = [int((one & (count > 1)).sum()) for one in there]
    unique = [int((one & (count == 1)).sum()) for one in there]
    ratios = [s / max(u, epsilon) for s, u in zip(shared, unique, strict=True)]
    factors = [1 + r * min(max(ratio, 0), alpha) for ratio in ratios]
    return ram(base, deltas, epsilon=epsilon, alone=factors)
