"""The methods of the package against their formulas; see `method_contract`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.contracts.method_contract import MethodContract, Setting
from tests.contracts.small_inputs import Shape, SmallInputs, decode, read_back
from tests.oracles import dense
from tests.oracles.dense import Answer

WEIGHTS = [{"weight": w} for w in (0.5, 0.75, -0.25, 1.0)]
AWKWARD = [{"weight": w} for w in (0.1, -0.7, 0.0, 1 / 3)]


class TestLinear(MethodContract):
    method = "linear"
    settings = (
        Setting(),
        Setting(AWKWARD),
        Setting(WEIGHTS, {"normalize": False}),
        Setting(WEIGHTS),
    )

    def answer(self, inputs: SmallInputs, name: str, setting: Setting) -> Answer:
        return dense.linear(
            [inputs.model(entry, name) for entry in inputs.entries],
            setting.of("weight", self.spec.per_model, self.everyone(inputs)),
            normalize=setting.get("normalize", self.spec.shared),
        )


class TestTaskArithmetic(MethodContract):
    method = "task_arithmetic"
    settings = (
        Setting(),
        Setting(AWKWARD, {"lambda": -1.3}),
        Setting(WEIGHTS, {"normalize": True}),
        Setting([{"weight": 0}] * 4),
        Setting(WEIGHTS, {"lambda": 0.3, "normalize": True}),
    )

    def answer(self, inputs: SmallInputs, name: str, setting: Setting) -> Answer:
        return dense.task_arithmetic(
            inputs.origin(name),
            [inputs.delta(entry, name) for entry in inputs.entries],
            setting.of("weight", self.spec.per_model, self.everyone(inputs)),
            lambda_=setting.get("lambda", self.spec.shared),
            normalize=setting.get("normalize", self.spec.shared),
        )


class TestTies(MethodContract):
    method = "ties"
    settings = (
        Setting(),
        Setting(
            [{"weight": w, "density": d} for w, d in ((0.5, 0.6), (0.3, 0.5), (1, 1), (2, 0.1))]
        ),
        Setting(AWKWARD, {"normalize": False, "lambda": 1.7}),
        Setting([{"weight": -1, "density": 1e-9}] * 4),
        Setting([{"weight": 0, "density": 0.5}] * 4),
        Setting([{"weight": w, "density": 0.37} for w in (0.4, 1.0, 0.0, -0.2)]),
    )

    def answer(self, inputs: SmallInputs, name: str, setting: Setting) -> Answer:
        models = self.touching(inputs, name)
        return dense.ties(
            inputs.origin(name),
            [inputs.task_vector(inputs.entries[i], name) for i in models],
            setting.of("weight", self.spec.per_model, models),
            setting.of("density", self.spec.per_model, models),
            lambda_=setting.get("lambda", self.spec.shared),
            normalize=setting.get("normalize", self.spec.shared),
        )

    def test_hardly_any_vote_is_within_the_margin(self, tmp_path: Path) -> None:
        """Else the leave that the formula gives there could hide wrong votes."""
        inputs = SmallInputs(tmp_path, {"up.weight": (512, 400)}, "BF16")
        inputs.add_model()
        inputs.add_adapter(inputs.base, rank=4)
        inputs.add_adapter(inputs.base, rank=8)
        setting = Setting(
            [{"weight": w, "density": d} for w, d in ((1, 0.5), (0.7, 0.4), (0.1, 1))]
        )
        self.merge(inputs.recipe(self.method, setting.per_model), tmp_path / "out")
        answer = self.answer(inputs, "up.weight", setting)
        assert answer.doubtful() < 1e-4
        merged = decode(read_back(tmp_path / "out")["up.weight"])
        assert not answer.wrong(merged, "BF16").any()


class TestPassthrough(MethodContract):
    method = "passthrough"
    settings = (Setting(), Setting([{"scale": -1.7}]), Setting([{"scale": 0}]))

    def add_entries(self, inputs: SmallInputs, shapes: Mapping[str, Shape]) -> None:
        names = [name for name, shape in shapes.items() if len(shape) == 2 and 0 not in shape]
        inputs.add_adapter(names[:-1], rank=5)

    def answer(self, inputs: SmallInputs, name: str, setting: Setting) -> Answer:
        (scale,) = setting.of("scale", self.spec.per_model, [0])
        return dense.passthrough(inputs.model(inputs.entries[0], name), scale)
