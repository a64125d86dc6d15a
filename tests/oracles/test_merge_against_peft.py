"""Whole merges of adapters that PEFT made, tensor by tensor within the bound of a float32 merge.

`|ours - exact| <= u |exact| + (r + 2) 2^-24 (|W| + s |B| |A|)`: one rounding when a row is written,
and float32 arithmetic before it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from exact_merge import (
    Answer,
    Entry,
    Stored,
    assert_close,
    read_tensors,
    ties,
    updates_by_peft,
    weighted_deltas,
    weighted_mean,
)
from peft_models import Shelf, load, make_gpt2, make_llama, make_qwen2, merged_by_peft

import streammerge as sm

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONV1D = ["c_attn", "c_proj", "c_fc"]
MAKERS = {"llama": make_llama, "qwen2": make_qwen2, "gpt2": make_gpt2}
MEMORY = "8GiB"  # a bound: what is free on the machine is not what is tested
MOST_UNCLEAR = 1e-4  # of a model's elements may stand on the edge of a threshold or a vote

# label: model, its dtype, the adapter's dtype, LoraConfig
ADAPTERS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "plain": ("llama", "float32", "float32", {"target_modules": LINEARS}),
    "plain-bfloat16": ("llama", "bfloat16", "bfloat16", {"target_modules": LINEARS}),
    "plain-float16": ("llama", "float16", "float16", {"target_modules": LINEARS}),
    "float32-on-bfloat16": ("qwen2", "bfloat16", "float32", {"target_modules": LINEARS}),
    "rank-1": ("qwen2", "float32", "float32", {"target_modules": LINEARS, "r": 1}),
    "rank-over-width": ("qwen2", "float32", "float32", {"target_modules": ["q_proj"], "r": 40}),
    "rslora": (
        "llama",
        "float32",
        "float32",
        {"target_modules": LINEARS, "use_rslora": True, "r": 5, "lora_alpha": 3},
    ),
    "rslora-bfloat16": (
        "qwen2",
        "bfloat16",
        "bfloat16",
        {"target_modules": ["v_proj", "down_proj"], "use_rslora": True, "lora_alpha": 24},
    ),
    "patterns": (
        "llama",
        "float32",
        "float32",
        {
            "target_modules": LINEARS,
            "r": 4,
            "lora_alpha": 6,
            "rank_pattern": {"layers.1.self_attn.q_proj": 3, "q_proj": 2, "^model.*down_proj": 7},
            "alpha_pattern": {r"layers\.0\..*": 5, "k_proj": 1},
        },
    ),
    "rslora-patterns": (
        "qwen2",
        "bfloat16",
        "float32",
        {
            "target_modules": ["q_proj", "up_proj"],
            "use_rslora": True,
            "rank_pattern": {"up_proj": 3},
            "alpha_pattern": {"up_proj": 11},
        },
    ),
    "head": ("llama", "float32", "float32", {"target_modules": ["q_proj", "lm_head"]}),
    "conv1d": ("gpt2", "float32", "float32", {"target_modules": CONV1D, "fan_in_fan_out": True}),
    "conv1d-rslora": (
        "gpt2",
        "bfloat16",
        "bfloat16",
        {"target_modules": CONV1D, "use_rslora": True, "rank_pattern": {"c_fc": 3}},
    ),
    # Nothing but the model's type says that these square weights lie transposed.
    "conv1d-square": ("gpt2", "float32", "float32", {"target_modules": ["attn.c_proj"]}),
    "conv1d-square-bfloat16": ("gpt2", "bfloat16", "float32", {"target_modules": ["attn.c_proj"]}),
}

# Adapters that touch different tensors, with different ranks and scales; `{kind}` has its modules.
LLAMA_TRIO: dict[str, dict[str, Any]] = {
    "math": {"target_modules": LINEARS},
    "code": {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 3, "lora_alpha": 9},
    "chat": {"target_modules": ["v_proj", "o_proj"], "use_rslora": True, "lora_alpha": 4},
}
GPT2_TRIO: dict[str, dict[str, Any]] = {
    "math": {"target_modules": CONV1D},
    "code": {"target_modules": ["attn.c_proj", "c_fc"], "r": 3, "lora_alpha": 9},
    "chat": {"target_modules": ["attn.c_proj"], "use_rslora": True, "lora_alpha": 4},
}
TRIOS = {"llama": LLAMA_TRIO, "qwen2": LLAMA_TRIO, "gpt2": GPT2_TRIO}
GROUPS = [("llama", "float32"), ("llama", "bfloat16"), ("qwen2", "bfloat16"), ("gpt2", "float32")]

Weights = tuple[float, float, float]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("peft"))


def model_of(shelf: Shelf, kind: str, dtype: str) -> Path:
    return shelf.get(f"{kind}-{dtype}", MAKERS[kind], dtype)


def finetune_of(shelf: Shelf, kind: str, dtype: str, seed: int = 5) -> Path:
    """A model of the same names and shapes whose every weight lies near the other's."""
    base = model_of(shelf, kind, dtype)

    def make(folder: Path) -> Path:
        import torch

        torch.manual_seed(seed)
        model = load(base)
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter) * 0.01
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        return folder

    return shelf.get(f"{kind}-{dtype}-tuned-{seed}", make)


