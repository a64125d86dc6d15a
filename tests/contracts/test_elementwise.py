"""Methods that select or share element by element; see `method_contract`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from streammerge.kernels.contributions import importance, variance
from tests.contracts.method_contract import MethodContract, Setting
from tests.contracts.small_inputs import Shape, SmallInputs, decode, read_back
from tests.contracts.test_spherical import matrices
from tests.oracles import elementwise
from tests.oracles.dense import Answer, Single


def of_all(inputs: SmallInputs, name: str) -> list[Single]:
    return [inputs.task_vector(entry, name) for entry in inputs.entries]


class TestSce(MethodContract):
    method = "sce"
    settings = (
        Setting(),
        Setting(shared={"select_topk": 0}),
        Setting(shared={"select_topk": 0.99}),
        Setting(shared={"select_topk": 0.2}),
    )

    def answer(self, inputs: SmallInputs, name: str, setting: Setting) -> Answer:
        topk = setting.get("select_topk", self.spec.shared)
        return elementwise.sce(inputs.origin(name), of_all(inputs, name), topk)

    def test_small_updates_count_alike(self, tmp_path: Path) -> None:
        """Deltas of 1e-4 have mean squares under 1e-6."""
        inputs = SmallInputs(tmp_path, {"up.weight": (40, 30)}, "F32")
        for size in (1e-4, 3e-4, 2e-4):
            inputs.add_model(size=size)
        self.merge(inputs.recipe(self.method), tmp_path / "out")
        merged = decode(read_back(tmp_path / "out")["up.weight"])
        deltas = np.array(of_all(inputs, "up.weight"), np.float64)
        agrees = np.sign(deltas) == np.sign(deltas.sum(axis=0))
        expected = (deltas * agrees).sum(axis=0) / agrees.sum(axis=0)
        np.testing.assert_allclose(merged, inputs.origin("up.weight") + expected, atol=1e-6)


class TestNearswap(MethodContract):
    method = "nearswap"
    settings = tuple(Setting(shared={"t": t}) for t in (0.05, 0.0, 1e-7, -1.0, 100.0))

    def add_entries(self, inputs: SmallInputs, shapes: Mapping[str, Shape]) -> None:
        inputs.add_adapter(matrices(shapes)[:-1], rank=3, on=inputs.add_model())
        del inputs.entries[0]

    def answer(self, inputs: SmallInputs, name: str, setting: Setting) -> Answer:
        (delta,) = of_all(inputs, name)
        return elementwise.nearswap(inputs.origin(name), delta, setting.shared["t"])


class TestArceeFusion(MethodContract):
    method = "arcee_fusion"
    settings = (Setting(),)

    def add_entries(self, inputs: SmallInputs, shapes: Mapping[str, Shape]) -> None:
        inputs.add_model(size=0.5)

    def answer(self, inputs: SmallInputs, name: str, setting: Setting) -> Answer:
        (delta,) = of_all(inputs, name)
        return elementwise.arcee_fusion(inputs.origin(name), delta)

    def test_little_is_within_the_margin(self, tmp_path: Path) -> None:
        """Else the leave that the oracle gives there could hide a wrong threshold."""
        inputs = self.make(tmp_path)
        for name in inputs.base:
            assert self.answer(inputs, name, Setting()).doubtful() < 0.05 or name.endswith("ature")


class TestArceeFusionOfAnAdapter(TestArceeFusion):
    def add_entries(self, inputs: SmallInputs, shapes: Mapping[str, Shape]) -> None:
        inputs.add_adapter(matrices(shapes), rank=3, scale=4.0)


class TestRam(MethodContract):
    method = "ram"
    settings = (Setting(), Setting(shared={"epsilon": 0.1}), Setting(shared={"epsilon": 0}))

    def answer(self, inputs: SmallInputs, name: str, setting: Setting) -> Answer:
        epsilon = setting.get("epsilon", self.spec.shared)
        return elementwise.ram(inputs.origin(name), of_all(inputs, name), epsilon=epsilon)


class TestRamplus(MethodContract):
    method = "ramplus_tl"
    settings = (
        Setting(),
        Setting(shared={"epsilon": 0.1, "r": 2.0, "alpha": 0.7}),
        Setting(shared={"r": -0.5, "alpha": 5.0}),
    )

    def answer(self, inputs: SmallInputs, name: str, setting: Setting) -> Answer:
        knobs = {k: setting.get(k, self.spec.shared) for k in ("epsilon", "r", "alpha")}
        return elementwise.ramplus(inputs.origin(name), of_all(inputs, name), **knobs)


# ---------------------------------------------------------------------------------- the kernels

RANDOM = np.random.default_rng(0).normal(size=(4, 3, 50)).astype(np.float32)


@pytest.mark.parametrize("models", [4, 7])
def test_variance_counts_those_that_are_not_there(models: int) -> None:
    missing = np.zeros((models - 4, 3, 50))
    expected = np.concatenate([RANDOM.astype(np.float64), missing]).var(axis=0)
    np.testing.assert_allclose(variance(RANDOM, models), expected, rtol=1e-6)
    assert not variance(np.zeros((2, 1, 5), np.float32), 3).any()
    assert not variance(RANDOM[:1], 1).any()


def test_importance_is_its_formula() -> None:
    base, model = RANDOM[0].astype(np.float64), RANDOM[1]
    delta = (model - RANDOM[0]).astype(np.float32)
    expected = elementwise.importance(base, (RANDOM[0] + delta).astype(np.float64))
    np.testing.assert_allclose(importance(delta, RANDOM[0]), expected, rtol=1e-5)
    assert not importance(np.zeros((2, 9), np.float32), RANDOM[0, :2, :9].copy()).any()
    large = np.array([[3e38, -3e38, 0]], np.float32)
    assert np.isfinite(importance(np.zeros_like(large), large)).all()
