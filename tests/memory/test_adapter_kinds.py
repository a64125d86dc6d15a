"""The promise of bounded memory for what is more than LoRA on a linear layer.

On an embedding, factors are as long as it is; DoRA wants norms of whole rows or whole columns.
docs/performance.md has the embedding at the size of a 70B model's.
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
BUDGET = 384 * MIB
EMBEDDING = (40000, 1024)  # 82 MB; A of rank 256 is 41 MB in float32, and never held
LLAMA = (2048, 5632, 1, 512, 16000)

# label: model, method, adapters
MERGES = {
    "an embedding": ("embedding", "task_arithmetic", ["lora-0"]),
    "an embedding, columns of it": ("embedding", "task_arithmetic", ["lora-0", "lora-1", "dora"]),
    "a vote on an embedding": ("embedding", "ties", ["lora-0", "lora-1", "dora"]),
    "rows of linear layers": ("llama", "linear", ["dora-0", "dora-1"]),
    "a vote on linear layers": ("llama", "ties", ["dora-0", "dora-1", "lora"]),
}

pytestmark = pytest.mark.skipif(
    not os.access(memory.TIME, os.X_OK), reason=f"needs {memory.TIME} (Debian: apt install time)"
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("inputs")
    embedding, llama = root / "embedding", root / "llama"
    bench_inputs.make_embedding(embedding, EMBEDDING, tuned=False)
    for seed in range(2):
        folder = embedding / f"lora-{seed}"
        bench_inputs.make_embedding_adapter(folder, EMBEDDING, rank=256, seed=seed)
        bench_inputs.make_adapter(llama / f"dora-{seed}", LLAMA, seed=seed, dora=True)
    bench_inputs.make_embedding_adapter(embedding / "dora", EMBEDDING, rank=64, dora=True)
    bench_inputs.make_llama(llama / "base", LLAMA)
    bench_inputs.make_adapter(llama / "lora", LLAMA, seed=2)
    memory.warm_up(root)
    yield root
    shutil.rmtree(root)


@pytest.mark.parametrize("label", MERGES)
def test_measured_stays_under_projected_and_near_it(
    inputs: Path, tmp_path: Path, label: str
) -> None:
    model, method, adapters = MERGES[label]
    folder, density = inputs / model, ", density: 0.5" if method == "ties" else ""
    entries = "".join(f"  - {{path: {folder / name}, weight: 0.5{density}}}\n" for name in adapters)
    head = f"base_model: {folder / 'base'}\nmerge_method: {method}\nadapters:\n"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(head + entries)
    measured = memory.measure(recipe, tmp_path / "out", BUDGET, "--threads", "2")
    print(measured, f"{measured.ratio:.2f}")
    assert measured.verdict(BUDGET) == "ok", measured
