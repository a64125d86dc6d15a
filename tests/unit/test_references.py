"""What a model reference means: a folder here, or a snapshot in the Hugging Face cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from streammerge.errors import BadInput, ConfigError, InputMissing
from streammerge.storage import references
from streammerge.storage.references import display_name, is_hub_id, resolve

COMMIT, OTHER = "0123456789abcdef" * 2 + "01234567", "f" * 40


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    pair = tmp_path / "configs", tmp_path / "work"
    for folder in pair:
        folder.mkdir()
    return pair


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds org/model at main, at refs/pr/1 and at a commit without a name."""
    for name in ("HF_HOME", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    hub = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    model = hub / "models--org--model"
    (model / "refs/refs/pr").mkdir(parents=True)
    (model / "refs/main").write_text(COMMIT)
    (model / "refs/refs/pr/1").write_text(OTHER + "\n")
    (model / "refs/gone").write_text("a" * 40)
    (model / "refs/broken").write_text("../../..")
    for commit in (COMMIT, OTHER):
        (model / "snapshots" / commit).mkdir(parents=True)
    return hub


# ------------------------------------------------------------------------------------------ paths


def test_relative_to_the_config_first_then_to_the_working_directory(
    folders: tuple[Path, Path],
) -> None:
    configs, work = folders
    (configs / "a").mkdir()
    (work / "b").mkdir()
    assert resolve("a", None, folders) == configs / "a"
    assert resolve("./b", None, folders) == work / "b"
    assert resolve("../work/b", None, folders).samefile(work / "b")


def test_a_slip_is_answered_with_the_folder_that_is_near(folders: tuple[Path, Path]) -> None:
    configs, work = folders
    (work / "llama-7b").mkdir()
    for slip in ("lama-7b", "./llama-7"):
        with pytest.raises(InputMissing) as caught:
            resolve(slip, None, folders)
        assert f"did you mean {work / 'llama-7b'}?" in str(caught.value.remedy)
    with pytest.raises(InputMissing) as caught:
        resolve("./mistral", None, (configs, configs / "." / "../configs", work))
    assert caught.value.remedy == "check the path"
    assert str(caught.value.found).count(str(configs / "mistral")) == 1


def test_two_different_folders_are_refused(folders: tuple[Path, Path]) -> None:
    for folder in folders:
        (folder / "a").mkdir()
    with pytest.raises(ConfigError, match="could mean different folders") as caught:
        resolve("a", None, folders)
    for folder in folders:
        assert str(folder / "a") in str(caught.value)


def test_one_folder_seen_twice_is_no_conflict(folders: tuple[Path, Path]) -> None:
    configs, work = folders
    (work / "a").mkdir()
    (configs / "a").symlink_to(work / "a")
    assert resolve("a", None, folders) == configs / "a"
    assert resolve("a", None, (work, work)) == work / "a"


def test_absolute_and_home(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    configs, work = folders
    monkeypatch.setenv("HOME", str(work))
    (work / "m").mkdir()
    assert resolve("~/m", None, (configs,)) == work / "m"
    assert resolve(str(work / "m"), None, (configs,)) == work / "m"


@pytest.mark.parametrize("text", ["org/model", "~/nothing", "~nobody-of-that-name/x", "./no"])
def test_an_unset_home_does_not_crash(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    for name in ("HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name)

    def no_entry(_: int) -> None:
        raise KeyError

    monkeypatch.setattr("pwd.getpwuid", no_entry)
    with pytest.raises(InputMissing):
        resolve(text, None, folders)


def test_a_file_is_not_a_folder(folders: tuple[Path, Path]) -> None:
    file = folders[0] / "model.safetensors"
    file.touch()
    with pytest.raises(BadInput, match="not a folder") as caught:
        resolve(file.name, None, folders)
    assert str(folders[0]) in str(caught.value.remedy)


@pytest.mark.parametrize("text", ["./missing", "/missing/x", "a/b/c", "a\0b", "org/model:8b", ".."])
def test_missing_says_where_was_looked(folders: tuple[Path, Path], text: str) -> None:
    with pytest.raises(InputMissing) as caught:
        resolve(text, None, [folders[0] / "nowhere"])
    assert "nothing at /" in str(caught.value.found)
    assert "hf download" not in str(caught.value)


def test_nothing_is_no_reference(folders: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="empty"):
        resolve("", None, folders)


def test_a_folder_has_no_revision(folders: tuple[Path, Path]) -> None:
    (folders[0] / "org/model").mkdir(parents=True)
    with pytest.raises(ConfigError, match="has no revisions"):
        resolve("org/model", "main", folders)


# -------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize(
    ("revision", "commit"),
    [(None, COMMIT), ("main", COMMIT), ("refs/pr/1", OTHER), (OTHER, OTHER), (COMMIT, COMMIT)],
)
def test_a_hub_id_is_found_in_the_cache(
    folders: tuple[Path, Path], cache: Path, revision: str | None, commit: str
) -> None:
    found = resolve("org/model", revision, folders)
    assert found == cache / "models--org--model" / "snapshots" / commit


def test_an_id_without_organisation(folders: tuple[Path, Path], cache: Path) -> None:
    (cache / "models--gpt2/snapshots" / COMMIT).mkdir(parents=True)
    (cache / "models--gpt2/refs").mkdir()
    (cache / "models--gpt2/refs/main").write_text(COMMIT)
    assert resolve("gpt2", None, folders).name == COMMIT


def test_a_folder_here_wins_over_the_cache(folders: tuple[Path, Path]) -> None:
    (folders[1] / "org/model").mkdir(parents=True)
    assert resolve("org/model", None, folders) == folders[1] / "org/model"


@pytest.mark.parametrize(
    ("text", "revision", "remedy"),
    [
        ("org/other", None, "hf download org/other`"),
        ("org/model", "v2", "hf download org/model --revision v2`"),
        ("org/model", "gone", "hf download org/model --revision gone`"),
        ("org/model", "e" * 40, "--revision " + "e" * 40),
    ],
)
def test_what_the_cache_lacks_can_be_downloaded(
    folders: tuple[Path, Path], cache: Path, text: str, revision: str | None, remedy: str
) -> None:
    with pytest.raises(InputMissing) as caught:
        resolve(text, revision, folders)
    assert remedy in str(caught.value.remedy)
    assert str(cache / f"models--{text.replace('/', '--')}") in str(caught.value)
    assert str(folders[0] / text) in str(caught.value)


@pytest.mark.parametrize("revision", ["../../x", "/etc/passwd", "a\0", "refs/../main", "a b", "."])
def test_a_revision_is_no_path(folders: tuple[Path, Path], revision: str) -> None:
    with pytest.raises(ConfigError, match="is no revision"):
        resolve("org/model", revision, folders)


def test_a_broken_ref_is_said(folders: tuple[Path, Path]) -> None:
    with pytest.raises(BadInput, match="holds no commit"):
        resolve("org/model", "broken", folders)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"HF_HOME": "/data/hf"},
        {"HF_HOME": "~/hf", "XDG_CACHE_HOME": "/xdg"},
        {"XDG_CACHE_HOME": "/xdg"},
        {"HF_HOME": "/data/hf", "HF_HUB_CACHE": "$HOME/hub"},
        {"HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/data/hf"},
        {"HF_HUB_CACHE": "/new", "HUGGINGFACE_HUB_CACHE": "/old"},
    ],
)
def test_the_cache_is_where_huggingface_hub_has_it(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code = "import json, huggingface_hub.constants as c; print(json.dumps(c.HF_HUB_CACHE))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert str(references._hub_cache()) == json.loads(done.stdout)


# ------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpt2", True),
        ("org/model", True),
        ("meta-llama/Llama-3.1-8B_x", True),
        ("a" * 96, True),
        ("a" * 97, False),
        ("", False),
        ("a/b/c", False),
        ("./a", False),
        ("/a", False),
        ("~/a", False),
        ("a b", False),
        ("a--b", False),
        ("a..b", False),
        ("org/", False),
        ("modèle", False),
        ("a\n", False),
    ],
)
def test_hub_ids(text: str, expected: bool) -> None:
    assert is_hub_id(text) is expected


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/models/llama", "llama"),
        ("models/llama/", "llama"),
        ("models/x/../llama", "llama"),
        (f"/c/hub/models--org--model/snapshots/{COMMIT}", "org/model"),
        (f"/c/hub/models--gpt2/snapshots/{COMMIT}", "gpt2"),
        (f"/c/hub/models--org--a-b/snapshots/{COMMIT}/sub", "sub"),
    ],
)
def test_display_names(path: str, name: str) -> None:
    assert display_name(Path(path)) == name


def test_the_display_name_of_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert display_name(Path(".")) == os.path.basename(tmp_path)
