"""Every kind of LoRA on a small model that has a place for it, and what each must come to.

The formulas are written out here in float64, from the files that PEFT saved and their config;
nothing of the package is used.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from adapter_case import load_any
from exact_merge import STEP, Answer, Exact, Stored, read_tensors
from other_models import make_convnext, make_qwen2_vl, make_resnet, make_wav2vec2, save_new
from peft_models import VOCABULARY, make_gpt2, make_llama, make_qwen2

PREFIX = "base_model.model."
ROUNDINGS = 8  # of a norm, which float32 arithmetic takes over a few dozen elements


def make_bert(folder: Path, dtype: str = "float32") -> Path:
    """An encoder with biases everywhere and an embedding that no head shares."""
    from transformers import BertConfig

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=56,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return save_new("BertModel", config, folder, dtype)


MODELS: dict[str, Callable[..., Path]] = {
    "llama": make_llama,
    "qwen2": partial(make_qwen2, tied=False),
    "gpt2": partial(make_gpt2, tied=False),
    "bert": make_bert,
    "resnet": make_resnet,
    "wav2vec2": make_wav2vec2,
    "qwen2-vl": lambda folder, dtype: make_qwen2_vl(folder),
    "convnext": make_convnext,
}


@dataclass(frozen=True)
class Case:
    """An adapter on a model; `renamed` are leading parts of modules that the file names else."""

    model: str
    config: Mapping[str, Any]
    dtype: str = "float32"  # of the base
    adapter_dtype: str = "float32"
    adalora: bool = False
    kept: Mapping[str, list[bool]] = field(default_factory=dict)  # by AdaLoRA, of each module
    renamed: Mapping[str, str] = field(default_factory=dict)


_RANKS = {"r": 5, "lora_alpha": 3}
_CONV2D = {"target_modules": ["convolution"], **_RANKS}
_CONV1D = {"target_modules": ["0.conv", "1.conv"], **_RANKS}
_VISION = {"model.visual.": "visual.", "model.language_model.": "model."}
_BERT = ["query", "word_embeddings", "position_embeddings"]
_ADALORA = {"init_r": 6, "target_r": 3, "total_step": 10, "lora_alpha": 7}

CASES: dict[str, Case] = {
    "embedding": Case("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding-bfloat16": Case(
        "llama", {"target_modules": ["embed_tokens"], **_RANKS}, "bfloat16", "bfloat16"
    ),
    "embedding-rslora": Case(
        "bert", {"target_modules": _BERT, "use_rslora": True, "r": 5, "lora_alpha": 3}, "float16"
    ),
    "embedding-of-gpt2": Case("gpt2", {"target_modules": ["wte", "wpe", "c_attn"]}),
    "convolution-2d": Case("resnet", _CONV2D),
    "convolution-2d-bfloat16": Case("resnet", _CONV2D, "bfloat16", "float16"),
    "convolution-1d": Case("wav2vec2", _CONV1D),
    "convolution-3d": Case("qwen2-vl", {"target_modules": ["proj"], **_RANKS}, renamed=_VISION),
    "dora": Case("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "dora-bfloat16": Case(
        "qwen2", {"target_modules": "all-linear", "use_dora": True}, "bfloat16", "bfloat16"
    ),
    "dora-float16": Case(
        "qwen2", {"target_modules": ["v_proj"], "use_dora": True, **_RANKS}, "float16", "float16"
    ),
    "dora-transposed": Case("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "dora-embedding": Case("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "dora-embedding-bfloat16": Case(
        "bert", {"target_modules": _BERT, "use_dora": True}, "bfloat16", "bfloat16"
    ),
    "dora-convolution-2d": Case("resnet", {**_CONV2D, "use_dora": True}),
    "dora-convolution-1d": Case("wav2vec2", {**_CONV1D, "use_dora": True}),
    "dora-convolution-3d": Case(
        "qwen2-vl", {"target_modules": ["proj"], "use_dora": True}, renamed=_VISION
    ),
    "dora-patterns": Case(
        "gpt2",
        {
            "target_modules": ["c_attn", "c_fc", "wte"],
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {"c_fc": 3, "wte": 2},
            "alpha_pattern": {r"h\.0\..*": 5, "wte": 11},
        },
    ),
    "lora-bias": Case("bert", {"target_modules": ["query", "dense"], "lora_bias": True}),
    "lora-bias-conv1d": Case(
        "gpt2", {"target_modules": ["c_attn"], "lora_bias": True, "use_rslora": True}, "bfloat16"
    ),
    "lora-bias-convolution": Case("wav2vec2", {**_CONV1D, "lora_bias": True}),
    "adalora": Case("llama", {**_ADALORA, "target_modules": ["q_proj", "up_proj"]}, adalora=True),
    "adalora-bfloat16": Case(
        "bert", {**_ADALORA, "target_modules": ["query"]}, "bfloat16", "bfloat16", adalora=True
    ),
    "adalora-after-training": Case(
        "llama",
        {**_ADALORA, "target_modules": ["q_proj", "up_proj"]},
        adalora=True,
        kept={
            "model.layers.0.self_attn.q_proj": [True, False, True, False, False, True],
            "model.layers.1.self_attn.q_proj": [False] * 6,
            "model.layers.1.mlp.up_proj": [True] * 6,
        },
    ),
    "adalora-conv1d": Case("gpt2", {**_ADALORA, "target_modules": ["c_attn"]}, adalora=True),
    "adalora-convolution": Case("resnet", {**_ADALORA, **_CONV2D}, adalora=True),
}


def train(case: Case, model_folder: Path, out_folder: Path, seed: int = 5) -> Path:
    """An adapter of a case, saved: what PEFT would train is moved by random values."""
    import torch
    from peft import AdaLoraConfig, LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = (AdaLoraConfig if case.adalora else LoraConfig)(**case.config)
    model = get_peft_model(load_any(model_folder), config)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            moved = parameter + 0.2 * torch.randn_like(parameter)
            parameter.data = moved.to(getattr(torch, case.adapter_dtype))
    if case.kept:
        pattern = {f"{module}.lora_E.default": kept for module, kept in case.kept.items()}
        model.peft_config["default"].rank_pattern = pattern
    model.save_pretrained(str(out_folder), save_embedding_layers=False)
    return out_folder


def merged_by_peft(model_folder: Path, adapter: Path, out_folder: Path) -> dict[str, Stored]:
    """What PEFT's `merge_and_unload` makes of it, under the names of the model's file."""
    from peft import PeftModel

    merged = PeftModel.from_pretrained(load_any(model_folder), adapter).merge_and_unload()
    merged.save_pretrained(out_folder)
    return read_tensors(out_folder)


# ------------------------------------------------------------------------------- what is exact


def answers(case: Case, model: Path, adapter: Path) -> dict[str, Answer]:
    """By the base tensor's name: the exact result, and how far float32 arithmetic may be off."""
    base, held = read_tensors(model), read_tensors(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    modules: dict[str, dict[str, Exact]] = {}
    for key, stored in held.items():
        module, part = key.removeprefix(PREFIX).split(".lora_")
        modules.setdefault(module, {})[part.removesuffix(".weight")] = stored.values()
    found: dict[str, Answer] = {}
    for module, parts in modules.items():
        file_name = _in_file(module, case.renamed)
        if not any(values.size for values in parts.values()):
            continue  # AdaLoRA took all ranks away
        scale = _scale(module, config)
        weight = base[f"{file_name}.weight"].values()
        found[f"{file_name}.weight"] = _weight(weight, parts, scale, case.model)
        if "B.bias" in parts:
            bias, added = base[f"{file_name}.bias"].values(), scale * parts["B.bias"]
            found[f"{file_name}.bias"] = Answer(bias + added, 3 * STEP * (abs(bias) + abs(added)))
    return found


def _in_file(module: str, renamed: Mapping[str, str]) -> str:
    for old, new in renamed.items():
        if module.startswith(old):
            return new + module.removeprefix(old)
    return module


def _scale(module: str, config: Mapping[str, Any]) -> float:
    if config["peft_type"] == "ADALORA":
        return float(config["lora_alpha"] / (config["init_r"] + 1e-5))
    rank = _of_pattern(config["rank_pattern"], module, config["r"])
    alpha = _of_pattern(config["alpha_pattern"], module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config["use_rslora"] else rank)


def _of_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    hits = (v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    return float(next(hits, default))


def _weight(weight: Exact, parts: Mapping[str, Exact], scale: float, model: str) -> Answer:
    embedding = "embedding_A" in parts
    a = parts["embedding_A" if embedding else "A"]
    b = parts["embedding_B" if embedding else "B"]
    rank = len(a)
    values = parts.get("E", parts.get("diag", np.ones(rank))).reshape(rank, 1)
    flat_a, flat_b = values * a.reshape(rank, -1), b.reshape(len(b), rank)
    transposed = embedding or (model == "gpt2" and weight.ndim == 2)
    delta, size = (
        _shaped(left @ right, weight.shape, transposed)
        for left, right in ((scale * flat_b, flat_a), (abs(scale * flat_b), abs(flat_a)))
    )
    summed, terms = weight + delta, np.abs(weight) + size
    off = (rank + 2) * STEP * terms
    if "magnitude_vector" not in parts:
        return Answer(summed, off)
    axes = (0,) if transposed else tuple(range(1, weight.ndim))
    norms = np.sqrt(np.sum(summed**2, axis=axes, keepdims=True))
    factor = parts["magnitude_vector"].reshape(norms.shape) / norms
    exact = factor * summed
    of_norm = np.sqrt(np.sum(off**2, axis=axes, keepdims=True)) / norms + ROUNDINGS * STEP
    rounding = 2 * STEP * (np.abs(weight) + np.abs(exact))
    return Answer(exact, np.abs(factor) * off + np.abs(exact) * of_norm + rounding)


def _shaped(product: Exact, shape: tuple[int, ...], transposed: bool) -> Exact:
    return product.T if transposed else product.reshape(shape)
