"""The promise of bounded memory for adapters on an embedding, whose factors are as long as it is.

docs/performance.md has the same at the size of a 70B model.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import bench_inputs
import memory
import pytest

MIB = 1 << 20
SHAPE = (40000, 1024)  # 82 MB; A of rank 256 is 41 MB in float32, and never held
RECIPES = {
    "one LoRA": ("task_arithmetic", ["lora-0"]),
    "two LoRAs and a DoRA": ("task_arithmetic", ["lora-0", "lora-1", "dora"]),
    "a vote of both kinds": ("ties", ["lora-0", "lora-1", "dora"]),
}

pytestmark = pytest.mark.skipif(
    not os.access(memory.TIME, os.X_OK), reason=f"needs {memory.TIME} (Debian: apt install time)"
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("inputs")
    bench_inputs.make_embedding(folder, SHAPE, tuned=False)
    for seed in range(2):
        bench_inputs.make_embedding_adapter(folder / f"lora-{seed}", SHAPE, rank=256, seed=seed)
    bench_inputs.make_embedding_adapter(folder / "dora", SHAPE, rank=64, dora=True)
    memory.warm_up(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("label", RECIPES)
def test_factors_as_long_as_the_embedding_are_never_held(
    inputs: Path, tmp_path: Path, label: str
) -> None:
    method, adapters = RECIPES[label]
    entries = "".join(f"  - {{path: {inputs / name}, weight: 0.5}}\n" for name in adapters)
    density = "parameters: {density: 0.5}\n" if method == "ties" else ""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base_model: {inputs / 'base'}\nmerge_method: {method}\nadapters:\n{entries}{density}"
    )
    budget_bytes = 384 * MIB
    measured = memory.measure(recipe, tmp_path / "out", budget_bytes, "--threads", "2")
    print(measured)
    assert measured.verdict(budget_bytes) == "ok", measured
