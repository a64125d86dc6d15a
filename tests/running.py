"""Small inputs of real shapes, the real command, and what there is to compare of an output."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import bench_inputs
from safetensors import deserialize

from tests.makers import Tensor

# The command as pip installed it beside this Python.
COMMAND = str(Path(sys.executable).with_name("streammerge"))

# Hidden, intermediate, layers, key-value width, vocabulary: a few kilobytes, one tile each.
TINY = (64, 128, 2, 64, 300)
# The MLP's tensors are two tiles each: 15 MB.
TILED = (256, 4096, 2, 64, 4000)

ADAPTERS = """\
base_model: ./base
merge_method: METHOD
adapters:
  - {path: ./lora-0, weight: 0.7}
  - {path: ./lora-1, weight: 0.3}
"""


def make_inputs(
    folder: Path, config: bench_inputs.Config = TINY, *, rank: int = 4, tuned: bool = False
) -> Path:
    """`base` in two shards with a tokenizer and a licence, `lora-0`, `lora-1`, perhaps `tuned`."""
    bench_inputs.make_llama(folder / "base", config, shards=2)
    for seed in range(2):
        bench_inputs.make_adapter(folder / f"lora-{seed}", config, rank=rank, seed=seed)
    if tuned:
        bench_inputs.make_finetune(folder / "base", folder / "tuned", 20)
    (folder / "base" / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "base" / "LICENSE").write_text("Apache License\n")
    (folder / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# Base\n")
    return folder


def write_recipe(folder: Path, name: str, text: str = ADAPTERS) -> Path:
    """A recipe beside the inputs; the usual one is of two adapters by the method of its name."""
    path = folder / f"{name}.yaml"
    path.write_text(text.replace("METHOD", name))
    return path


def run(
    *arguments: str | int | Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 200,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end; its output is text, and not a terminal."""
    command = [COMMAND, *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=cwd,
        env=dict(os.environ if env is None else env),
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        text=True,
        timeout=timeout,
        **options,
    )


def fresh_process() -> ProcessPoolExecutor:
    """One new Python process to call functions in: a small budget must hold for the process as a
    whole, and the one that runs the tests has torch in its memory."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def files(folder: Path) -> dict[str, bytes]:
    """Relative name -> bytes of every file of a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def digest(folder: Path, *, only: str = "") -> str:
    """One hash over the names and bytes of all files, or of those whose names end in `only`."""
    total = hashlib.sha256()
    for name, data in files(folder).items():
        if name.endswith(only):
            total.update(f"{name}\0{len(data)}\0".encode() + data)
    return total.hexdigest()


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor as the safetensors library reads it, in the order of files and of headers."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        read = {n: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for n, t in deserialize(raw)}  # type: ignore[no-untyped-call]
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        found |= {name: read[name] for name in header if name in read}
    return found


def tensor_digest(folder: Path) -> str:
    """One hash over name, dtype, shape and bytes of all tensors, by name: wherever they lie."""
    total = hashlib.sha256()
    for name, (dtype, shape, data) in sorted(tensors(folder).items()):
        total.update(f"{name}\0{dtype}\0{shape}\0".encode() + data)
    return total.hexdigest()
