"""Merges on a device: through torch's CPU device here, and on CUDA where there is one."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streammerge as sm
from streammerge import device, grid
from streammerge.commands.recompute import Lead, recompute
from streammerge.commands.verify import verify
from streammerge.device import CPU, Device, Lanes, choose
from streammerge.errors import ConfigError
from streammerge.methods import CATALOGUE
from streammerge.planning.fingerprint import environment
from streammerge.sources.low_rank import Product
from tests.contracts.method_contract import MEMORY
from tests.contracts.small_inputs import SmallInputs, decode, read_back
from tests.contracts.test_all_methods import ROWS, SHAPES, recipe
from tests.oracles.dense import Exact
from tests.running import digest

torch = pytest.importorskip("torch")

DEVICES = ["torch-cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(params=DEVICES)
def name(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    found: str = request.param
    return found


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(grid, "TILE_ELEMENTS", 256)
    for call in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, call, lambda descriptor: None)
    enabled, threads = torch.is_grad_enabled(), torch.get_num_threads()
    yield
    torch.set_grad_enabled(enabled)
    torch.set_num_threads(threads)


def merged(path: Path, out: Path, **how: Any) -> dict[str, Exact]:
    sm.merge(path, out=out, **{"memory": MEMORY, "threads": 2, **how})
    return {tensor: decode(stored) for tensor, stored in read_back(out).items()}


def inputs(folder: Path, method: str, kind: str) -> SmallInputs:
    made = SmallInputs(folder, SHAPES, "F32")
    for number in range(min(3, CATALOGUE[method].models[1] or 3)):
        if kind == "adapters":
            made.add_adapter([n for n, shape in SHAPES.items() if len(shape) > 1], 3 + number)
        else:
            made.add_model(changed=tuple(SHAPES))
    return made


@pytest.mark.parametrize("kind", ["adapters", "models"])
@pytest.mark.parametrize("method", ROWS)
def test_the_device_gives_what_the_cpu_gives(
    name: str, method: str, kind: str, tmp_path: Path
) -> None:
    """Which is held to float64 by every method's own suite."""
    made = inputs(tmp_path, method, kind)
    path = recipe(made, method, rescale="l1")
    expected = merged(path, tmp_path / "cpu", device="cpu")
    found = merged(path, tmp_path / "device", device=name)
    assert any((expected[one] != made.origin(one)).any() for one in expected)
    for one, tensor in expected.items():
        np.testing.assert_allclose(found[one], tensor, rtol=1e-5, atol=1e-5, err_msg=one)


def test_the_same_bytes_whatever_the_threads(name: str, tmp_path: Path) -> None:
    path = recipe(inputs(tmp_path, "ties", "adapters"), "ties")
    digests = set()
    for threads in (1, 3):
        sm.merge(path, out=tmp_path / str(threads), memory=MEMORY, threads=threads, device=name)
        digests.add(digest(tmp_path / str(threads)))
    assert len(digests) == 1


def test_it_is_recomputed_where_it_was_made(name: str, tmp_path: Path) -> None:
    path, out = recipe(inputs(tmp_path, "ties", "adapters"), "ties"), tmp_path / "out"
    sm.merge(path, out=out, memory=MEMORY, device=name)
    found = recompute(verify(out), 50, Lead(path))
    assert found.derived and found.derived > 10 and not found.notes


