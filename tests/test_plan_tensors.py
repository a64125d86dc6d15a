"""`plan --tensors` says of every tensor what happens to it, and its sums are the plan's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import streammerge as sm
from tests.running import TINY, make_inputs, run, tensors, write_recipe

RANK = 4
HIDDEN = TINY[0]
Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"

TIES = """\
base_model: ./base
merge_method: ties
adapters: [{path: ./lora-0, density: 0.5}]
models: [{model: ./tuned, parameters: {density: 0.3}}]
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("inputs"), TINY, rank=RANK, tuned=True)
    write_recipe(folder, "linear")
    (folder / "cast.yaml").write_text((folder / "linear.yaml").read_text() + "out_dtype: float32\n")
    write_recipe(folder, "ties", TIES)
    adapter = (folder / "linear.yaml").read_text() + "output: {kind: adapter}\n"
    write_recipe(folder, "adapter", adapter)
    return folder


def told(recipe: Path, **options: Any) -> dict[str, dict[str, Any]]:
    """Tensor -> what the plan says of it."""
    return {one.spec.name: one.as_dict() for one in sm.plan(recipe, **options).tensors()}


def test_a_linear_merge_copies_what_no_adapter_touches(inputs: Path) -> None:
    found = told(inputs / "linear.yaml")
    factors = 2 * 2 * RANK * HIDDEN * 4  # of two adapters A and B, float32
    base = 2 * HIDDEN * HIDDEN  # bfloat16
    assert found[Q] == {
        "name": Q,
        "shape": [HIDDEN, HIDDEN],
        "dtype": "BF16",
        "action": "merged",
        "models": ["lora-0", "lora-1"],
        "statistics": [],
        "reads": 1,
        "read_bytes": base + factors,
        "write_bytes": base,
        "spilled_bytes": 0,
    }
    norm = found[NORM]
    assert (norm["action"], norm["models"], norm["reads"]) == ("copied", [], 1)
    assert norm["read_bytes"] == norm["write_bytes"] == 2 * HIDDEN


def test_what_nothing_changes_is_cast_to_another_dtype(inputs: Path) -> None:
    found = told(inputs / "cast.yaml")
    assert (found[NORM]["action"], found[NORM]["dtype"]) == ("cast", "F32")
    assert found[NORM]["write_bytes"] == 2 * found[NORM]["read_bytes"] == 4 * HIDDEN
    assert found[Q]["action"] == "merged"


def test_a_statistic_is_another_read_and_what_is_spilled_is_said(inputs: Path) -> None:
    kept = told(inputs / "ties.yaml", spill="always", out=inputs / "out")
    assert kept[Q]["models"] == ["tuned", "lora-0"]
    assert kept[NORM]["models"] == ["tuned"]
    assert kept[Q]["statistics"] == [["cut"]] and kept[Q]["reads"] == 2
    assert kept[Q]["spilled_bytes"] == 2 * 4 * HIDDEN * HIDDEN  # float32 of both
    again = told(inputs / "ties.yaml", spill="never")
    assert not any(one["spilled_bytes"] for one in again.values())
    assert again[Q]["read_bytes"] > kept[Q]["read_bytes"]


@pytest.mark.parametrize("name", ["linear", "cast", "ties", "adapter"])
def test_the_tensors_add_up_to_the_plan_and_are_the_output(
    inputs: Path, tmp_path: Path, name: str
) -> None:
    recipe = inputs / f"{name}.yaml"
    plan = json.loads(run("plan", recipe, "--tensors", "--json").stdout)
    each = plan["each_tensor"]
    assert sum(one["read_bytes"] for one in each) == plan["read_bytes"]
    assert sum(one["write_bytes"] for one in each) == plan["write_bytes"]
    copied = [one for one in each if one["action"] == "copied"]
    assert len(copied) == plan["tensors"]["copied"]
    assert sum(one["read_bytes"] for one in copied) == plan["copied_bytes"]
    sm.merge(recipe, out=tmp_path / "out")
    stored = [(n, d, list(s)) for n, (d, s, _) in tensors(tmp_path / "out").items()]
    assert [(one["name"], one["dtype"], one["shape"]) for one in each] == stored


def test_a_person_gets_a_line_for_each_only_when_asked(inputs: Path) -> None:
    short = run("plan", inputs / "linear.yaml").stdout
    assert Q not in short
    long = run("plan", inputs / "linear.yaml", "--tensors").stdout
    lines = {line.split()[0]: line for line in long.splitlines() if line.startswith("model.")}
    assert len(lines) == 20
    assert "BF16  64 x 64   merged from lora-0, lora-1  read once: " in lines[Q]
    assert lines[NORM].endswith("read once: 128 B, 128 B written")
    assert len({line.index("read ") for line in lines.values()}) == 1  # in columns
    twice = run("plan", inputs / "ties.yaml", "--tensors").stdout
    assert "merged from tuned, lora-0  read twice for cut, then to merge: " in twice
    assert "each_tensor" not in json.loads(run("plan", inputs / "ties.yaml", "--json").stdout)
