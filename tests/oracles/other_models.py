"""Small models of other architectures: convolutions of every kind, BERT, vision and language."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft_models import VOCABULARY, make_gpt2


def save_new(kind: str, config: Any, folder: Path, dtype: str) -> Path:
    """A new model of a class of transformers, random with a fixed seed."""
    import torch
    import transformers

    torch.manual_seed(20)
    model = getattr(transformers, kind)(config)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def make_resnet(folder: Path, dtype: str = "float32") -> Path:
    """Convolutions with kernels of 7 x 7, 3 x 3 and 1 x 1."""
    from transformers import ResNetConfig

    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return save_new("ResNetForImageClassification", config, folder, dtype)


def make_wav2vec2(folder: Path, dtype: str = "float32") -> Path:
    """Convolutions of one dimension before an encoder."""
    from transformers import Wav2Vec2Config

    config = Wav2Vec2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=(8, 12),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        conv_bias=True,
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    return save_new("Wav2Vec2ForCTC", config, folder, dtype)


def make_convnext(folder: Path, dtype: str = "float32") -> Path:
    """Convolutions with as many groups as channels."""
    from transformers import ConvNextConfig

    config = ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, num_labels=3)
    return save_new("ConvNextForImageClassification", config, folder, dtype)


def make_qwen2_vl(folder: Path, tied: bool = False) -> Path:
    """A vision-language model: its file has other names than its modules."""
    from transformers import Qwen2VLConfig

    text = {
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    return save_new("Qwen2VLForConditionalGeneration", config, folder, "float32")


def make_bert(folder: Path) -> Path:
    """A masked language model whose head, named unlike most, shares the embedding's weight."""
    from transformers import BertConfig

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=56,
        max_position_embeddings=64,
    )
    return save_new("BertForMaskedLM", config, folder, "float32")


def make_gpt2_of_the_hub(folder: Path) -> Path:
    """As it lies on the hub: saved from the body, without `transformer.` and without a head."""
    from safetensors.numpy import load_file, save_file

    make_gpt2(folder)
    path = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): one for name, one in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    return folder


def make_tied_llava(folder: Path) -> Path:
    """A vision-language model of the family that transformers 4.52 moved, its head tied."""
    import torch
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=200, tie_word_embeddings=True
    )
    torch.manual_seed(20)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder
