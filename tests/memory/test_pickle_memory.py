"""torch, which looks into pickles before a merge, is in the projection, and in the budget."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from streammerge.errors import BudgetError, Problems
from streammerge.storage import unpickle
from streammerge.storage.pickles import LOOK_BYTES, Pickles
from tests.makers import write_model
from tests.running import COMMAND, run

MIB = 1 << 20
RECIPE = "{base_model: ./base, merge_method: linear, models: [{model: ./tuned}], dtype: float32}"


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A model in safetensors, and one as torch.save writes it."""
    write_model(tmp_path / "base", {"w": ("F32", (4, 4), bytes(64))})
    write_model(tmp_path / "tuned", {})
    (tmp_path / "tuned" / "model.safetensors").unlink()
    torch.save({"w": torch.ones(4, 4)}, tmp_path / "tuned" / "pytorch_model.bin")
    (tmp_path / "it.yaml").write_text(RECIPE)
    return tmp_path


def many(folder: Path, count: int) -> Path:
    """A file of many small tensors, such as of a model of experts."""
    names = (f"model.layers.0.mlp.experts.{index}.down_proj.weight" for index in range(count))
    torch.save({name: torch.ones(64) for name in names}, folder / "many.bin")
    return folder / "many.bin"


@pytest.mark.parametrize("count", [1, 5000])
def test_what_is_foreseen_is_what_it_takes(tmp_path: Path, count: int) -> None:
    path = many(tmp_path, count)
    usage = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=-3)"
    usage += "; print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    command = [sys.executable, "-c", usage, sys.executable, "-P", unpickle.__file__, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    measured = int(done.stdout) << 10
    assert measured <= LOOK_BYTES <= 1.3 * measured


def test_both_processes_stay_under_the_projection(inputs: Path) -> None:
    """Watched from outside while the plan is made."""
    command = [COMMAND, "plan", "it.yaml", "--allow-pickle", "--json"]
    most = 0
    with subprocess.Popen(command, cwd=inputs, stdout=subprocess.PIPE, text=True) as plan:
        while plan.poll() is None:
            for child in children(plan.pid):
                most = max(most, status(plan.pid, "VmRSS") + status(child, "VmHWM"))
            time.sleep(0.002)
        assert plan.stdout is not None
        told = json.loads(plan.stdout.read())
    assert 300 * MIB < most <= told["pickles_peak_bytes"] == told["projected_peak_bytes"]
    assert told["pickles_peak_bytes"] <= 1.3 * most


def children(pid: int) -> list[int]:
    """Of its main thread; none once it has ended."""
    try:
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except OSError:
        return []


def status(pid: int, field: str) -> int:
    """A size in bytes; 0 once the process has ended."""
    try:
        found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) << 10 if found else 0


@pytest.mark.parametrize("command", ["plan", "merge"])
def test_a_budget_without_room_for_it_is_refused_before_it_starts(
    inputs: Path, command: str
) -> None:
    """Though the merge alone would fit."""
    bystander = inputs / "torch.py"
    bystander.write_text(f"open({str(inputs / 'started')!r}, 'w')\n__version__ = '2.9'\n")
    env = {**os.environ, "PYTHONPATH": f"{inputs}:{os.environ.get('PYTHONPATH', '')}"}
    arguments = (command, "it.yaml", "--out", inputs / "out", "--allow-pickle", "--memory")
    refused = run(*arguments, "300MiB", cwd=inputs, env=env)
    assert refused.returncode == 78
    assert "it.yaml:1:61: torch, which looks into pickles, does not fit" in refused.stderr
    assert "found:    a budget of 300 MiB" in refused.stderr
    assert not (inputs / "started").exists() and not (inputs / "out").exists()
    asked = run(*arguments, "1GiB", cwd=inputs, env=env)
    assert (inputs / "started").exists() and "torch 2.9" in asked.stderr
    bystander.unlink()
    least = re.search(r"--memory (\S+) is the least", refused.stderr)
    assert least is not None, refused.stderr
    done = run(*arguments, least[1], cwd=inputs)
    assert done.returncode == 0, done.stderr


def test_a_torch_that_takes_more_is_refused_when_it_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its size is not known beforehand; the least budget is, from then on.

    The size of this process, in which other tests ran, may fall between the two reads.
    """
    monkeypatch.setattr("streammerge.system.resident_bytes", lambda: 200 * MIB)
    path = many(tmp_path, 30_000)
    free = Pickles()
    assert len(free.read([path], Problems())) == 1
    problems = Problems()
    assert not Pickles(free.peak_bytes - 8 * MIB).read([path], problems)
    (problem,) = problems
    assert isinstance(problem, BudgetError)
    assert free.peak_bytes <= problem.least_bytes <= free.peak_bytes + 12 * MIB


def test_safetensors_need_no_room_for_it(inputs: Path) -> None:
    (inputs / "it.yaml").write_text(RECIPE.replace("tuned", "base"))
    done = run("plan", "it.yaml", "--allow-pickle", "--memory", "300MiB", "--json", cwd=inputs)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["pickles_peak_bytes"] == 0 and told["projected_peak_bytes"] < 300 * MIB
