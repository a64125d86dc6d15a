"""A model folder: its shards and index, what kind of folder it is, and what its donor gives."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from streammerge.errors import BadInput, InputMissing, Refused, StreammergeError
from streammerge.storage.donated import donor_files
from streammerge.storage.folder import (
    ModelFolder,
    open_model,
    output_config,
    shard_names,
)
from streammerge.words import DType
from tests.makers import Tensor, write_index, write_model, write_safetensors

TENSORS: dict[str, Tensor] = {
    name: ("BF16", (2, 2), bytes([place]) * 8) for place, name in enumerate("dcbafe")
}
ONE, TWO = shard_names(2)
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model"


def refused(folder: Path, kind: type[StreammergeError], *words: str) -> None:
    """The folder is refused for one reason, which the message gives with a remedy."""
    with pytest.raises(kind) as caught:
        open_model(folder)
    assert caught.value.remedy
    assert str(caught.value).startswith(str(folder))
    for word in words:
        assert word in str(caught.value)


def check_bytes(model: ModelFolder, tensors: Mapping[str, Tensor]) -> None:
    assert set(model.tensors) == set(tensors)
    assert len(model.tensors) == len(tensors)
    for name, extent in model.tensors.items():
        with open(extent.path, "rb") as file:
            file.seek(extent.offset)
            assert file.read(extent.spec.nbytes) == tensors[name][2]


# -------------------------------------------------------------------------------- what is opened


@pytest.mark.parametrize("shards", [1, 2, 3, 6])
def test_every_tensor_is_found_with_its_bytes(folder: Path, shards: int) -> None:
    model = open_model(write_model(folder, TENSORS, shards, {"model_type": "llama"}))
    check_bytes(model, TENSORS)
    assert list(model.tensors) == list(TENSORS)  # in shard order, then in file order
    assert tuple(os.path.basename(shard.path) for shard in model.shards) == shard_names(shards)
    assert model.config == {"model_type": "llama"}
    assert model.notes == ()
    assert "x" not in model.tensors


def test_shards_come_in_the_order_of_their_names(folder: Path) -> None:
    write_model(folder, TENSORS, 2, {})
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    write_index(folder, dict(reversed(weight_map.items())), 48)
    assert list(open_model(folder).tensors) == list(TENSORS)


def test_a_hub_cache_of_links_works(tmp_path: Path) -> None:
    cache = tmp_path / "models--org--model"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / ("a" * 40)
    write_model(snapshot, TENSORS, 2, {"model_type": "llama"})
    for place, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(cache / "blobs" / str(place))
        file.symlink_to(f"../../blobs/{place}")
    check_bytes(open_model(snapshot), TENSORS)
    assert donor_files(snapshot) == (Path("config.json"),)


def test_an_index_may_name_the_single_file(folder: Path) -> None:
    write_model(folder, TENSORS, 1, {})
    write_index(folder, dict.fromkeys(TENSORS, "model.safetensors"), 48)
    check_bytes(open_model(folder), TENSORS)


def test_names_of_shards_are_free(folder: Path) -> None:
    folder.mkdir()
    write_safetensors(folder / "part-a.safetensors", TENSORS)
    write_index(folder, dict.fromkeys(TENSORS, "part-a.safetensors"), 48)
    check_bytes(open_model(folder), TENSORS)


def test_without_config_there_is_a_note(folder: Path) -> None:
    model = open_model(write_model(folder, TENSORS))
    assert model.config == {}
    assert "no config.json" in model.notes[0]


def test_unrelated_weights_are_noted(folder: Path) -> None:
    write_model(folder, TENSORS, 2, {})
    for name in ("consolidated.safetensors", "adapter_model.safetensors"):
        (folder / name).touch()
    (note,) = open_model(folder).notes
    assert note == "not read: adapter_model.safetensors, consolidated.safetensors"


def test_a_wrong_total_size_is_noted(folder: Path) -> None:
    write_model(folder, TENSORS, 2, {})
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    write_index(folder, weight_map, 47)
    (note,) = open_model(folder).notes
    assert "total_size of 47 bytes" in note
    assert "hold 48" in note


@pytest.mark.parametrize("metadata", [None, {}, "x"])
def test_an_index_needs_no_metadata(folder: Path, metadata: Any) -> None:
    write_model(folder, TENSORS, 2, {})
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | {"metadata": metadata}))
    assert open_model(folder).notes == ()


def test_a_folder_of_the_size_of_70b_opens_in_a_moment(folder: Path) -> None:
    folder.mkdir()
    files = shard_names(30)
    weight_map: dict[str, str] = {}
    for shard, file in enumerate(files):
        names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(723) if i % 30 == shard]
        write_safetensors(folder / file, dict.fromkeys(names, ("BF16", (0, 8192), b"")))
        weight_map.update(dict.fromkeys(names, file))
    write_index(folder, weight_map)
    begin = time.process_time()
    assert len(open_model(folder).tensors) == 723
    assert time.process_time() - begin < 0.5  # 0.02 s measured


# ------------------------------------------------------------------------- what kind of folder


def test_missing_file_and_empty(tmp_path: Path, folder: Path) -> None:
    refused(folder, InputMissing, "no such folder", "nothing")
    folder.symlink_to("gone")
    refused(folder, InputMissing, "a link to gone")
    folder.unlink()
    folder.symlink_to("model")
    refused(folder, InputMissing, "lead back to themselves")
    folder.unlink()
    folder.touch()
    refused(folder, BadInput, "is not a folder", str(tmp_path))
    folder.unlink()
    folder.mkdir()
    refused(folder, InputMissing, "holds no model weights", "found:    nothing")
    (folder / "readme.txt").touch()
    refused(folder, InputMissing, "holds no model weights", "readme.txt")


def test_an_impossible_path(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no possible file name"):
        open_model(tmp_path / "a\0b")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["pytorch_model.bin"], ("pytorch_model.bin", "convert it to safetensors")),
        (["pytorch_model-00001-of-00002.bin", "config.json"], ("pickle can run code",)),
        (["adapter_config.json", "adapter_model.safetensors"], ("an adapter", "`adapters`")),
        (["consolidated.safetensors", "params.json"], ("consolidated.safetensors", "layout")),
        (["model.Q4_0.gguf"], ("model.Q4_0.gguf",)),
    ],
)
def test_other_kinds_of_folders(folder: Path, files: list[str], words: tuple[str, ...]) -> None:
    folder.mkdir()
    for file in files:
        (folder / file).touch()
    refused(folder, BadInput, "is not a model in safetensors", *words)


def test_a_pipeline_names_its_models(folder: Path) -> None:
    for part in ("text_encoder", "transformer"):
        write_model(folder / part, TENSORS)
    (folder / "scheduler").mkdir()
    (folder / "model_index.json").write_text("{}")
    refused(folder, BadInput, "diffusers pipeline of the models text_encoder, transformer")


def test_shards_without_an_index(folder: Path) -> None:
    write_model(folder, TENSORS, 2)
    (folder / INDEX).unlink()
    refused(folder, InputMissing, "index.json is missing", ONE)


# --------------------------------------------------------------------------------- index and shards


OUTSIDE = [
    "../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "a\0.safetensors", "", "..",
    "a\\b.safetensors", "x.bin", "x\n.safetensors", "x" * 300 + ".safetensors", None, 7, ["x"],
]  # fmt: skip


@pytest.mark.parametrize("value", OUTSIDE)
def test_an_index_names_files_of_the_folder(folder: Path, value: Any) -> None:
    write_model(folder, TENSORS, 2, {})
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["a"] = value
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, BadInput, INDEX, "names no file of the folder")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{", ("not valid JSON", "line 1")),
        (b"[]", ("not a JSON object",)),
        (b"\xff{}", ("not UTF-8",)),
        (b"[" * 200_000, ("absurdly deep",)),
        (b"{}", ("weight_map is malformed", "None")),
        (b'{"weight_map": {}}', ("weight_map is malformed",)),
        (b'{"weight_map": ["a"]}', ("weight_map is malformed",)),
        (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', ("a key twice", "'a'")),
    ],
)
def test_a_bad_index(folder: Path, text: bytes, words: tuple[str, ...]) -> None:
    write_model(folder, TENSORS, 2, {})
    (folder / INDEX).write_bytes(text)
    refused(folder, BadInput, INDEX, *words)


def test_an_index_that_is_a_fifo_does_not_block(folder: Path) -> None:
    write_model(folder, TENSORS, 2, {})
    (folder / INDEX).unlink()
    os.mkfifo(folder / INDEX)
    refused(folder, BadInput, "a FIFO")


def test_a_shard_that_is_listed_and_absent(folder: Path) -> None:
    write_model(folder, TENSORS, 2, {})
    (folder / TWO).unlink()
    refused(folder, InputMissing, TWO, "is listed in model.safetensors.index.json", "download")


def test_a_shard_that_is_a_dangling_link(folder: Path) -> None:
    write_model(folder, TENSORS, 2, {})
    (folder / TWO).unlink()
    (folder / TWO).symlink_to("../blobs/x")
    refused(folder, InputMissing, TWO, "link to ../blobs/x")


@pytest.mark.parametrize("extra", ["model-00003-of-00003.safetensors", "model.safetensors"])
def test_a_shard_that_is_present_and_unlisted(folder: Path, extra: str) -> None:
    write_model(folder, TENSORS, 2, {})
    write_safetensors(folder / extra, {"z": ("U8", (1,), b"z")})
    refused(folder, BadInput, extra, "does not belong", "remove")


def test_shards_left_beside_a_single_file(folder: Path) -> None:
    write_model(folder, TENSORS, 2, {})
    (folder / INDEX).unlink()
    (folder / TWO).unlink()
    write_safetensors(folder / "model.safetensors", TENSORS)
    refused(folder, BadInput, ONE, "does not belong")


def test_a_tensor_elsewhere_than_the_index_says(folder: Path) -> None:
    write_model(folder, TENSORS, 2, {})
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["d"] = TWO
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(Refused) as caught:
        open_model(folder)
    one, two = caught.value.problems
    assert f"{ONE}: holds tensors that {INDEX} does not place there" in str(one)
    assert f"{TWO}: lacks tensors that {INDEX} places there" in str(two)
    assert one.found == two.found == "1: d"


def test_a_tensor_that_the_index_does_not_list(folder: Path) -> None:
    write_model(folder, TENSORS, 2, {})
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["d"]
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, BadInput, ONE, "does not place there", "1: d")


def test_a_tensor_in_two_shards(folder: Path) -> None:
    write_model(folder, TENSORS, 2, {})
    write_safetensors(folder / TWO, {name: TENSORS[name] for name in "dafe"})
    with pytest.raises(Refused) as caught:
        open_model(folder)
    assert [problem.found for problem in caught.value.problems] == ["1: d", "1: d"]
    assert str(caught.value).count("that another shard holds too") == 2


def test_many_names_are_counted(folder: Path) -> None:
    write_model(folder, TENSORS, 2, {})
    write_safetensors(folder / TWO, {})
    write_index(folder, dict.fromkeys([f"t{i}" for i in range(9)], TWO) | dict.fromkeys("dcb", ONE))
    refused(folder, BadInput, "9: t0, t1, t2 and 6 more")


def test_all_problems_are_said_at_once(folder: Path) -> None:
    write_model(folder, TENSORS, 3, {"quantization_config": {"quant_method": "gptq"}})
    one, two, three = shard_names(3)
    (folder / one).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (folder / two).unlink()
    with pytest.raises(Refused) as caught:
        open_model(folder)
    assert caught.value.exit_code == 66
    text = str(caught.value)
    assert "'gptq'" in text
    assert "git lfs pull" in text
    assert two in text
    assert three not in text


# ------------------------------------------------------------------------------ config, quantised


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, ("'bitsandbytes'",)),
        ({"quantization_config": {"load_in_4bit": True}}, ("a quantization_config",)),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, ("'fp8'",)),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, ("compressed",)),
    ],
)
def test_quantised_models_are_refused(folder: Path, config: Any, words: tuple[str, ...]) -> None:
    write_model(folder, TENSORS, 1, config)
    refused(folder, BadInput, "config.json", "quantised", *words)


@pytest.mark.parametrize("config", [{"quantization_config": None}, {"quantization_config": {}}])
def test_an_empty_quantisation_is_none(folder: Path, config: Any) -> None:
    check_bytes(open_model(write_model(folder, TENSORS, 1, config)), TENSORS)


def test_8_bit_floats_are_refused(folder: Path) -> None:
    write_model(folder, TENSORS | {"x": ("F8_E4M3", (2,), b"xx")}, 2, {})
    refused(folder, BadInput, TWO, "8-bit floats", "1 tensors: x")


def test_integers_are_buffers(folder: Path) -> None:
    tensors = TENSORS | {"ids": ("I64", (1,), bytes(8)), "mask": ("BOOL", (2,), b"\0\1")}
    check_bytes(open_model(write_model(folder, tensors, 1, {})), tensors)


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1, "a": 2}', '{"a":' * 99_999])
def test_a_bad_config(folder: Path, text: str) -> None:
    write_model(folder, TENSORS)
    (folder / "config.json").write_text(text)
    refused(folder, BadInput, "config.json")


def test_the_output_config_has_the_dtype_wherever_the_input_had_one() -> None:
    config = {
        "_name_or_path": "/home/someone/model",
        "torch_dtype": "float16",
        "hidden_size": 8,
        "text_config": {"dtype": "float32", "_name_or_path": "x", "rope_scaling": {"dtype": "z"}},
        "encoder": {"model_type": "vit", "torch_dtype": "float16"},
        "vision_config": {"hidden_size": 4},
    }
    before = json.dumps(config)
    assert output_config(config, dtype=DType.BF16) == {
        "torch_dtype": "bfloat16",
        "hidden_size": 8,
        "text_config": {"dtype": "bfloat16", "rope_scaling": {"dtype": "z"}},
        "encoder": {"model_type": "vit", "torch_dtype": "bfloat16"},
        "vision_config": {"hidden_size": 4},
    }
    assert json.dumps(config) == before


def test_the_output_config_says_that_a_head_is_untied_wherever_that_is_read() -> None:
    """The image model has no words, and the text model's config may leave out how many it has."""
    config = {
        "text_config": {"hidden_size": 4},
        "decoder": {"vocab_size": 9, "tie_word_embeddings": True},
        "vision_config": {"hidden_size": 4},
    }
    own = {"tie_word_embeddings": False}
    assert output_config(config, dtype=None, untied=True) == {
        **own,
        "text_config": {"hidden_size": 4, **own},
        "decoder": {"vocab_size": 9, **own},
        "vision_config": {"hidden_size": 4},
    }
    assert output_config(config, dtype=None) == config


