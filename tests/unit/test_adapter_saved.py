"""Tensors that an adapter holds in full: what they replace, and what is a mere copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import PREFIX, lora, write_config
from numpy.typing import NDArray
from safetensors.numpy import save_file

from streammerge.adapters import ResolvedAdapter, open_adapter, resolve_adapter
from streammerge.errors import BadInput
from streammerge.storage.folder import open_model
from streammerge.words import Factors, Replacement

Q, EMBEDDING = "model.layers.0.q_proj", "model.embed_tokens"
UNTIED = {"tie_word_embeddings": False}
Array = NDArray[np.generic]


def numbers(*shape: int, seed: int = 0, dtype: str = "float32") -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


BASE = {
    f"{EMBEDDING}.weight": numbers(9, 4, seed=1),
    f"{Q}.weight": numbers(4, 4, seed=2),
    f"{Q}.bias": numbers(4, seed=3),
    "lm_head.weight": numbers(9, 4, seed=4),
}
FACTORS: dict[str, Array] = {key: numbers(*shape) for key, shape in lora(Q, 4, 4).items()}


def resolve(folder: Path, tensors: dict[str, Array], **config: Any) -> ResolvedAdapter:
    """An adapter with a LoRA on one layer, and these tensors under PEFT's prefix."""
    base = folder / "base"
    base.mkdir()
    save_file(BASE, base / "model.safetensors")
    write_config(folder / "it", **config)
    saved = FACTORS | {PREFIX + key: tensor for key, tensor in tensors.items()}
    save_file(saved, folder / "it" / "adapter_model.safetensors")
    return resolve_adapter(open_adapter(folder / "it", "it"), open_model(base).tensors, UNTIED)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("lm_head.weight", "lm_head.weight"),
        ("lm_head.modules_to_save.weight", "lm_head.weight"),
        (f"{EMBEDDING}.base_layer.weight", f"{EMBEDDING}.weight"),
        (f"{EMBEDDING}.token_adapter.base_layer.weight", f"{EMBEDDING}.weight"),
        (f"{Q}.bias", f"{Q}.bias"),
        (f"{Q}.base_layer.bias", f"{Q}.bias"),
    ],
)
def test_what_replaces_what(tmp_path: Path, key: str, name: str) -> None:
    resolved = resolve(tmp_path, {key: numbers(*BASE[name].shape, seed=9)})
    update = resolved.updates[name]
    assert isinstance(update, Replacement)
    assert (update.extent.spec.name, update.extent.spec.shape) == (name, BASE[name].shape)
    assert (update.rows, update.then) == (None, None)
    assert len(resolved.updates) == 2


def test_an_adapter_name_in_all_keys_is_dropped(tmp_path: Path) -> None:
    write_config(tmp_path / "it")
    saved = {key.replace("weight", "mine.weight"): one for key, one in FACTORS.items()}
    saved[f"{PREFIX}lm_head.modules_to_save.mine.weight"] = numbers(9, 4)
    save_file(saved, tmp_path / "it" / "adapter_model.safetensors")
    save_file(BASE, tmp_path / "model.safetensors")
    folder = open_adapter(tmp_path / "it", "it")
    assert "lm_head.weight" in resolve_adapter(folder, open_model(tmp_path).tensors, {}).updates


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_a_copy_of_the_base_replaces_nothing(tmp_path: Path, dtype: str) -> None:
    copy = BASE["lm_head.weight"].astype(dtype)
    resolved = resolve(tmp_path, {"lm_head.base_layer.weight": copy})
    assert [*resolved.updates] == [f"{Q}.weight"]
    assert resolved.notes == ("1 of its tensors are copies of the base's and change nothing",)


def test_nothing_but_copies_is_no_adapter(tmp_path: Path) -> None:
    write_config(tmp_path / "it")
    save_file(BASE, tmp_path / "model.safetensors")
    copy = {f"{PREFIX}lm_head.weight": BASE["lm_head.weight"]}
    save_file(copy, tmp_path / "it" / "adapter_model.safetensors")
    folder = open_adapter(tmp_path / "it", "it")
    with pytest.raises(BadInput, match="holds no tensors that change a model"):
        resolve_adapter(folder, open_model(tmp_path).tensors, {})


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_one_other_bit_is_no_copy(tmp_path: Path, dtype: type[np.floating[Any]]) -> None:
    changed = BASE["lm_head.weight"].astype(dtype)
    changed[-1, -1] = np.nextafter(changed[-1, -1], dtype(9))
    assert "lm_head.weight" in resolve(tmp_path, {"lm_head.base_layer.weight": changed}).updates


