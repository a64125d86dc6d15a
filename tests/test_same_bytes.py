"""The same recipe on the same inputs gives the same bytes, however the merge was run.

One hash over all output files for any threads, budget, way of reading, timing and staging, and any
order of the tensors in the inputs. Only the donor's order shows, since the output mirrors it: then
every tensor has the same bytes.
"""

from __future__ import annotations

import getpass
import itertools
import json
import random
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import streammerge as sm
from streammerge.arrays import RawBytes
from streammerge.storage.shard import ShardFile
from tests.makers import write_model
from tests.running import (
    TILED,
    digest,
    files,
    fresh_process,
    make_inputs,
    run,
    tensor_digest,
    tensors,
)

# Adapters that share every projection, and a full fine-tune that changes all tensors.
RECIPES = {
    "linear": """\
base_model: ./base
merge_method: linear
models:
  - {model: ./tuned, parameters: {weight: 0.4}}
adapters:
  - {path: ./lora-0, weight: 0.35}
  - {path: ./lora-1, weight: 0.25}
""",
    "ties": """\
base_model: ./base
merge_method: ties
models:
  - {model: ./tuned, parameters: {weight: 0.4, density: 0.3}}
adapters:
  - {path: ./lora-0, weight: 0.35, density: 0.6}
  - {path: ./lora-1, weight: -0.25, density: 0.5}
""",
    # Most tensors are copied inside the kernel, the projections are computed.
    "adapters": """\
base_model: ./base
merge_method: ties
adapters:
  - {path: ./lora-0, weight: 0.7, density: 0.5}
  - {path: ./lora-1, weight: 0.3, density: 0.5}
""",
}

Merge = Callable[..., sm.Report]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("inputs"), TILED, tuned=True)
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def merge() -> Iterator[Merge]:
    """`sm.merge` in a process of its own."""
    with fresh_process() as pool:
        yield lambda *args, **options: pool.submit(sm.merge, *args, **options).result()


