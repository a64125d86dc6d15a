"""Every way to train an adapter that is merged or refused: the rows of docs/adapters.md.

A case names a small model, what PEFT's `LoraConfig` is told, and what must come of it. The tests of
`test_adapter_cases.py` take each case through PEFT, a merge and the model's answers, and generate
the table of the docs from this list: what is not here is not claimed there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from adapter_case import Case
from architecture_cases import ARCHITECTURES, MODELS_OF_ARCHITECTURES
from other_models import (
    make_bert,
    make_convnext,
    make_gpt2_of_the_hub,
    make_qwen2_vl,
    make_resnet,
    make_tied_llava,
    make_wav2vec2,
)
from peft_models import VOCABULARY, make_gpt2, make_llama, make_qwen2

# What PEFT is told of a model: trained in full, next to a LoRA that keeps it company.
ATTENTION = ["q_proj", "v_proj"]
HEADS = ["embed_tokens", "lm_head"]


MODELS: dict[str, Callable[[Path], Path]] = {
    "Llama": make_llama,
    "tied Llama": partial(make_llama, tied=True),
    "Qwen2": partial(make_qwen2, tied=False),
    "GPT-2": make_gpt2,
    "untied GPT-2": partial(make_gpt2, tied=False),
    "GPT-2 as on the hub": make_gpt2_of_the_hub,
    "Qwen2-VL": make_qwen2_vl,
    "tied Qwen2-VL": partial(make_qwen2_vl, tied=True),
    "BERT": make_bert,
    "tied LLaVA": make_tied_llava,
    "ResNet": make_resnet,
    "ConvNeXt": make_convnext,
    "wav2vec 2.0": make_wav2vec2,
    **MODELS_OF_ARCHITECTURES,
}


_DORA: dict[str, Any] = {"use_dora": True}
_ADALORA: dict[str, Any] = {"init_r": 6, "target_r": 3, "total_step": 10}
KINDS = (
    Case("LoRA", "Llama", {"target_modules": "all-linear"}),
    Case("LoRA", "untied GPT-2", {"target_modules": ["c_attn", "c_proj", "lm_head"]}),
    Case("LoRA", "Qwen2-VL", {"target_modules": [*ATTENTION, "qkv"], "use_rslora": True}),
    Case("LoRA on an embedding", "Llama", {"target_modules": ["embed_tokens"]}),
    Case("LoRA on an embedding", "untied GPT-2", {"target_modules": ["wte", "wpe"]}),
    Case("LoRA on a convolution", "ResNet", {"target_modules": ["convolution"]}, remark="2-d"),
    Case(
        "LoRA on a convolution",
        "wav2vec 2.0",
        {"target_modules": ["0.conv", "1.conv"]},
        remark="1-d",
    ),
    Case("DoRA", "Qwen2", {"target_modules": "all-linear", **_DORA}),
    Case("DoRA", "untied GPT-2", {"target_modules": ["c_attn", "wte"], **_DORA}),
    Case("DoRA", "Llama", {"target_modules": ["embed_tokens"], **_DORA}, remark="an embedding"),
    Case("DoRA", "ResNet", {"target_modules": ["convolution"], **_DORA}, remark="2-d convolutions"),
    Case(
        "DoRA", "wav2vec 2.0", {"target_modules": ["0.conv"], **_DORA}, remark="a 1-d convolution"
    ),
    Case("lora_bias", "Qwen2", {"target_modules": ATTENTION, "lora_bias": True}),
    Case("lora_bias", "GPT-2", {"target_modules": ["c_attn"], "lora_bias": True}),
    Case("AdaLoRA", "Llama", {"target_modules": ATTENTION, **_ADALORA}),
    Case("AdaLoRA", "untied GPT-2", {"target_modules": ["c_attn"], **_ADALORA}),
)

# What no merge can hold, or what a recipe must say more about.
NOT_MERGED = (
    *(
        Case(
            f"init_lora_weights: {init}",
            "Llama",
            {"target_modules": ATTENTION, "init_lora_weights": init},
            refused="assume_residual_base: true",
            remark="unless the recipe says that the base is the residual one",
        )
        for init in ("pissa", "olora")
    ),
    Case(
        "layer replication",
        "Llama",
        {"target_modules": ATTENTION, "layer_replication": [(0, 2), (0, 2)]},
        refused="layer replication",
    ),
    Case(
        "activated LoRA",
        "Llama",
        {
            "target_modules": ATTENTION,
            "alora_invocation_tokens": [1, 2],
            "task_type": "CAUSAL_LM",
        },
        refused="aLoRA",
    ),
    Case(
        "lora_bias",
        "Llama",
        {"target_modules": ATTENTION, "lora_bias": True},
        refused="layers of the base that have none",
        remark="where the base has no bias",
    ),
    Case(
        "LoRA on a convolution",
        "ConvNeXt",
        {"target_modules": ["dwconv"], "r": 8},
        refused="a convolution with groups",
        remark="with groups",
    ),
)

REPLACING = (
    Case("modules_to_save", "Llama", {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}),
    Case(
        "modules_to_save",
        "Qwen2",
        {"target_modules": ATTENTION, "modules_to_save": ["mlp", "input_layernorm"]},
        remark="modules of several tensors",
    ),
    Case("modules_to_save", "Qwen2-VL", {"target_modules": ATTENTION, "modules_to_save": HEADS}),
    Case("bias: all", "Qwen2", {"target_modules": ATTENTION, "bias": "all"}),
    Case("bias: all", "GPT-2", {"target_modules": ["c_attn"], "bias": "all"}),
    Case("bias: lora_only", "Qwen2", {"target_modules": ATTENTION, "bias": "lora_only"}),
    Case("bias: lora_only", "GPT-2", {"target_modules": ["c_attn"], "bias": "lora_only"}),
    Case(
        "trainable tokens",
        "Llama",
        {"target_modules": ATTENTION, "trainable_token_indices": [90, 3, 41]},
    ),
    Case(
        "trainable tokens",
        "Llama",
        {
            "target_modules": ATTENTION,
            "trainable_token_indices": {"embed_tokens": [7, 5], "lm_head": [6]},
        },
        remark="of embedding and head",
    ),
)


TOKENS = (
    Case("trainable tokens by themselves", "Llama", {"token_indices": [90, 3, 41]}),
    Case("trainable tokens by themselves", "tied Llama", {"token_indices": [90, 3]}, tied=True),
    Case(
        "trainable tokens by themselves",
        "tied Llama",
        {"token_indices": [7], "target_modules": ["lm_head"]},
        tied=False,
        remark="of the head",
    ),
    Case("trainable tokens by themselves", "T5", {"token_indices": [7, 90]}, tied=True),
)


def _tied(
    kind: str, remark: str, *models: str, still: bool = False, **config: Any
) -> tuple[Case, ...]:
    """One way to train a tied model, on several; `still` says whether it is tied after that."""
    cases = []
    for model in models:
        attention = ["c_attn"] if model.startswith("GPT-2") else ATTENTION
        targets = attention + config.get("target_modules", [])
        told = {**config, "target_modules": targets}
        cases.append(Case(kind, model, told, tied=still, remark=remark))
    return tuple(cases)


_LLAMA, _VL, _LLAVA = "tied Llama", "tied Qwen2-VL", "tied LLaVA"
TIED = (
    *_tied(
        "LoRA on tied weights", "the head", _LLAMA, "GPT-2", _VL, _LLAVA, target_modules=["lm_head"]
    ),
    *_tied(
        "LoRA on tied weights",
        "the embedding",
        _LLAMA,
        _VL,
        _LLAVA,
        target_modules=["embed_tokens"],
    ),
    *_tied("LoRA on tied weights", "the embedding", "GPT-2", target_modules=["wte"]),
    *_tied("LoRA on tied weights", "both", _LLAMA, target_modules=HEADS),
    *_tied(
        "LoRA on tied weights",
        "ensure_weight_tying",
        _LLAMA,
        target_modules=["embed_tokens"],
        ensure_weight_tying=True,
        still=True,
    ),
    *_tied(
        "DoRA on tied weights", "the embedding", _LLAMA, target_modules=["embed_tokens"], **_DORA
    ),
    *_tied("DoRA on tied weights", "the embedding", "GPT-2", target_modules=["wte"], **_DORA),
    *_tied(
        "DoRA on tied weights", "the head", _LLAMA, "GPT-2", target_modules=["lm_head"], **_DORA
    ),
    *_tied("DoRA on tied weights", "both", _LLAMA, target_modules=HEADS, **_DORA),
    *_tied(
        "modules_to_save of tied weights", "the head", _LLAMA, "GPT-2", modules_to_save=["lm_head"]
    ),
    *_tied(
        "modules_to_save of tied weights", "the embedding", _LLAMA, modules_to_save=["embed_tokens"]
    ),
    *_tied("modules_to_save of tied weights", "the embedding", "GPT-2", modules_to_save=["wte"]),
    *_tied("modules_to_save of tied weights", "both", _LLAMA, _VL, modules_to_save=HEADS),
    *_tied(
        "modules_to_save of tied weights",
        "ensure_weight_tying",
        _LLAMA,
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
        still=True,
    ),
    *_tied(
        "trainable tokens of tied weights",
        "",
        _LLAMA,
        _VL,
        still=True,
        trainable_token_indices=[90, 3],
    ),
    *_tied(
        "trainable tokens of tied weights",
        "each its own",
        _LLAMA,
        trainable_token_indices={"embed_tokens": [7, 5], "lm_head": [6]},
    ),
    *_tied(
        "trainable tokens of tied weights",
        "ensure_weight_tying",
        _LLAMA,
        trainable_token_indices={"embed_tokens": [7, 5], "lm_head": [7, 5]},
        ensure_weight_tying=True,
        still=True,
    ),
)

# BERT's head has another name than most, a bias of its own, and the bias is shared too.
_QUERIES: dict[str, Any] = {"target_modules": ["query", "value"]}
BERT = (
    Case(
        "LoRA on tied weights",
        "BERT",
        {"target_modules": ["query", "word_embeddings"]},
        tied=False,
        remark="the embedding",
    ),
    Case(
        "LoRA on tied weights",
        "BERT",
        {"target_modules": ["query", "decoder"]},
        tied=False,
        remark="the head",
    ),
    Case("bias: all", "BERT", {**_QUERIES, "bias": "all"}),
    Case(
        "modules_to_save of tied weights",
        "BERT",
        {**_QUERIES, "modules_to_save": ["decoder"]},
        tied=False,
        remark="the head",
    ),
)


def _resize(model: Any) -> None:
    model.resize_token_embeddings(VOCABULARY + 4)


_ROWS = [VOCABULARY + 1, 3]
LARGER = (
    *(
        Case("a larger vocabulary", model, told, _resize, tied=tied, remark=remark)
        for model, tied in (("Llama", False), ("tied Llama", True))
        for remark, told in (
            ("", {"target_modules": ATTENTION}),
            ("modules_to_save", {"target_modules": ATTENTION, "modules_to_save": HEADS}),
            ("trainable tokens", {"target_modules": ATTENTION, "trainable_token_indices": _ROWS}),
        )
        if (model, remark) != ("tied Llama", "modules_to_save")
    ),
    # PEFT looks for `vocab_size` where a vision-language model's config has none.
    Case(
        "a larger vocabulary",
        "Qwen2-VL",
        {"target_modules": ATTENTION, "modules_to_save": HEADS},
        _resize,
        remark="modules_to_save",
    ),
    Case(
        "a larger vocabulary",
        "Qwen2-VL",
        {"target_modules": ATTENTION, "trainable_token_indices": _ROWS},
        _resize,
        refused="trainable tokens whose rows",
        remark="trainable tokens, without the embedding",
    ),
    Case("a larger vocabulary", "T5", {"target_modules": ["q", "v"]}, _resize, tied=True),
    Case("a larger vocabulary", "Mamba", {"target_modules": ["x_proj"]}, _resize, tied=True),
    Case(
        "a larger vocabulary",
        "T5",
        {"target_modules": ["q"], "modules_to_save": ["shared"]},
        _resize,
        refused="for some tensors and not for others",
        remark="of which `shared` alone was trained",
    ),
    Case(
        "a larger vocabulary",
        "BART",
        {"target_modules": ["q_proj"]},
        _resize,
        refused="resize_token_embeddings",
        remark="with a bias for each word",
    ),
    Case(
        "a larger vocabulary",
        "Phi",
        {"target_modules": ["q_proj"]},
        _resize,
        refused="resize_token_embeddings",
        remark="whose head has a bias",
    ),
    Case(
        "a larger vocabulary",
        "Llama",
        {"target_modules": ["embed_tokens", "lm_head"], **_DORA},
        _resize,
        refused="resize_token_embeddings",
        remark="DoRA on the embedding",
    ),
    Case(
        "a larger vocabulary",
        "tied Llama",
        {"target_modules": [*ATTENTION, "embed_tokens"]},
        _resize,
        tied=False,
        remark="LoRA on the embedding",
    ),
    Case(
        "a larger vocabulary",
        "Llama",
        {"target_modules": [*ATTENTION, "embed_tokens", "lm_head"]},
        _resize,
        remark="LoRA on embedding and head",
    ),
    Case(
        "a larger vocabulary",
        "Llama",
        {"target_modules": [*ATTENTION, "embed_tokens"]},
        _resize,
        refused="for some tensors and not for others",
        remark="of which PEFT saved the embedding alone",
    ),
)

# ------------------------------------------------------------------------------- names and folders


def _rename(change: Callable[[str], str]) -> Callable[[Path], None]:
    """Give every tensor of a saved adapter another key."""

    def spoil(folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        path = folder / "adapter_model.safetensors"
        save_file({change(key): tensor for key, tensor in load_file(path).items()}, path)

    return spoil


def _with_name(key: str) -> str:
    """As a raw state dict has it: with the adapter's name, and a wrapper's."""
    if ".lora_" in key:
        return key.replace(".weight", ".default.weight")
    return key.replace("lm_head.weight", "lm_head.modules_to_save.default.weight")


def _move(inner: str) -> Callable[[Path], None]:
    """Put a saved adapter into a folder below, as a trainer or a named adapter has it."""

    def spoil(folder: Path) -> None:
        files = [path for path in folder.iterdir() if path.is_file()]
        (folder / inner).mkdir(parents=True)
        for path in files:
            path.rename(folder / inner / path.name)

    return spoil


def _configure(**fields: Any) -> Callable[[Path], None]:
    """Change fields of the saved config."""

    def spoil(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return spoil


def _pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _two(folder: Path) -> None:
    for inner in ("code", "math"):
        (folder / inner).mkdir()
        (folder / inner / "adapter_config.json").write_text("{}")
    (folder / "adapter_config.json").unlink()


def _four(name: str) -> str:
    """As transformers 4.51 named the modules of Qwen2-VL."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


