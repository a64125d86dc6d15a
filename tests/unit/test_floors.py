"""The floors of the house: kept by the package, and a breach is seen."""

from __future__ import annotations

from pathlib import Path

import floors
import pytest

import streammerge


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A package with a room on each of some floors, and nothing wrong."""
    for name, text in {
        "words.py": "import math\n",
        "storage/header.py": "from streammerge.words import TensorSpec\n",
        "recipe/read.py": "from streammerge.recipe.values import Recipe\n",
        "planning/plan.py": "from streammerge.recipe import Recipe\n",
    }.items():
        write(tmp_path, name, text)
    return tmp_path


def write(house: Path, name: str, text: str) -> Path:
    path = house / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_the_package_keeps_its_floors() -> None:
    assert list(floors.faults(Path(streammerge.__file__).parent)) == []


def test_every_room_of_the_floors_is_there() -> None:
    root = Path(streammerge.__file__).parent
    assert {room for room in floors.LEVEL if not list(root.glob(f"{room}*"))} == set()


def test_a_sound_house_has_no_faults(house: Path) -> None:
    assert list(floors.faults(house)) == []


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("storage/up.py", "from streammerge.planning import Plan", "planning, a floor above"),
        ("storage/up.py", "import streammerge.engine", "engine, a floor above"),
        ("storage/up.py", "from streammerge import kernels", "kernels, a floor above"),
        ("storage/up.py", "def f():\n    import streammerge.cli", "cli, a floor above"),
        ("words.py", "from streammerge.storage.header import Header", "storage, a floor above"),
        ("recipe/side.py", "from streammerge.methods import CATALOGUE", "methods, its neighbour"),
        ("sinks/side.py", "from streammerge.sources.dense import Dense", "sources, its neighbour"),
        ("shed/x.py", "", "no floor"),
        ("shed.py", "", "no floor"),
    ],
)
def test_a_breach_is_named_with_its_file(house: Path, name: str, text: str, said: str) -> None:
    path = write(house, name, text + "\n")
    (fault,) = floors.faults(house)
    assert fault.startswith(f"{path}:")
    assert said in fault


def test_type_checking_is_no_excuse(house: Path) -> None:
    """An import for annotations alone ties two floors together as well."""
    text = "if TYPE_CHECKING:\n    from streammerge.engine import merge\n"
    write(house, "sinks/typed.py", text)
    assert len(list(floors.faults(house))) == 1
