"""Linear algebra of small matrices in float64: all that is left of low-rank updates in a basis.

Nothing here is larger than a block of rows, or than the sum of the updates' ranks squared. Singular
vectors are fixed up to signs by LAPACK, so the results are the same on every run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from streammerge.arrays import Core

# A direction is null below this share of the largest singular value: what is lost with it is less
# than a rounding of float32, 6e-8, and so is 2e-16 over this, by which a basis misses right angles.
NULL = 1e-8
# Of shared bases, one after the other; each keeps no less than the one before.
ROUNDS = 10


def triangle(blocks: Iterable[Core], cols: int) -> Core:
    """R `[at most cols, cols]` of a QR decomposition of blocks `[n, cols]` under each other.

    Block by block, so that a tall matrix is never held: Demmel et al., "Communication-optimal
    parallel and sequential QR", SIAM J. Sci. Comput. 2012.
    """
    found: Core = np.zeros((0, cols))
    for block in blocks:
        found = np.asarray(np.linalg.qr(np.vstack([found, block]), mode="r"))
    return found


def svd(matrix: Core) -> tuple[Core, Core, Core]:
    """`(u [m, d], values [d], vt [d, n])`, d the numerical rank: null directions are dropped."""
    u, values, vt = np.linalg.svd(matrix, full_matrices=False)
    count = int(np.count_nonzero(values > NULL * values[:1].sum()))
    return u[:, :count], values[:count], vt[:count]


def basis(triangle: Core) -> tuple[Core, Core]:
    """Left singular vectors U of a matrix L, by the triangle `[at most R, R]` of its QR.

    Returns `to_basis [R, d]`, with U = L @ to_basis, and `in_basis [d, R]`, which is U' L. The rank
    d is that of L with its columns at length one: the numbers of an adapter that are small beside
    another's, in one of its factors, are not null. They would be lost with a cut of L itself.
    """
    lengths = np.linalg.norm(triangle, axis=0)
    divisors = np.where(lengths > 0, lengths, 1.0)
    _, values, vt = svd(triangle / divisors)
    to_any_basis = vt.T / values / divisors[:, np.newaxis]
    in_any_basis = values[:, np.newaxis] * vt * lengths
    turn = np.linalg.svd(in_any_basis, full_matrices=False)[0]
    return to_any_basis @ turn, turn.T @ in_any_basis


def shared_bases(matrices: Core, rank: int) -> tuple[Core, Core]:
    """Orthonormal U `[m, rank]` and V `[n, rank]` in which most of all `[count, m, n]` lies.

    They make the sum of `|U' X_i V|^2` large: a Tucker decomposition of two modes, begun with the
    singular vectors of the matrices side by side, and improved one basis after the other. De
    Lathauwer et al., "On the best rank-1 and rank-(R1, ..., RN) approximation of higher-order
    tensors", SIAM J. Matrix Anal. Appl. 2000. Fewer columns where m or n is less than `rank`.
    """
    turned = matrices.transpose(0, 2, 1)
    u, v = _strongest(matrices, rank), _strongest(turned, rank)
    for _ in range(ROUNDS):
        u = _strongest(matrices @ v, rank)
        v = _strongest(turned @ u, rank)
    return u, v


def _strongest(matrices: Core, rank: int) -> Core:
    """Left singular vectors of matrices `[count, m, n]` side by side."""
    return np.asarray(np.linalg.svd(np.hstack([*matrices]), full_matrices=False)[0][:, :rank])


def isotropic(matrix: Core) -> Core:
    """The matrix with its non-zero singular values replaced by their mean."""
    u, values, vt = svd(matrix)
    return np.asarray(u @ vt * (values.mean() if len(values) else 0.0))


def polar(matrix: Core) -> Core:
    """The nearest matrix with orthonormal columns: U V' of its SVD; null directions stay null."""
    u, _, vt = svd(matrix)
    return np.asarray(u @ vt)
