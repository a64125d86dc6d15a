"""Planning reads headers only, and says what the merge then reads and writes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import bench_inputs
import memory
import numpy as np
import pytest

import streammerge as sm
from streammerge.planning import CopyJob
from tests.running import TILED, make_inputs, write_recipe

MIB = 1 << 20
TIES = """\
base_model: ./base
merge_method: ties
adapters:
  - {path: ./lora-0, weight: 0.7, density: 0.5}
  - {path: ./lora-1, weight: 0.3, density: 0.5}
"""
THREE = TIES + "  - {path: ./lora-2, weight: 0.2, density: 0.5}\n"


def kernel_read_bytes() -> int:
    """What this process has read so far by system calls, copies inside the kernel included."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("inputs"), TILED, rank=4, tuned=True)
    write_recipe(folder, "ties", TIES)
    write_recipe(folder, "tuned", TIES + "models: [{model: ./tuned, parameters: {density: 0.3}}]\n")
    write_recipe(folder, "linear")
    return folder


@pytest.fixture(scope="module")
def seventy(tmp_path_factory: pytest.TempPathFactory, inputs: Path) -> Path:
    """A model of 141 GB and three adapters, of headers over holes."""
    folder = tmp_path_factory.mktemp("seventy")
    bench_inputs.make_sparse_70b(folder)
    files = list(folder.rglob("*.safetensors"))
    apparent = sum(file.stat().st_size for file in files)
    stored = sum(file.stat().st_blocks * 512 for file in files)
    assert apparent > 140e9
    if stored > 100 * MIB:
        pytest.skip("this file system stores holes")
    sm.plan(inputs / "ties.yaml")  # imports and kernels, which are not what is measured here
    return write_recipe(folder, "ties", THREE)


@pytest.fixture
def no_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of a mapped file are read without a system call."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("planning must not map a weight file")

    monkeypatch.setattr(np, "memmap", refuse)


@pytest.mark.usefixtures("no_mapping")
@pytest.mark.parametrize("io", ["mmap", "read"])
def test_a_70b_model_is_planned_from_its_headers(
    seventy: Path, io: Literal["mmap", "read"]
) -> None:
    before, started = kernel_read_bytes(), time.monotonic()
    plan = sm.plan(seventy, memory="4GiB", io=io)
    seconds, read = time.monotonic() - started, kernel_read_bytes() - before
    print(f"planned in {seconds:.2f} s, reading {read / MIB:.1f} MiB")
    assert read < 32 * MIB
    assert seconds < 30  # ten times what is promised: the machine may be busy
    demand = plan.demand
    assert demand.merged_tensors + demand.copied_tensors == 723
    assert demand.merged_tensors == 7 * 80
    assert len(plan.layouts) == 30
    assert plan.applied() == {"lora-0": 560, "lora-1": 560, "lora-2": 560}
    assert plan.flight.projected_bytes <= 4 << 30


def test_a_70b_plan_counts_what_is_in_the_headers(seventy: Path) -> None:
    plan = sm.plan(seventy, memory="4GiB")
    base = sum(f.stat().st_size for f in (seventy.parent / "base").glob("*.safetensors"))
    adapters = sum(f.stat().st_size for f in seventy.parent.glob("lora-*/*.safetensors"))
    assert plan.output_bytes() == pytest.approx(base, rel=0.001)
    assert plan.demand.write_bytes == pytest.approx(base, rel=0.001)
    # The copied tensors and, under ties, the adapters thrice at most; the base's rows once.
    assert base + adapters < plan.demand.read_bytes < base + 3.1 * adapters
    copied = sum(job.source.spec.nbytes for job in plan.jobs() if isinstance(job, CopyJob))
    assert plan.demand.copied_bytes == copied


# --------------------------------------------------------------------- what merge then does


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """What the kernel gave for the merge's reads of tensors, and took for the writes."""
    counts = {"read": 0, "copied": 0}
    preadv, copy_file_range = os.preadv, os.copy_file_range

    def counting_preadv(*arguments: object) -> int:
        done: int = preadv(*arguments)  # type: ignore[arg-type]
        counts["read"] += done
        return done

    def counting_copy(*arguments: object) -> int:
        done: int = copy_file_range(*arguments)  # type: ignore[arg-type]
        counts["copied"] += done
        return done

    monkeypatch.setattr(os, "preadv", counting_preadv)
    monkeypatch.setattr(os, "copy_file_range", counting_copy)
    yield counts


@pytest.mark.parametrize("name", ["ties", "tuned", "linear"])
def test_the_plan_is_within_one_percent_of_the_merge(
    inputs: Path, tmp_path: Path, counted: dict[str, int], name: str
) -> None:
    recipe = inputs / f"{name}.yaml"
    demand = sm.plan(recipe).demand
    # One thread, so that no two tiles of a tensor add to the counts at once.
    report = sm.merge(recipe, out=tmp_path / "out", io="read", threads=1)
    assert report.read_bytes == pytest.approx(demand.read_bytes, rel=0.01)
    assert counted["read"] + counted["copied"] == pytest.approx(demand.read_bytes, rel=0.01)
    assert counted["copied"] == demand.copied_bytes
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert report.written_bytes == written
    assert written == pytest.approx(demand.write_bytes, rel=0.01)


def test_besides_tensors_only_headers_and_samples_are_read(inputs: Path, tmp_path: Path) -> None:
    """The identity of an input is 16 places of 64 KiB in each file."""
    recipe = inputs / "ties.yaml"
    sm.merge(recipe, out=tmp_path / "first", io="read")
    before = kernel_read_bytes()
    report = sm.merge(recipe, out=tmp_path / "out", io="read")
    besides = kernel_read_bytes() - before - report.read_bytes
    files = [*inputs.glob("base/*.safetensors"), *inputs.glob("lora-*/*.safetensors")]
    assert -MIB < besides < (len(files) + 1) * MIB


def test_copying_reads_as_much_as_it_writes(inputs: Path, tmp_path: Path) -> None:
    text = "base_model: ./base\nmerge_method: passthrough\nmodels: [{model: ./tuned}]\n"
    recipe = write_recipe(inputs, "copy", text)
    demand = sm.plan(recipe).demand
    assert demand.read_bytes == demand.write_bytes == demand.copied_bytes
    assert sm.merge(recipe, out=tmp_path / "out").read_bytes == demand.read_bytes


@pytest.mark.long
def test_the_predicted_time_is_near(tmp_path: Path) -> None:
    """On the 2.5 GB model; promised within a factor of 2 on an idle machine with a fast disk."""
    folder = memory.inputs_of(Path(os.environ.get("STREAMMERGE_BENCH", ".bench")), "llama")
    for method in ("linear", "ties"):
        recipe = folder / f"{method}.yaml"
        recipe.write_text(memory.recipe_text("llama", method))
        predicted = sm.plan(recipe, memory="1GiB").seconds
        best = min(sm.merge(recipe, out=tmp_path / f"{method}-{i}").seconds for i in range(2))
        print(f"{method}: predicted {predicted:.1f} s, took {best:.1f} s")
        assert predicted / 10 < best < predicted * 10  # the machine may be busy
