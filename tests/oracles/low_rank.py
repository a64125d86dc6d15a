"""Merges of low-rank updates on whole dense matrices in float64, straight from the papers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tests.oracles.dense import Exact

_NULL = 1e-8  # of the largest singular value; the cases of the tests are far from it


def nearest(matrix: Exact, rank: int) -> Exact:
    """The nearest matrix of a rank (Eckart and Young, 1936)."""
    u, values, vt = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray((u[:, :rank] * values[:rank]) @ vt[:rank])


def iso_c(deltas: Sequence[Exact], weights: Sequence[float]) -> Exact:
    """`sum w_i d_i` with its non-zero singular values replaced by their mean."""
    total = sum(w * d for w, d in zip(weights, deltas, strict=True))
    u, values, vt = np.linalg.svd(total, full_matrices=False)
    kept = values > _NULL * values[0]
    return np.asarray(u[:, kept] @ vt[kept] * values[kept].mean())


def tsv(deltas: Sequence[Exact], weights: Sequence[float]) -> Exact:
    """The top rank / T singular triplets of each, both sides made orthogonal (Procrustes)."""
    left, values, right = [], [], []
    for delta, weight in zip(deltas, weights, strict=True):
        u, strengths, vt = np.linalg.svd(delta, full_matrices=False)
        rank = int(np.sum(strengths > _NULL * strengths[0]))
        count = max(1, rank // len(deltas))
        left.append(u[:, :count])
        values.append(weight * strengths[:count])
        right.append(vt[:count].T)
    both = _orthogonal(np.hstack(left)), _orthogonal(np.hstack(right))
    return np.asarray(both[0] @ np.diag(np.concatenate(values)) @ both[1].T)


def _orthogonal(columns: Exact) -> Exact:
    u, values, vt = np.linalg.svd(columns, full_matrices=False)
    kept = values > _NULL * values[0]
    return np.asarray(u[:, kept] @ vt[kept])


def compressed(
    deltas: Sequence[Exact], rank: int, rule: Callable[[list[Exact]], Exact], rounds: int = 10
) -> Exact:
    """`U rule(U' d_i V) V'`: U and V of the Tucker decomposition of the deltas, nearly of one size.

    Each basis holds the strongest eigenvectors of a sum of squares, not of matrices side by side.
    """
    sizes = [float(np.linalg.norm(delta)) for delta in deltas]
    mean = float(np.mean(sizes))
    evened = [
        (0.25 * size + 0.75 * mean) / size * delta
        for size, delta in zip(sizes, deltas, strict=True)
        if size
    ]
    u = _eigenvectors(sum(x @ x.T for x in evened), rank)
    v = _eigenvectors(sum(x.T @ x for x in evened), rank)
    for _ in range(rounds):
        u = _eigenvectors(sum((x @ v) @ (x @ v).T for x in evened), rank)
        v = _eigenvectors(sum((x.T @ u) @ (x.T @ u).T for x in evened), rank)
    return np.asarray(u @ rule([u.T @ delta @ v for delta in deltas]) @ v.T)


def _eigenvectors(square: Exact, rank: int) -> Exact:
    return np.asarray(np.linalg.eigh(square)[1][:, ::-1][:, :rank])
