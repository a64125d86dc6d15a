"""The public face: what `import streammerge` offers, typed, and doing what it says."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import streammerge as sm
from streammerge import events
from streammerge.errors import BudgetError
from tests.running import fresh_process, make_inputs, tensors, write_recipe

NAMES = {"Plan", "Report", "StreammergeError", "__version__", "merge", "plan"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(make_inputs(tmp_path_factory.mktemp("inputs")), "ties")


def test_the_names_are_those_and_no_others() -> None:
    assert set(sm.__all__) == NAMES
    assert len(sm.__all__) == len(NAMES)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_each_name_can_be_imported(name: str) -> None:
    space: dict[str, Any] = {}
    exec(f"from streammerge import {name}", space)
    assert space[name] is getattr(sm, name)


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'mergee'"):
        _ = sm.mergee


@pytest.mark.parametrize("function", [sm.merge, sm.plan])
def test_the_functions_are_typed_and_explained(function: Any) -> None:
    hints = get_type_hints(function)
    assert set(hints) == {*inspect.signature(function).parameters, "return"}
    assert "StreammergeError" in (function.__doc__ or "")


@pytest.mark.parametrize("kind", [sm.Plan, sm.Report, sm.StreammergeError])
def test_the_classes_are_explained(kind: type) -> None:
    assert kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}(")


def test_type_checkers_may_read_the_package() -> None:
    """PEP 561: without this file mypy takes every name for Any."""
    assert (Path(sm.__file__).parent / "py.typed").is_file()


def test_importing_loads_nothing_heavy() -> None:
    code = "import sys, streammerge; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"numpy", "numba", "torch", "zarr", "click", "pydantic"} & set(done.stdout.split())


# ------------------------------------------------------------------------------- plan and merge


def plan_then_merge(recipe: Path, out: Path) -> None:
    planned = sm.plan(recipe, memory="2GiB")
    report = sm.merge(recipe, out=out, memory="2GiB")
    assert isinstance(planned, sm.Plan)
    assert isinstance(report, sm.Report)
    assert report.out == out
    assert report.written_bytes == planned.output_bytes()
    assert report.tensors == planned.demand.merged_tensors + planned.demand.copied_tensors
    assert report.copied_bytes == planned.demand.copied_bytes
    assert {change.name: change.total for change in report.changes} == planned.applied()
    assert report.peak_bytes <= 2 << 30
    assert planned.as_dict()["budget_bytes"] == 2 << 30


def test_plan_says_what_merge_then_does(recipe: Path, tmp_path: Path) -> None:
    with fresh_process() as pool:
        pool.submit(plan_then_merge, recipe, tmp_path / "out").result()


def test_plan_writes_nothing(recipe: Path) -> None:
    before = sorted(recipe.parent.rglob("*"))
    sm.plan(recipe)
    assert sorted(recipe.parent.rglob("*")) == before


def test_the_report_says_what_each_adapter_changed(recipe: Path, tmp_path: Path) -> None:
    report = sm.merge(recipe, out=tmp_path / "out")
    assert [change.name for change in report.changes] == ["lora-0", "lora-1"]
    for change in report.changes:
        assert change.applied == change.total == 2 * 7  # seven projections of two layers
        assert change.relative is not None and 0 < change.relative < 1
        assert f"{change.name}: 14 of 14 tensors applied, mean relative change" in str(change)
    assert not report.already_done
    assert sm.merge(recipe, out=tmp_path / "out").already_done


def test_paths_may_be_text(recipe: Path, tmp_path: Path) -> None:
    report = sm.merge(str(recipe), out=str(tmp_path / "out"), memory=1 << 34, threads=1, io="read")
    assert report.out == tmp_path / "out"
    assert set(tensors(report.out)) == set(tensors(recipe.parent / "base"))


def test_force_replaces_an_output_of_another_merge(recipe: Path, tmp_path: Path) -> None:
    linear = write_recipe(recipe.parent, "linear")
    sm.merge(recipe, out=tmp_path / "out")
    with pytest.raises(sm.StreammergeError, match="--force"):
        sm.merge(linear, out=tmp_path / "out")
    assert not sm.merge(linear, out=tmp_path / "out", force=True).already_done


def test_events_are_handed_out(recipe: Path, tmp_path: Path) -> None:
    seen: list[events.Event] = []
    sm.merge(recipe, out=tmp_path / "out", emit=seen.append)
    progress = [event for event in seen if isinstance(event, events.Progress)]
    assert progress[-1].done == progress[-1].total
    assert [event.done for event in progress] == sorted(event.done for event in progress)


def test_errors_are_of_one_tree(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(sm.StreammergeError) as missing:
        sm.merge(tmp_path / "none.yaml", out=tmp_path / "out")
    assert missing.value.exit_code == 66
    with pytest.raises(BudgetError) as small:
        sm.plan(recipe, memory="32MiB")
    assert small.value.exit_code == 78
    assert small.value.least_bytes > 32 << 20
    assert not (tmp_path / "out").exists()