def test_the_output_config_keeps_the_dtype_when_none_is_asked_for() -> None:
    config = {"dtype": "float16", "a": [1, {"b": None}]}
    assert output_config(config, dtype=None) == config
    assert output_config({}, dtype=DType.F32) == {}


def test_usual_shard_names() -> None:
    assert shard_names(1) == ("model.safetensors",)
    assert shard_names(12)[9] == "model-00010-of-00012.safetensors"
    assert len(shard_names(12)) == 12


# ---------------------------------------------------------------------------------- donor's files

GIVEN = [
    "LICENSE", "LICENCE.txt", "Notice.md", "USE_POLICY.md", "additional_chat_templates/tool.jinja",
    "added_tokens.json", "chat_template.jinja", "config.json", "generation_config.json",
    "merges.txt", "modeling_x.py", "preprocessor_config.json", "qwen.tiktoken",
    "special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer_config.json",
    "vocab.json", "source.spm",
]  # fmt: skip
KEPT = [
    "README.md", "model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json",
    "adapter_config.json", "streammerge.json", "trainer_state.json", "training_args.bin",
    "all_results.json", ".gitattributes", ".secret.json", "additional_chat_templates/.x.jinja",
    "additional_chat_templates/x.py", "original/config.json", "params.json", "image.png",
    "license.safetensors", "notice.bin",
]  # fmt: skip


def test_what_the_donor_gives(folder: Path) -> None:
    for name in GIVEN + KEPT:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "assets.json").mkdir()
    os.mkfifo(folder / "pipe.json")
    assert donor_files(folder) == tuple(sorted(map(Path, GIVEN)))


def test_a_donor_file_that_is_a_dangling_link_is_refused(folder: Path) -> None:
    folder.mkdir()
    (folder / "tokenizer.json").symlink_to("../blobs/x")
    with pytest.raises(InputMissing, match=r"tokenizer\.json: is a link"):
        donor_files(folder)
