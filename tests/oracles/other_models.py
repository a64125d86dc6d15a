"""Small models that are no language models: convolutions of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft_models import VOCABULARY


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
