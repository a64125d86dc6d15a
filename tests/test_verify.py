"""`streammerge verify`: whatever is wrong with an output is found and named, at its depth."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import streammerge as sm
from streammerge import grid
from streammerge.commands.recompute import Lead, compare_copies, recompute
from streammerge.commands.verify import describe, verify
from streammerge.errors import BadInput, InputMissing, StreammergeError
from tests.running import digest, make_inputs, run, write_recipe

PRUNED = """\
base_model: ./base
merge_method: ties
adapters:
  - {path: ./lora-0, weight: 0.7, density: 0.4}
  - {path: ./lora-1, weight: 0.3, density: 0.6}
"""
UP = "model.layers.1.mlp.up_proj.weight"  # computed
NORM = "model.layers.1.input_layernorm.weight"  # copied
FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
ALL = 10**6  # more tiles than there are


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    write_recipe(folder, "ties", PRUNED)
    write_recipe(folder, "linear")
    return folder


@pytest.fixture(scope="module")
def made(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sm.merge(inputs / "ties.yaml", out=tmp_path_factory.mktemp("made") / "out").out


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """An output to spoil."""
    return Path(shutil.copytree(made, tmp_path / "out"))


def flip(folder: Path, tensor: str) -> Path:
    """Change one bit in the middle of a tensor; returns the shard."""
    for path in folder.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        if tensor in header:
            data[start + sum(header[tensor]["data_offsets"]) // 2] ^= 4
            path.write_bytes(data)
            return path
    raise LookupError(tensor)


# ------------------------------------------------------------------------------------ all is well


def test_a_sound_output_passes_at_every_depth(inputs: Path, made: Path) -> None:
    found = recompute(verify(made, read_data=True), ALL, Lead(inputs / "ties.yaml"))
    assert (found.shards, found.tensors) == (2, 20)
    assert (found.summed, found.unsummed) == (14, 6)
    assert found.derived == 20  # one tile each
    assert not found.notes


def test_a_sample_is_no_larger_than_asked(
    inputs: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(inputs)  # where the names in the output's own recipe are found
    assert recompute(verify(made), 7, Lead()).derived == 7


def test_tiles_of_a_cut_tensor_are_derived_each_at_its_place(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "TILE_ELEMENTS", 1000)
    out = sm.merge(inputs / "ties.yaml", out=tmp_path / "out").out
    found = recompute(verify(out), ALL, Lead(inputs / "ties.yaml"))
    assert found.derived is not None and found.derived > 100
    path = flip(out, UP)
    with pytest.raises(BadInput) as caught:
        recompute(verify(out), ALL, Lead(inputs / "ties.yaml"))
    assert f"{path}: {UP}, rows " in str(caught.value)
    assert "1 of " in str(caught.value.found)


def test_the_command_says_what_it_looked_at(inputs: Path, made: Path) -> None:
    before = digest(made)
    done = run("verify", made, "--read-data", "--recompute", 4, cwd=inputs)
    assert done.returncode == 0, done.stderr
    assert "14 tensors read: every checksum is right" in done.stdout
    assert "4 tiles derived again: equal byte for byte" in done.stdout
    assert "not read" not in done.stdout
    assert "data       not read: --read-data" in run("verify", made).stdout
    found = json.loads(run("verify", made, "--json").stdout)
    assert (found["tensors"], found["summed"], found["derived"]) == (20, None, None)
    assert digest(made) == before


# ------------------------------------------------------------------------------- what is spoiled


def _edit(name: str, change: Callable[[Any], None]) -> Callable[[Path], None]:
    def edit(out: Path) -> None:
        document = json.loads((out / name).read_text())
        change(document)
        (out / name).write_text(json.dumps(document))

    return edit


def _relabel(out: Path) -> None:
    """Another dtype of the same size: every size and checksum of data is as before."""
    data = (out / FIRST).read_bytes()
    (out / FIRST).write_bytes(data.replace(b'"BF16"', b'"F16" ', 1))


SPOILED: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "no record": (lambda out: (out / "streammerge.json").unlink(), ("holds no streammerge.json",)),
    "torn record": (
        lambda out: os.truncate(out / "streammerge.json", 100),
        ("streammerge.json: the record is not valid JSON",),
    ),
    "record of another form": (
        _edit("streammerge.json", lambda record: record["shards"][FIRST].pop("bytes")),
        ("streammerge.json: the record is damaged", "bytes"),
    ),
    "record with text for a sum": (
        _edit("streammerge.json", lambda record: record["tensors"].update({UP: "0"})),
        ("streammerge.json: the record is damaged", "'0' is no int"),
    ),
    "record of the future": (
        _edit("streammerge.json", lambda record: record.update(format=99)),
        ("streammerge.json: is no record that this version reads",),
    ),
    "a tensor too many in the record": (
        _edit("streammerge.json", lambda record: record["tensors"].update(extra=1)),
        ("extra is in the record and not in the shards",),
    ),
    "missing shard": (lambda out: (out / SECOND).unlink(), (f"{SECOND}: is missing",)),
    "short shard": (
        lambda out: os.truncate(out / SECOND, 9999),
        (f"{SECOND}: has not the size that was written", "9999 bytes", "merge again with --force"),
    ),
    "long shard": (
        lambda out: os.truncate(out / SECOND, (out / SECOND).stat().st_size + 1),
        (f"{SECOND}: has not the size that was written",),
    ),
    "another dtype": (_relabel, (f"{FIRST}: has not the header that was written",)),
    "config edited": (
        lambda out: (out / "config.json").write_text("{}"),
        ("config.json: is not the file that the merge wrote", "sha256"),
    ),
    "tokenizer gone": (
        lambda out: (out / "tokenizer.json").unlink(),
        ("tokenizer.json: is missing",),
    ),
    "index edited": (
        _edit("model.safetensors.index.json", lambda i: i["weight_map"].update({UP: FIRST})),
        ("index.json: is not the file", f"{FIRST}: lacks tensors"),
    ),
    "a shard too many": (
        lambda out: shutil.copy(out / FIRST, out / "model-00003-of-00003.safetensors") and None,
        ("model-00003-of-00003.safetensors: does not belong",),
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_structure_that_is_spoiled_is_named(out: Path, case: str) -> None:
    spoil, words = SPOILED[case]
    spoil(out)
    with pytest.raises(StreammergeError) as caught:
        verify(out)
    assert caught.value.exit_code == 65
    assert str(out) in str(caught.value) and "  remedy:" in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_byte_too_many_is_told_by_both_sizes(out: Path) -> None:
    size = (out / SECOND).stat().st_size
    os.truncate(out / SECOND, size + 1)
    with pytest.raises(BadInput) as caught:
        verify(out)
    assert (caught.value.found, caught.value.expected) == (f"{size + 1} bytes", f"{size} bytes")


def test_all_that_is_wrong_is_said_at_once(out: Path) -> None:
    (out / "LICENSE").write_text("mine")
    flip(out, UP)
    flip(out, "model.layers.0.mlp.up_proj.weight")
    done = run("verify", out, "--read-data")
    assert done.returncode == 65
    assert done.stdout == ""
    assert "LICENSE: is not the file" in done.stderr
    assert f"the bytes of {UP} are not those that were written" in done.stderr
    assert "the bytes of model.layers.0.mlp.up_proj.weight are not" in done.stderr


def test_a_flipped_bit_is_found_by_reading(out: Path) -> None:
    path = flip(out, UP)
    verify(out)  # the structure is as it was
    with pytest.raises(BadInput) as caught:
        verify(out, read_data=True)
    assert caught.value.where == str(path)
    assert "found:    crc32c" in str(caught.value)


@pytest.mark.parametrize("options", [("--read-data",), ("--recompute", ALL)])
def test_a_flipped_bit_of_a_copied_tensor_is_found_by_its_input(
    inputs: Path, out: Path, options: tuple[str | int, ...]
) -> None:
    """No checksum was recorded of what the kernel copied; the input still has the bytes."""
    path = flip(out, NORM)
    done = run("verify", out, *options, cwd=inputs)
    assert done.returncode == 65, done.stderr
    assert f"{path}: {NORM}, bytes 0 to 127: is not what the inputs give" in done.stderr


def test_copies_that_equal_their_input_are_said(inputs: Path, made: Path) -> None:
    done = run("verify", made, "--read-data", "--config", inputs / "ties.yaml")
    assert done.returncode == 0, done.stderr
    assert "14 tensors read: every checksum is right" in done.stdout
    assert "6 more were copied from an input and have its bytes" in done.stdout


@pytest.mark.parametrize("changed", [False, True])
def test_copies_without_their_input_are_said(inputs: Path, out: Path, changed: bool) -> None:
    """That is no fault of the output, unless a recipe was named that leads elsewhere."""
    elsewhere = out.parent / "elsewhere"
    elsewhere.mkdir()
    if changed:
        for name in ("base", "lora-0", "lora-1"):
            shutil.copytree(inputs / name, elsewhere / name)
        flip(elsewhere / "base", NORM)
    done = run("verify", out, "--read-data", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    why = "other inputs" if changed else "the inputs of the output are not here"
    assert "6 copied tensors are compared with nothing" in done.stdout and why in done.stdout
    named = run("verify", out, "--read-data", "--config", write_recipe(elsewhere, "ties", PRUNED))
    assert named.returncode == (65 if changed else 66)


def test_values_that_are_not_finite_are_counted(inputs: Path, tmp_path: Path) -> None:
    """Also where they were copied unread: what was computed is refused by the merge."""
    own = Path(shutil.copytree(inputs, tmp_path / "own"))
    nan = (0x7FC0).to_bytes(2, "little")
    for path in (own / "base").glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        placed = json.loads(data[8:start]).get(NORM)
        if placed:
            begin = start + placed["data_offsets"][0]
            data[begin : begin + 6] = nan + (0xFF80).to_bytes(2, "little") + b"\x7f\x7f"
            path.write_bytes(data)
    out = sm.merge(own / "ties.yaml", out=tmp_path / "out").out
    found = verify(out, read_data=True)
    assert found.not_finite == {NORM: 2}
    assert compare_copies(found, Lead(own / "ties.yaml")).compared == 6
    assert f"NaN or infinite: {NORM} (2)" in describe(found)
    assert not verify(out).not_finite, "nothing was read"


# ----------------------------------------------------------------------------- what does not fit


def test_another_recipe_is_no_proof(inputs: Path, made: Path) -> None:
    done = run("verify", made, "--recompute", 1, "--config", inputs / "linear.yaml")
    assert done.returncode == 65
    assert "the recipe had `merge_method: ties`" in done.stderr


def test_changed_inputs_are_no_proof(inputs: Path, made: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(inputs, tmp_path / "in"))
    flip(changed / "lora-1", "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight")
    with pytest.raises(BadInput, match="the weights of lora-1") as caught:
        recompute(verify(made), 1, Lead(changed / "ties.yaml"))
    assert "lora-0" not in str(caught.value)


def test_inputs_that_are_not_here_ask_for_a_recipe(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputMissing, match="--config") as caught:
        recompute(verify(made), 1, Lead())
    assert caught.value.where == str(made / "streammerge.yaml")


def test_no_output_is_exit_66(tmp_path: Path) -> None:
    done = run("verify", tmp_path / "none")
    assert done.returncode == 66
    assert f"{tmp_path / 'none'}: there is no such output" in done.stderr


def test_one_that_is_half_done_is_told_from_none(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr("streammerge.building.write_companions", None)
        sm.merge(inputs / "ties.yaml", out=out)
    done = run("verify", out)
    assert done.returncode == 66
    assert f"a merge that is half done, in {tmp_path / '.out.streammerge'}" in done.stderr
    assert "run the command of that merge again" in done.stderr


def test_options_that_lead_to_inputs_are_refused_where_none_are_read(made: Path) -> None:
    assert run("verify", made, "--memory", "1GiB").returncode == 2
