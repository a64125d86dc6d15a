"""The comparison with mergekit says how far apart and fails beyond the bound; without mergekit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import compare_mergekit
import numpy as np
import pytest
from compare_mergekit import CASES, NEAR, Tensors, apart, write_model

import streammerge as sm
from streammerge.methods import CATALOGUE

Change = Callable[[np.ndarray], np.ndarray]  # type: ignore[type-arg]


def merge_by_another(change: Change) -> Callable[[Sequence[Path], str], None]:
    """A stand-in whose results are ours, changed."""

    def merge(folders: Sequence[Path], python: str) -> None:
        for folder in folders:
            sm.merge(folder / "recipe.yaml", out=folder / "same")
            tensors: Tensors = compare_mergekit.read(folder / "same")
            write_model(folder / "theirs", {n: change(v) for n, v in tensors.items()})

    return merge


def compare(monkeypatch: pytest.MonkeyPatch, method: str, change: Change) -> int:
    monkeypatch.setattr(compare_mergekit, "merge_by_mergekit", merge_by_another(change))
    return compare_mergekit.main(["--python", "unused", "--only", method])


def test_every_deterministic_method_is_compared() -> None:
    """Those that draw at random are, with a density that keeps everything."""
    compared = {case.method for case in CASES}
    ours_alone = {"magnitude_prune", "tsv", "iso_c"}
    assert compared == set(CATALOGUE) - ours_alone


def test_equal_results_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(monkeypatch, "nearswap", lambda value: value) == 0
    told = capsys.readouterr().out
    assert "  0.0e+00  nearswap t 0.01" in told
    assert "0 cases are further apart" in told


def test_the_largest_difference_is_told_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def off(value: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        changed = value.copy()
        changed.flat[0] += np.abs(value).max() * 1e-3
        return changed

    assert compare(monkeypatch, "nearswap", off) == 1
    assert "  1.0e-03  nearswap t 0.01" in capsys.readouterr().out


def test_a_difference_with_a_reason_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = (case for case in CASES if case.differs)
    assert compare(monkeypatch, case.method, lambda value: value + 1) == 0


def test_a_nan_is_no_agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    one, nan = np.ones((2, 2), np.float32), np.full((2, 2), np.nan, np.float32)
    for theirs in ({"a": one, "b": nan}, {"a": nan, "b": one}):
        found = apart({"a": one, "b": one}, theirs)
        assert not found <= NEAR
