"""Small linear algebra in float64 against numpy on the whole matrix."""

from __future__ import annotations

import numpy as np
import pytest

from streammerge.kernels.spectral import isotropic, polar, shared_bases, svd, triangle

RANDOM = np.random.default_rng(5)


@pytest.mark.parametrize("rows", [3, 7, 40])  # fewer than columns, as many, more
def test_a_triangle_has_the_products_of_the_whole(rows: int) -> None:
    matrix = RANDOM.normal(size=(rows, 7))
    found = triangle((matrix[start : start + 3] for start in range(0, rows, 3)), 7)
    assert found.shape == (min(rows, 7), 7)
    np.testing.assert_allclose(found.T @ found, matrix.T @ matrix, rtol=0, atol=1e-12)


def test_a_triangle_keeps_small_directions_that_squares_would_lose() -> None:
    matrix = RANDOM.normal(size=(50, 2)) @ np.diag([1.0, 1e-8])
    values = np.linalg.svd(triangle([matrix], 2), compute_uv=False)
    np.testing.assert_allclose(values, np.linalg.svd(matrix, compute_uv=False), rtol=1e-6)


def test_null_directions_are_dropped() -> None:
    matrix = RANDOM.normal(size=(9, 2)) @ RANDOM.normal(size=(2, 6))
    u, values, vt = svd(matrix)
    assert (u.shape, values.shape, vt.shape) == ((9, 2), (2,), (2, 6))
    np.testing.assert_allclose((u * values) @ vt, matrix, atol=1e-12)


def test_nothing_has_no_direction() -> None:
    u, values, vt = svd(np.zeros((4, 3)))
    assert (u.shape, values.shape, vt.shape) == ((4, 0), (0,), (0, 3))
    assert not isotropic(np.zeros((4, 3))).any()
    assert polar(np.zeros((4, 0))).shape == (4, 0)


def test_isotropic_keeps_directions_and_the_sum_of_strengths() -> None:
    matrix = RANDOM.normal(size=(6, 3)) @ RANDOM.normal(size=(3, 8))
    before, after = svd(matrix), svd(isotropic(matrix))
    np.testing.assert_allclose(after[1], before[1].mean(), rtol=1e-12)
    np.testing.assert_allclose(after[0] @ after[2], before[0] @ before[2], atol=1e-12)


def test_the_polar_factor_is_the_nearest_with_orthonormal_columns() -> None:
    matrix = RANDOM.normal(size=(8, 3))
    found = polar(matrix)
    np.testing.assert_allclose(found.T @ found, np.eye(3), atol=1e-12)
    symmetric = found.T @ matrix  # and the other factor of the decomposition is positive
    np.testing.assert_allclose(symmetric, symmetric.T, atol=1e-12)
    assert np.linalg.eigvalsh(symmetric).min() > 0


def test_shared_bases_find_what_all_matrices_share() -> None:
    rows, columns = (np.linalg.qr(RANDOM.normal(size=(n, 3)))[0] for n in (9, 7))
    matrices = rows @ RANDOM.normal(size=(4, 3, 3)) @ columns.T
    u, v = shared_bases(matrices + 1e-9 * RANDOM.normal(size=matrices.shape), 3)
    np.testing.assert_allclose(u @ u.T, rows @ rows.T, atol=1e-7)
    np.testing.assert_allclose(v @ v.T, columns @ columns.T, atol=1e-7)


def test_of_one_matrix_shared_bases_are_its_singular_vectors() -> None:
    matrix = RANDOM.normal(size=(8, 6))
    u, v = shared_bases(matrix[np.newaxis], 2)
    expected = np.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(u @ u.T, expected[0][:, :2] @ expected[0][:, :2].T, atol=1e-9)
    np.testing.assert_allclose(v @ v.T, expected[2][:2].T @ expected[2][:2], atol=1e-9)
