"""What goes wrong in a method of the user's own, and where none is ever taken from."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import streammerge as sm
from streammerge.errors import ConfigError, MethodError, Place
from tests.contracts.small_inputs import SmallInputs, read_back
from tests.running import run

ROOT = Path(__file__).parents[1]

HEAD = """\
from typing import Annotated
import numpy as np
from streammerge.arrays import Deltas, PerModel, Rows
from streammerge.methods import method
from streammerge.methods.ties import ties
from streammerge.declarations import (Coefficients, Knob)
"""
TWICE = """
@method()
def twice(deltas: Deltas, *, factor: Annotated[float, Knob(2.0, "f")]) -> Rows:
    \"\"\"The sum, times a factor.\"\"\"
    return np.float32(factor) * deltas.sum(axis=0)
"""
WEIGHTED = """\
@method()
def f(deltas: Deltas, *, weight: Annotated[PerModel, Knob(1.0, "w")]) -> Coefficients:
    return Coefficients([1.0 / (w - w) for w in weight.tolist()])
"""


@pytest.fixture
def inputs(tmp_path: Path) -> SmallInputs:
    inputs = SmallInputs(tmp_path, {"up.weight": (30, 20), "norm.weight": (9,)}, "F32")
    inputs.add_adapter(["up.weight"], rank=2)
    inputs.add_adapter(["up.weight"], rank=3)
    return inputs


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.py"
    path.write_text(HEAD + text)
    return path


def refused(inputs: SmallInputs, method: str = "mine.py") -> sm.StreammergeError:
    with pytest.raises(sm.StreammergeError) as raised:
        sm.merge(inputs.recipe(method), out=inputs.folder / "out")
    assert not (inputs.folder / "out").exists()
    return raised.value


# ------------------------------------------------------------------------------ code that fails


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ("def f(:\n", 7, "SyntaxError"),
        ("x = 1\ny = x / 0\n", 8, "ZeroDivisionError: division by zero"),
        ("import nowhere_to_be_found\n", 7, "ModuleNotFoundError"),
        ("raise SystemExit(3)\n", 7, "SystemExit: 3"),
        ("@method()\ndef f(deltas: Deltas, *, x: float) -> Rows:\n    ...\n", 7, "x must be"),
    ],
)
def test_a_file_that_does_not_run(
    inputs: SmallInputs, tmp_path: Path, text: str, line: int, told: str
) -> None:
    path = write(tmp_path, text)
    problem = refused(inputs)
    assert isinstance(problem, MethodError) and told in problem.what
    assert isinstance(problem.where, Place) and problem.where.file.endswith("recipe.yaml")
    assert re.fullmatch(rf"{path}:{line}:\d+: .*", problem.found or "")
    assert (problem.found or "").endswith(text.splitlines()[line - 7])


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ("@method()\ndef f(deltas: Deltas) -> Rows:\n    return deltas[99]\n", 9, "IndexError"),
        ("@method()\ndef f(deltas: Deltas) -> Rows:\n    raise SystemExit\n", 9, "SystemExit"),
        (WEIGHTED, 9, "ZeroDivisionError"),
    ],
)
def test_a_function_that_fails(
    inputs: SmallInputs, tmp_path: Path, text: str, line: int, told: str
) -> None:
    path = write(tmp_path, text)
    problem = refused(inputs)
    assert isinstance(problem, MethodError) and problem.exit_code == 78
    assert "the merge method mine.py fails: " in problem.what and told in problem.what
    assert isinstance(problem.where, Place)
    assert (problem.where.file, problem.where.line) == (str(path), line)
    assert problem.found == text.splitlines()[line - 7].strip()


@pytest.mark.parametrize(
    ("returns", "result", "found"),
    [
        ("Rows", "deltas.sum(axis=0).astype(np.float64)", "ndarray of float64 (30, 20)"),
        ("Rows", "deltas", "ndarray of float32 (2, 30, 20)"),
        ("Rows", "None", "NoneType of object ()"),
        ("Coefficients", "Coefficients([1.0])", "Coefficients(models=[1.0], base=1.0)"),
    ],
)
def test_a_function_that_returns_something_else(
    inputs: SmallInputs, tmp_path: Path, returns: str, result: str, found: str
) -> None:
    write(tmp_path, f"@method()\ndef f(deltas: Deltas) -> {returns}:\n    return {result}\n")
    problem = refused(inputs)
    assert isinstance(problem, MethodError) and "the merge method mine.py returns " in problem.what
    assert problem.found == found


def test_the_command_shows_no_traceback(inputs: SmallInputs, tmp_path: Path) -> None:
    path = write(tmp_path, "@method()\ndef f(deltas: Deltas) -> Rows:\n    return deltas[99]\n")
    done = run("merge", inputs.recipe("mine.py"), "--out", tmp_path / "out")
    assert done.returncode == 78 and "Traceback" not in done.stderr and "bug" not in done.stderr
    assert f"error: {path}:9:12: the merge method mine.py fails: IndexError" in done.stderr


# ------------------------------------------------------------------------ files that are not run


@pytest.mark.parametrize("place", ["base", "base/sub", "adapter-0", "link"])
def test_no_code_from_a_models_folder(inputs: SmallInputs, tmp_path: Path, place: str) -> None:
    marker = tmp_path / "it-ran"
    folder = tmp_path / "base" if place == "link" else tmp_path / place
    folder.mkdir(exist_ok=True)
    path = write(folder, TWICE + f"open({str(marker)!r}, 'w').close()\n")
    if place == "link":
        (tmp_path / "mine.py").symlink_to(path)
    problem = refused(inputs, "mine.py" if place == "link" else f"{place}/mine.py")
    assert problem.what == "no code is run from a model's folder"
    assert "mine.py, and weights in " in str(problem.found)
    assert not marker.exists()


def test_two_files_that_could_be_meant(
    inputs: SmallInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    write(tmp_path, TWICE)
    write(tmp_path / "cwd", TWICE)
    assert "two files could be meant" in refused(inputs).what


def test_the_newest_version_is_run_and_nothing_left_beside_it(
    inputs: SmallInputs, tmp_path: Path
) -> None:
    """Of the same size and second: bytecode that Python keeps would be that of the first."""
    found = []
    for factor in ("2.0", "3.0"):
        write(tmp_path, TWICE.replace("2.0", factor))
        sm.merge(inputs.recipe("mine.py"), out=tmp_path / "out", force=True)
        found.append(read_back(tmp_path / "out"))
    assert found[0] != found[1]
    assert not (tmp_path / "__pycache__").exists()


def test_another_version_is_another_merge(inputs: SmallInputs, tmp_path: Path) -> None:
    recipe, out = inputs.recipe("mine.py"), tmp_path / "out"
    write(tmp_path, TWICE)
    assert not sm.merge(recipe, out=out).already_done
    assert sm.merge(recipe, out=out).already_done
    write(tmp_path, TWICE + "# changed\n")
    with pytest.raises(sm.StreammergeError, match="the output exists") as raised:
        sm.merge(recipe, out=out)
    assert "mine.py: sha256" in str(raised.value)


# ----------------------------------------------------------------------------- from a package


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package as pip installs it."""
    folder = tmp_path / "site"
    about = folder / "own_merging-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: own-merging\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[streammerge.methods]\ndoubled = own_merging:twice\n")
    (folder / "own_merging.py").write_text(HEAD + TWICE)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{folder}")
    yield folder
    sys.modules.pop("own_merging", None)


