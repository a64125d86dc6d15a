"""What holds for every method of the catalogue alike."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

import streammerge as sm
from streammerge import grid
from streammerge.errors import BadInput
from streammerge.methods import CATALOGUE
from tests.contracts.method_contract import MEMORY
from tests.contracts.small_inputs import Shape, SmallInputs, decode, encode, read_back
from tests.makers import write_model
from tests.oracles.dense import Exact

UP, DOWN, WIDE = "model.up.weight", "model.down.weight", "model.wide.weight"
SHAPES: Mapping[str, Shape] = {
    UP: (37, 24),
    DOWN: (24, 37),
    WIDE: (3, 300),
    "model.norm.weight": (70,),
}
PER_MODEL = {"weight": (0.5, 0.75, 0.3), "density": (0.5, 0.4, 0.7), "scale": (0.7,)}
SHARED = {"t": 0.4, "select_topk": 0.6, "rescale": "density"}
# Those that merge low-rank updates alone have no full models to be compared with.
ROWS = [name for name, spec in CATALOGUE.items() if spec.space != "cores"]
CHANCE = ("dare_linear", "dare_ties", "della_linear", "della")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "TILE_ELEMENTS", 256)
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda descriptor: None)


def adapters(folder: Path, count: int) -> SmallInputs:
    """Adapters on different tensors, over a base to which they add exactly in float32."""
    inputs = SmallInputs(folder, SHAPES, "F32")
    for name, tensor in inputs.base.items():
        inputs.base[name] = encode(np.rint(decode(tensor) * 2**12) / 2**12, "F32")
    write_model(folder / "base", inputs.base, 1, {"model_type": "llama"})
    for shard in (folder / "base").glob("model*-of-*"):
        shard.unlink()
    (folder / "base" / "model.safetensors.index.json").unlink()
    for names, rank in (([UP, DOWN], 3), ([DOWN, WIDE], 7), ([UP], 5))[:count]:
        inputs.add_adapter(names, rank)
    return inputs


def recipe(inputs: SmallInputs, method: str, seed: int = 0, **others: object) -> Path:
    spec = CATALOGUE[method]
    own = [
        {name: PER_MODEL[name][i] for name in spec.per_model if name in PER_MODEL}
        for i in range(len(inputs.entries))
    ]
    shared = {name: value for name, value in {**SHARED, **others}.items() if name in spec.shared}
    path = inputs.recipe(method, own, shared)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seed": seed}))
    return path


def merge(path: Path, out: Path) -> dict[str, Exact]:
    sm.merge(path, out=out, memory=MEMORY, threads=2)
    return {name: decode(tensor) for name, tensor in read_back(out).items()}


@pytest.mark.parametrize("method", ROWS)
def test_adapters_are_the_full_models_that_they_make(method: str, tmp_path: Path) -> None:
    """Tensors that an adapter leaves alone included: it takes part with zeros there."""
    inputs = adapters(tmp_path, min(3, CATALOGUE[method].models[1] or 3))
    path = recipe(inputs, method)
    found = merge(path, tmp_path / "from-adapters")
    document = json.loads(path.read_text())
    for number, (entry, model) in enumerate(zip(inputs.entries, document["models"], strict=True)):
        tensors = {name: encode(inputs.model(entry, name).value, "F32") for name in inputs.base}
        folder = write_model(tmp_path / f"full-{number}", tensors, 1, {"model_type": "llama"})
        model["model"] = str(folder)
    path.write_text(json.dumps(document))
    expected = merge(path, tmp_path / "from-models")
    assert any((expected[name] != inputs.origin(name)).any() for name in expected)
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("method", ROWS)
def test_a_model_that_is_the_base_changes_nothing(method: str, tmp_path: Path) -> None:
    """Task vectors of zeros throughout; nothing divides by them."""
    inputs = SmallInputs(tmp_path, SHAPES, "F32")
    for _ in range(min(3, CATALOGUE[method].models[1] or 3)):
        inputs.add_model(changed=())
    found = merge(recipe(inputs, method), tmp_path / "out")
    scale = PER_MODEL["scale"][0] if method == "passthrough" else 1.0
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor, scale * inputs.origin(name), rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("method", ROWS)
def test_a_model_with_a_nan_is_refused(method: str, tmp_path: Path) -> None:
    """Also where it would be pruned away, or fall below every threshold."""
    inputs = SmallInputs(tmp_path, SHAPES, "F32")
    for _ in range(min(3, CATALOGUE[method].models[1] or 3)):
        inputs.add_model()
    folder = Path(inputs.entries[-1].text)
    spoiled = dict(inputs.entries[-1].tensors)
    values = decode(spoiled[UP])
    values[7, 3] = np.nan
    spoiled[UP] = encode(values, "F32")
    for old in folder.iterdir():
        old.unlink()
    write_model(folder, spoiled, 1, {"model_type": "llama"})
    with pytest.raises(BadInput, match="NaN"):
        merge(recipe(inputs, method), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", CHANCE)
def test_any_grid_drops_the_same_elements(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(adapters(tmp_path, 3), method)
    found = merge(path, tmp_path / "small")
    for elements in (1, 1000, 1 << 19):
        monkeypatch.setattr(grid, "TILE_ELEMENTS", elements)
        again = merge(path, tmp_path / f"of-{elements}")
        for name, tensor in found.items():
            np.testing.assert_array_equal(again[name], tensor)


@pytest.mark.parametrize("method", CHANCE)
def test_the_seed_and_the_position_decide_what_is_dropped(method: str, tmp_path: Path) -> None:
    inputs = adapters(tmp_path, 3)
    first = merge(recipe(inputs, method), tmp_path / "first")
    again = merge(recipe(inputs, method), tmp_path / "again")
    other = merge(recipe(inputs, method, seed=1), tmp_path / "other")
    inputs.entries.reverse()
    turned = merge(recipe(inputs, method), tmp_path / "turned")
    for name in (UP, DOWN):
        np.testing.assert_array_equal(first[name], again[name])
        assert (first[name] != other[name]).mean() > 0.1
        assert (first[name] != turned[name]).mean() > 0.1
    written = [
        json.loads((tmp_path / run / "streammerge.json").read_text())["fingerprint"]
        for run in ("first", "again", "other")
    ]
    assert written[0] == written[1] != written[2]


def test_ties_as_the_paper_has_it(tmp_path: Path) -> None:
    """Unweighted vote, mean by count: as PEFT's `ties` on dense task vectors."""
    inputs = adapters(tmp_path, 3)
    path = recipe(inputs, "ties", vote="unweighted", divide="count", rescale="none")
    merged = merge(path, tmp_path / "out")
    kept, weights = [], PER_MODEL["weight"]
    for entry, density in zip(inputs.entries, PER_MODEL["density"], strict=True):
        delta = inputs.delta(entry, DOWN).value
        count = max(1, int(density * delta.size)) if delta.any() else 0
        least = np.sort(np.abs(delta).reshape(-1))[::-1][count - 1] if count else 1.0
        kept.append(np.where(np.abs(delta) >= least, delta, 0) if count else delta)
    stack = np.array(kept)
    sign = np.where(stack.sum(axis=0) >= 0, 1, -1)
    agrees = np.sign(stack) == sign
    weighted = stack * np.array(weights)[:, None, None]
    mean = (weighted * agrees).sum(axis=0) / np.maximum(agrees.sum(axis=0), 1)
    expected = inputs.origin(DOWN) + mean
    off = np.abs(merged[DOWN] - expected) > 1e-5
    assert off.mean() < 0.01  # equal magnitudes at a threshold: here, all of them stay