def trio_of(shelf: Shelf, kind: str, dtype: str) -> dict[str, Path]:
    """Three adapters of a model, by name."""
    model = model_of(shelf, kind, dtype)
    return {
        name: shelf.adapter(f"{kind}-{dtype}-{name}", model, seed, dtype=dtype, **options)
        for seed, (name, options) in enumerate(TRIOS[kind].items())
    }


def entries_of(model: Path, adapters: Mapping[str, Path]) -> list[Entry]:
    """What the adapters are to the oracle, with weight 1."""
    tensors = read_tensors(model)
    return [Entry(tensors, updates_by_peft(model, path)) for path in adapters.values()]


def weigh(entries: list[Entry], weights: Weights) -> list[Entry]:
    return [replace(e, weight=w) for e, w in zip(entries, weights, strict=True)]


def merge(folder: Path, **recipe: Any) -> dict[str, Stored]:
    """The tensors of the merged model, which lies in `folder/merged`."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    sm.merge(path, out=folder / "merged", memory=MEMORY)
    return read_tensors(folder / "merged")


def assert_merged(
    merged: Mapping[str, Stored], base: Mapping[str, Stored], answers: Mapping[str, Answer]
) -> None:
    """Tensors with an answer are close to it and changed; all others are the base's bytes."""
    assert list(merged) == list(base)
    assert answers
    for name, stored in base.items():
        ours = merged[name]
        assert (ours.dtype, ours.shape) == (stored.dtype, stored.shape)
        if name in answers:
            assert_close(name, ours, answers[name])
            assert ours.data != stored.data, f"{name} did not change"
        else:
            assert ours.data == stored.data, f"{name} is not the base's"
    unclear = [answer.unclear for answer in answers.values() if answer.unclear is not None]
    elements = sum(answer.exact.size for answer in answers.values())
    # Models as small as these may have one cut between two near neighbours more than that.
    assert sum(mask.sum() for mask in unclear) <= MOST_UNCLEAR * elements + 2


# -------------------------------------------------------------------------------- one adapter


@pytest.mark.parametrize("label", ADAPTERS)
def test_one_adapter_is_baked_into_its_base(shelf: Shelf, tmp_path: Path, label: str) -> None:
    kind, dtype, adapter_dtype, options = ADAPTERS[label]
    model = model_of(shelf, kind, dtype)
    adapter = shelf.adapter(label, model, seed=7, dtype=adapter_dtype, **options)
    entry = Entry(read_tensors(model), updates_by_peft(model, adapter))
    answers = {n: weighted_deltas(n, entry.tensors, [entry]) for n in entry.updates}

    merged = merge(tmp_path, merge_method="passthrough", models=[{"model": f"{model}+{adapter}"}])

    assert_merged(merged, entry.tensors, answers)
    by_peft = merged_by_peft(model, adapter)  # in float32, whatever the base is stored as
    for name, answer in answers.items():
        assert_close(name, Stored("F32", answer.exact.shape, by_peft[name].tobytes()), answer)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_every_method_bakes_a_single_adapter_alike(
    shelf: Shelf, tmp_path: Path, method: str
) -> None:
    model = model_of(shelf, "llama", "bfloat16")
    adapter = trio_of(shelf, "llama", "bfloat16")["math"]
    (entry,) = entries_of(model, {"math": adapter})
    answers = {n: weighted_deltas(n, entry.tensors, [entry]) for n in entry.updates}
    adapters = [{"path": str(adapter)}]
    merged = merge(tmp_path, merge_method=method, base_model=str(model), adapters=adapters)
    assert_merged(merged, entry.tensors, answers)


def test_the_report_counts_every_tensor_of_every_adapter(shelf: Shelf, tmp_path: Path) -> None:
    model = model_of(shelf, "llama", "float32")
    trio = trio_of(shelf, "llama", "float32")
    adapters = [{"path": str(path), "name": name} for name, path in trio.items()]
    recipe = {"merge_method": "ties", "base_model": str(model), "adapters": adapters}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    report = sm.merge(tmp_path / "recipe.yaml", out=tmp_path / "merged", memory=MEMORY)
    told = [(change.name, change.applied, change.total) for change in report.changes]
    assert told == [("math", 14, 14), ("code", 6, 6), ("chat", 4, 4)]
    for change, entry in zip(report.changes, entries_of(model, trio), strict=True):
        norms = [
            np.linalg.norm(update.delta) / np.linalg.norm(entry.tensors[name].values())
            for name, update in entry.updates.items()
        ]
        assert change.relative == pytest.approx(np.mean(norms), rel=1e-5)


