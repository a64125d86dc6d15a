"""A stopped merge goes on with the same bytes whatever statistics its method has finished."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import streammerge as sm
from streammerge import grid
from tests.running import digest, make_inputs
from tests.test_resume import stop_after

# Random masks scaled by a norm; a chain of a selection and sums; two cuts; inner products of rows,
# and of factors, from which factors follow once in a tensor.
METHODS = ("dare_ties", "sce", "breadcrumbs", "karcher", "multislerp")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("method", METHODS)
def test_it_goes_on_with_the_same_bytes(
    method: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "TILE_ELEMENTS", 1000)
    monkeypatch.setattr("streammerge.sinks.shards.COMMIT_BYTES", 20_000)
    document = {
        "merge_method": method,
        "base_model": "./base",
        "adapters": [{"path": f"./lora-{i}", "weight": 0.4 + i, "density": 0.3} for i in (0, 1)],
        "parameters": {"select_topk": 0.4},
        "seed": 7,
    }
    recipe = inputs / f"{method}.yaml"
    recipe.write_text(json.dumps(document))
    expected = digest(sm.merge(recipe, out=tmp_path / "undisturbed").out)
    out = tmp_path / "out"
    for done in (23, 31):
        stop_after(recipe, out, done)
    report = sm.merge(recipe, out=out, threads=2)
    assert report.resumed_bytes > 0
    assert digest(out) == expected
