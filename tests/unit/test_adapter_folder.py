"""Which folders are adapters, and what is said of those that are not."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapter_files import adapter, lora, write_config, write_weights

from streammerge.adapters import open_adapter
from streammerge.errors import BadInput, InputMissing, Refused, StreammergeError

SHAPES = lora("model.layers.0.self_attn.q_proj", 4, 4)


def refusal(path: Path) -> StreammergeError:
    with pytest.raises(StreammergeError) as caught:
        open_adapter(path, "it")
    assert str(path) in str(caught.value), "the message does not say where"
    assert "remedy:" in str(caught.value)
    return caught.value


def test_a_folder_is_opened_without_reading_tensors(tmp_path: Path) -> None:
    write_config(tmp_path, base_model_name_or_path="some/model", peft_version="0.21.2")
    write_weights(tmp_path, SHAPES)
    folder = open_adapter(tmp_path, "math")
    assert (folder.name, folder.path, folder.notes) == ("math", tmp_path, ())
    assert set(folder.header.tensors) == set(SHAPES)
    assert folder.config.base_model_name_or_path == "some/model"


def test_a_missing_folder(tmp_path: Path) -> None:
    assert isinstance(refusal(tmp_path / "nowhere"), InputMissing)


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    write_weights(tmp_path, SHAPES)
    problem = refusal(tmp_path / "adapter_model.safetensors")
    assert "a folder, not a file" in str(problem)
    assert f"adapter_model.safetensors: {tmp_path}" in str(problem.remedy)


def test_an_empty_folder(tmp_path: Path) -> None:
    problem = refusal(tmp_path)
    assert isinstance(problem, InputMissing)
    assert problem.found == "an empty folder"


def test_weights_without_a_config_name_what_is_there(tmp_path: Path) -> None:
    write_weights(tmp_path, SHAPES)
    problem = refusal(tmp_path)
    assert problem.exit_code == 66
    assert problem.found == "adapter_model.safetensors"


def test_a_trainers_folder_names_its_checkpoints_and_the_latest(tmp_path: Path) -> None:
    for step in (1000, 500, 90):
        write_config(tmp_path / f"checkpoint-{step}")
    (tmp_path / "runs").mkdir()
    problem = refusal(tmp_path)
    assert isinstance(problem, InputMissing)
    assert "".join(str(problem.found).split()) == "checkpoint-90/checkpoint-500/checkpoint-1000/"
    assert str(problem.remedy).endswith(str(tmp_path / "checkpoint-1000"))


@pytest.mark.parametrize("inner", ["checkpoint-500", "math", "checkpoint-500/math"])
def test_the_only_adapter_below_is_found(tmp_path: Path, inner: str) -> None:
    """A trainer's last checkpoint, an adapter that PEFT saved under its name, and both."""
    adapter(tmp_path / inner, SHAPES)
    (tmp_path / "runs" / "events").mkdir(parents=True)
    opened = open_adapter(tmp_path, "it")
    assert opened.path == tmp_path / inner
    assert opened.notes == (f"found in {inner}/ of the folder that is named",)
    assert open_adapter(tmp_path / inner, "it").notes == ()


def test_an_adapter_beside_its_checkpoints_is_the_one_that_is_meant(tmp_path: Path) -> None:
    adapter(tmp_path, SHAPES)
    write_config(tmp_path / "checkpoint-500")
    assert open_adapter(tmp_path, "it").path == tmp_path


def test_an_adapter_below_a_full_model_is_not_guessed(tmp_path: Path) -> None:
    adapter(tmp_path / "lora", SHAPES)
    (tmp_path / "config.json").write_text("{}")
    assert "this is a full model" in str(refusal(tmp_path))


def test_several_named_adapters_are_listed(tmp_path: Path) -> None:
    adapter(tmp_path / "math", SHAPES)
    adapter(tmp_path / "code", SHAPES)
    problem = refusal(tmp_path)
    assert isinstance(problem, InputMissing)
    assert "".join(str(problem.found).split()) == "code/math/"


def test_a_full_model_is_sent_to_models(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    problem = refusal(tmp_path)
    assert isinstance(problem, BadInput)
    assert problem.remedy == "list it under `models`"


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x02}q\x00.")
    problem = refusal(tmp_path)
    assert isinstance(problem, BadInput)
    assert "not opened" in str(problem)
    assert "save_pretrained" in str(problem.remedy)


def test_a_pickle_beside_safetensors_does_not_matter(tmp_path: Path) -> None:
    write_config(tmp_path)
    write_weights(tmp_path, SHAPES)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x02}q\x00.")
    open_adapter(tmp_path, "it")


def test_a_name_that_cannot_be_is_no_traceback() -> None:
    with pytest.raises(BadInput, match="no possible file name"):
        open_adapter(Path("a\0b"), "it")


def test_missing_weights(tmp_path: Path) -> None:
    write_config(tmp_path)
    assert isinstance(refusal(tmp_path), InputMissing)


def test_config_and_weights_are_both_judged(tmp_path: Path) -> None:
    write_config(tmp_path, use_qalora=True, r="8")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    problem = refusal(tmp_path)
    assert isinstance(problem, Refused)
    text = str(problem)
    assert all(word in text for word in ("QA-LoRA", "`r`", "adapter_model.safetensors: is empty"))