def test_factors_are_added_to_what_replaced_the_base(tmp_path: Path) -> None:
    """Such as an embedding that was resized, then trained by LoRA."""
    update = resolve(tmp_path, {f"{Q}.base_layer.weight": numbers(4, 4)}).updates[f"{Q}.weight"]
    assert isinstance(update, Replacement)
    assert isinstance(update.then, Factors)


def test_what_was_left_behind_does_not_count(tmp_path: Path) -> None:
    trained = numbers(9, 4, seed=7)
    tensors = {
        "lm_head.original_module.weight": numbers(9, 4, seed=8),
        "lm_head.modules_to_save.weight": trained.copy(),
        "lm_head.weight": trained,
    }
    update = resolve(tmp_path, tensors).updates["lm_head.weight"]
    assert isinstance(update, Replacement)
    header = open_adapter(tmp_path / "it", "it").header
    assert update.extent.offset == header.tensors[f"{PREFIX}lm_head.weight"].offset


def refusal(folder: Path, tensors: dict[str, Array], **config: Any) -> str:
    with pytest.raises(BadInput) as caught:
        resolve(folder, tensors, **config)
    assert str(folder / "it" / "adapter_model.safetensors") in str(caught.value)
    return str(caught.value)


def test_one_tensor_with_two_values_is_refused(tmp_path: Path) -> None:
    tensors = {
        "lm_head.modules_to_save.weight": numbers(9, 4, seed=7),
        "lm_head.weight": numbers(9, 4, seed=8),
    }
    text = refusal(tmp_path, tensors)
    assert "twice, with different values" in text
    assert "lm_head.weight and base_model.model.lm_head.modules_to_save.weight" in text


@pytest.mark.parametrize(
    ("key", "shape"),
    [("lm_head.weight", (8, 4)), ("lm_head.weight", (12, 5)), (f"{Q}.weight", (5, 4))],
)
def test_other_shapes_are_refused(tmp_path: Path, key: str, shape: tuple[int, ...]) -> None:
    text = refusal(tmp_path, {key: numbers(*shape)})
    assert f"{key}: {list(shape)}, base {list(BASE[key].shape)}" in text


def test_a_module_that_the_base_lacks_is_named_with_its_neighbours(tmp_path: Path) -> None:
    text = refusal(tmp_path, {"score.weight": numbers(2, 4)}, task_type="SEQ_CLS")
    assert "score.weight (nearest: lm_head.weight" in text


def test_codes_replace_no_weights(tmp_path: Path) -> None:
    text = refusal(tmp_path, {"lm_head.weight": np.ones((9, 4), np.int8)})
    assert "lm_head.weight: I8, base F32" in text


# --------------------------------------------------------------------------------- trained tokens

TOKENS = f"{EMBEDDING}.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize("key", [TOKENS, f"{TOKENS}.default"])
def test_rows_are_replaced_where_the_config_says(tmp_path: Path, key: str) -> None:
    resolved = resolve(tmp_path, {key: numbers(2, 4)}, trainable_token_indices=[8, 0])
    update = resolved.updates[f"{EMBEDDING}.weight"]
    assert isinstance(update, Replacement)
    assert update.rows == (8, 0)


def test_rows_of_a_replaced_tensor(tmp_path: Path) -> None:
    """As PEFT saves the tokens of a resized embedding."""
    tensors = {
        TOKENS: numbers(2, 4),
        f"{EMBEDDING}.token_adapter.base_layer.weight": numbers(12, 4),
    }
    resolved = resolve(tmp_path, tensors, trainable_token_indices=[11, 0])
    update = resolved.updates[f"{EMBEDDING}.weight"]
    assert isinstance(update, Replacement)
    assert update.extent.spec.shape == (12, 4)
    assert isinstance(update.then, Replacement)
    assert update.then.rows == (11, 0)


@pytest.mark.parametrize(
    "indices", [None, [1], [1, 2, 3], [1, 1], [1, 9], {"lm_head": [1, 2]}], ids=repr
)
def test_rows_that_the_config_does_not_give(tmp_path: Path, indices: object) -> None:
    text = refusal(tmp_path, {TOKENS: numbers(2, 4)}, trainable_token_indices=indices)
    assert "trainable tokens whose rows" in text
    assert f"{EMBEDDING}.weight: [2, 4] for rows" in text


# ---------------------------------------------------------------------------------------- biases


def test_biases_that_peft_did_not_save_are_warned_of(tmp_path: Path) -> None:
    (warning,) = resolve(tmp_path, {}, bias="lora_only").warnings
    assert "none of 1 trained biases" in warning


def test_saved_biases_are_no_warning(tmp_path: Path) -> None:
    tensors = {f"{Q}.base_layer.bias": numbers(4)}
    assert resolve(tmp_path, tensors, bias="lora_only").warnings == ()
