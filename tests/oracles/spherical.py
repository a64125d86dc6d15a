"""Merges on a sphere, on whole vectors in float64, straight from the formulas."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from tests.oracles.dense import UNIT, Answer, Exact, Vector


def slerp(t: float, a: Exact, b: Exact) -> Exact:
    """Between two vectors: by the angle of their directions, applied to them as they are."""
    u, v = (x / np.linalg.norm(x) if np.linalg.norm(x) > 1e-8 else x for x in (a, b))
    cosine = float(np.clip(np.vdot(u, v), -1, 1))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    return _arc(t, np.arccos(cosine), a, b)


def nuslerp(t: float, a: Exact, b: Exact) -> Exact:
    """The same with other limits: linear only where no direction is left."""
    u, v = (x / max(float(np.linalg.norm(x)), 1e-7) for x in (a, b))
    cosine = float(np.clip(np.vdot(u, v), -1, 1))
    if 1 - cosine**2 <= 1e-12:
        return (1 - t) * a + t * b
    return _arc(t, np.arccos(cosine), a, b)


def _arc(t: float, angle: float, a: Exact, b: Exact) -> Exact:
    return np.asarray((np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle))


def multislerp(
    weights: Sequence[float], vectors: Sequence[Exact], *, normalize: bool = True, eps: float = 1e-8
) -> Exact:
    """Project on the sphere, step in the tangent space at the mean, and back."""
    if len(vectors) == 1:
        return vectors[0]
    w = np.array(weights, np.float64)
    w = w / w.sum() if normalize else w
    stack = np.array(vectors)
    flat = stack.reshape(len(stack), -1)
    norms = np.linalg.norm(flat, axis=1)
    units = flat / (norms[:, None] + eps)
    mean = w @ units
    if np.linalg.norm(mean) < max(eps, 1e-6):
        return np.asarray((w @ flat).reshape(stack.shape[1:]))
    mean = mean / np.linalg.norm(mean)
    tangent = w @ (units - (units @ mean)[:, None] * mean)
    size = np.linalg.norm(tangent) + eps
    result = mean * np.cos(size) + tangent * (np.sin(size) / size)
    return np.asarray((result * (norms @ w)).reshape(stack.shape[1:]))


def karcher(vectors: Sequence[Exact], *, max_iter: int = 10, tol: float = 1e-5) -> Exact:
    """Riemannian gradient descent of the sum of squared angles, at the mean length."""
    if len(vectors) == 1:
        return vectors[0]
    norms = [float(np.linalg.norm(x)) for x in vectors]
    units = [x / n for x, n in zip(vectors, norms, strict=True) if n > tol]
    if not units:
        return np.zeros(vectors[0].shape)
    mean = sum(units, np.zeros(units[0].shape)) / len(units)
    mean = units[0] if np.linalg.norm(mean) < tol else mean / np.linalg.norm(mean)
    for _ in range(max_iter):
        step = np.zeros(mean.shape)
        for unit in units:
            cosine = float(np.clip(np.vdot(mean, unit), -1, 1))
            angle = np.arccos(cosine)
            if tol <= angle <= np.pi - tol:
                step = step + angle / np.sin(angle) * (unit - cosine * mean) / len(units)
        size = float(np.linalg.norm(step))
        if size < tol:
            break
        mean = np.cos(size) * mean + np.sin(size) * step / size
        mean = mean / np.linalg.norm(mean)
    return np.asarray(mean * np.mean(norms))


def model_stock(base: Exact, deltas: Sequence[Exact]) -> Exact:
    """The paper's interpolation between the base and the mean of the models."""
    count = len(deltas)
    cosines = [
        float(np.clip(np.vdot(a, b) / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-6), -1, 1))
        for a, b in combinations(deltas, 2)
    ]
    cosine = float(np.mean(cosines))
    divisor = 1 + (count - 1) * cosine
    t = 0.0 if abs(divisor) < 1e-6 else count * cosine / divisor
    models = [base + delta for delta in deltas]
    return np.asarray(t * sum(models, np.zeros(base.shape)) / count + (1 - t) * base)


def answer(value: Exact, vectors: Sequence[Vector], terms: int = 0) -> Answer:
    """A combination of vectors: float32 rounds each term in proportion to its own size."""
    flat = np.array([vector.value.reshape(-1) for vector in vectors])
    factors = np.linalg.lstsq(flat.T, value.reshape(-1), rcond=None)[0] if value.size else []
    size = sum((abs(f) * v.size for f, v in zip(factors, vectors, strict=False)), np.abs(value))
    roundings = 6 + terms + sum(vector.terms for vector in vectors)
    return Answer(value, roundings * (UNIT * size + 2.0**-149))