_PLAIN: dict[str, Any] = {"target_modules": ATTENTION}
NAMES = (
    Case(
        "names: with the adapter's own, `.default.`",
        "Llama",
        {**_PLAIN, "modules_to_save": ["lm_head"]},
        spoil=_rename(_with_name),
    ),
    Case(
        "names: of a wrapper of torch.compile",
        "Llama",
        _PLAIN,
        spoil=_rename(lambda key: f"_orig_mod.{key}"),
    ),
    Case(
        "names: of the body alone",
        "Llama",
        _PLAIN,
        spoil=_rename(lambda key: key.replace("model.model.model.", "model.model.")),
    ),
    Case(
        "names: of the body alone",
        "BERT",
        {"target_modules": ["query", "value"]},
        spoil=_rename(lambda key: key.replace(".bert.", ".")),
    ),
    Case("names: of transformers 5", "Qwen2-VL", _PLAIN),
    Case("names: of transformers 5", "tied LLaVA", _PLAIN),
    Case("names: of transformers 4", "Qwen2-VL", _PLAIN, spoil=_rename(_four)),
    Case(
        "names: without `transformer.` in the base",
        "GPT-2 as on the hub",
        {"target_modules": ["c_attn"]},
    ),
    Case(
        "names: of which some are no tensor's",
        "Llama",
        _PLAIN,
        spoil=_rename(lambda key: key.replace("layers.1", "layers.9")),
        refused="name no tensor of the base",
    ),
    Case("folders: a trainer's checkpoint below", "Llama", _PLAIN, spoil=_move("checkpoint-500")),
    Case("folders: an adapter below, under its name", "Llama", _PLAIN, spoil=_move("math")),
    Case("folders: several adapters below", "Llama", _PLAIN, spoil=_two, refused="holds several"),
    Case(
        "folders: a pickle, adapter_model.bin",
        "Llama",
        _PLAIN,
        spoil=_pickle,
        refused="is a pickle",
    ),
    Case(
        "trained on a 4-bit copy (QLoRA)",
        "Llama",
        _PLAIN,
        spoil=_configure(base_model_name_or_path="someone/llama-bnb-4bit"),
    ),
)

CASES = (*KINDS, *NOT_MERGED, *REPLACING, *TOKENS, *TIED, *BERT, *ARCHITECTURES, *LARGER, *NAMES)
