"""Whole merges of adapters that PEFT made, tensor by tensor within the bound of a float32 merge.

`|ours - exact| <= u |exact| + (r + 2) 2^-24 (|W| + s |B| |A|)`: one rounding when a row is written,
and float32 arithmetic before it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from exact_merge import (
    Entry,
    Stored,
    assert_close,
    read_tensors,
    ties,
    updates_by_peft,
    weighted_deltas,
    weighted_mean,
)
from merge_cases import (
    CONV1D,
    LINEARS,
    MEMORY,
    Weights,
    assert_merged,
    entries_of,
    finetune_of,
    merge,
    model_of,
    trio_of,
    weigh,
)
from peft_models import Shelf, merged_by_peft

import streammerge as sm

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
    # The head is wrapped last, so PEFT saves its `fan_in_fan_out: false` for the Conv1Ds too.
    "conv1d-and-head": (
        "gpt2-untied",
        "float32",
        "float32",
        {"target_modules": ["attn.c_proj", "lm_head"]},
    ),
    # Nothing but the model's type says that these square weights lie transposed.
    "conv1d-square": ("gpt2", "float32", "float32", {"target_modules": ["attn.c_proj"]}),
    "conv1d-square-bfloat16": ("gpt2", "bfloat16", "float32", {"target_modules": ["attn.c_proj"]}),
}

GROUPS = [("llama", "float32"), ("llama", "bfloat16"), ("qwen2", "bfloat16"), ("gpt2", "float32")]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("peft"))


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
def test_full_models_and_adapters_vote(shelf: Shelf, tmp_path: Path, kind: str, dtype: str) -> None:
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
