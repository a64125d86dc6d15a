"""Gradients and filters: each tensor is what a merge with its own numbers gives.

Which numbers these are is computed here from the rule; merges with plain numbers are held to
float64 elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import streammerge as sm
from streammerge.errors import ConfigError
from tests.makers import Tensor, write_model
from tests.oracles.exact_merge import Stored, read_tensors

LAYERS = 5
KINDS = ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")
BEFORE, AFTER = ("model.embed_tokens.weight",), ("model.norm.weight", "lm_head.weight")
NAMES = (
    *BEFORE,
    *(f"model.layers.{layer}.{kind}.weight" for layer in range(LAYERS) for kind in KINDS),
    *AFTER,
)


def depth_of(name: str) -> float:
    parts = name.split(".")
    return int(parts[2]) / (LAYERS - 1) if parts[1] == "layers" else 0.0


def between(values: list[float], depth: float) -> float:
    return float(np.interp(depth * (len(values) - 1), range(len(values)), values))


def stepped(values: list[Any], depth: float) -> Any:
    return values[int(depth * (len(values) - 1))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, random = tmp_path_factory.mktemp("models"), np.random.default_rng(3)
    values = {
        name: random.normal(size=(24,) if "norm" in name else (40, 24)).astype(np.float32)
        for name in NAMES
    }

    def write(model: str, moved: Mapping[str, Any]) -> None:
        stored: dict[str, Tensor] = {
            name: ("F32", one.shape, one.astype(np.float32).tobytes())
            for name, one in moved.items()
        }
        write_model(root / model, stored, config={"model_type": "llama"})

    write("base", values)
    for model in ("one", "two"):
        write(model, {n: v + 0.1 * random.normal(size=v.shape) for n, v in values.items()})
    return root


def merge(
    folder: Path, out: Path, method: str, models: Mapping[str, Any], shared: Mapping[str, Any]
) -> dict[str, Stored]:
    recipe = {
        "merge_method": method,
        "base_model": str(folder / "base"),
        "models": [
            {"model": str(folder / name), "parameters": own} for name, own in models.items()
        ],
        "parameters": dict(shared),
    }
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    sm.merge(path, out=out, memory="8GiB")
    return read_tensors(out)


def q(value: Any, rest: Any) -> list[dict[str, Any]]:
    return [{"filter": "q_proj", "value": value}, {"value": rest}]


def own_ties(name: str, depth: float) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    weight = between([1, 2], depth) if "q_proj" in name else 0.5
    one = {"density": between([0.2, 0.9, 0.4], depth), "weight": weight}
    two = {"density": 0.7 if "layernorm" in name else 0.3, "weight": 1}
    return one, two, {"normalize": stepped([True, False, True], depth)}


def own_slerp(name: str, depth: float) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    if "self_attn" in name:
        t = between([0, 0.5, 0.3, 0.7, 1], depth)
    else:
        t = between([1, 0.5, 0.7, 0.3, 0], depth) if "mlp" in name else 0.5
    return {}, {}, {"t": t}


def own_dare(name: str, depth: float) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    return (
        {"density": between([0.5, 1], depth)},
        {"density": 0.25},
        {"lambda": between([2, 1, 3], depth), "rescale": stepped(["l1", "none"], depth)},
    )


def own_della(name: str, depth: float) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    both = {"density": between([0.4, 0.6], depth), "epsilon": 0.3 if "q_proj" in name else 0.1}
    return both, both, {}


CASES: dict[str, tuple[str, Any, Any, Any, Any]] = {
    "ties": (
        "ties",
        {"density": [0.2, 0.9, 0.4], "weight": q([1, 2], 0.5)},
        {"density": [{"filter": "layernorm", "value": 0.7}]},
        {"normalize": [True, False, True], "density": 0.3},
        own_ties,
    ),
    "slerp": (
        "slerp",
        {},
        None,
        {
            "t": [
                {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
                {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
                {"value": 0.5},
            ]
        },
        own_slerp,
    ),
    "dare_ties": (
        "dare_ties",
        {"density": [0.5, 1]},
        {"density": [{"filter": "*", "value": 0.25}, {"filter": "q_proj", "value": 1}]},
        {"lambda": [2, 1, 3], "rescale": [True, False]},
        own_dare,
    ),
    "della": (
        "della",
        {},
        {},
        {"density": [0.4, 0.6], "epsilon": q(0.3, 0.1)},
        own_della,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_tensor_is_merged_with_its_own_numbers(
    folder: Path, tmp_path: Path, case: str
) -> None:
    method, one, two, shared, own = CASES[case]
    models = {"one": one} if two is None else {"one": one, "two": two}
    merged = merge(folder, tmp_path / "varying", method, models, shared)

    @cache
    def plainly(name: str) -> dict[str, Stored]:
        first, second, common = own(name, depth_of(name))
        plain = {"one": first} if two is None else {"one": first, "two": second}
        return merge(folder, tmp_path / name, method, plain, common)

    assert set(merged) == set(NAMES)
    for name in NAMES:
        assert merged[name].data == plainly(name)[name].data, name
    assert len({merged[name].data for name in NAMES}) == len(NAMES)
    first, last = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, LAYERS - 1))
    assert plainly(first)[last].data != merged[last].data, "the numbers make no difference"


def test_a_density_of_zero_is_a_task_vector_of_zero(folder: Path, tmp_path: Path) -> None:
    """It is nothing in the sum, and its weight still counts in the divisor."""
    models = {"one": {"density": [0, 1], "weight": 3}, "two": {"weight": 1}}
    shared = {"normalize": True}
    merged = merge(folder, tmp_path / "out", "dare_linear", models, shared)
    base, one, two = (read_tensors(folder / name) for name in ("base", "one", "two"))
    for name, stored in merged.items():
        depth, start = depth_of(name), base[name].values()
        deltas = [model[name].values() - start for model in (one, two)]
        if depth == 0:
            expected = start + deltas[1] / 4
        elif depth == 1:
            expected = start + (3 * deltas[0] + deltas[1]) / 4
        else:
            continue  # a random mask
        assert np.abs(stored.values() - expected).max() <= 4 * 2.0**-24 * np.abs(start).max()


def test_nothing_is_left_where_all_densities_are_zero(folder: Path, tmp_path: Path) -> None:
    models = {"one": {}, "two": {}}
    merged = merge(folder, tmp_path / "out", "ties", models, {"density": q(0, 1)})
    base = read_tensors(folder / "base")
    for name, stored in merged.items():
        assert (stored.data == base[name].data) == ("q_proj" in name), name


def test_weights_that_cancel_somewhere_are_refused_with_the_tensor(
    folder: Path, tmp_path: Path
) -> None:
    models = {"one": {"weight": [1, 0, 1]}, "two": {"weight": q(0, 1)}}
    with pytest.raises(ConfigError) as caught:
        merge(folder, tmp_path / "out", "linear", models, {})
    assert "in model.layers.2.self_attn.q_proj.weight, the weights sum to zero" in str(caught.value)
    assert "normalize: false" in str(caught.value.remedy)
    assert merge(folder, tmp_path / "other", "linear", models, {"normalize": False})


def test_what_does_not_go_together_somewhere_is_refused_with_the_tensor(
    folder: Path, tmp_path: Path
) -> None:
    shared = {"density": [0.5, 0.9], "epsilon": 0.3}
    with pytest.raises(ConfigError) as caught:
        merge(folder, tmp_path / "out", "della", {"one": {}}, shared)
    assert str(caught.value.what).startswith("in model.layers.")


def test_a_filter_that_fits_nothing_is_warned_of(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "ties.yaml"
    own = {"weight": [{"filter": "self_atn", "value": 2}, {"filter": "mlp", "value": 1}]}
    models = [{"model": str(folder / "one"), "parameters": own}]
    recipe = {"merge_method": "ties", "base_model": str(folder / "base"), "models": models}
    path.write_text(yaml.safe_dump(recipe))
    plan = sm.plan(path, memory="8GiB")
    assert plan.warnings == ("the filter 'self_atn' has no effect: it is in no tensor's name",)


def test_a_gradient_over_no_layers_is_warned_of(tmp_path: Path) -> None:
    for name in ("base", "one"):
        stored: dict[str, Tensor] = {"w": ("F32", (2, 2), np.ones(4, np.float32).tobytes())}
        write_model(tmp_path / name, stored, config={})
    path = tmp_path / "linear.yaml"
    models = [{"model": "./one", "parameters": {"weight": [1, 2]}}]
    path.write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    (warning,) = sm.plan(path, memory="8GiB").warnings
    assert "no layers are told" in warning


def slice_of(folder: Path, layers: int, **parameters: Any) -> dict[str, Any]:
    names = ("base", "one")
    sources = [{"model": str(folder / name), "layer_range": [0, layers]} for name in names]
    return {
        "merge_method": "slerp",
        "base_model": str(folder / "base"),
        "slices": [{"sources": sources}],
        "parameters": parameters,
    }


def test_a_slice_of_all_layers_merges_whole_models(folder: Path, tmp_path: Path) -> None:
    """As mergekit's own example of slerp has it."""
    _, one, _, shared, _ = CASES["slerp"]
    path = tmp_path / "slices.yaml"
    path.write_text(yaml.safe_dump(slice_of(folder, LAYERS, **shared)))
    sm.merge(path, out=tmp_path / "slices", memory="8GiB")
    assert read_tensors(tmp_path / "slices") == merge(
        folder, tmp_path / "models", "slerp", {"one": one}, shared
    )


@pytest.mark.parametrize("layers", [LAYERS - 1, LAYERS + 1])
def test_a_slice_of_other_layers_is_refused(folder: Path, tmp_path: Path, layers: int) -> None:
    path = tmp_path / "slices.yaml"
    path.write_text(yaml.safe_dump(slice_of(folder, layers, t=0.5)))
    with pytest.raises(ConfigError) as caught:
        sm.plan(path, memory="8GiB")
    assert f"the slice takes {layers} layers of one" in str(caught.value)
    assert caught.value.remedy == f"write layer_range: [0, {LAYERS}]"


def test_the_plan_tells_how_parameters_vary(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "ties.yaml"
    own = {"density": [0.2, 0.9], "weight": q(2, 1)}
    models = [{"model": str(folder / "one"), "parameters": own}]
    recipe = {"merge_method": "ties", "base_model": str(folder / "base"), "models": models}
    path.write_text(yaml.safe_dump(recipe))
    plan = sm.plan(path, memory="8GiB")
    (told,) = plan.as_dict()["models"]
    assert told["density"] == [0.2, 0.9]
    assert told["weight"] == q(2, 1)
