"""From a folder to updates: every tensor of an adapter is applied, or it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from adapter_files import PREFIX, adapter, base_of, lora

from streammerge.adapters import resolve_adapter
from streammerge.errors import BadInput, Refused, StreammergeError
from streammerge.words import DType, Factors

ATTENTION = "model.layers.0.self_attn"
BASE = base_of(
    {
        "lm_head.weight": (9, 4),
        f"{ATTENTION}.v_proj.weight": (2, 4),
        f"{ATTENTION}.q_proj.weight": (4, 4),
        "model.embed_tokens.weight": (9, 4),
    }
)
UNTIED = {"model_type": "llama", "tie_word_embeddings": False}
SHAPES = lora(f"{ATTENTION}.v_proj", 2, 4) | lora(f"{ATTENTION}.q_proj", 4, 4)


def test_updates_come_in_the_order_of_the_base(tmp_path: Path) -> None:
    resolved = resolve_adapter(adapter(tmp_path, SHAPES), BASE, UNTIED)
    q, v = f"{ATTENTION}.q_proj", f"{ATTENTION}.v_proj"
    assert list(resolved.updates) == [f"{v}.weight", f"{q}.weight"]
    update = resolved.updates[f"{v}.weight"]
    assert isinstance(update, Factors)
    assert (update.scale, update.left.transposed) == (2.0, False)
    names = [side.extent.spec.name for side in (update.left, update.right)]
    assert names == [f"{PREFIX}{v}.lora_B.weight", f"{PREFIX}{v}.lora_A.weight"]
    assert update.left.extent.path == str(tmp_path / "adapter_model.safetensors")
    assert resolved.notes == ()


def refusal(folder: Path, shapes: dict[str, Any], config: dict[str, Any] = UNTIED) -> str:
    with pytest.raises(StreammergeError) as caught:
        resolve_adapter(adapter(folder, shapes), BASE, config)
    assert caught.value.exit_code == 65
    text = str(caught.value)
    assert str(folder / "adapter_model.safetensors") in text
    return text


def test_an_adapter_without_lora_tensors(tmp_path: Path) -> None:
    assert "holds no tensors that change a model" in refusal(tmp_path, {})


def test_nothing_but_training_state_is_no_adapter(tmp_path: Path) -> None:
    assert "holds no tensors that change a model" in refusal(
        tmp_path, {"q.lora_velora_embed": (4,)}
    )


def test_all_kinds_of_problems_are_said_at_once(tmp_path: Path) -> None:
    shapes = (
        SHAPES
        | lora("model.layers.9.self_attn.q_proj", 4, 4)
        | lora(f"{ATTENTION}.q_proj", 4, 4, rank=3)
        | {f"{PREFIX}model.embed_tokens.trainable_tokens_delta": (2, 9)}
    )
    folder = adapter(tmp_path, shapes)
    with pytest.raises(Refused) as caught:
        resolve_adapter(folder, BASE, UNTIED)
    assert len(caught.value.problems) == 3
    text = str(caught.value)
    assert "trainable tokens" in text
    assert f"model.layers.9.self_attn.q_proj.weight (nearest: {ATTENTION}.q_proj.weight" in text
    assert f"{ATTENTION}.q_proj: rank 3 in the file, 2 in the config" in text


# ----------------------------------------------------------------------------------- tied heads

HEAD = lora("lm_head", 9, 4)
NO_HEAD = {name: extent for name, extent in BASE.items() if name != "lm_head.weight"}


def test_a_head_that_is_not_there_is_no_tied_head(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="name no tensor of the base, out of 3"):
        resolve_adapter(adapter(tmp_path, HEAD | SHAPES), NO_HEAD, UNTIED)


def test_a_tied_base_takes_adapters_on_other_layers(tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True}
    assert len(resolve_adapter(adapter(tmp_path, SHAPES), NO_HEAD, tied).updates) == 2


# ----------------------------------------------------------------------------------------- notes


@pytest.mark.parametrize(
    ("named", "path", "noted"),
    [
        ("someone/another-model", "/models/base/model.safetensors", True),
        ("/home/trainer/base", "/models/base/model.safetensors", False),
        ("someone/base", "/models/base/model.safetensors", False),
        ("someone/m", "/hub/models--someone--m/snapshots/0a1b/model.safetensors", False),
        ("other/m", "/hub/models--someone--m/snapshots/0a1b/model.safetensors", True),
        (None, "/models/base/model.safetensors", False),
    ],
)
def test_another_base_in_the_config_is_one_line(
    tmp_path: Path, named: str | None, path: str, noted: bool
) -> None:
    shapes = {name: extent.spec.shape for name, extent in BASE.items()}
    folder = adapter(tmp_path, SHAPES, base_model_name_or_path=named)
    notes = resolve_adapter(folder, base_of(shapes, path=path), UNTIED).notes
    assert len(notes) == noted
    assert all(repr(named) in note for note in notes)


def test_alpha_zero_is_a_value_and_is_said(tmp_path: Path) -> None:
    folder = adapter(tmp_path, SHAPES, alpha_pattern={"q_proj": 0})
    resolved = resolve_adapter(folder, BASE, UNTIED)
    assert [update.scale for update in resolved.updates.values()] == [2.0, 0.0]  # type: ignore[union-attr]
    assert resolved.notes == ("alpha is 0 for 1 of its 2 tensors: these stay unchanged",)


def test_moved_names_and_training_state_are_said(tmp_path: Path) -> None:
    shapes = {key.replace("model.layers", "layers"): shape for key, shape in SHAPES.items()}
    state = {f"{PREFIX}layers.0.self_attn.q_proj.lora_velora_embed": (4,)}
    folder = adapter(tmp_path, shapes | state, velora_config={"num_groups": 4})
    resolved = resolve_adapter(folder, BASE, UNTIED)
    assert len(resolved.updates) == 2
    assert [note.split()[0] for note in resolved.notes] == ["trained", "its", "1"]
    assert "with `model.` in front" in resolved.notes[1]


def test_a_base_of_codes_is_refused(tmp_path: Path) -> None:
    shapes = {name: extent.spec.shape for name, extent in BASE.items()}
    with pytest.raises(BadInput, match="codes, not weights"):
        resolve_adapter(adapter(tmp_path, SHAPES), base_of(shapes, DType.U8), UNTIED)