# ---------------------------------------------------------------------------- several adapters


@pytest.mark.parametrize("weights", [(0.7, -0.3, 0.25), (0.0, 1.5, -2.0), (1.0, 1.0, 0.0)])
@pytest.mark.parametrize(("kind", "dtype"), GROUPS)
def test_weighted_adapters_add_up(
    shelf: Shelf, tmp_path: Path, kind: str, dtype: str, weights: Weights
) -> None:
    model, trio = model_of(shelf, kind, dtype), trio_of(shelf, kind, dtype)
    entries = weigh(entries_of(model, trio), weights)
    base = entries[0].tensors
    named = {n for entry in entries for n in entry.updates if entry.weight}
    answers = {n: weighted_deltas(n, base, entries) for n in named}
    adapters = [{"path": str(p), "weight": w} for p, w in zip(trio.values(), weights, strict=True)]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(model), "adapters": adapters}
    assert_merged(merge(tmp_path, **recipe), base, answers)


def test_lambda_scales_the_sum(shelf: Shelf, tmp_path: Path) -> None:
    model, trio = model_of(shelf, "llama", "float32"), trio_of(shelf, "llama", "float32")
    entries = weigh(entries_of(model, trio), (-0.4 * 0.7, 0.4 * 0.3, 0.4 * 2))
    base = entries[0].tensors
    answers = {n: weighted_deltas(n, base, entries) for e in entries for n in e.updates}
    adapters = [
        {"path": str(path), "weight": weight}
        for path, weight in zip(trio.values(), (-0.7, 0.3, 2.0), strict=True)
    ]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(model), "adapters": adapters}
    assert_merged(merge(tmp_path, **recipe, parameters={"lambda": 0.4}), base, answers)


@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (3.0, 1.0, 0.5), (1.0, -0.25, 0.0)])
@pytest.mark.parametrize(("kind", "dtype"), GROUPS)
def test_linear_is_the_mean_by_all_weights(
    shelf: Shelf, tmp_path: Path, kind: str, dtype: str, weights: Weights
) -> None:
    """An adapter that leaves a tensor alone counts there too: as the base."""
    model, trio = model_of(shelf, kind, dtype), trio_of(shelf, kind, dtype)
    entries = weigh(entries_of(model, trio), weights)
    named = {n for entry in entries for n in entry.updates if entry.weight}
    answers = {n: weighted_mean(n, entries) for n in named}
    adapters = [{"path": str(p), "weight": w} for p, w in zip(trio.values(), weights, strict=True)]
    recipe = {"merge_method": "linear", "base_model": str(model), "adapters": adapters}
    assert_merged(merge(tmp_path, **recipe), entries[0].tensors, answers)


@pytest.mark.parametrize(
    ("weights", "densities", "shared"),
    [
        ((1.0, 1.0, 1.0), (0.5, 0.5, 0.5), {}),
        ((0.7, 0.2, 0.4), (0.2, 1.0, 0.03), {}),
        ((0.7, -0.3, 0.0), (0.6, 0.4, 0.9), {"lambda": 0.8}),
        ((0.6, 0.9, -1.1), (0.0001, 0.35, 0.7), {"normalize": False, "lambda": 1.5}),
    ],
)
@pytest.mark.parametrize(("kind", "dtype"), GROUPS)
def test_ties_trims_votes_and_averages(
    shelf: Shelf,
    tmp_path: Path,
    kind: str,
    dtype: str,
    weights: Weights,
    densities: Weights,
    shared: dict[str, Any],
) -> None:
    model, trio = model_of(shelf, kind, dtype), trio_of(shelf, kind, dtype)
    entries = [
        replace(entry, density=density)
        for entry, density in zip(weigh(entries_of(model, trio), weights), densities, strict=True)
    ]
    options = {"scale": shared.get("lambda", 1.0), "normalize": shared.get("normalize", True)}
    base = entries[0].tensors
    named = {n for entry in entries for n in entry.updates if entry.weight}
    answers = {n: ties(n, base, entries, **options) for n in named}
    adapters = [
        {"path": str(path), "weight": entry.weight, "density": entry.density}
        for path, entry in zip(trio.values(), entries, strict=True)
    ]
    recipe = {"merge_method": "ties", "base_model": str(model), "adapters": adapters}
    assert_merged(merge(tmp_path, **recipe, parameters=shared), base, answers)


