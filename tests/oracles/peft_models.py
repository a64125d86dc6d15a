"""Small models of three architectures and LoRA adapters on them, made by transformers and PEFT.

torch, transformers and PEFT are imported inside the functions: together they cost several seconds.
Everything is random with a fixed seed, and lora_B, which PEFT starts at zero, is filled too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

VOCABULARY = 97
_GROUPED: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}


def make_llama(folder: Path, dtype: str = "float32", tied: bool = False) -> Path:
    """A Llama of two layers: grouped key-value heads, so square and other weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**_GROUPED, tie_word_embeddings=tied)
    return _save(LlamaForCausalLM, config, folder, dtype)


def make_qwen2(folder: Path, dtype: str = "float32", tied: bool = True) -> Path:
    """A Qwen2 of two layers: biases on q, k and v; its head is tied unless told otherwise."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**_GROUPED, tie_word_embeddings=tied)
    return _save(Qwen2ForCausalLM, config, folder, dtype)


def make_gpt2(folder: Path, dtype: str = "float32", tied: bool = True) -> Path:
    """A GPT-2 of two layers: Conv1D weights `[in, out]`, of which attn.c_proj is square."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        tie_word_embeddings=tied,
    )
    return _save(GPT2LMHeadModel, config, folder, dtype)


def make_adapter(
    model_folder: Path,
    out_folder: Path,
    seed: int,
    *,
    dtype: str = "float32",
    name: str = "default",
    copy_base: bool = False,
    **lora_kwargs: Any,
) -> Path:
    """A LoRA on a saved model, with both factors random, in the element type `dtype`.

    `copy_base` leaves PEFT its habit of saving the base's weight beside an adapter on an embedding
    or a head. Returns the folder that holds the adapter: PEFT puts one of another name than
    `default` into a folder of that name.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(load(model_folder), LoraConfig(**lora_kwargs), adapter_name=name)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn_like(parameter).mul_(0.2).to(getattr(torch, dtype))
    model.save_pretrained(str(out_folder), save_embedding_layers="auto" if copy_base else False)
    return out_folder if name == "default" else out_folder / name


def load(model_folder: Path) -> PreTrainedModel:
    """A saved model in float32, whatever it was stored as."""
    import torch
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, local_files_only=True
    )
    return model


def merged_by_peft(model_folder: Path, *adapter_folders: Path) -> dict[str, NDArray[np.float32]]:
    """The tensors of a model, in float32, after PEFT merged adapters into it, one by one."""
    from peft import PeftModel

    model = load(model_folder)
    for adapter in adapter_folders:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


class Shelf:
    """Models and adapters by name, each made once: `shelf.get("llama", make_llama, tied=True)`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, Path] = {}

    def get(self, label: str, make: Callable[..., Path], *args: Any, **kwargs: Any) -> Path:
        """The folder that `make(folder, ...)` filled under this label, now or before."""
        if label not in self._made:
            self._made[label] = make(self._root / label, *args, **kwargs)
        return self._made[label]

    def adapter(self, label: str, model_folder: Path, seed: int, **kwargs: Any) -> Path:
        """The folder of an adapter on a model, made now or before under this label."""

        def make(folder: Path) -> Path:
            return make_adapter(model_folder, folder, seed, **kwargs)

        return self.get(label, make)


def _save(kind: Any, config: Any, folder: Path, dtype: str) -> Path:
    import torch

    torch.manual_seed(20)
    kind(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder
