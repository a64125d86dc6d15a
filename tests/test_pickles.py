"""Pickles of PyTorch with `--allow-pickle`: the bytes of safetensors, and no code that runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import streammerge as sm
from streammerge.errors import BadInput, ConfigError, Problems, Refused, StreammergeError
from streammerge.storage.folder import open_model
from streammerge.storage.header import Header
from streammerge.storage.pickles import Pickles
from streammerge.storage.smallfile import open_regular, pread
from tests.running import digest, make_inputs, run, tensor_digest, write_recipe

INDEX = "pytorch_model.bin.index.json"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same models twice: as safetensors, and in `pickled` as torch.save writes them."""
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    pickled = Path(shutil.copytree(folder, folder / "pickled"))
    for place in (folder, pickled):
        write_recipe(place, "ties")
    for path in sorted(pickled.rglob("*.safetensors")):
        torch.save(load_file(path), path.with_name(binary(path.name)))
        path.unlink()
    index = pickled / "base" / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    placed = {name: binary(file) for name, file in document["weight_map"].items()}
    (index.parent / INDEX).write_text(json.dumps({**document, "weight_map": placed}))
    index.unlink()
    return folder


def binary(name: str) -> str:
    """What torch.save's file is called where safetensors' is called `name`."""
    stem = name.removesuffix(".safetensors")
    return f"{stem if stem.startswith('adapter') else 'pytorch_' + stem}.bin"


