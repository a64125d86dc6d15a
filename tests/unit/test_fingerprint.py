"""What makes two merges the same, and what tells them apart."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import streammerge as sm
from streammerge.planning.fingerprint import identify
from tests.makers import write_model
from tests.running import make_inputs, tensors, write_recipe

RECIPE = """\
base_model: ./base
merge_method: linear
models: [{model: ./tuned}]
adapters: [{path: ./lora-0}, {path: ./lora-1}]
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"), tuned=True)


@pytest.fixture
def copied(inputs: Path, tmp_path: Path) -> Path:
    return shutil.copytree(inputs, tmp_path / "copied")


def fingerprint(folder: Path, recipe_yaml: str = "recipe") -> str:
    plan = sm.plan(write_recipe(folder, "cfg", RECIPE))
    return identify(plan.inputs, plan.layouts, recipe_yaml).fingerprint


def turn(model: Path, shards: int) -> None:
    """Put a model's tensors in the reverse order and into other files."""
    turned = dict(reversed(tensors(model).items()))
    for file in model.glob("model*"):
        file.unlink()
    write_model(model, turned, shards)


def test_a_copy_and_another_order_beside_the_donor_are_the_same(inputs: Path, copied: Path) -> None:
    turn(copied / "tuned", shards=3)
    assert fingerprint(copied) == fingerprint(inputs)


def test_the_donors_order_is_the_outputs_layout(inputs: Path, copied: Path) -> None:
    turn(copied / "base", shards=2)
    assert fingerprint(copied) != fingerprint(inputs)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: flip(next(folder.glob("tuned/*.safetensors")), -1),
        lambda folder: flip(next(folder.glob("base/*.safetensors")), -1),
        lambda folder: flip(folder / "lora-1/adapter_model.safetensors", -1),
        lambda folder: (folder / "base/tokenizer.json").write_text("{}"),
        lambda folder: shutil.copy(
            folder / "lora-0/adapter_model.safetensors", folder / "lora-1/adapter_model.safetensors"
        ),
    ],
    ids=["a bit of a model", "a bit of the base", "a bit of an adapter", "tokenizer", "adapter"],
)
def test_other_contents_are_told_apart(
    inputs: Path, copied: Path, change: Callable[[Path], object]
) -> None:
    change(copied)
    assert fingerprint(copied) != fingerprint(inputs)


def test_another_recipe_is_told_apart(inputs: Path) -> None:
    assert fingerprint(inputs, "one") != fingerprint(inputs, "other")
