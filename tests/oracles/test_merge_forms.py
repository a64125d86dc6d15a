"""Merges in other dtypes, of sharded bases, and out of the hub's cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exact_merge import assert_close, read_tensors, weighted_deltas
from merge_cases import assert_merged, entries_of, merge, model_of, trio_of, weigh
from peft_models import Shelf, load

from tests.makers import write_model


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("peft"))


@pytest.mark.parametrize("out", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_output_takes_the_dtype_asked_for(
    shelf: Shelf, tmp_path: Path, dtype: str, out: str
) -> None:
    """Rounded once, at the end, the tensors that no adapter touches too."""
    import torch

    model, trio = model_of(shelf, "llama", dtype), trio_of(shelf, "llama", dtype)
    entries = weigh(entries_of(model, trio), (0.5, 0.5, 0.5))
    adapters = [{"path": str(path), "weight": 0.5} for path in trio.values()]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(model), "adapters": adapters}
    merged = merge(tmp_path, **recipe, out_dtype=out)
    base = entries[0].tensors
    touched = {n for entry in entries for n in entry.updates}
    label = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}[out]
    assert list(merged) == list(base)
    for name, stored in merged.items():
        assert (stored.dtype, stored.shape) == (label, base[name].shape)
        if name in touched:
            assert_close(name, stored, weighted_deltas(name, base, entries))
        else:
            cast = torch.from_numpy(base[name].values()).to(getattr(torch, out))
            assert np.array_equal(stored.values(), cast.double().numpy()), name
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["dtype"] == out


@pytest.mark.parametrize("method", ["linear", "passthrough"])
def test_a_cast_keeps_the_sign_of_zero(tmp_path: Path, method: str) -> None:
    values = np.array([[0.0, -0.0, 1.0, -1.0]], np.float32)
    base = write_model(tmp_path / "base", {"w": ("F32", (1, 4), values.tobytes())}, config={})
    models = [{"model": str(base)}]
    stored = merge(tmp_path, merge_method=method, models=models, out_dtype="bfloat16")["w"]
    assert stored.data.hex(" ", 2) == "0000 0080 803f 80bf"


def test_float32_survives_a_bfloat16_base(shelf: Shelf, tmp_path: Path) -> None:
    """The delta is never rounded to the base's dtype: a float32 output keeps its low bits."""
    model = model_of(shelf, "llama", "bfloat16")
    adapter = trio_of(shelf, "llama", "bfloat16")["math"]
    recipe = {"base_model": str(model), "adapters": [{"path": str(adapter)}]}
    merged = merge(tmp_path, merge_method="task_arithmetic", **recipe, out_dtype="float32")
    (entry,) = entries_of(model, {"math": adapter})
    for name in entry.updates:
        low_bits = np.frombuffer(merged[name].data, "<u4") & 0xFFFF
        assert np.count_nonzero(low_bits) > 0.9 * low_bits.size, name


def sharded(model: Path, folder: Path) -> Path:
    """The same model in several files, as transformers cuts it."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = json.loads((model / "config.json").read_text())["dtype"]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    loaded.save_pretrained(folder, max_shard_size="20KB")
    return folder


def test_a_sharded_base_gives_the_same_tensors_in_its_own_shards(
    shelf: Shelf, tmp_path: Path
) -> None:
    model, trio = model_of(shelf, "llama", "bfloat16"), trio_of(shelf, "llama", "bfloat16")
    in_shards = shelf.get("llama-sharded", lambda folder: sharded(model, folder))
    adapters = [{"path": str(path), "weight": 0.5, "density": 0.5} for path in trio.values()]
    recipe: dict[str, Any] = {"merge_method": "ties", "adapters": adapters}
    (tmp_path / "one").mkdir()
    whole = merge(tmp_path / "one", **recipe, base_model=str(model))
    merged = merge(tmp_path, **recipe, base_model=str(in_shards))
    assert merged == whole
    index = "model.safetensors.index.json"
    before = json.loads((in_shards / index).read_text())
    after = json.loads((tmp_path / "merged" / index).read_text())
    assert len(set(before["weight_map"].values())) > 2
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"]["total_size"] == sum(len(stored.data) for stored in merged.values())
    loaded = load(tmp_path / "merged").state_dict()
    for name, stored in merged.items():
        assert np.array_equal(loaded[name].double().numpy(), stored.values()), name


def as_cached(folder: Path, cache: Path, repository: str) -> Path:
    """A folder as the hub's cache keeps it: blobs by hash, and a snapshot of links to them."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = cache / f"models--{repository.replace('/', '--')}"
    snapshot = home / "snapshots" / commit
    for made in (home / "blobs", home / "refs", snapshot):
        made.mkdir(parents=True)
    (home / "refs/main").write_text(commit)
    for number, path in enumerate(sorted(folder.iterdir())):
        blob = home / "blobs" / f"{number:040x}"
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


@pytest.mark.parametrize("named", ["by id", "by revision", "by path"])
def test_the_hub_cache_is_read_through_its_links(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    model, trio = model_of(shelf, "llama", "bfloat16"), trio_of(shelf, "llama", "bfloat16")
    in_shards = shelf.get("llama-sharded", lambda folder: sharded(model, folder))
    base = as_cached(in_shards, tmp_path / "hub", "tiny/llama")
    adapter = as_cached(trio["math"], tmp_path / "hub", "tiny/llama-math")
    texts = {
        "by id": ("tiny/llama", "tiny/llama-math"),
        "by revision": ("tiny/llama@main", f"tiny/llama-math@{adapter.name}"),
        "by path": (str(base), str(adapter)),
    }[named]
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    models = [{"model": "+".join(texts)}]
    merged = merge(tmp_path, merge_method="passthrough", models=models)
    (entry,) = entries_of(model, {"math": trio["math"]})
    answers = {n: weighted_deltas(n, entry.tensors, [entry]) for n in entry.updates}
    base_tensors = read_tensors(in_shards)
    assert_merged(merged, base_tensors, answers)
    assert not any(path.is_symlink() for path in (tmp_path / "merged").iterdir())
