"""Methods whose factors follow from the inner products of the models; see `method_contract`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

from streammerge.declarations import Coefficients
from streammerge.methods import CATALOGUE
from tests.contracts.method_contract import MethodContract, Setting
from tests.contracts.small_inputs import Shape, SmallInputs
from tests.oracles import spherical
from tests.oracles.dense import Answer, Exact, Vector

Formula = Callable[[Exact, Exact], Exact]


def matrices(shapes: Mapping[str, Shape]) -> list[str]:
    return [name for name, shape in shapes.items() if len(shape) == 2 and 0 not in shape]


def given(inputs: SmallInputs, name: str) -> list[Exact]:
    """The task vectors as float32 gives them to a method; zeros of those that leave it alone."""
    return [inputs.task_vector(entry, name).astype(np.float64) for entry in inputs.entries]


def weights_of(inputs: SmallInputs, name: str) -> list[Exact]:
    models = [inputs.model(entry, name).value for entry in inputs.entries]
    return [model.astype(np.float32).astype(np.float64) for model in models]


def on_base(inputs: SmallInputs, name: str, merged: Exact) -> Answer:
    """A merged task vector added to the base."""
    base = inputs.origin(name)
    vectors = [inputs.delta(entry, name) for entry in inputs.entries]
    return spherical.answer(base + merged, [Vector(base, np.abs(base)), *vectors])


def by_vector(setting: Setting, formula: Formula, a: Exact, b: Exact) -> Exact:
    """A formula of two vectors over the tensor, each row or each column."""
    if setting.shared.get("nuslerp_flatten", True) or a.ndim < 2:
        return formula(a, b)
    if setting.shared.get("nuslerp_row_wise", False):
        a, b = a.T, b.T
        rows = [formula(x, y) for x, y in zip(a, b, strict=True)]
        return np.array(rows).reshape(a.shape).T
    rows = [formula(x, y) for x, y in zip(a, b, strict=True)]
    return np.array(rows).reshape(a.shape)


class TestSlerp(MethodContract):
    method = "slerp"
    settings = tuple(Setting(shared={"t": t}) for t in (0.3, 0.0, 1.0, 0.5, 1.7))

    def add_entries(self, inputs: SmallInputs, shapes: Mapping[str, Shape]) -> None:
        tuned = inputs.add_model(size=1.5)
        inputs.entries.clear()
        inputs.add_adapter(matrices(shapes)[:-1], rank=3, on=tuned)

    def answer(self, inputs: SmallInputs, name: str, setting: Setting) -> Answer:
        base, (delta,) = inputs.origin(name), given(inputs, name)
        merged = spherical.slerp(setting.shared["t"], base, base + delta)
        return on_base(inputs, name, merged - base)


class TestSlerpOfAnAdapter(TestSlerp):
    settings = tuple(Setting(shared={"t": t}) for t in (0.5, -0.4))

    def add_entries(self, inputs: SmallInputs, shapes: Mapping[str, Shape]) -> None:
        inputs.add_adapter(matrices(shapes)[1:], rank=5, scale=16.0)


class TestNuslerp(MethodContract):
    method = "nuslerp"
    settings = (
        Setting(),
        Setting([{"weight": 0.3}, {"weight": 0.9}]),
        Setting([{"weight": 1}, {"weight": -1}]),
        Setting(shared={"nuslerp_flatten": False}),
        Setting(
            [{"weight": 0.3}, {"weight": 0.1}],
            {"nuslerp_flatten": False, "nuslerp_row_wise": True},
        ),
    )

    def add_entries(self, inputs: SmallInputs, shapes: Mapping[str, Shape]) -> None:
        inputs.add_model()
        inputs.add_adapter(matrices(shapes)[1:], rank=9, scale=-2.0)

    def answer(self, inputs: SmallInputs, name: str, setting: Setting) -> Answer:
        first, second = setting.of("weight", self.spec.per_model, [0, 1])
        t = 0.5 if first + second == 0 else second / (first + second)

        def formula(a: Exact, b: Exact) -> Exact:
            return spherical.nuslerp(t, a, b)

        merged = by_vector(setting, formula, *given(inputs, name))
        if merged.ndim < 2 or setting.shared.get("nuslerp_flatten", True):
            return on_base(inputs, name, merged)
        base = inputs.origin(name)  # factors differ by row or column, so they are taken at most
        size = sum((3 * inputs.delta(e, name).size for e in inputs.entries), np.abs(base))
        return Answer(base + merged, 30 * 2.0**-24 * size)


class TestNuslerpOfAdapters(TestNuslerp):
    """All inner products come from the factors."""

    settings = (Setting([{"weight": 0.3}, {"weight": 0.9}]),)

    def add_entries(self, inputs: SmallInputs, shapes: Mapping[str, Shape]) -> None:
        inputs.add_adapter(matrices(shapes)[:-1], rank=3)
        inputs.add_adapter(matrices(shapes)[1:], rank=9, scale=-2.0)


class TestMultislerp(MethodContract):
    method = "multislerp"
    settings = (
        Setting(),
        Setting([{"weight": w} for w in (0.5, 0.7, 0.2, 1.1)]),
        Setting([{"weight": w} for w in (0.5, -0.7, 0.2, 1.1)], {"normalize_weights": False}),
    )

    def answer(self, inputs: SmallInputs, name: str, setting: Setting) -> Answer:
        merged = spherical.multislerp(
            setting.of("weight", self.spec.per_model, self.everyone(inputs)),
            given(inputs, name),
            normalize=setting.get("normalize_weights", self.spec.shared),
        )
        return on_base(inputs, name, merged)


class TestKarcher(MethodContract):
    method = "karcher"
    settings = (Setting(), Setting(shared={"max_iter": 1}), Setting(shared={"tol": 0.5}))

    def answer(self, inputs: SmallInputs, name: str, setting: Setting) -> Answer:
        models = [inputs.model(entry, name) for entry in inputs.entries]
        merged = spherical.karcher(weights_of(inputs, name), **setting.shared)
        return spherical.answer(merged, models)


class TestModelStock(MethodContract):
    method = "model_stock"
    settings = (Setting(), Setting(shared={"filter_wise": True}))

    def answer(self, inputs: SmallInputs, name: str, setting: Setting) -> Answer:
        base, deltas = inputs.origin(name), given(inputs, name)
        if not setting.shared.get("filter_wise", False) or base.ndim < 2:
            return on_base(inputs, name, spherical.model_stock(base, deltas) - base)
        rows = [
            spherical.model_stock(base[row], [delta[row] for delta in deltas])
            for row in range(len(base))
        ]
        size = sum((inputs.delta(e, name).size for e in inputs.entries), np.abs(base))
        return Answer(np.array(rows).reshape(base.shape), 60 * 2.0**-24 * size)


class TestModelStockOfAdapters(TestModelStock):
    def add_entries(self, inputs: SmallInputs, shapes: Mapping[str, Shape]) -> None:
        inputs.add_adapter(matrices(shapes)[:2], rank=3)
        inputs.add_adapter(matrices(shapes)[1:], rank=9, scale=-2.0)
        inputs.add_adapter(matrices(shapes)[-1:], rank=2)


# ----------------------------------------------------------------------------- degenerate inputs

RANDOM = np.random.default_rng(0).normal(size=(3, 40))
PAIRS: Mapping[str, Sequence[Exact]] = {
    "zeros": np.zeros((2, 40)),
    "the same": np.array([RANDOM[0], RANDOM[0]]),
    "parallel": np.array([RANDOM[0], 0.3 * RANDOM[0]]),
    "opposite": np.array([RANDOM[0], -0.7 * RANDOM[0]]),
    "one is zero": np.array([RANDOM[0], 0 * RANDOM[0]]),
    "zero first": np.array([0 * RANDOM[0], RANDOM[0]]),
    "tiny": 1e-6 * RANDOM[:2],
    "one element": RANDOM[:2, :1],
    "one element each way": RANDOM[:2, :1] * [[1], [-1]],
}


def combined(method: str, vectors: Sequence[Exact], gram: Exact, **knobs: object) -> Exact:
    """What a method makes of vectors whose inner products it is given."""
    found = CATALOGUE[method].function(None, gram=gram, **knobs)
    assert isinstance(found, Coefficients)
    return sum((f * v for f, v in zip(found.models, vectors, strict=True)), 0 * vectors[0])


@pytest.mark.parametrize("name", PAIRS)
def test_nuslerp_of_degenerate_pairs(name: str) -> None:
    a, b = PAIRS[name]
    gram = np.array([a, b]) @ np.array([a, b]).T
    knobs = {"weight": np.array([1.0, 3.0]), "nuslerp_flatten": True, "nuslerp_row_wise": False}
    found = combined("nuslerp", [a, b], gram, **knobs)
    np.testing.assert_allclose(found, spherical.nuslerp(0.75, a, b), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_slerp_of_degenerate_pairs(name: str) -> None:
    base, model = PAIRS[name]
    both = np.array([base, model - base])
    found = CATALOGUE["slerp"].function(None, t=0.3, gram=both @ both.T)
    result = found.base * base + found.models[0] * (model - base)
    np.testing.assert_allclose(result, spherical.slerp(0.3, base, model), rtol=1e-6, atol=1e-9)


def test_slerp_takes_a_zero_vector_as_at_right_angles() -> None:
    base = RANDOM[0]
    both = np.array([0 * base, base])
    found = CATALOGUE["slerp"].function(None, t=0.3, gram=both @ both.T)
    np.testing.assert_allclose(found.models[0], np.sin(0.3 * np.pi / 2))


@pytest.mark.parametrize("name", PAIRS)
def test_multislerp_of_degenerate_pairs(name: str) -> None:
    pair = np.array(PAIRS[name])
    weights = np.array([1.0, 1.0])
    knobs = {"weight": weights, "normalize_weights": True, "eps": 1e-8}
    found = combined("multislerp", pair, pair @ pair.T, **knobs)
    expected = spherical.multislerp([1.0, 1.0], pair)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", PAIRS)
def test_karcher_of_degenerate_pairs(name: str) -> None:
    pair = np.array(PAIRS[name])
    found = combined("karcher", pair, pair @ pair.T, max_iter=10, tol=1e-5)
    np.testing.assert_allclose(found, spherical.karcher(pair), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", PAIRS)
def test_model_stock_of_degenerate_pairs(name: str) -> None:
    pair = np.array(PAIRS[name])
    found = combined("model_stock", pair, pair @ pair.T, filter_wise=False)
    expected = spherical.model_stock(np.zeros(pair.shape[1]), pair)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_karcher_lies_as_near_to_all_models_as_any() -> None:
    """The defining property: the squared angles grow in every direction."""
    gram = RANDOM @ RANDOM.T
    mean = combined("karcher", RANDOM, gram, max_iter=100, tol=1e-12)
    units = RANDOM / np.linalg.norm(RANDOM, axis=1, keepdims=True)

    def spread(point: Exact) -> float:
        return float(np.sum(np.arccos(units @ point / np.linalg.norm(point)) ** 2))

    chance = np.random.default_rng(1)
    for _ in range(20):
        aside = mean + 1e-3 * chance.normal(size=mean.shape)
        assert spread(aside) > spread(mean)
