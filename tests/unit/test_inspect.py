"""What `inspect` says of adapters: the facts that there are, and all that hinders a merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from adapter_files import PREFIX, lora, write_config, write_weights

from streammerge.commands.inspect import describe, examine
from streammerge.errors import BadInput, InputMissing, Problems, Refused
from tests.makers import Tensor, write_model

Q = "model.layers.0.self_attn.q_proj"
BASE: dict[str, Tensor] = {
    f"{Q}.weight": ("F32", (4, 4), bytes(64)),
    f"{Q}.bias": ("F32", (4,), bytes(16)),
    "lm_head.weight": ("F32", (9, 4), bytes(144)),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", BASE, config={"tie_word_embeddings": False})


def look(path: Path, base: Path | None = None) -> tuple[dict[str, Any], Problems]:
    problems = Problems()
    return examine(str(path), str(base) if base else None, problems), problems


def adapter(folder: Path, more: dict[str, tuple[int, ...]], **config: Any) -> Path:
    write_config(folder, **config)
    write_weights(folder, lora(Q, 4, 4) | {PREFIX + key: shape for key, shape in more.items()})
    return folder


def test_what_an_adapter_is_and_touches(tmp_path: Path, base: Path) -> None:
    more: dict[str, tuple[int, ...]] = {"lm_head.weight": (9, 4), f"{Q}.lora_B.bias": (4,)}
    path = adapter(tmp_path / "it", more, lora_bias=True, base_model_name_or_path="some/base")
    facts, problems = look(path, base)
    assert not problems
    assert facts["kind"] == "LoRA, lora_bias, tensors in full"
    assert (facts["ranks"], facts["scales"]) == ([2], [2.0])
    assert (facts["targets"], facts["replaces"]) == ({"q_proj": 1}, {"lm_head": 1})
    assert sorted(facts["touches"]) == sorted(BASE)
    text = describe(facts)
    assert "scaling       alpha / rank, alpha 4: 2\n" in text
    assert "on that base  3 tensors applied" in text


@pytest.mark.parametrize(
    ("key", "shape", "config", "kind"),
    [
        (f"{Q}.lora_magnitude_vector", (4,), {"use_dora": True}, "DoRA"),
        (
            "lm_head.token_adapter.trainable_tokens_delta",
            (1, 4),
            {"trainable_token_indices": [1]},
            "LoRA, trainable tokens",
        ),
    ],
)
def test_kinds(
    tmp_path: Path, key: str, shape: tuple[int, ...], config: dict[str, Any], kind: str
) -> None:
    facts, _ = look(adapter(tmp_path, {key: shape}, **config))
    assert facts["kind"] == kind


def test_all_that_hinders_is_said_beside_what_is_known(tmp_path: Path, base: Path) -> None:
    more: dict[str, tuple[int, ...]] = {"lm_head.weight": (8, 4), "model.norm.weight": (4,)}
    facts, problems = look(adapter(tmp_path / "it", more), base)
    assert facts["touches"] == []
    assert facts["targets"] == {"q_proj": 1}
    assert len(facts["hindered_by"]) == len(problems) == 2
    text = "\n".join(facts["hindered_by"])
    assert "lm_head.weight: [8, 4], base [9, 4]" in text
    assert "model.norm.weight (nearest: " in text
    with pytest.raises(Refused) as caught:
        problems.raise_any()
    assert caught.value.exit_code == 65


def test_a_refused_config_hides_no_tensors(tmp_path: Path) -> None:
    facts, problems = look(adapter(tmp_path, {}, use_qalora=True))
    assert "QA-LoRA" in facts["hindered_by"][0]
    assert (facts["kind"], facts["ranks"]) == ("LoRA", [2])
    assert "alpha" not in facts
    assert len(problems) == 1
    assert "rank          2" in describe(facts)


def test_a_pickle_is_named_and_not_opened(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"no pickle at all")
    facts, problems = look(tmp_path)
    assert "is a pickle" in facts["hindered_by"][0]
    with pytest.raises(BadInput):
        problems.raise_any()


def test_a_trainers_folder_is_looked_into(tmp_path: Path) -> None:
    adapter(tmp_path / "checkpoint-500", {})
    facts, _ = look(tmp_path)
    assert facts["path"] == str(tmp_path / "checkpoint-500")


def test_a_base_that_is_not_there_hinders(tmp_path: Path) -> None:
    _, problems = look(adapter(tmp_path / "it", {}), tmp_path / "none")
    with pytest.raises(InputMissing):
        problems.raise_any()
