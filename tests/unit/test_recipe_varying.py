"""Gradients and filters: what a parameter is for which tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_recipe import METHODS

from streammerge.errors import Problems
from streammerge.planning.knobs import Layers
from streammerge.recipe import Recipe, at, fixed, parse_recipe, to_yaml, told

TIES = "base_model: b\nmerge_method: ties\n"


def parse(text: str) -> Recipe:
    problems = Problems()
    recipe = parse_recipe(text, "cfg.yaml", Path("/recipes"), METHODS, problems)
    problems.raise_any()
    assert recipe is not None
    return recipe


def density(value: str, common: str = "{}") -> Recipe:
    own = f"models: [{{model: a, parameters: {{density: {value}}}}}]"
    return parse(f"{TIES}{own}\nparameters: {common}")


def looked_up(recipe: Recipe, name: str, depth: float) -> object:
    return at(recipe.entries[0].knobs["density"], name, depth)


@pytest.mark.parametrize(
    ("depth", "expected"),
    [(0.0, 0.1), (0.125, 0.2), (0.25, 0.3), (0.5, 0.5), (0.75, 0.75), (1.0, 1.0)],
)
def test_a_gradient_is_linear_between_its_values(depth: float, expected: float) -> None:
    recipe = density("[0.1, 0.3, 0.5, 0.75, 1]")
    assert looked_up(recipe, "any", depth) == pytest.approx(expected, rel=1e-15)


def test_a_gradient_of_one_value_is_that_value() -> None:
    assert {looked_up(density("[0.4]"), "any", depth) for depth in (0.0, 0.3, 1.0)} == {0.4}


@pytest.mark.parametrize(
    ("value", "steps"),
    [
        ("{normalize: [true, false, true]}", {0.0: True, 0.49: True, 0.5: False, 1.0: True}),
        ("{rescale: [none, l1]}", {0.0: "none", 0.99: "none", 1.0: "l1"}),
        ("{rescale: [true, density]}", {0.0: "l1", 1.0: "density"}),
    ],
)
def test_booleans_and_names_change_in_steps(value: str, steps: dict[float, object]) -> None:
    recipe = parse(f"{TIES}models: [{{model: a}}]\nparameters: {value}")
    (knob,) = (key for key in ("normalize", "rescale") if key in value)
    assert {depth: at(recipe.shared[knob], "any", depth) for depth in steps} == steps


def test_the_first_filter_in_the_name_counts() -> None:
    recipe = density("[{filter: mlp, value: [0.2, 0.4]}, {filter: up, value: 0.9}, {value: 0.6}]")
    assert looked_up(recipe, "layers.0.mlp.up", 0.5) == pytest.approx(0.3)
    assert looked_up(recipe, "layers.0.up", 0.5) == 0.9
    assert looked_up(recipe, "norm", 0.5) == 0.6


@pytest.mark.parametrize("everywhere", ["{value: 0.6}", "{filter: '*', value: 0.6}"])
def test_what_follows_a_value_for_all_is_never_reached(everywhere: str) -> None:
    recipe = density(f"[{everywhere}, {{filter: mlp, value: 0.2}}]")
    assert looked_up(recipe, "mlp", 0) == 0.6
    assert "mlp" not in to_yaml(recipe)


def test_no_hit_falls_through_to_the_top_level_and_to_the_default() -> None:
    own, common = "[{filter: mlp, value: 0.2}]", "{density: [{filter: attn, value: 0.3}]}"
    recipe = density(own, common)
    found = {name: looked_up(recipe, name, 0) for name in ("mlp", "attn", "norm")}
    assert found == {"mlp": 0.2, "attn": 0.3, "norm": 1.0}
    assert looked_up(density(own, "{density: 0.7}"), "norm", 0) == 0.7
    assert looked_up(density("0.4", common), "attn", 0) == 0.4


def test_zero_is_in_reach_of_lists_alone() -> None:
    assert looked_up(density("[0, 1]"), "any", 0.0) == 0.0
    assert looked_up(density("[{filter: mlp, value: 0}]"), "mlp", 0.5) == 0.0


@pytest.mark.parametrize(
    "value", ["[0.5, 1]", "[0.5]", "[{filter: mlp, value: [0, 1]}, {filter: q, value: 0.25}]"]
)
def test_what_is_written_reads_back(value: str) -> None:
    recipe = density(value, "{normalize: [true, false], density: [{filter: norm, value: 0.5}]}")
    assert recipe.varies
    assert parse(to_yaml(recipe)) == recipe
    assert fixed(recipe.entries[0].knobs) == {"weight": 1.0}


def test_in_words() -> None:
    recipe = density("[{filter: mlp, value: [0.2, 0.4]}, {filter: up, value: 0.9}]")
    words = told(recipe.entries[0].knobs["density"])
    assert words == "(mlp 0.2, 0.4 over the layers; up 0.9; else 1)"
    assert told(density("[0.2, 1]").entries[0].knobs["density"]) == "0.2, 1 over the layers"


@pytest.mark.parametrize(
    ("names", "depths"),
    [
        (("layers.0.q", "layers.1.q", "layers.2.q", "norm"), (0.0, 0.5, 1.0, 0.0)),
        (("h.0.experts.5.up", "h.1.experts.7.up"), (0.0, 1.0)),
        (("layers.0.q", "embed"), (1.0, 0.0)),
        (("tower.0.q", "tower.1.q", "text.0.q", "text.1.q", "text.2.q"), (0, 1, 0, 0.5, 1)),
        (("mlp.0.weight", "mlp.2.weight"), (0.0, 0.0)),  # a sequence with an activation: no layers
        (("layers.²", "layers.-1"), (0.0, 0.0)),
    ],
)
def test_the_depth_of_a_tensor(names: tuple[str, ...], depths: tuple[float, ...]) -> None:
    layers = Layers(names)
    assert tuple(map(layers.depth, names)) == depths


SLICE = """\
merge_method: ties
base_model: b
slices:
  - sources:
      - {model: b, layer_range: [0, 4]}
      - {model: a, layer_range: [0, 4], parameters: {density: [{filter: q, value: 0.1}]}}
      - {model: c, layer_range: [0, 4]}
    parameters: {density: [{filter: k, value: 0.2}], normalize: false}
parameters: {density: 0.3, weight: 2, normalize: true}
"""


def test_a_slice_of_all_layers_is_its_models() -> None:
    """Source before slice before top level; the base must be listed, and is the base."""
    recipe = parse(SLICE)
    assert [entry.model.text for entry in recipe.entries] == ["a", "c"]
    assert [entry.layers for entry in recipe.entries] == [4, 4]
    of_names = {
        name: [at(entry.knobs["density"], name, 0) for entry in recipe.entries] for name in "qkv"
    }
    assert of_names == {"q": [0.1, 0.3], "k": [0.2, 0.2], "v": [0.3, 0.3]}
    assert recipe.shared["normalize"] is False
    assert [entry.knobs["weight"] for entry in recipe.entries] == [2.0, 2.0]
    assert recipe.warnings == ()
    assert parse(to_yaml(recipe)) == recipe
