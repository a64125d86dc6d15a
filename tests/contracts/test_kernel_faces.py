"""Both faces of every kernel give the same: arrays by numpy and numba, tensors by torch.

What is computed element by element is equal bit for bit; products and sums, whose order is the
library's, are held to float64. On torch's CPU device, and on CUDA where there is one.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from streammerge import kernels
from streammerge.kernels import (
    casts,
    contributions,
    cpu,
    norms,
    product,
    prune,
    vote,
    weighted,
)
from streammerge.kernels.drop import drop, drop_by_rank
from streammerge.kernels.prune import ABOVE_ALL, KEEP_ALL_EQUAL, Cut
from streammerge.noise import Draws, key_of
from streammerge.scratch import Scratch
from streammerge.words import DType

torch = pytest.importorskip("torch")

MODULES = (
    casts,
    contributions,
    sys.modules[drop.__module__],
    norms,
    product,
    prune,
    vote,
    weighted,
)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
SHAPE = (3, 37, 53)  # models, rows, cols


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    name: str = request.param
    return name


def deltas(seed: int = 0, *, equals: bool = False) -> np.ndarray[Any, Any]:
    """Some of them zero, and with `equals` of few magnitudes."""
    random = np.random.default_rng(seed)
    found = random.normal(size=SHAPE).astype(np.float32)
    found[random.random(SHAPE) < 0.1] = 0
    return np.round(found * 2) / 2 if equals else found


def up(array: np.ndarray[Any, Any], device: str) -> Any:
    return torch.from_numpy(array.copy()).to(device)


def down(found: Any) -> Any:
    return found.cpu().numpy() if isinstance(found, torch.Tensor) else found


def both(device: str, function: Callable[..., Any], *arrays: Any, **others: Any) -> tuple[Any, Any]:
    """What a kernel returns, and leaves of its arguments, by either face."""
    mine = [a.copy() if isinstance(a, np.ndarray) and a.dtype == np.float32 else a for a in arrays]
    theirs = [
        up(a, device) if isinstance(a, np.ndarray) and a.dtype == np.float32 else a for a in arrays
    ]
    first, second = function(*mine, **others), function(*theirs, **others)
    return [first, *mine], [down(one) for one in (second, *theirs)]


def assert_equal(pair: tuple[Any, Any]) -> None:
    for mine, theirs in zip(*pair, strict=True):
        if isinstance(mine, np.ndarray):
            np.testing.assert_array_equal(mine, theirs)
            np.testing.assert_array_equal(np.signbit(mine), np.signbit(theirs))
        elif isinstance(mine, int | float):
            assert mine == theirs


def assert_near(pair: tuple[Any, Any], rtol: float) -> None:
    for mine, theirs in zip(*pair, strict=True):
        if mine is not None:
            size = np.abs(mine).max()
            np.testing.assert_allclose(theirs, mine, rtol=rtol, atol=rtol * size)


# ------------------------------------------------------------------------------- both are there


def test_every_kernel_has_a_face_for_tensors() -> None:
    """Also the same parameters, by name and order."""
    from streammerge.kernels import gpu

    found = 0
    for module in MODULES:
        for name, function in vars(module).items():
            if hasattr(function, "__wrapped__") and function.__module__ == module.__name__:
                theirs = inspect.signature(getattr(gpu, name)).parameters
                assert list(inspect.signature(function).parameters) == list(theirs), name
                found += 1
    assert found > 25


# ------------------------------------------------------------------------------ bit for bit


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F32, DType.F64])
def test_casts(device: str, dtype: DType) -> None:
    rows = deltas()[0]
    rows[0, :4] = 1e30, 3.0e38, 65519.0, 1e-42
    stored, theirs = (np.empty(rows.size * dtype.itemsize, np.uint8) for _ in range(2))
    bad = kernels.narrow(rows, dtype, stored)
    assert kernels.narrow(up(rows, device), dtype, theirs) == bad
    np.testing.assert_array_equal(stored, theirs)
    wide, tensor = np.empty_like(rows), up(np.empty_like(rows), device)
    kernels.widen(stored, dtype, wide)
    kernels.widen(stored, dtype, tensor)
    np.testing.assert_array_equal(wide, down(tensor))
    stored.flags.writeable = False  # as mapped
    kernels.widen(stored, dtype, tensor)
    np.testing.assert_array_equal(wide, down(tensor))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_counted(device: str, bad: float) -> None:
    rows = deltas()[0]
    rows[1, 2] = rows[3, 4] = bad
    assert_equal(both(device, casts.not_finite, rows))
    out = np.empty(rows.size * 2, np.uint8)
    assert kernels.narrow(up(rows, device), DType.BF16, out) == 2


CUTS = [
    Cut((0, 0x3F800000, ABOVE_ALL), (KEEP_ALL_EQUAL,) * 3),
    Cut((0x3F800000, 0x3F000000, 0x40000000), (7, 0, 1)),
    Cut((1, 0x7F000000, 0x3F800000), (KEEP_ALL_EQUAL, 3, 10**6)),
]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("equals", [False, True])
def test_pruning(device: str, cut: Cut, equals: bool) -> None:
    assert_equal(both(device, prune.trim, deltas(equals=equals), cut))
    assert_equal(both(device, prune.drop_largest, deltas(equals=equals), cut))


@pytest.mark.parametrize(("low", "high"), [(1, ABOVE_ALL), (0x3F000000, 0x3F800000), (1, 2)])
def test_counting(device: str, low: int, high: int) -> None:
    rows = deltas()[0]
    above, found = prune.count_and_collect(rows, low, high, Scratch())
    theirs = prune.count_and_collect(up(rows, device), low, high, Scratch())
    assert above == theirs[0]
    np.testing.assert_array_equal(np.sort(found), np.sort(theirs[1]))
    assert_equal(both(device, prune.count_nonzero, rows))
    np.testing.assert_array_equal(prune.keys(rows), prune.keys(up(rows, device)))


DRAWS = Draws(tuple(key_of(7, "a.weight", model) for model in range(3)), 1 << 40)


def test_the_same_elements_are_dropped(device: str) -> None:
    pair = both(device, drop, deltas(), np.array([0.5, 1.0, 0.1]), DRAWS)
    assert_equal(pair)
    assert (pair[0][0][0] == 0).mean() > 0.4


@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("cols", [1, 53])
def test_the_same_elements_are_dropped_by_rank(device: str, divide: bool, cols: int) -> None:
    shares, spreads = np.array([0.5, 1.0, 0.3]), np.array([0.2, 0.0, 0.1])
    stack = np.ascontiguousarray(deltas(equals=True)[:, :, :cols])
    assert_equal(both(device, drop_by_rank, stack, shares, spreads, DRAWS, divide=divide))


@pytest.mark.parametrize("how", ["weighted", "unweighted", "count"])
@pytest.mark.parametrize("divide", ["none", "weights", "count"])
@pytest.mark.parametrize("least", [0.0, 0.25])
def test_election(device: str, how: str, divide: str, least: float) -> None:
    weights = np.array([0.3, -0.2, 1e-9])
    for equals in (False, True):
        given = {"vote": how, "divide": divide, "scale": 0.7, "least_divisor": least}
        assert_equal(both(device, vote.elect, deltas(equals=equals), weights, **given))


def test_election_keeps_what_is_not_finite(device: str) -> None:
    stack = deltas()
    stack[1, 2, 3] = np.inf
    _, theirs = both(device, vote.elect, stack, np.ones(3))
    assert not np.isfinite(theirs[0][2, 3])


def test_sums_of_rows(device: str) -> None:
    a, b, _ = deltas()
    for function in (weighted.add, weighted.subtract):
        assert_equal(both(device, function, a, b, np.empty_like(a)))
    assert_equal(both(device, weighted.copy, a, np.empty_like(a)))
    assert_equal(both(device, weighted.fill, a, -0.0))
    assert_equal(both(device, weighted.add_scaled, a, 0.1, b))
    assert_equal(both(device, weighted.add_up, deltas(), np.array([0.1, 0.2, -0.3]), 0.5))
    assert_equal(both(device, weighted.scaled, deltas(), np.array([0.1, 1.0, -0.3])))
    assert_equal(both(device, weighted.take_up_to, a, 0.3, 1e-6))
    for shape in ((37, 1), (1, 53)):
        factors = np.random.default_rng(1).normal(size=shape)
        assert_equal(both(device, weighted.multiply_by, a, factors))
    assert_equal(both(device, product.thinned, a, 5))


def test_contributions(device: str) -> None:
    for stack in (deltas(), deltas(equals=True)):
        assert_equal(both(device, contributions.variance, stack, 4))
        assert_equal(both(device, contributions.zero_where_zero, stack, stack[1].copy()))
        assert_equal(both(device, contributions.zero_below, stack[0], np.abs(stack[1]), 0.5))
        assert_equal(both(device, contributions.count_contributions, stack, 0.4))
        alone = np.array([1.5, 0.5, 2.0])
        assert_equal(both(device, contributions.merge_contributions, stack, 0.4, alone))


def test_rescaling_of_rows_and_columns(device: str) -> None:
    rows, change, _ = deltas()
    for function, size in ((norms.rescale_rows, 37), (norms.rescale_columns, 53)):
        factors = np.random.default_rng(2).normal(1, 0.01, size)
        assert_equal(both(device, function, rows, change, factors))


# ------------------------------------------------------------------------- sums and products


def test_products(device: str) -> None:
    random = np.random.default_rng(3)
    left = random.normal(size=(37, 9)).astype(np.float32)
    right = random.normal(size=(9, 53)).astype(np.float32)
    out = np.empty((37, 53), np.float32)
    assert_near(both(device, product.multiply, left, right, out), 2e-6)
    assert_near(both(device, product.gram, right), 1e-12)
    grams = [product.gram(right[:4]), product.gram(right[4:])]
    pair = both(device, product.squared_norms, left, grams, [0.5, 2.0])
    assert_near((pair[0][:1], pair[1][:1]), 1e-5)
    a, b, _ = deltas()
    for axis in (0, 1):
        assert_near(both(device, product.products_along, a, b, axis), 1e-12)


def test_norms(device: str) -> None:
    a, b, _ = deltas()
    for function in (weighted.sum_of_squares, weighted.sum_of_magnitudes, norms.squares_of_columns):
        assert_near(both(device, function, a), 1e-12)
    for pairwise in (weighted.sum_of_squared_differences, norms.norms_of_rows):
        assert_near(both(device, pairwise, a, b), 1e-12)
    assert_near(both(device, contributions.importance, a, b), 1e-6)


def test_a_kernel_of_the_cpu_is_not_called_for_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the suite would compare numba with itself."""
    monkeypatch.setattr(cpu, "keep_largest", None)
    cut = Cut((0x3F800000,) * 3, (1,) * 3)
    prune.trim(up(deltas(), "cpu"), cut)
    with pytest.raises(TypeError):
        prune.trim(deltas(), cut)