def test_an_installed_package(inputs: SmallInputs, tmp_path: Path, package: Path) -> None:
    sm.merge(inputs.recipe("doubled"), out=tmp_path / "out")
    write(tmp_path, TWICE)
    sm.merge(inputs.recipe("mine.py"), out=tmp_path / "file")
    assert read_back(tmp_path / "out") == read_back(tmp_path / "file")
    listed = run("methods").stdout
    assert re.search(r"^doubled +The sum, times a factor\.$", listed, re.MULTILINE)
    assert "doubled" in [one["name"] for one in json.loads(run("methods", "--json").stdout)]
    assert "did you mean doubled?" in run("methods", "dubled").stderr


@pytest.mark.parametrize(
    ("value", "told"),
    [("own_merging:nothing", "cannot be loaded: AttributeError"), ("os:sep", "is none")],
)
def test_a_package_that_gives_none(
    inputs: SmallInputs, package: Path, value: str, told: str
) -> None:
    points = package / "own_merging-1.0.dist-info" / "entry_points.txt"
    points.write_text(f"[streammerge.methods]\ndoubled = {value}\n")
    with pytest.raises(ConfigError, match="the installed method doubled") as raised:
        sm.plan(inputs.recipe("doubled"))
    assert told in raised.value.what and isinstance(raised.value, MethodError)