# ------------------------------------------------------------------- adapters and full models


class Mixture:
    """An adapter of A, a fine-tune B of A, and B with another adapter: `[lora, B, B+lora]`."""

    def __init__(self, shelf: Shelf, kind: str, dtype: str, weights: Weights) -> None:
        trio = trio_of(shelf, kind, dtype)
        self.model, tuned = model_of(shelf, kind, dtype), finetune_of(shelf, kind, dtype)
        a, b = read_tensors(self.model), read_tensors(tuned)
        self.base = a
        self.entries = [
            Entry(a, updates_by_peft(self.model, trio["math"]), weights[0]),
            Entry(b, {}, weights[1]),
            Entry(b, updates_by_peft(tuned, trio["code"]), weights[2]),
        ]
        texts = f"{self.model}+{trio['math']}", f"{tuned}", f"{tuned}+{trio['code']}"
        self._models = [
            {"model": text, "parameters": {"weight": weight}}
            for text, weight in zip(texts, weights, strict=True)
        ]

    def recipe(self, method: str, density: float | None = None) -> dict[str, Any]:
        extra = {} if density is None else {"parameters": {"density": density}}
        base = {"base_model": str(self.model)}
        return {"merge_method": method, **base, "models": self._models, **extra}


@pytest.mark.parametrize("weights", [(0.6, 0.3, -0.5), (0.0, 0.0, 1.0), (1.0, -1.0, 0.5)])
@pytest.mark.parametrize(("kind", "dtype"), GROUPS)
def test_full_models_and_adapters_add_up(
    shelf: Shelf, tmp_path: Path, kind: str, dtype: str, weights: Weights
) -> None:
    mixture = Mixture(shelf, kind, dtype, weights)
    answers = {n: weighted_deltas(n, mixture.base, mixture.entries) for n in mixture.base}
    merged = merge(tmp_path, **mixture.recipe("task_arithmetic"))
    assert_merged(merged, mixture.base, answers)


@pytest.mark.parametrize("weights", [(0.6, 0.3, 0.1), (0.0, 0.4, 0.6), (2.0, -0.5, 1.0)])
@pytest.mark.parametrize(("kind", "dtype"), GROUPS)
def test_full_models_and_adapters_are_averaged(
    shelf: Shelf, tmp_path: Path, kind: str, dtype: str, weights: Weights
) -> None:
    mixture = Mixture(shelf, kind, dtype, weights)
    answers = {n: weighted_mean(n, mixture.entries) for n in mixture.base}
    assert_merged(merge(tmp_path, **mixture.recipe("linear")), mixture.base, answers)


@pytest.mark.parametrize(("kind", "dtype"), GROUPS)
def test_full_models_and_adapters_vote(
    shelf: Shelf, tmp_path: Path, kind: str, dtype: str
) -> None:
    """In bfloat16 many differences are equally large: of those at the cut the first ones stay."""
    mixture = Mixture(shelf, kind, dtype, (0.6, 0.3, 0.5))
    entries = [replace(entry, density=0.4) for entry in mixture.entries]
    answers = {n: ties(n, mixture.base, entries) for n in mixture.base}
    merged = merge(tmp_path, **mixture.recipe("ties", density=0.4))
    assert_merged(merged, mixture.base, answers)


def test_a_model_taken_in_full_keeps_its_bytes(shelf: Shelf, tmp_path: Path) -> None:
    """By difference, a third of its float32 elements would be off in the last bit."""
    model = model_of(shelf, "llama", "float32")
    tuned = finetune_of(shelf, "llama", "float32")
    models = [{"model": str(tuned)}]
    merged = merge(tmp_path, merge_method="task_arithmetic", base_model=str(model), models=models)
    assert merged == read_tensors(tuned)
    assert merged != read_tensors(model)


def test_an_adapter_on_another_model_is_baked_into_that_one(shelf: Shelf, tmp_path: Path) -> None:
    """`B+lora` alone at weight 1, in a merge on A, is B with the adapter."""
    model, tuned = model_of(shelf, "qwen2", "float32"), finetune_of(shelf, "qwen2", "float32")
    adapter = trio_of(shelf, "qwen2", "float32")["code"]
    base, entry = read_tensors(model), Entry(read_tensors(tuned), updates_by_peft(tuned, adapter))
    models = [{"model": f"{tuned}+{adapter}"}]
    merged = merge(tmp_path, merge_method="linear", base_model=str(model), models=models)
    answers = {n: weighted_deltas(n, entry.tensors, [entry]) for n in entry.updates}
    assert_merged(merged, entry.tensors, answers)
    assert merged.keys() == base.keys()


# ----------------------------------------------------------------- dtypes, shards and the cache


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