def test_what_is_done_on_it_is_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else the suite would compare numpy with itself."""
    seen = []
    whole = Product.rows

    def rows(self: Product, tile: Any, own: Any, out: Any, scratch: Any) -> None:
        seen.append(type(out))
        whole(self, tile, own, out, scratch)

    monkeypatch.setattr(Product, "rows", rows)
    path = recipe(inputs(tmp_path, "ties", "adapters"), "ties")
    merged(path, tmp_path / "out", device="torch-cpu")
    assert set(seen) == {torch.Tensor}


# --------------------------------------------------------------------------------- out of memory


def failing(monkeypatch: pytest.MonkeyPatch, times: int) -> list[int]:
    """The first `times` products find no room; returns a list that counts the others."""
    left, done = [times], []
    whole = Product.rows

    def rows(self: Product, *arguments: Any) -> None:
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("no room, said the test")
        done.append(1)
        whole(self, *arguments)

    monkeypatch.setattr(Product, "rows", rows)
    return done


def test_out_of_memory_lowers_what_is_in_flight(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = recipe(inputs(tmp_path, "ties", "adapters"), "ties")
    undisturbed = merged(path, tmp_path / "whole", device="torch-cpu", threads=3)
    done = failing(monkeypatch, 2)
    found = merged(path, tmp_path / "out", device="torch-cpu", threads=3)
    assert done
    for one, tensor in undisturbed.items():
        np.testing.assert_array_equal(found[one], tensor)


def test_a_device_that_is_too_small_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = recipe(inputs(tmp_path, "ties", "adapters"), "ties")
    failing(monkeypatch, 10**6)
    with pytest.raises(ConfigError, match="does not hold one tile") as told:
        merged(path, tmp_path / "out", device="torch-cpu")
    assert "--device cpu" in str(told.value)
    assert not (tmp_path / "out").exists()


def test_lanes_are_given_up_one_by_one() -> None:
    lanes = Lanes(CPU, 3)
    assert lanes.fewer(3) and lanes.most == 2
    assert lanes.fewer(3) and lanes.most == 2, "another thread did it meanwhile"
    assert lanes.fewer(2) and lanes.most == 1
    assert not lanes.fewer(1)
    with lanes.one() as first:
        pass
    with lanes.one() as second:
        assert first is second, "buffers are used again"


# ------------------------------------------------------------------------------------- the choice


def test_auto_without_a_driver_is_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "_DRIVER", tmp_path / "none")
    assert choose("auto") == (CPU, None)


def test_auto_says_what_keeps_it_from_a_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "0000:01:00.0").mkdir()
    monkeypatch.setattr(device, "_DRIVER", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen, note = choose("auto")
    assert chosen == CPU and note and "finds no such CUDA device" in note
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda module: None)
    chosen, note = choose("auto")
    assert chosen == CPU and note and "streammerge[gpu]" in note


def test_auto_takes_a_device_and_goes_on_with_the_kind_that_began(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "0000:01:00.0").mkdir()
    monkeypatch.setattr(device, "_DRIVER", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose("auto") == (Device("cuda:0"), None)
    assert choose("auto", before="cpu") == (CPU, None)
    with pytest.raises(ConfigError, match="no such CUDA device"):
        choose("cuda:1")


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    path = recipe(inputs(tmp_path, "ties", "adapters"), "ties")
    with pytest.raises(ConfigError, match="no such CUDA device") as told:
        sm.plan(path, device="cuda")
    assert told.value.exit_code == 78 and "--device cpu" in str(told.value)


@pytest.mark.parametrize(
    ("changes", "how", "why"),
    [
        ({"space": "core"}, {}, "small, and done with numpy"),
        ({"output": {"kind": "adapter", "path": "x"}}, {}, "small, and done with numpy"),
        ({}, {"spill": "always"}, "not spilled"),
    ],
)
def test_what_a_device_cannot_do_is_refused(
    changes: dict[str, Any], how: dict[str, Any], why: str, tmp_path: Path
) -> None:
    path = recipe(inputs(tmp_path, "ties", "adapters"), "ties")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=why):
        sm.plan(path, device="torch-cpu", **how)


OWN = """
from typing import Annotated
{imports}
from streammerge.declarations import Knob
from streammerge.methods import method

@method()
def mine(deltas: {stack}, *, weight: Annotated[{per_model}, Knob(1.0)]) -> {rows}:
    "Half of the sum."
    return {half}
"""
IN_TORCH = OWN.format(
    imports="import torch",
    stack='Annotated[torch.Tensor, "deltas"]',
    per_model="torch.Tensor",
    rows="torch.Tensor",
    half="0.5 * (deltas * weight[:, None, None]).sum(dim=0).float()",
)
IN_NUMPY = OWN.format(
    imports="from streammerge.arrays import Deltas, PerModel, Rows",
    stack="Deltas",
    per_model="PerModel",
    rows="Rows",
    half="0.5 * (deltas * weight[:, None, None]).sum(axis=0).astype('f4')",
)


def own_recipe(folder: Path, text: str) -> Path:
    made = inputs(folder, "ties", "adapters")
    (folder / "mine.py").write_text(text)
    path = made.recipe("task_arithmetic", [{"weight": w} for w in (0.5, 0.75, 0.3)], {})
    document = json.loads(path.read_text()) | {"merge_method": "./mine.py"}
    path.write_text(json.dumps(document))
    return path


def test_a_method_of_ones_own_in_torch_runs_on_the_device(name: str, tmp_path: Path) -> None:
    path = own_recipe(tmp_path, IN_TORCH)
    expected = merged(path, tmp_path / "cpu", device="cpu")
    found = merged(path, tmp_path / "device", device=name)
    for one, tensor in expected.items():
        np.testing.assert_allclose(found[one], tensor, rtol=1e-5, atol=1e-6)


def test_one_in_numpy_is_refused_there(tmp_path: Path) -> None:
    path = own_recipe(tmp_path, IN_NUMPY)
    merged(path, tmp_path / "cpu", device="cpu")
    with pytest.raises(ConfigError, match="written for numpy"):
        sm.plan(path, device="torch-cpu")


def test_the_kind_of_device_is_part_of_what_a_merge_is() -> None:
    assert environment(CPU)["device"] == "cpu"
    assert environment(Device("torch-cpu"))["device"] == "torch-cpu"
    assert dataclasses.asdict(CPU) == {"name": "cpu"}


def test_the_option_is_checked(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "streammerge", "plan", "x.yaml", "--device", "gpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "none of auto, cpu, cuda" in done.stderr
