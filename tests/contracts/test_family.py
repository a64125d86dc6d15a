"""The family of TIES: what is pruned, how it is scaled, voted on and added; see `method_contract`.

ties itself is in `test_methods`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streammerge.errors import Problems
from streammerge.methods import CATALOGUE
from streammerge.recipe import parse_recipe
from tests.contracts.method_contract import MethodContract, Setting
from tests.contracts.small_inputs import SmallInputs
from tests.oracles import dense, pruning
from tests.oracles.dense import Answer, Exact, Single, Vector

WEIGHTS = (0.5, 0.75, -0.25, 1.0)
DENSITIES = (0.6, 0.5, 1.0, 0.1)
MIXED = [{"weight": w, "density": d} for w, d in zip(WEIGHTS, DENSITIES, strict=True)]
THIRDS = [{"weight": w, "density": 0.37} for w in (0.4, 1.0, 0.0, -0.2)]


class FamilyContract(MethodContract):
    """Prunes, rescales, and votes or sums."""

    def pruned(self, delta: Single, name: str, model: int, setting: Setting) -> Exact:
        raise NotImplementedError

    def share(self, size: int, density: float) -> float:
        """The share that is kept, for `rescale: density`."""
        return max(1, int(density * size)) / size

    def of_model(self, knob: str, model: int, setting: Setting) -> Any:
        return setting.of(knob, self.spec.per_model, [model])[0]

    def kept(self, inputs: SmallInputs, name: str, model: int, setting: Setting) -> Exact:
        delta = inputs.task_vector(inputs.entries[model], name)
        left = self.pruned(delta, name, model, setting)
        rescale = setting.get("rescale", self.spec.shared)
        if rescale == "l1":
            return pruning.to_old_norm(delta, left)
        if rescale == "density" and left.size:
            return left / self.share(delta.size, self.of_model("density", model, setting))
        return left

    def answer(self, inputs: SmallInputs, name: str, setting: Setting) -> Answer:
        knobs = self.spec.shared
        models = self.touching(inputs, name)
        kept = [self.kept(inputs, name, model, setting) for model in models]
        weights = setting.of("weight", self.spec.per_model, models)
        base, lambda_ = inputs.origin(name), setting.get("lambda", knobs)
        normalize = setting.get("normalize", knobs)
        if "vote" in knobs:
            divide = setting.get("divide", knobs)
            if divide == "normalize":
                divide = "weights" if normalize else "none"
            vote = setting.get("vote", knobs)
            return dense.voted(base, kept, weights, vote=vote, divide=divide, lambda_=lambda_)
        everyone = setting.of("weight", self.spec.per_model, self.everyone(inputs))
        total = sum(everyone) if normalize else 1.0
        return dense.weighted_sum(
            [1.0, *(lambda_ * w / total for w in weights)],
            [Vector(base, np.abs(base)), *(Vector(one, 3 * np.abs(one), 4) for one in kept)],
        )


SUMS = (
    Setting(),
    Setting(MIXED, {"rescale": "none", "lambda": 1.7}),
    Setting(MIXED, {"rescale": "density", "normalize": True}),
    Setting(THIRDS, {"rescale": "l1"}),
)
VOTES = (
    Setting(MIXED, {"rescale": "none", "vote": "unweighted", "divide": "count"}),
    Setting(MIXED, {"rescale": "density", "vote": "count", "divide": "weights"}),
    Setting(THIRDS, {"rescale": "l1", "normalize": True, "lambda": -0.5}),
)


class TestTiesOptions(FamilyContract):
    method = "ties"
    settings = (*VOTES, Setting(THIRDS, {"ties": "all", "divide": "none"}))

    def pruned(self, delta: Single, name: str, model: int, setting: Setting) -> Exact:
        density = self.of_model("density", model, setting)
        kept = dense.keep_largest(delta, density)
        if setting.get("ties", self.spec.shared) == "all" and kept.any() and density < 1:
            least = np.abs(kept[kept != 0]).min() if np.count_nonzero(kept) else 0
            enough = np.count_nonzero(kept) == max(1, int(density * delta.size))
            return np.where(np.abs(delta) >= least, delta, 0) if enough else kept
        return kept


class TestMagnitudePrune(TestTiesOptions):
    method = "magnitude_prune"
    settings = (*SUMS, Setting(THIRDS, {"ties": "all"}))


class TestDareLinear(FamilyContract):
    method = "dare_linear"
    settings = SUMS

    def share(self, size: int, density: float) -> float:
        return density

    def pruned(self, delta: Single, name: str, model: int, setting: Setting) -> Exact:
        drawn = pruning.numbers(0, name, model, delta.size)
        return pruning.dropped(delta, self.of_model("density", model, setting), drawn)


class TestDareTies(TestDareLinear):
    method = "dare_ties"
    settings = VOTES


class TestDellaLinear(FamilyContract):
    method = "della_linear"
    settings = (
        Setting(),
        Setting(
            [{**one, "epsilon": e} for one, e in zip(MIXED, (0.3, 0.1, 0.7, 0.05), strict=True)],
            {"rescale": "none"},
        ),
        Setting(THIRDS, {"rescale": "density", "normalize": True}),
        Setting(THIRDS),
    )

    def share(self, size: int, density: float) -> float:
        return 1.0  # each element is divided by its own probability

    def pruned(self, delta: Single, name: str, model: int, setting: Setting) -> Exact:
        density, epsilon = (self.of_model(k, model, setting) for k in ("density", "epsilon"))
        drawn = pruning.numbers(0, name, model, delta.size)
        divide = setting.get("rescale", self.spec.shared) == "density"
        return pruning.dropped_by_rank(delta, density, epsilon, drawn, divide=divide)

    @pytest.mark.parametrize(
        ("density", "epsilon", "fine"),
        [(0.5, 0.15, True), (0.1, 0.15, False), (0.9, 0.1, False), (1, 0.15, True), (0.9, 0, True)],
    )
    def test_probabilities_beyond_0_and_1_are_refused(
        self, density: float, epsilon: float, fine: bool
    ) -> None:
        problems = Problems()
        text = f"merge_method: {self.method}\nbase_model: b\nmodels:\n  - model: a\n"
        text += f"    parameters: {{density: {density}, epsilon: {epsilon}}}\n"
        parse_recipe(text, "cfg.yaml", Path(), CATALOGUE, problems)
        found = [str(problem) for problem in problems]
        assert len(found) == (0 if fine else 1), found
        assert fine or "density and epsilon do not go together" in found[0]


class TestDella(TestDellaLinear):
    method = "della"
    settings = (
        Setting(THIRDS, {"rescale": "density", "vote": "count"}),
        Setting(THIRDS, {"normalize": False}),
    )


class TestBreadcrumbs(FamilyContract):
    method = "breadcrumbs"
    settings = (
        *SUMS,
        Setting([{**one, "gamma": g} for one, g in zip(MIXED, (0, 0.9, 0.2, 0.3), strict=True)]),
    )

    def pruned(self, delta: Single, name: str, model: int, setting: Setting) -> Exact:
        density, gamma = (self.of_model(k, model, setting) for k in ("density", "gamma"))
        return pruning.middle(delta, density, gamma)


class TestBreadcrumbsTies(TestBreadcrumbs):
    method = "breadcrumbs_ties"
    settings = (*VOTES, Setting([{"density": 0.3, "gamma": 0.5, "weight": w} for w in WEIGHTS]))
