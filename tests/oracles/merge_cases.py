"""Small models with three adapters each, merges of them, and what a merged model is held to.

Every model and adapter lies on a `Shelf`, so that the tests of a module share them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from exact_merge import Answer, Entry, Stored, assert_close, read_tensors, updates_by_peft
from peft_models import Shelf, load, make_gpt2, make_llama, make_qwen2

import streammerge as sm

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONV1D = ["c_attn", "c_proj", "c_fc"]
MAKERS: dict[str, Callable[..., Path]] = {
    "llama": make_llama,
    "qwen2": make_qwen2,
    "gpt2": make_gpt2,
    "gpt2-untied": partial(make_gpt2, tied=False),
}
MEMORY = "8GiB"  # a bound: what is free on the machine is not what is tested
MOST_UNCLEAR = 1e-4  # of a model's elements may stand on the edge of a threshold or a vote

# Adapters that touch different tensors, with different ranks and scales.
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

Weights = tuple[float, float, float]


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
