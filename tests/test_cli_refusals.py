"""What the command refuses: the exit code, the place, the remedy; and nothing is touched."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest

import streammerge as sm
from streammerge.errors import BadInput, OutputRefused
from tests.running import digest, make_inputs, run, tensors, write_recipe

NAN = struct.pack("<f", float("nan"))
UP = "model.layers.1.mlp.up_proj.weight"
UP_B = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("inputs"), tuned=True)
    for method in ("ties", "linear"):
        write_recipe(folder, method)
    return folder


@pytest.fixture
def inputs(made: Path, tmp_path: Path) -> Path:
    """Inputs to spoil, alone in a folder."""
    return Path(shutil.copytree(made, tmp_path / "in"))


Refused = Callable[..., CompletedProcess[str]]


@pytest.fixture
def refused(inputs: Path, tmp_path: Path) -> Iterator[Refused]:
    """Runs a command that must be refused; then inputs are unchanged and nothing is left over."""
    out = tmp_path / "out"

    def refuse(code: int, *words: str, recipe: str = "ties.yaml") -> CompletedProcess[str]:
        before, beside = digest(inputs), sorted(tmp_path.iterdir())
        done = run("merge", recipe, "--out", out, cwd=inputs)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
        for word in (*words, "  remedy:"):
            assert word in done.stderr
        assert digest(inputs) == before
        assert sorted(tmp_path.iterdir()) == beside
        return done

    yield refuse


def spoil(folder: Path, tensor: str, raw: bytes) -> None:
    """Put some bytes into the middle of a stored tensor."""
    for path in folder.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        if tensor in header:
            begin, end = header[tensor]["data_offsets"]
            place = start + begin + (end - begin) // 2 // len(raw) * len(raw)
            data[place : place + len(raw)] = raw
            path.write_bytes(data)
            return
    raise LookupError(tensor)


# --------------------------------------------------------------------------------- usage: exit 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["merge"], "give a CONFIG, or --base, --adapter and --method"),
        (["merge", "ties.yaml", "--base", "base"], "not both"),
        (["merge", "--base", "base", "--adapter", "lora-0"], "--method"),
        (["merge", "ties.yaml", "--threads", "0"], "--threads"),
        (["merge", "ties.yaml", "--io", "tape"], "'auto', 'mmap', 'read'"),
        (["merge", "ties.yaml", "--memori", "1GiB"], "--memory"),
        (["nonsense"], "No such command 'nonsense'"),
        (["inspect"], "PATHS"),
    ],
)
def test_wrong_usage_is_exit_2(made: Path, arguments: list[str], said: str) -> None:
    done = run(*arguments, cwd=made)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------------------- config: exit 78


def test_a_mistake_is_shown_at_its_line_and_column(inputs: Path, refused: Refused) -> None:
    text = (
        "base_model: ./base\n"
        "merge_method: ties\n"
        "adapters:\n"
        "  - {path: ./lora-0, weight: 0.7, density: 1.5}\n"
        "  - {path: ./lora-1, wieght: 0.3}\n"
        "out_dtyp: bfloat16\n"
    )
    (inputs / "cfg.yaml").write_text(text)
    done = refused(78, recipe="cfg.yaml")
    density, weight = text.splitlines()[3:5]
    assert f"cfg.yaml:4:{density.index('1.5') + 1}: " in done.stderr
    assert f"cfg.yaml:5:{weight.index('wieght') + 1}: " in done.stderr
    assert "cfg.yaml:6:1: " in done.stderr
    assert "did you mean `weight`?" in done.stderr
    assert "did you mean `out_dtype`?" in done.stderr


def test_all_problems_are_said_at_once(inputs: Path, refused: Refused) -> None:
    """One of the recipe, a folder that is missing, a file that is cut: the first of 78, 66, 65."""
    (inputs / "cfg.yaml").write_text(
        "base_model: ./base\nmerge_method: ties\nadapters:\n"
        "  - {path: ./lora-0, density: 7}\n  - {path: ./lora-9}\n  - {path: ./lora-1}\n"
    )
    cut = inputs / "lora-1" / "adapter_model.safetensors"
    os.truncate(cut, cut.stat().st_size - 1)
    done = refused(78, "cfg.yaml:4:", "lora-9", "lora-1", recipe="cfg.yaml")
    assert done.stderr.count("error: ") == 3
    assert done.stderr.count("  remedy:") == 3
    (inputs / "cfg.yaml").write_text((inputs / "cfg.yaml").read_text().replace("7", "0.7"))
    assert refused(66, recipe="cfg.yaml").stderr.count("error: ") == 2


@pytest.mark.parametrize("option", ["--memory", "--shard-size"])
def test_a_size_that_is_none_names_its_option(made: Path, option: str) -> None:
    done = run("plan", "ties.yaml", option, "lots", cwd=made)
    assert done.returncode == 78
    assert f"error: {option}: this is not a size" in done.stderr and "'lots'" in done.stderr


def test_a_fine_tune_that_is_its_own_base_is_refused(made: Path, tmp_path: Path) -> None:
    arguments = ("--base", "./base", "--rank", "4", "--out", tmp_path / "out")
    done = run("extract-lora", "base", *arguments, cwd=made)
    assert done.returncode == 78
    assert (
        "error: the fine-tune is its own base" in done.stderr and "command line" not in done.stderr
    )


def test_an_unknown_method_names_its_nearest(inputs: Path, refused: Refused) -> None:
    write_recipe(inputs, "tise")
    refused(78, "tise.yaml:2:15: ", "'tise'", "did you mean `ties`?", recipe="tise.yaml")
    done = run("methods", "tise")
    assert done.returncode == 78
    assert "remedy:   did you mean ties?" in done.stderr


@pytest.mark.parametrize("size", ["12x", "-1GiB"])
def test_a_size_that_is_none(made: Path, tmp_path: Path, size: str) -> None:
    done = run("merge", "ties.yaml", "--out", tmp_path / "out", f"--memory={size}", cwd=made)
    assert done.returncode == 78
    assert repr(size) in done.stderr and "for example 2GiB" in done.stderr


# ------------------------------------------------------------------------------ missing: exit 66


@pytest.mark.parametrize("gone", ["base", "lora-1", "base/model-00002-of-00002.safetensors"])
def test_a_missing_input_is_named(inputs: Path, refused: Refused, gone: str) -> None:
    path = inputs / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    refused(66, path.name)


def test_a_missing_recipe_is_named(refused: Refused) -> None:
    refused(66, "none.yaml: there is no such recipe", recipe="none.yaml")


def test_inspect_says_what_is_missing(tmp_path: Path) -> None:
    done = run("inspect", tmp_path / "none")
    assert done.returncode == 66
    assert str(tmp_path / "none") in done.stderr and "  remedy:" in done.stderr


# ----------------------------------------------------------------------------- bad data: exit 65


@pytest.mark.parametrize("lost", [1, 20_000])
def test_a_truncated_adapter_is_named(inputs: Path, refused: Refused, lost: int) -> None:
    path = inputs / "lora-1" / "adapter_model.safetensors"
    os.truncate(path, path.stat().st_size - lost)
    refused(65, "lora-1/adapter_model.safetensors", "ends past", "found:", "expected:")


def test_an_adapter_of_another_base_is_refused(inputs: Path, refused: Refused) -> None:
    path = inputs / "lora-1" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes().replace(b".self_attn.q_proj.", b".self_attn.x_proj."))
    refused(65, "lora-1", "x_proj")


def test_nan_in_an_adapter_is_refused(inputs: Path, refused: Refused) -> None:
    spoil(inputs / "lora-0", UP_B, NAN)
    refused(65, UP, "NaN", recipe="linear.yaml")


@pytest.mark.parametrize("method", ["ties", "linear", "task_arithmetic"])
@pytest.mark.parametrize("where", ["base", "tuned", "lora-0"])
@pytest.mark.parametrize("density", [1, 0.5])
def test_no_method_swallows_a_nan(
    inputs: Path, tmp_path: Path, where: str, method: str, density: float
) -> None:
    """A vote in which a NaN never agrees would write the base, as if the model were not there."""
    tensor, nan = (UP_B, NAN) if where == "lora-0" else (UP, NAN[2:])  # its upper half in bfloat16
    spoil(inputs / where, tensor, nan)
    text = (inputs / "ties.yaml").read_text().replace("ties", method)
    text += f"models: [{{model: ./tuned}}]\nparameters: {{density: {density}}}\n"
    with pytest.raises(BadInput, match="NaN") as caught:
        sm.merge(write_recipe(inputs, "cfg", text), out=tmp_path / "out")
    assert UP in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_infinity_in_an_adapter_is_refused_without_noise(inputs: Path, refused: Refused) -> None:
    spoil(inputs / "lora-0", UP_B, struct.pack("<f", float("inf")))
    done = refused(65, UP, recipe="linear.yaml")
    assert "RuntimeWarning" not in done.stderr


@pytest.mark.parametrize("method", ["ties", "linear"])
@pytest.mark.parametrize("where", ["base", "tuned"])
def test_the_file_that_holds_a_nan_is_named(
    inputs: Path, tmp_path: Path, where: str, method: str
) -> None:
    spoil(inputs / where, UP, NAN[2:])
    knobs = "{weight: 0.5, density: 0.5}"  # without pruning, ties would copy `tuned` unread
    models = "".join(
        f"  - {{model: ./{name}, parameters: {knobs}}}\n" for name in ("base", "tuned")
    )
    base = "base_model: ./base\n" if method == "ties" else ""
    text = f"merge_method: {method}\n{base}models:\n{models}"
    with pytest.raises(BadInput) as caught:
        sm.merge(write_recipe(inputs, "cfg", text), out=tmp_path / "out")
    said = str(caught.value)
    assert where in said and UP in said and "NaN" in said and "--nan keep" in said
    other = {"base": "tuned", "tuned": "base"}[where]
    assert f"/{other}/" not in said


def test_nan_is_kept_where_that_is_asked_for(inputs: Path, tmp_path: Path) -> None:
    spoil(inputs / "base", UP, NAN[2:])
    out = tmp_path / "out"
    done = run("merge", "ties.yaml", "--out", out, "--nan", "keep", cwd=inputs)
    assert done.returncode == 0, done.stderr
    values = np.frombuffer(tensors(out)[UP][2], np.uint16)
    assert np.count_nonzero((values & 0x7FFF) > 0x7F80) == 1
    checked = run("verify", out, "--read-data", "--recompute", 99, cwd=inputs)
    assert checked.returncode == 0, checked.stderr


def test_a_value_that_grows_too_large_is_refused_even_so(inputs: Path, tmp_path: Path) -> None:
    spoil(inputs / "base", UP, struct.pack("<f", 1e6)[2:])
    text = (inputs / "ties.yaml").read_text() + "out_dtype: float16\n"
    with pytest.raises(BadInput, match="too large for F16"):
        sm.merge(write_recipe(inputs, "cfg", text), out=tmp_path / "out", nan="keep")


def test_what_is_too_large_for_float16_is_refused(inputs: Path, refused: Refused) -> None:
    spoil(inputs / "base", UP, struct.pack("<f", 1e6)[2:])
    (inputs / "cfg.yaml").write_text((inputs / "ties.yaml").read_text() + "out_dtype: float16\n")
    done = refused(65, UP, "too large for F16", recipe="cfg.yaml")
    assert "out_dtype: bfloat16 or float32" in done.stderr


def test_a_mended_input_merges_after_a_refusal(
    made: Path, inputs: Path, refused: Refused, tmp_path: Path
) -> None:
    spoil(inputs / "base", UP, NAN[2:])
    refused(65)
    shutil.rmtree(inputs / "base")
    shutil.copytree(made / "base", inputs / "base")
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    assert run("merge", "ties.yaml", "--out", out, cwd=inputs).returncode == 0
    assert digest(out) == digest(sm.merge(made / "ties.yaml", out=undisturbed).out)


# ------------------------------------------------------------------------- the output: exit 73


def test_another_recipes_output_is_kept_unless_forced(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sm.merge(made / "ties.yaml", out=out)
    before = digest(out)
    done = run("merge", "linear.yaml", "--out", out, cwd=made)
    assert done.returncode == 73
    assert f"{out}: the output exists" in done.stderr
    assert "--force replaces it" in done.stderr
    assert digest(out) == before
    forced = run("merge", "linear.yaml", "--out", out, "--force", cwd=made)
    assert forced.returncode == 0, forced.stderr
    assert digest(out) != before
    assert "merge_method: linear" in (out / "streammerge.yaml").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_replaces_no_folder_of_others(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    done = run("merge", "ties.yaml", "--out", out, "--force", cwd=made)
    assert done.returncode == 73
    assert f"{out}: the output exists" in done.stderr
    assert "a folder without streammerge.json, so not made by streammerge" in done.stderr
    assert "--force leaves it alone" in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.txt"]


def test_one_whose_record_cannot_be_read_is_not_taken_for_ours(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "streammerge.json").write_text("{")
    done = run("merge", "ties.yaml", "--out", out, "--force", cwd=made)
    assert done.returncode == 73
    assert f"streammerge.json that cannot be read: `streammerge verify {out}`" in done.stderr
    assert [path.name for path in out.iterdir()] == ["streammerge.json"]


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_force_replaces_no_file_and_no_link(made: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        if kind == "link":
            (tmp_path / "target").mkdir()
        out.symlink_to(tmp_path / "target")
    before = sorted(tmp_path.iterdir())
    done = run("merge", "ties.yaml", "--out", out, "--force", cwd=made)
    assert done.returncode == 73
    assert str(out) in done.stderr and "  remedy:" in done.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("out", "relation"),
    [
        ("base", "is an input folder"),
        ("lora-0", "is an input folder"),
        ("base/merged", "lies in an input folder"),
        ("lora-1/a/b", "lies in an input folder"),
        (".", "contains an input folder"),
        ("..", "contains an input folder"),
        ("alias", "is an input folder"),
        ("alias/merged", "lies in an input folder"),
    ],
)
def test_an_output_that_touches_an_input_is_refused(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, relation: str
) -> None:
    (inputs / "alias").symlink_to("base")
    before = sorted(tmp_path.rglob("*")), digest(inputs)
    monkeypatch.chdir(inputs)
    with pytest.raises(OutputRefused) as caught:
        sm.merge("ties.yaml", out=out, force=True)
    assert str(caught.value).startswith(f"{out}: the output {relation}")
    assert "outside of the inputs" in str(caught.value)
    assert (sorted(tmp_path.rglob("*")), digest(inputs)) == before


def test_the_command_does_not_force_its_way_into_an_input(inputs: Path) -> None:
    before = digest(inputs)
    done = run("merge", "ties.yaml", "--out", "base", "--force", cwd=inputs)
    assert done.returncode == 73
    assert "base: the output is an input folder" in done.stderr
    assert digest(inputs) == before


@pytest.mark.parametrize("option", ["--out", "--cache"])
def test_a_place_that_cannot_be_made_is_named(made: Path, tmp_path: Path, option: str) -> None:
    (tmp_path / "file").write_text("")
    given = {"--out": tmp_path / "out", option: tmp_path / "file" / "below"}
    arguments = [word for pair in given.items() for word in pair]
    done = run("merge", "ties.yaml", *arguments, cwd=made)
    assert done.returncode == 73
    assert re.search(
        rf"{tmp_path}/file/\S*below\S*: the (output|cache) cannot be created", done.stderr
    )
    assert "  remedy:" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("lost", ["shard", "size", "header"])
def test_a_damaged_output_is_not_taken_for_complete(made: Path, tmp_path: Path, lost: str) -> None:
    out = tmp_path / "out"
    sm.merge(made / "ties.yaml", out=out)
    before = digest(out)
    shard = out / "model-00002-of-00002.safetensors"
    if lost == "shard":
        shard.unlink()
    elif lost == "size":
        os.truncate(shard, shard.stat().st_size - 1)
    else:
        shard.write_bytes(shard.read_bytes().replace(b'"BF16"', b'"F16" ', 1))
    done = run("merge", "ties.yaml", "--out", out, cwd=made)
    assert done.returncode == 73
    assert f"a damaged result: `streammerge verify {out}` says what is wrong" in done.stderr
    assert run("merge", "ties.yaml", "--out", out, "--force", cwd=made).returncode == 0
    assert digest(out) == before
    assert len(tensors(out)) == 20