@pytest.fixture(scope="module")
def from_safetensors(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("expected") / "out"
    return tensor_digest(sm.merge(inputs / "ties.yaml", out=out).out)


def read(path: Path) -> Header:
    problems = Problems()
    headers = Pickles().read([path], problems)
    problems.raise_any()
    return headers[0]


def saved(folder: Path, held: Any, **options: Any) -> Path:
    torch.save(held, folder / "it.bin", **options)
    return folder / "it.bin"


def refused(path: Path, *words: str) -> StreammergeError:
    with pytest.raises(BadInput) as caught:
        read(path)
    text = str(caught.value)
    assert all(word in text for word in (str(path), *words)), text
    assert "weights_only=False" not in text
    return caught.value


# ------------------------------------------------------------------------------- whole merges


@pytest.mark.parametrize("io", ["mmap", "read"])
def test_the_tensors_are_those_of_safetensors(
    inputs: Path, from_safetensors: str, tmp_path: Path, io: Any
) -> None:
    before = digest(inputs / "pickled")
    recipe = inputs / "pickled" / "ties.yaml"
    out = sm.merge(recipe, out=tmp_path / "out", io=io, allow_pickle=True).out
    assert tensor_digest(out) == from_safetensors
    assert not list(out.glob("*.bin*"))
    assert digest(inputs / "pickled") == before


def test_the_command_stays_under_its_projection_and_recomputes(
    inputs: Path, from_safetensors: str, tmp_path: Path
) -> None:
    """torch is not in the memory of the merge."""
    out, folder = tmp_path / "out", inputs / "pickled"
    done = run("merge", "ties.yaml", "--out", out, "--allow-pickle", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["peak_bytes"] <= report["projected_bytes"]
    assert tensor_digest(out) == from_safetensors
    again = run("verify", out, "--recompute", 20, "--allow-pickle", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert "20 tiles derived again" in again.stdout
    assert run("verify", out, "--recompute", 20, cwd=folder).returncode == 65


def test_a_stopped_merge_goes_on(
    inputs: Path, from_safetensors: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr("streammerge.building.write_companions", None)
        sm.merge(inputs / "pickled" / "ties.yaml", out=out, allow_pickle=True)
    report = sm.merge(inputs / "pickled" / "ties.yaml", out=out, allow_pickle=True)
    assert report.resumed_bytes > 0
    assert tensor_digest(out) == from_safetensors


@pytest.mark.parametrize("folder", ["base", "lora-0"])
def test_without_the_option_nothing_is_opened(inputs: Path, tmp_path: Path, folder: str) -> None:
    own = Path(shutil.copytree(inputs, tmp_path / "own"))
    shutil.rmtree(own / folder)
    shutil.copytree(inputs / "pickled" / folder, own / folder)
    done = run("merge", "ties.yaml", "--out", tmp_path / "out", cwd=own)
    assert done.returncode == 65
    assert "--allow-pickle" in done.stderr and "pickle" in done.stderr
    allowed = run("plan", "ties.yaml", "--allow-pickle", cwd=own)
    assert allowed.returncode == 0, allowed.stderr


def facts(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """What `inspect` says of a base and an adapter, but where they are."""
    paths = ("base", "lora-0", "--base", "base", "--json")
    done = run("inspect", *paths, *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    return [{**one, "path": None} for one in json.loads(done.stdout)]


def test_inspect_says_of_them_what_it_says_of_safetensors(inputs: Path) -> None:
    before = digest(inputs / "pickled")
    told = facts(inputs / "pickled", "--allow-pickle")
    assert [one["kind"] for one in told] == ["model", "LoRA"]
    assert told == facts(inputs)
    assert digest(inputs / "pickled") == before


@pytest.mark.parametrize("path", ["base", "lora-0"])
def test_inspect_opens_none_without_the_option(inputs: Path, path: str) -> None:
    done = run("inspect", path, cwd=inputs / "pickled")
    assert done.returncode == 65
    assert "--allow-pickle" in done.stderr


def test_inspect_says_what_it_can_of_one_that_cannot_be_merged(
    inputs: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(inputs / "pickled" / "lora-0", tmp_path / "own"))
    config = own / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bias": "sometimes"}))
    done = run("inspect", own, "--allow-pickle", "--json")
    told = json.loads(done.stdout)[0]
    assert done.returncode == 65 and "bias" in told["hindered_by"][0]
    assert told["ranks"] == facts(inputs)[1]["ranks"]


def test_inspect_takes_a_bare_pickle_for_a_model(tmp_path: Path) -> None:
    """Without a config, as old checkpoints come: its name says what it is."""
    torch.save({"weight": torch.ones(3, 5)}, tmp_path / "pytorch_model.bin")
    assert "is not a model in safetensors" in run("inspect", tmp_path).stderr
    done = run("inspect", tmp_path, "--allow-pickle", "--json")
    assert json.loads(done.stdout)[0]["parameters"] == 15


@pytest.mark.parametrize("shared", [True, False])
def test_a_tied_head_lies_where_its_embedding_lies(tmp_path: Path, shared: bool) -> None:
    """transformers saved both names of one tensor; from safetensors it comes to the same."""
    own = make_inputs(tmp_path)
    recipe, base = write_recipe(own, "ties"), own / "base"
    config = base / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    held = {
        n: one for path in sorted(base.glob("*.safetensors")) for n, one in load_file(path).items()
    }
    embedding = held["model.embed_tokens.weight"]
    held["lm_head.weight"] = embedding if shared else embedding.clone()
    for path in (*base.glob("*.safetensors"), base / "model.safetensors.index.json"):
        path.unlink()
    torch.save(held, base / "pytorch_model.bin")
    out = sm.merge(recipe, out=tmp_path / "from-pickle", allow_pickle=True).out
    held["lm_head.weight"] = embedding.clone()
    save_file(held, base / "model.safetensors")
    assert tensor_digest(out) == tensor_digest(sm.merge(recipe, out=tmp_path / "other").out)


def test_safetensors_win_where_both_are_there(inputs: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(inputs / "base", tmp_path / "own"))
    (own / "pytorch_model.bin").write_bytes(b"never opened")
    assert all(h.path.endswith(".safetensors") for h in open_model(own, Pickles()).shards)


# ------------------------------------------------------------------------------------ one file


def test_where_the_bytes_lie(tmp_path: Path) -> None:
    """Views, shared tensors, all dtypes, parameters, empty ones and scalars."""
    whole = torch.arange(600, dtype=torch.float32).reshape(30, 20)
    held = {
        "whole": whole,
        "shared": whole,
        "rows": whole[3:7],
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "bfloat16": torch.tensor([1.5, -2.0]).bfloat16(),
        "float64": torch.tensor([[1e300]], dtype=torch.float64),
        "long": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "empty": torch.empty(0, 4),
    }
    header = read(saved(tmp_path, held))
    assert header.tensors.keys() == held.keys()
    with open_regular(header.path) as (descriptor, _):
        for name, tensor in held.items():
            extent = header.tensors[name]
            assert extent.spec.shape == tuple(tensor.shape)
            flat = tensor.detach().reshape(-1).view(torch.uint8) if tensor.numel() else None
            expected = bytes(flat.tolist()) if flat is not None else b""
            assert pread(descriptor, extent.spec.nbytes, extent.offset) == expected, name
    assert header.tensors["shared"].offset == header.tensors["whole"].offset


def test_links_are_followed_whatever_their_names(tmp_path: Path) -> None:
    """As in a hub cache."""
    (tmp_path / "blobs of it").mkdir()
    blob = saved(tmp_path / "blobs of it", {"a": torch.ones(3)})
    link = tmp_path / "it (1).bin"
    link.symlink_to(blob)
    assert read(link).tensors["a"] == replace(read(blob).tensors["a"], path=str(link))


class Command:
    """What an attacker puts into a file."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self._marker}",)


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = saved(tmp_path, {"weight": torch.ones(3), "more": Command(marker)})
    refused(path, "more than tensors", "system")
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the file would do harm, or this test shows nothing"


def test_all_bad_files_of_a_model_are_named(inputs: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(inputs / "pickled" / "base", tmp_path / "own"))
    for path in own.glob("*.bin"):
        path.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(Refused) as caught:
        open_model(own, Pickles())
    assert [problem.exit_code for problem in caught.value.problems] == [65, 65]


def sparse() -> Any:
    return torch.eye(3).to_sparse()


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ([torch.ones(3)], ("no table of tensors", "list")),
        ({"model": {"weight": torch.ones(3)}}, ("more than a table", "dict under 'model'")),
        ({"step": 7, "weight": torch.ones(3)}, ("more than a table", "int under 'step'")),
        ({"turned": torch.ones(2, 3).t()}, ("'turned' does not lie in it row after row",)),
        ({"thin": sparse()}, ("'thin' does not lie in it", "sparse")),
        ({"complex": torch.ones(3, dtype=torch.complex64)}, ("unknown dtype", "complex64")),
        ({"": torch.ones(3)}, ("empty name",)),
    ],
)
def test_what_is_no_table_of_plain_tensors(tmp_path: Path, held: Any, words: Any) -> None:
    refused(saved(tmp_path, held), *words)


def test_the_old_form_and_other_files(tmp_path: Path) -> None:
    old = saved(tmp_path, {"a": torch.ones(3)}, _use_new_zipfile_serialization=False)
    refused(old, "torch 1.6")
    old.write_bytes(b"")
    refused(old, "no zip archive")
    with zipfile.ZipFile(old, "w") as archive:
        archive.writestr("notes.txt", "of another kind")
    refused(old, "cannot be read as a file of torch.save")


@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_a_file_that_was_cut(tmp_path: Path, share: float) -> None:
    path = saved(tmp_path, {"a": torch.ones(3000)})
    os.truncate(path, int(path.stat().st_size * share))
    refused(path)


def test_numbers_of_another_byte_order(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": torch.ones(3)})
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in held.items():
            archive.writestr(name, b"big" if name.endswith("byteorder") else data)
    refused(path, "another byte order", "big")


# ----------------------------------------------------------------------------------- which torch


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("__version__ = '2.9.1'", ("torch 2.9.1", "torch 2.10 or newer")),
        ("__version__ = '2.1.0+cu118'", ("torch 2.1.0+cu118",)),
        ("raise ImportError", ("no torch", "pip install")),
    ],
)
def test_a_torch_without_the_fixes_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, words: tuple[str, ...]
) -> None:
    path = saved(tmp_path, {"a": torch.ones(3)})
    (tmp_path / "torch.py").write_text(f"{source}\ndef load(*_, **__): raise SystemExit('asked')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert all(word in str(caught.value) for word in words)


def test_a_file_that_brings_torch_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, {"a": torch.ones(3)})
    text = "import os\n__version__ = '2.10'\ndef load(*_, **__): os.abort()\n"
    (tmp_path / "torch.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    refused(path, "brought down", "exit code -6")


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "it.bin")
    refused(tmp_path / "it.bin", "a FIFO")


def test_the_merge_itself_never_imports_torch(inputs: Path, tmp_path: Path) -> None:
    script = (
        "import sys, streammerge as sm\n"
        f"sm.merge({str(inputs / 'pickled' / 'ties.yaml')!r}, out={str(tmp_path / 'out')!r}, "
        "allow_pickle=True)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
