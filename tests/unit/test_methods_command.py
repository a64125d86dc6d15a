"""The catalogue that `streammerge methods` shows, from the signatures."""

from __future__ import annotations

from pathlib import Path

import pytest

from streammerge.commands.methods import catalogue, explain, overview
from streammerge.errors import Problems
from streammerge.methods import CATALOGUE
from streammerge.recipe import parse_recipe

# Reads of a tensor at least and at most, as the design promises them.
READS = {
    **dict.fromkeys(["linear", "task_arithmetic", "passthrough", "nearswap", "ram"], (1, 1)),
    **dict.fromkeys(["tsv", "iso_c"], (1, 1)),
    **dict.fromkeys(["dare_linear", "dare_ties", "della_linear", "della"], (1, 2)),
    **dict.fromkeys(["ties", "magnitude_prune", "breadcrumbs", "breadcrumbs_ties"], (1, 3)),
    **dict.fromkeys(["slerp", "nuslerp", "multislerp", "karcher", "model_stock"], (2, 2)),
    **dict.fromkeys(["arcee_fusion", "ramplus_tl"], (2, 2)),
    "sce": (2, 3),
}


def test_every_method_reads_as_often_as_promised() -> None:
    found = {one["name"]: tuple(one["reads"].values()) for one in catalogue()}
    assert found == READS


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_example_is_a_recipe_of_the_method(name: str) -> None:
    _, example = explain(name).split("\nexample\n")
    text = "\n".join(line.removeprefix("    ") for line in example.splitlines())
    problems = Problems()
    recipe = parse_recipe(text, "cfg.yaml", Path(), CATALOGUE, problems)
    problems.raise_any()
    assert recipe is not None and recipe.method.name == name
    assert recipe.warnings == ()


@pytest.mark.parametrize("name", CATALOGUE)
def test_it_explains_every_parameter(name: str) -> None:
    told, spec = explain(name), CATALOGUE[name]
    for knob, declared in {**spec.per_model, **spec.shared}.items():
        assert f"\n    {knob} " in told
        assert declared.about and declared.about.split()[0] in told
    assert "tiles a thread" in told
    assert max(map(len, told.splitlines())) <= 110


def test_the_list_names_every_method_once() -> None:
    lines = overview().splitlines()
    assert [line.split()[0] for line in lines if line and line[0].isalpha()] == list(CATALOGUE)
