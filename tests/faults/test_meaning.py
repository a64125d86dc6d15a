"""Inputs that are well formed and do not fit together, or hold what arithmetic trips over."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

import streammerge as sm
from streammerge import events
from streammerge.errors import BadInput
from tests.makers import Tensor, write_model
from tests.running import tensors


def f32(*values: float, shape: tuple[int, ...] | None = None) -> Tensor:
    return "F32", shape or (len(values),), struct.pack(f"<{len(values)}f", *values)


def full(rows: int, cols: int, value: float = 1.0) -> Tensor:
    return f32(*[value] * (rows * cols), shape=(rows, cols))


USUAL: dict[str, Tensor] = {
    "model.embed_tokens.weight": full(32, 4),
    "model.layers.0.up.weight": full(6, 4),
    "lm_head.weight": full(32, 4),
}
LINEAR = "merge_method: linear\nmodels: [{model: ./one}, {model: ./two}]\n"


def recipe(folder: Path, one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> Path:
    """The mean of two models."""
    config = {"model_type": "llama", "tie_word_embeddings": "lm_head.weight" not in one}
    write_model(folder / "one", one, 1, config)
    write_model(folder / "two", two, 1, config)
    path = folder / "cfg.yaml"
    path.write_text(LINEAR)
    return path


def refused(path: Path) -> str:
    with pytest.raises(sm.StreammergeError) as caught:
        sm.merge(path, out=path.parent / "out")
    assert caught.value.exit_code == 65
    assert not (path.parent / "out").exists()
    return str(caught.value)


# ------------------------------------------------------------------------------- shapes and names


def test_vocabularies_of_two_lengths_are_refused_with_both_and_the_remedy(tmp_path: Path) -> None:
    two = {**USUAL, "model.embed_tokens.weight": full(33, 4), "lm_head.weight": full(33, 4)}
    said = refused(recipe(tmp_path, USUAL, two))
    assert said.count("the shape of ") == 2
    assert "[33, 4]" in said and "[32, 4]" in said
    assert "resize_token_embeddings" in said


def test_other_shapes_are_refused_with_both(tmp_path: Path) -> None:
    said = refused(recipe(tmp_path, USUAL, {**USUAL, "model.layers.0.up.weight": full(4, 6)}))
    assert "model.layers.0.up.weight" in said and "[4, 6]" in said and "[6, 4]" in said


def test_missing_and_extra_tensors_are_named(tmp_path: Path) -> None:
    two = {**USUAL, "model.layers.1.up.weight": full(6, 4)}
    del two["model.layers.0.up.weight"]
    said = refused(recipe(tmp_path, USUAL, two))
    assert "two lacks 1 tensor that one has" in said and "model.layers.0.up.weight" in said
    assert "two has 1 tensor that one lacks" in said and "model.layers.1.up.weight" in said


def test_buffers_that_some_versions_store_follow_the_donor(tmp_path: Path) -> None:
    name = "model.layers.0.rotary_emb.inv_freq"
    one = {**USUAL, name: f32(1.0, 0.5)}
    path = recipe(tmp_path, one, USUAL)
    said: list[str] = []
    sm.merge(path, out=tmp_path / "out", emit=lambda e: said.append(getattr(e, "text", "")))
    assert any("buffers follow one" in line for line in said)
    assert tensors(tmp_path / "out")[name] == one[name]


# ---------------------------------------------------------------------------------------- dtypes


def test_mixed_dtypes_take_the_donors(tmp_path: Path) -> None:
    halves = struct.pack("<24e", *[3.0] * 24)
    two = {**USUAL, "model.layers.0.up.weight": ("F16", (6, 4), halves)}
    sm.merge(recipe(tmp_path, USUAL, two), out=tmp_path / "out")
    assert tensors(tmp_path / "out")["model.layers.0.up.weight"] == full(6, 4, 2.0)


@pytest.mark.parametrize("dtype", ["I64", "U8", "BOOL"])
def test_integer_buffers_are_copied_where_all_agree(tmp_path: Path, dtype: str) -> None:
    size = 8 if dtype == "I64" else 1
    buffer: Tensor = dtype, (3,), bytes([1, 0, 1] + [0] * 3 * (size - 1))
    one = {**USUAL, "model.steps": buffer}
    sm.merge(recipe(tmp_path, one, one), out=tmp_path / "out")
    assert tensors(tmp_path / "out")["model.steps"] == buffer
    other = {**USUAL, "model.steps": (dtype, (3,), bytes(3 * size))}
    said = refused(recipe(tmp_path / "again", one, other))
    assert "the buffer model.steps differs" in said


def test_tensors_without_dimensions_and_without_elements(tmp_path: Path) -> None:
    one = {**USUAL, "model.scale": f32(2.0, shape=()), "model.none": ("F32", (0, 4), b"")}
    two = {**USUAL, "model.scale": f32(4.0, shape=()), "model.none": ("F32", (0, 4), b"")}
    sm.merge(recipe(tmp_path, one, two), out=tmp_path / "out")
    found = tensors(tmp_path / "out")
    assert found["model.scale"] == f32(3.0, shape=())
    assert found["model.none"] == ("F32", (0, 4), b"")


# ---------------------------------------------------------------------------------------- values


def test_denormals_and_signed_zeros_come_through(tmp_path: Path) -> None:
    odd = f32(3e-45, -3e-45, 1e-39, -0.0, 0.0, 1e-38)  # half of the first can be told
    one = {**USUAL, "model.odd": odd}
    sm.merge(recipe(tmp_path, one, one), out=tmp_path / "out")
    found = np.frombuffer(tensors(tmp_path / "out")["model.odd"][2], "<f4")
    expected = np.frombuffer(odd[2], "<f4")
    assert np.array_equal(found, expected)


def test_infinity_is_named_with_its_file(tmp_path: Path) -> None:
    two = {**USUAL, "model.layers.0.up.weight": full(6, 4, float("inf"))}
    said = refused(recipe(tmp_path, USUAL, two))
    assert f"{tmp_path / 'two' / 'model.safetensors'}: model.layers.0.up.weight" in said
    assert "24 values are NaN or infinite" in said


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_a_task_vector_of_zeros_gives_the_base(tmp_path: Path, method: str) -> None:
    write_model(tmp_path / "base", USUAL, 1, {"model_type": "llama"})
    write_model(tmp_path / "same", USUAL, 1, {"model_type": "llama"})
    path = tmp_path / "cfg.yaml"
    knobs = ", parameters: {density: 0.5}" if method == "ties" else ""
    path.write_text(
        f"merge_method: {method}\nbase_model: ./base\nmodels: [{{model: ./same{knobs}}}]\n"
    )
    sm.merge(path, out=tmp_path / "out")
    assert tensors(tmp_path / "out") == USUAL


def test_a_file_that_ends_in_zeros_is_warned_of(tmp_path: Path) -> None:
    """The right size, and the last pages never written, as a torn copy leaves it."""
    one = {**USUAL, "model.last.weight": full(64, 64)}
    path = recipe(tmp_path, one, one)
    file = tmp_path / "two" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-8192:] = bytes(8192)
    file.write_bytes(data)
    said: list[events.Event] = []
    sm.merge(path, out=tmp_path / "out", emit=said.append)
    warned = [one.text for one in said if isinstance(one, events.Warned)]
    assert [line for line in warned if str(file) in line and "8192 bytes" in line], warned
    assert not [line for line in warned if str(tmp_path / "one") in line]


def test_bad_input_is_of_one_class(tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        sm.merge(
            recipe(tmp_path, USUAL, {**USUAL, "lm_head.weight": full(6, 4)}), out=tmp_path / "out"
        )
