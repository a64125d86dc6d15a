"""The output is an ordinary model folder, with a card, its recipe and a record of the merge."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from crc32c import crc32c
from safetensors import safe_open

import streammerge as sm
from streammerge.errors import Problems
from streammerge.methods import CATALOGUE
from streammerge.recipe import read_recipe
from tests.running import files, make_inputs, tensors, write_recipe

RECIPE = """\
base_model: ./base
merge_method: ties
adapters:
  - {path: ./lora-0, name: math, weight: 0.7, density: 0.5}
  - {path: ./lora-1, weight: 0.3}
parameters: {lambda: 0.9}
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("inputs"), tuned=True)
    (folder / "base" / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "base" / "modeling_odd.py").write_text("raise SystemExit('never run')\n")
    (folder / "base" / "optimizer.pt").write_bytes(b"of training")
    return folder


def merge(inputs: Path, out: Path, text: str, name: str = "cfg") -> Path:
    sm.merge(write_recipe(inputs, name, text), out=out)
    return out


@pytest.fixture(scope="module")
def out(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merge(inputs, tmp_path_factory.mktemp("outs") / "out", RECIPE)


@pytest.fixture(scope="module")
def computed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output whose tensors are all computed, none copied, in float16."""
    text = (
        "base_model: ./base\nmerge_method: linear\nout_dtype: float16\n"
        "models: [{model: ./base, parameters: {weight: 0.5}}, "
        "{model: ./tuned, parameters: {weight: 0.5}}]\n"
    )
    return merge(inputs, tmp_path_factory.mktemp("outs") / "computed", text, "computed")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


# ------------------------------------------------------------------------------------- weights


def test_it_holds_these_files_and_no_others(out: Path) -> None:
    assert set(files(out)) == {
        "LICENSE",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "modeling_odd.py",
        "streammerge.json",
        "streammerge.yaml",
        "tokenizer.json",
    }


def test_nothing_is_left_beside_it(out: Path) -> None:
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_the_library_reads_what_the_base_had(inputs: Path, out: Path) -> None:
    before, after = tensors(inputs / "base"), tensors(out)
    assert list(after) == list(before)
    for name, (dtype, shape, data) in after.items():
        assert (dtype, shape) == before[name][:2]
        assert (data != before[name][2]) == ("_proj" in name), f"{name}: touched, or not"


def test_every_shard_says_that_it_is_of_pytorch(out: Path) -> None:
    """transformers refuses a file without this line."""
    for path in out.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            assert file.metadata() == {"format": "pt"}


def test_the_index_is_complete_and_counts_bytes(out: Path) -> None:
    index = read_json(out / "model.safetensors.index.json")
    held: dict[str, str] = {}
    for path in out.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            held |= dict.fromkeys(file.keys(), path.name)
    assert index["weight_map"] == held
    total = sum(len(data) for _, _, data in tensors(out).values())
    assert index["metadata"]["total_size"] == total


def test_one_shard_has_no_index(inputs: Path, tmp_path: Path) -> None:
    out = merge(inputs, tmp_path / "out", RECIPE + "output: {shard_size: 1GiB}\n", "one")
    assert list(out.glob("*.safetensors*")) == [out / "model.safetensors"]
    assert tensors(out).keys() == tensors(inputs / "base").keys()


def test_a_shard_size_is_kept(inputs: Path, tmp_path: Path) -> None:
    out = merge(inputs, tmp_path / "out", RECIPE + "output: {shard_size: 60KB}\n", "many")
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2
    for number, path in enumerate(shards, 1):
        assert path.name == f"model-{number:05}-of-{len(shards):05}.safetensors"
        with safe_open(path, "numpy") as file:
            assert len(list(file.keys())) == 1 or path.stat().st_size < 70_000
    index = read_json(out / "model.safetensors.index.json")
    assert set(index["weight_map"].values()) == {path.name for path in shards}


# --------------------------------------------------------------------------------- other files


def test_the_donors_files_are_copied_unchanged(inputs: Path, out: Path) -> None:
    for name in ("LICENSE", "tokenizer.json", "chat_template.jinja", "modeling_odd.py"):
        assert (out / name).read_bytes() == (inputs / "base" / name).read_bytes()


def test_the_config_is_the_donors_when_the_dtype_stays(inputs: Path, out: Path) -> None:
    assert (out / "config.json").read_bytes() == (inputs / "base" / "config.json").read_bytes()


def test_the_config_has_the_dtype_of_the_output(inputs: Path, computed: Path) -> None:
    config = read_json(computed / "config.json")
    assert config == {**read_json(inputs / "base" / "config.json"), "torch_dtype": "float16"}
    assert {dtype for dtype, _, _ in tensors(computed).values()} == {"F16"}


def test_the_card_has_what_the_hub_reads(out: Path) -> None:
    _, front, body = (out / "README.md").read_text().split("---\n", 2)
    head = yaml.safe_load(front)
    assert head["base_model"] == ["base", "lora-0", "lora-1"]
    assert head["base_model_relation"] == "merge"
    assert {"merge", "streammerge"} <= set(head["tags"])
    assert head["license"] == "apache-2.0"
    assert (out / "streammerge.yaml").read_text() in body
    assert "math: 14 of 14 tensors applied" in body


def test_the_recipe_reads_back_to_the_same_merge(inputs: Path, out: Path, tmp_path: Path) -> None:
    for name in ("base", "lora-0", "lora-1"):
        (tmp_path / name).symlink_to(inputs / name)
    shutil.copy(out / "streammerge.yaml", tmp_path)
    problems = Problems()
    recipe = read_recipe(tmp_path / "streammerge.yaml", CATALOGUE, problems)
    assert not list(problems) and recipe is not None
    assert recipe.method.name == "ties"
    assert [entry.name for entry in recipe.entries] == ["math", "lora-1"]
    assert recipe.shared["lambda"] == 0.9
    assert files(sm.merge(recipe, out=tmp_path / "again").out) == files(out)


# --------------------------------------------------------------------------------- the record


def test_the_record_describes_the_merge(out: Path) -> None:
    record = read_json(out / "streammerge.json")
    assert record["format"] == 1
    assert record["streammerge"] == sm.__version__
    assert record["method"] == "ties"
    assert len(record["fingerprint"]) == 64
    assert [change["model"] for change in record["changes"]] == ["math", "lora-1"]
    assert all(change["applied"] == change["total"] == 14 for change in record["changes"])
    assert {"device", "machine", "numpy", "blas"} == set(record["environment"])


@pytest.mark.parametrize("folder", ["out", "computed"])
def test_the_checksums_are_those_of_the_files(folder: str, request: pytest.FixtureRequest) -> None:
    out: Path = request.getfixturevalue(folder)
    record = read_json(out / "streammerge.json")
    assert record["shards"].keys() == {path.name for path in out.glob("*.safetensors")}
    for name, shard in record["shards"].items():
        data = (out / name).read_bytes()
        assert shard["bytes"] == len(data)
        assert shard["crc32c"] in (None, crc32c(data))
    held = tensors(out)
    assert record["tensors"].keys() == held.keys()
    for name, crc in record["tensors"].items():
        assert crc in (None, crc32c(held[name][2]))


def test_only_what_the_kernel_copied_has_no_checksum(out: Path, computed: Path) -> None:
    sums = read_json(out / "streammerge.json")["tensors"]
    missing = {name for name, crc in sums.items() if crc is None}
    assert missing == {name for name in tensors(out) if "_proj" not in name}
    record = read_json(computed / "streammerge.json")
    assert None not in record["tensors"].values()
    assert None not in [shard["crc32c"] for shard in record["shards"].values()]


# ----------------------------------------------------------------------------------- file modes


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_modes_follow_the_umask(inputs: Path, tmp_path: Path, umask: int) -> None:
    recipe = write_recipe(inputs, "cfg", RECIPE)
    out = sm.merge(recipe, out=tmp_path / "out").out
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~umask
    for path in out.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path.name