@pytest.fixture(scope="module")
def usual(inputs: Path, merge: Merge, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The output of each recipe, made in the plainest way."""
    outs = tmp_path_factory.mktemp("usual")
    for name in RECIPES:
        merge(inputs / f"{name}.yaml", out=outs / name, memory="384MiB", threads=1, io="read")
    return {name: outs / name for name in RECIPES}


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "out"
    shutil.rmtree(tmp_path / "out", ignore_errors=True)  # 15 MB each; pytest would keep them


WAYS = list(itertools.product((1, 2, 4), ("384MiB", "4GiB"), ("mmap", "read")))


@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize(("threads", "memory", "io"), WAYS)
def test_threads_budget_and_io_change_no_byte(
    inputs: Path,
    usual: dict[str, Path],
    merge: Merge,
    out: Path,
    method: str,
    threads: int,
    memory: str,
    io: str,
) -> None:
    recipe = inputs / f"{method}.yaml"
    report = merge(recipe, out=out, memory=memory, threads=threads, io=io)
    assert not report.already_done
    assert digest(out) == digest(usual[method])


@pytest.mark.parametrize("method", list(RECIPES))
def test_the_command_gives_the_bytes_of_the_function(
    inputs: Path, usual: dict[str, Path], out: Path, method: str
) -> None:
    done = run("merge", f"{method}.yaml", "--out", out, "--quiet", cwd=inputs)
    assert done.returncode == 0, done.stderr
    assert digest(out) == digest(usual[method])


@pytest.mark.parametrize("method", list(RECIPES))
def test_the_order_of_writes_changes_no_byte(
    inputs: Path,
    usual: dict[str, Path],
    out: Path,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write, chance, offsets = ShardFile.write, random.Random(method), list[int]()

    def late(shard: ShardFile, offset: int, stored: RawBytes) -> None:
        time.sleep(chance.uniform(0, 0.02))
        offsets.append(offset)
        write(shard, offset, stored)

    monkeypatch.setattr(ShardFile, "write", late)
    sm.merge(inputs / f"{method}.yaml", out=out, threads=4, memory="4GiB")
    assert offsets != sorted(offsets), "the sleeps were to change the order"
    assert digest(out) == digest(usual[method])


# ------------------------------------------------------------------- inputs that lie otherwise


@pytest.fixture(scope="module")
def shuffled(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same inputs with their tensors in another order and dealt to other files."""
    folder = tmp_path_factory.mktemp("shuffled")
    shutil.copytree(inputs, folder, dirs_exist_ok=True)
    for number, (name, shards) in enumerate({"base": 3, "tuned": 4}.items()):
        for file in (folder / name).glob("model*"):
            file.unlink()
        order = list(tensors(inputs / name).items())
        random.Random(number).shuffle(order)
        write_model(folder / name, dict(order), shards)
    for name in ("lora-0", "lora-1"):
        reversed_order = dict(reversed(tensors(inputs / name).items()))
        write_model(folder / name, reversed_order)
        (folder / name / "model.safetensors").rename(folder / name / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("method", list(RECIPES))
def test_the_order_of_the_other_models_tensors_changes_no_byte(
    inputs: Path, shuffled: Path, usual: dict[str, Path], out: Path, tmp_path: Path, method: str
) -> None:
    for name in ("tuned", "lora-0", "lora-1"):
        (tmp_path / name).symlink_to(shuffled / name)
    (tmp_path / "base").symlink_to(inputs / "base")
    recipe = tmp_path / "cfg.yaml"
    recipe.write_text(RECIPES[method])
    sm.merge(recipe, out=out, threads=2, memory="4GiB")
    assert digest(out) == digest(usual[method])


@pytest.mark.parametrize("method", list(RECIPES))
def test_the_order_of_the_donors_tensors_changes_no_tensor(
    shuffled: Path, usual: dict[str, Path], out: Path, method: str
) -> None:
    sm.merge(shuffled / f"{method}.yaml", out=out, threads=2, memory="4GiB")
    assert list(tensors(out)) == list(tensors(shuffled / "base")), "the output mirrors its donor"
    assert tensor_digest(out) == tensor_digest(usual[method])


def test_staged_inputs_give_the_same_files(
    inputs: Path, usual: dict[str, Path], tmp_path: Path, out: Path
) -> None:
    staged = tmp_path / "some where" / "else"
    shutil.copytree(inputs, staged, copy_function=shutil.copyfile)  # new times, new inodes
    sm.merge(staged / "ties.yaml", out=out)
    assert digest(out) == digest(usual["ties"])


# ---------------------------------------------------------------------- what the files do not say


@pytest.mark.parametrize("method", list(RECIPES))
def test_no_file_tells_where_when_or_by_whom(
    inputs: Path, usual: dict[str, Path], method: str
) -> None:
    private = [str(inputs), str(usual[method]), str(Path.home()), socket.gethostname()]
    private += [time.strftime("%Y-%m-%d"), str(int(time.time()))[:8]]
    small = {n: data for n, data in files(usual[method]).items() if not n.endswith("safetensors")}
    assert {"README.md", "streammerge.json", "streammerge.yaml", "config.json"} <= set(small)
    for name, data in small.items():
        for word in private:
            assert word.encode() not in data, f"{name} holds {word}"


def test_the_record_holds_no_user_and_no_duration(usual: dict[str, Path]) -> None:
    record = json.loads((usual["ties"] / "streammerge.json").read_text())

    def keys(value: object) -> Iterator[str]:
        if isinstance(value, dict):
            yield from value
            for inner in value.values():
                yield from keys(inner)

    told = set(keys(record))
    assert not told & {"user", "host", "hostname", "time", "date", "seconds", "duration", "cwd"}
    assert f'"{getpass.getuser()}"' not in (usual["ties"] / "streammerge.json").read_text()


def test_another_recipe_gives_other_bytes(usual: dict[str, Path]) -> None:
    assert len({digest(out) for out in usual.values()}) == len(RECIPES)
    assert len({tensor_digest(out) for out in usual.values()}) == len(RECIPES)
