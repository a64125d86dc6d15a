"""A method is a new file and a line that lists it: made here, it inherits the whole suite."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from streammerge.declarations import MethodSpec
from streammerge.methods import load
from tests.contracts.method_contract import MethodContract, Setting
from tests.contracts.small_inputs import SmallInputs
from tests.oracles import dense
from tests.oracles.dense import UNIT, Answer

HEAD = '''\
"""A method that the package does not know."""

from typing import Annotated

import numpy as np

from streammerge.arrays import Deltas, PerModel, Rows, Weights
from streammerge.kernels import Cut, trim
from streammerge.methods import method
from streammerge.statistics import KthMagnitude
from streammerge.declarations import (Coefficients, Knob)

'''

FILES = {
    "half_sum": '''
@method(temporaries=0)
def half_sum(
    deltas: Deltas,  # [models, rows, cols]
    *,
    weight: Annotated[PerModel, Knob(1.0, "factor")],
    share: Annotated[PerModel, Knob(1.0, "share of elements to keep", above=0, up_to=1)],
    cut: Annotated[Cut, KthMagnitude(keep="share")],
) -> Rows:
    """Half of the sum of the largest parts of the task vectors."""
    for delta, factor in zip(trim(deltas, cut), weight, strict=True):
        delta *= np.float32(0.5 * factor)
    for delta in deltas[1:]:  # in place: the engine plans for no other buffer
        deltas[0] += delta
    return deltas[0]
''',
    "geometric": '''
@method()
def geometric(
    deltas: Deltas,
    *,
    weight: Annotated[PerModel, Knob(1.0, "factor")],
    first: Annotated[float, Knob(0.5, "weight of the first", at_least=0.0, below=1.0)],
) -> Coefficients:
    """Each model weighs `first` times as much as the one before it."""
    return Coefficients([float(w) * first ** (i + 1) for i, w in enumerate(weight)])
''',
    "spread": '''
@method(models=(2, None))
def spread(
    models: Weights,  # [models, rows, cols]
    *,
    scale: Annotated[float, Knob(1.0, "factor")],
) -> Rows:
    """How far the models lie apart: the largest value less the smallest."""
    highest = models[0].copy()
    np.maximum.reduce(models, axis=0, out=highest)
    for model in models[1:]:
        np.minimum(models[0], model, out=models[0])
    highest -= models[0]
    highest *= np.float32(scale)
    return highest
''',
}


@pytest.fixture(scope="module", autouse=True)
def soup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The package `soup`, with a file for each method; nothing else is edited."""
    package = tmp_path_factory.mktemp("site") / "soup"
    _write(package)
    sys.path.insert(0, str(package.parent))
    importlib.invalidate_caches()
    for kind in (TestHalfSum, TestGeometric, TestSpread):
        kind.catalogue = load("soup", list(FILES))
    yield
    sys.path.remove(str(package.parent))
    for name in [name for name in sys.modules if name.partition(".")[0] == "soup"]:
        del sys.modules[name]


def _write(package: Path) -> None:
    package.mkdir()
    (package / "__init__.py").write_text("")
    for name, text in FILES.items():
        (package / f"{name}.py").write_text(HEAD + text)


class TestHalfSum(MethodContract):
    """Rows of task vectors, with a statistic."""

    method = "half_sum"
    catalogue: ClassVar[Mapping[str, MethodSpec]] = {}
    settings = (
        Setting(),
        Setting(
            [{"weight": w, "share": s} for w, s in ((1, 0.5), (-2, 0.25), (0, 1), (0.3, 0.01))]
        ),
    )

    def answer(self, inputs: SmallInputs, name: str, setting: Setting) -> Answer:
        models = self.touching(inputs, name)
        weights = setting.of("weight", self.spec.per_model, models)
        shares = setting.of("share", self.spec.per_model, models)
        base = inputs.origin(name)
        kept = [
            dense.keep_largest(inputs.task_vector(inputs.entries[i], name), share)
            for i, share in zip(models, shares, strict=True)
        ]
        terms = [0.5 * w * d for w, d in zip(weights, kept, strict=True)]
        size = sum((np.abs(term) for term in terms), np.abs(base))
        value = base + sum(terms, np.zeros(base.shape))
        return Answer(value, (len(terms) + 3) * UNIT * size)


class TestGeometric(MethodContract):
    """Coefficients: the engine forms the sum."""

    method = "geometric"
    catalogue: ClassVar[Mapping[str, MethodSpec]] = {}
    settings = (Setting(), Setting(shared={"first": 0.9}), Setting(shared={"first": 0.0}))

    def answer(self, inputs: SmallInputs, name: str, setting: Setting) -> Answer:
        first = setting.get("first", self.spec.shared)
        deltas = [inputs.delta(entry, name) for entry in inputs.entries]
        weights = setting.of("weight", self.spec.per_model, self.everyone(inputs))
        factors = [weight * first ** (i + 1) for i, weight in enumerate(weights)]
        return dense.task_arithmetic(inputs.origin(name), deltas, factors)


class TestSpread(MethodContract):
    """Rows of the models themselves: one that leaves a tensor alone is the base there."""

    method = "spread"
    catalogue: ClassVar[Mapping[str, MethodSpec]] = {}
    settings = (Setting(), Setting(shared={"scale": -0.5}))

    def answer(self, inputs: SmallInputs, name: str, setting: Setting) -> Answer:
        models = [inputs.model(entry, name) for entry in inputs.entries]
        stack = np.array([model.value for model in models])
        size = np.max([model.size for model in models], axis=0)
        terms = max(model.terms for model in models)
        value = setting.get("scale", self.spec.shared) * (stack.max(axis=0) - stack.min(axis=0))
        return Answer(value, (2 * terms + 4) * UNIT * size)
