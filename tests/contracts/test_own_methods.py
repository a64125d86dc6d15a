"""Methods of the user's own: the files of docs/own-methods.md, and what is wrong with others."""

from __future__ import annotations

import json
import re
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

import streammerge as sm
from streammerge.commands.methods import explain
from streammerge.errors import ConfigError, Problems
from streammerge.methods import CATALOGUE, WithOwn, own
from streammerge.recipe import parse_recipe
from tests.contracts.method_contract import MEMORY
from tests.contracts.small_inputs import SmallInputs, decode, read_back
from tests.oracles.dense import Exact, keep_largest

UP = "model.up.weight"
BLOCKS = re.findall(
    r"```python\n(.*?)```", Path("docs/own-methods.md").read_text("utf-8"), re.DOTALL
)


@pytest.fixture
def inputs(tmp_path: Path) -> SmallInputs:
    made = SmallInputs(tmp_path, {UP: (37, 24), "model.norm.weight": (70,)}, "F32")
    made.add_adapter([UP], rank=3)
    made.add_adapter([UP], rank=5)
    (tmp_path / "largest.py").write_text(BLOCKS[0])
    (tmp_path / "averages.py").write_text(BLOCKS[1])
    return made


def merged(inputs: SmallInputs, method: str, **knobs: float) -> Exact:
    recipe = inputs.recipe(method, [knobs, {}])
    out = inputs.folder / "out"
    sm.merge(recipe, out=out, memory=MEMORY, force=True)
    return decode(read_back(out)[UP])


def test_the_file_of_the_documentation(inputs: SmallInputs) -> None:
    found = merged(inputs, "./largest.py", weight=0.5, density=0.3)
    deltas = [inputs.task_vector(entry, UP) for entry in inputs.entries]
    kept = np.array([0.5 * keep_largest(deltas[0], 0.3), deltas[1].astype(np.float64)])
    largest = np.take_along_axis(kept, np.abs(kept).argmax(axis=0)[None], axis=0)[0]
    np.testing.assert_allclose(found, inputs.origin(UP) + largest, rtol=1e-6, atol=1e-6)


def test_the_same_in_torch(inputs: SmallInputs) -> None:
    found = merged(inputs, "averages.py:mean", weight=3.0)
    deltas = [inputs.delta(entry, UP).value for entry in inputs.entries]
    expected = inputs.origin(UP) + (3 * deltas[0] + deltas[1]) / 2
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_changed_file_is_another_merge(inputs: SmallInputs) -> None:
    def record() -> str:
        merged(inputs, "./largest.py")
        document = json.loads((inputs.folder / "out" / "streammerge.json").read_text())
        return str(document["fingerprint"])

    first = record()
    written = (inputs.folder / "out" / "streammerge.yaml").read_text()
    assert "merge_method: largest.py\n" in written
    assert re.search(r"\n# largest.py: sha256 [0-9a-f]{64}\n", written)
    assert record() == first
    with open(inputs.folder / "largest.py", "a") as file:
        file.write("\n# changed\n")
    assert record() != first


def test_it_is_explained(inputs: SmallInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(inputs.folder)
    told = explain("largest.py")
    assert "Of each element, the largest of the pruned" in told
    assert "read 1 to 2 times" in told
    assert "merge_method: largest.py" in told


def test_a_package_offers_a_method(inputs: SmallInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(inputs.folder)
    point = EntryPoint("biggest", "largest:largest", own.GROUP)
    monkeypatch.setattr(own, "entry_points", lambda group, name: [point][name != "biggest" :])
    assert merged(inputs, "biggest").shape == (37, 24)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("gone.py", None, "is not there"),
        ("broken.py", "def (", "SyntaxError"),
        ("empty.py", "", "no function under @method"),
        ("raises.py", "1 / 0", "ZeroDivisionError"),
        (
            "bare.py",
            "from streammerge.methods import method\n@method()\ndef f(x): ...",
            "TypeError",
        ),
        ("two.py", BLOCKS[0] + BLOCKS[0].replace("largest", "other"), "which method of two.py"),
        ("two.py:third", BLOCKS[0], "two.py has no method third"),
        ("tis", None, "names a method that is not here"),
    ],
)
def test_what_gives_no_method_is_refused(
    name: str, text: str | None, says: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / name.partition(":")[0]).write_text(text)
    problems = Problems()
    recipe = f"base_model: b\nmerge_method: {name}\nmodels: [{{model: a}}]\n"
    methods = WithOwn(CATALOGUE, (tmp_path,))
    parse_recipe(recipe, "cfg.yaml", tmp_path, methods, problems)
    (problem,) = problems
    assert isinstance(problem, ConfigError)
    assert says in str(problem) and "cfg.yaml:2:15" in str(problem)
