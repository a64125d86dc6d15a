"""Adapters on many architectures, each for what is particular about it.

Names of what is tied, more than two tensors that are one, fused weights, embeddings that are scaled
or projected, patches of images.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from adapter_case import Case
from other_models import save_new
from peft_models import VOCABULARY
from safetensors.numpy import load_file, save_file


def make(kind: str, folder: Path, **fields: Any) -> Path:
    """A new model of a class of transformers, with a few numbers of its config."""
    import transformers

    config = getattr(transformers, kind).config_class(**fields)
    return save_new(kind, config, folder, "float32")


def make_encoder_decoder(folder: Path) -> Path:
    """BERT and GPT-2 put together: the decoder ties its own head, and its own config says so."""
    from transformers import BertConfig, EncoderDecoderConfig, GPT2Config

    encoder = BertConfig(**_ENCODER)
    decoder = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return save_new("EncoderDecoderModel", config, folder, "float32")


def write_on_each_expert(
    model_folder: Path, out_folder: Path, config: Mapping[str, Any], seed: int = 5
) -> None:
    """An adapter of transformers 4, in which each expert has layers of its own, as files have."""
    numbers = np.random.default_rng(seed)
    ends = tuple(f"{module}.weight" for module in config["target_modules"])
    factors = {}
    for name, (out, inner) in shapes_of(model_folder).items():
        if name.endswith(ends):
            key = f"base_model.model.{name.removesuffix('.weight')}"
            for part, shape in (("A", (config["r"], inner)), ("B", (out, config["r"]))):
                values = 0.3 * numbers.standard_normal(shape)
                factors[f"{key}.lora_{part}.weight"] = values.astype(np.float32)
    out_folder.mkdir()
    save_file(factors, out_folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "base_model_name_or_path": str(model_folder), **config}
    (out_folder / "adapter_config.json").write_text(json.dumps(told))


def shapes_of(model_folder: Path) -> dict[str, tuple[int, ...]]:
    """Those of its matrices."""
    held = load_file(model_folder / "model.safetensors")
    return {name: tensor.shape for name, tensor in held.items() if tensor.ndim == 2}


_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "pad_token_id": 1,
    "decoder_start_token_id": 2,
}
_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}
_ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "embedding_size": 12,
}
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
}

_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}

MODELS_OF_ARCHITECTURES: dict[str, Callable[[Path], Path]] = {
    "T5": partial(make, "T5ForConditionalGeneration", **_T5),
    "BART": partial(make, "BartForConditionalGeneration", **_SEQ2SEQ),
    "OPT": partial(
        make,
        "OPTForCausalLM",
        vocab_size=VOCABULARY,
        hidden_size=16,
        word_embed_proj_dim=12,  # so that project_in and project_out stand between
        ffn_dim=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    ),
    "Mamba": partial(
        make,
        "MambaForCausalLM",
        vocab_size=VOCABULARY,
        hidden_size=16,
        state_size=4,
        num_hidden_layers=1,
    ),
    "Phi": partial(make, "PhiForCausalLM", **{**_DECODER, "num_key_value_heads": 2}),
    "Phi-3": partial(make, "Phi3ForCausalLM", **_DECODER),
    "Gemma": partial(make, "GemmaForCausalLM", **_DECODER, head_dim=8),
    "GPT-NeoX": partial(make, "GPTNeoXForCausalLM", **_DECODER, tie_word_embeddings=True),
    "RoBERTa": partial(
        make, "RobertaForMaskedLM", **_ENCODER, max_position_embeddings=120, pad_token_id=1
    ),
    "XLNet": partial(
        make,
        "XLNetLMHeadModel",
        vocab_size=VOCABULARY,
        d_model=16,
        n_layer=1,
        n_head=2,
        d_inner=24,
    ),
    "Marian": partial(make, "MarianMTModel", **_SEQ2SEQ),
    "Whisper": partial(
        make, "WhisperForConditionalGeneration", **_SEQ2SEQ, num_mel_bins=8, max_source_positions=20
    ),
    "DINOv2": partial(make, "Dinov2ForImageClassification", **_VISION, num_labels=3),
    "ELECTRA": partial(make, "ElectraForMaskedLM", **_ENCODER),
    "Mixtral": partial(
        make, "MixtralForCausalLM", **_DECODER, num_local_experts=4, num_experts_per_tok=2
    ),
    "Qwen3-MoE": partial(
        make,
        "Qwen3MoeForCausalLM",
        **_DECODER,
        head_dim=8,
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    "BERT and GPT-2": make_encoder_decoder,
    "Llama with a score": partial(make, "LlamaForSequenceClassification", **_DECODER, num_labels=3),
    "SigLIP": partial(make, "SiglipVisionModel", **_VISION),
    "Swin": partial(
        make,
        "SwinForImageClassification",
        image_size=64,
        patch_size=8,
        window_size=4,
        embed_dim=8,
        depths=[1, 1],
        num_heads=[2, 2],
        num_labels=3,
    ),
    "ViT": partial(
        make,
        "ViTForImageClassification",
        **_VISION,
        num_labels=3,
    ),
}

# PEFT fuses the factors of all experts to read these; the file of the model has them apart.
_EXPERTS = "LoRA on each expert, of transformers 4"
_TIED = "LoRA on tied weights"
ARCHITECTURES = (
    Case(_TIED, "T5", {"target_modules": ["q", "shared"]}, tied=False, remark="what all share"),
    Case(
        _TIED,
        "T5",
        {"target_modules": ["encoder.embed_tokens", "decoder.embed_tokens"]},
        remark="the encoder's and the decoder's",
    ),
    Case(_TIED, "T5", {"target_modules": ["lm_head", "v"]}, tied=False, remark="the head"),
    Case("LoRA", "T5", {"target_modules": ["q", "v", "wo"]}, tied=True),
    Case(
        _TIED,
        "BART",
        {"target_modules": ["encoder.embed_tokens", "decoder.embed_tokens", "q_proj"]},
        tied=False,
        remark="the encoder's and the decoder's",
    ),
    Case(_TIED, "BART", {"target_modules": ["lm_head", "fc1"]}, tied=False, remark="the head"),
    Case("LoRA", "BART", {"target_modules": ["q_proj", "fc2"]}, tied=True),
    Case(_TIED, "OPT", {"target_modules": ["embed_tokens"]}, tied=False, remark="the embedding"),
    Case(
        _TIED, "OPT", {"target_modules": ["lm_head", "project_out"]}, tied=False, remark="the head"
    ),
    Case(_TIED, "Mamba", {"target_modules": ["embeddings"]}, tied=False, remark="the embedding"),
    Case("LoRA", "Mamba", {"target_modules": ["in_proj", "x_proj"]}, tied=True),
    Case("LoRA", "Phi-3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    Case("DoRA", "Phi-3", {"target_modules": ["qkv_proj"], "use_dora": True}),
    Case(_TIED, "Gemma", {"target_modules": ["embed_tokens"]}, tied=False, remark="the embedding"),
    Case(
        "trainable tokens of tied weights",
        "Gemma",
        {"target_modules": ["q_proj"], "trainable_token_indices": [90, 3]},
        tied=True,
    ),
    Case(
        _TIED,
        "ELECTRA",
        {"target_modules": ["word_embeddings"]},
        tied=False,
        remark="the embedding",
    ),
    Case(
        _TIED,
        "BERT and GPT-2",
        {"target_modules": ["wte", "query"]},
        remark="the decoder's embedding",
    ),
    Case(_TIED, "GPT-NeoX", {"target_modules": ["embed_in"]}, tied=False, remark="the embedding"),
    Case(_TIED, "RoBERTa", {"target_modules": ["decoder"]}, tied=False, remark="the head"),
    Case(
        _TIED, "XLNet", {"target_modules": ["word_embedding"]}, tied=False, remark="the embedding"
    ),
    Case(_TIED, "Marian", {"target_modules": ["lm_head"]}, tied=False, remark="the head"),
    Case(_TIED, "Whisper", {"target_modules": ["proj_out"]}, tied=False, remark="the head"),
    Case("LoRA", "Whisper", {"target_modules": ["q_proj", "v_proj"]}, tied=True),
    Case("LoRA", "DINOv2", {"target_modules": "all-linear"}),
    Case(
        "modules_to_save",
        "Llama with a score",
        {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["score"]},
    ),
    Case(
        _EXPERTS,
        "Mixtral",
        {"target_modules": ["q_proj", "w1", "w2", "w3"], "r": 3, "lora_alpha": 6},
        write=write_on_each_expert,
    ),
    Case(
        _EXPERTS,
        "Qwen3-MoE",
        {"target_modules": ["gate_proj", "up_proj", "down_proj"], "r": 3, "lora_alpha": 6},
        write=write_on_each_expert,
    ),
    Case(
        "LoRA on torch.nn.MultiheadAttention",
        "SigLIP",
        {"target_modules": ["head.attention", "q_proj"]},
        refused="PEFT up to 0.21.2 adds that of `out_proj` twice",
    ),
    Case("LoRA", "Swin", {"target_modules": "all-linear"}),
    Case("LoRA", "ViT", {"target_modules": "all-linear"}),
    Case("LoRA on a convolution", "ViT", {"target_modules": ["projection"]}, remark="of patches"),
    Case(
        "modules_to_save",
        "ViT",
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]},
    ),
)
