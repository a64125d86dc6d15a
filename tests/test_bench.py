"""The benchmark covers the catalogue and measures real runs; on inputs of kilobytes here."""

from __future__ import annotations

import json
import os
from pathlib import Path

import bench
import bench_runs
import bench_works
import pytest

from streammerge.methods import CATALOGUE
from tests.running import TINY

pytestmark = pytest.mark.skipif(
    not os.access(bench_runs.TIME, os.X_OK), reason=f"needs {bench_runs.TIME}"
)


def test_every_method_has_its_work(tmp_path: Path) -> None:
    folder = bench_works.inputs(tmp_path, TINY)
    methods = {work.name.partition(", ")[2] for work in bench_works.works(folder)}
    assert methods == set(CATALOGUE)


def test_works_are_measured_and_told(tmp_path: Path) -> None:
    bench_works.inputs(tmp_path, TINY)
    into = tmp_path / "result"
    options = ["--inputs", str(tmp_path), "--into", str(into), "--only", "ties"]
    assert bench.main([*options, "--rounds", "1", "--state", "cold", "--least"]) == 0
    result = json.loads((into / "bench.json").read_text())
    assert len(result["rows"]) >= 2
    for row in result["rows"]:
        assert row["written_bytes"] > 0 and row["ratio"] > 0
        assert row["peak_bytes"] > 64 << 20  # of the merge, not of the shell that started it
    assert all(row["least"].endswith("MiB") for row in result["least"])
    assert (into / "bench.md").read_text().count("| cold |") == len(result["rows"])
    assert (into / "bench.svg").read_text().rstrip().endswith("</svg>")


def test_a_name_that_nothing_has_is_said(tmp_path: Path) -> None:
    bench_works.inputs(tmp_path, TINY)
    with pytest.raises(SystemExit, match="no work has that in its name: 3 adapters, linear"):
        bench.main(["--inputs", str(tmp_path), "--only", "nothing"])
