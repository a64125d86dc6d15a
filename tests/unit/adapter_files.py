"""Adapter folders and bases made of headers, without torch or PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from streammerge.adapters import AdapterFolder, open_adapter
from streammerge.words import DType, Extent, TensorSpec

PREFIX = "base_model.model."


def lora(module: str, out_rows: int, in_cols: int, rank: int = 2) -> dict[str, tuple[int, ...]]:
    """The keys and shapes of a LoRA on one module, as PEFT writes them."""
    return {
        f"{PREFIX}{module}.lora_A.weight": (rank, in_cols),
        f"{PREFIX}{module}.lora_B.weight": (out_rows, rank),
    }


def write_config(folder: Path, **fields: Any) -> Path:
    """adapter_config.json of a plain LoRA of rank 2 and alpha 4, with `fields` changed."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **fields}
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(config))
    return path


def write_weights(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "float32"
) -> None:
    """adapter_model.safetensors with ones."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: np.ones(shape, dtype) for key, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")


def adapter(folder: Path, shapes: Mapping[str, tuple[int, ...]], **fields: Any) -> AdapterFolder:
    """A written and opened adapter."""
    write_config(folder, **fields)
    write_weights(folder, shapes)
    return open_adapter(folder, "it")


def base_of(
    shapes: Mapping[str, tuple[int, ...]],
    dtype: DType = DType.BF16,
    path: str = "/models/base/model.safetensors",
) -> dict[str, Extent]:
    """The tensors of a base, as its headers would give them."""
    return {
        name: Extent(path, 0, TensorSpec(name, tuple(shape), dtype))
        for name, shape in shapes.items()
    }
