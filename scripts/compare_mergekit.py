"""Merges by mergekit and by streammerge of the same small float32 models, and how far apart.

Relative to the largest value of the tensor. Cases whose formula is not the same by intent are
marked; docs/mergekit.md says why. Exit code 1 when another case is further apart than 1e-5.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bench_inputs
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import streammerge as sm

NEAR = 1e-5
CONFIG = (128, 192, 5, 64, 300)  # see bench_inputs
Tensors = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Case:
    """One method with its parameters: of each model, and shared."""

    method: str
    shared: Mapping[str, Any] = field(default_factory=dict)
    models: int = 3
    weighted: bool = True
    own: Mapping[str, Any] = field(default_factory=dict)
    base_listed: bool = False
    based: bool = True
    sliced: bool = False  # the models as sources of one slice
    differs: str = ""  # why, in short, where the formula is not the same

    def recipe(self, folder: Path) -> dict[str, Any]:
        weights = (0.5, 0.7, 0.3)
        names = (["base"] if self.base_listed else []) + [f"tuned-{i}" for i in range(self.models)]
        entries = []
        for index, name in enumerate(names):
            weight = {"weight": weights[index % 3]} if self.weighted else {}
            entries.append({"model": str(folder / name), "parameters": {**weight, **self.own}})
        base = {"base_model": str(folder / "base")} if self.based else {}
        shared = {"parameters": dict(self.shared)} if self.shared else {}
        listed: dict[str, Any] = {"models": entries}
        if self.sliced:
            sources = [{**entry, "layer_range": [0, CONFIG[2]]} for entry in entries]
            listed = {"slices": [{"sources": sources}]}
        return {
            "merge_method": self.method,
            **base,
            **listed,
            **shared,
            "dtype": "float32",
        }

    def __str__(self) -> str:
        given = {**self.own, **self.shared}
        sliced = " in a slice" if self.sliced else ""
        return f"{self.method}{sliced} {', '.join(f'{k} {v}' for k, v in given.items())}".strip()


DENSE = {"density": 0.4}
ATTENTION_AND_MLP = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.4, 0.1]},
    {"value": 0.5},
]
CASES = (
    Case("linear", based=False),
    Case("linear", {"normalize": False}, based=False),
    Case("task_arithmetic", {"lambda": 0.7}),
    Case("task_arithmetic", {"normalize": True}),
    Case("ties", own=DENSE),
    Case("ties", {"normalize": False, "lambda": 1.3}, own=DENSE),
    Case("ties", {"rescale": True}, own=DENSE),
    Case("dare_linear"),
    Case("dare_ties", {"normalize": True}),
    Case("della", own={"density": 1.0}),
    Case("della_linear", own={"density": 1.0}),
    Case("breadcrumbs", own={**DENSE, "gamma": 0.05}),
    Case("breadcrumbs_ties", own={**DENSE, "gamma": 0.05}),
    Case("breadcrumbs", {"rescale": True}, own={"density": 0.95, "gamma": 0.2}),
    Case("sce", weighted=False),
    Case("sce", {"select_topk": 0.3}, weighted=False),
    Case("slerp", {"t": 0.4}, models=1, weighted=False, base_listed=True),
    Case("nuslerp", models=2),
    Case("nuslerp", {"nuslerp_flatten": False}, models=2),
    Case("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, models=2),
    Case("nuslerp", models=2, based=False),
    Case("multislerp"),
    Case("multislerp", based=False),
    Case("karcher", weighted=False, based=False),
    Case("model_stock", weighted=False),
    Case("model_stock", {"filter_wise": True}, weighted=False),
    Case("nearswap", {"t": 0.01}, models=1, weighted=False),
    Case(
        "arcee_fusion",
        models=1,
        weighted=False,
        differs="its float32 divergence moves a few elements over the threshold",
    ),
    Case("ram", {"epsilon": 0.01}, weighted=False),
    Case("ramplus_tl", {"epsilon": 0.01, "r": 0.5}, weighted=False),
    Case("passthrough", models=1, weighted=False, own={"scale": 0.5}, based=False),
    # Gradients and filters, of each model and shared.
    Case("slerp", {"t": ATTENTION_AND_MLP}, models=1, weighted=False, base_listed=True),
    Case(
        "slerp",
        {"t": ATTENTION_AND_MLP},
        models=1,
        weighted=False,
        base_listed=True,
        sliced=True,
    ),
    Case(
        "linear",
        own={"weight": [{"filter": "mlp", "value": [0.2, 1]}, {"value": [2, 1, 1]}]},
        based=False,
    ),
    Case("ties", {"normalize": [True, False], "lambda": [1, 2]}, own={"density": [0.2, 0.9, 0.6]}),
    Case("breadcrumbs", {"density": 0.6}, own={"density": [{"filter": "mlp", "value": 0.9}]}),
    Case("dare_ties", own={"density": [{"filter": "proj", "value": 0}]}),
)


def write_model(folder: Path, tensors: Tensors) -> None:
    """A Llama folder in float32."""
    folder.mkdir(parents=True)
    config = bench_inputs.llama_config(CONFIG, tied=False) | {"torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})


def make_models(folder: Path) -> None:
    random = np.random.default_rng(0)
    shapes = bench_inputs.llama_tensors(CONFIG, head=True)
    base = {n: random.normal(size=s).astype(np.float32) * 0.1 for n, s in shapes.items()}
    write_model(folder / "base", base)
    for index in range(3):
        moved = {
            name: (value + 0.03 * random.normal(size=value.shape)).astype(np.float32)
            for name, value in base.items()
        }
        write_model(folder / f"tuned-{index}", moved)


def read(folder: Path) -> dict[str, NDArray[np.float32]]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def apart(ours: Tensors, theirs: Tensors) -> float:
    """The largest difference, relative to the largest value of its tensor."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    found = [
        np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max() for name in theirs
    ]
    return float(np.max(found))  # NaN when one is


# Runs in mergekit's environment: one process for all cases, since it takes long to start.
DRIVER = """
import sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for folder in sys.argv[1:]:
    config = MergeConfiguration.model_validate(yaml.safe_load(open(folder + "/recipe.yaml")))
    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
    run_merge(config, folder + "/theirs", options)
"""


def merge_by_mergekit(folders: Sequence[Path], python: str) -> None:
    alone = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    command = [python, "-c", DRIVER, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, env=alone)
    if done.returncode:
        raise SystemExit(f"mergekit failed\n{done.stderr[-3000:]}")


def main(arguments: Sequence[str]) -> int:
    """0 when every case that is meant to agree does."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", required=True, help="of an environment with mergekit")
    parser.add_argument("--only", help="a method")
    options = parser.parse_args(arguments)
    cases = [case for case in CASES if options.only in (None, case.method)]
    far = 0
    with tempfile.TemporaryDirectory() as name:
        make_models(Path(name))
        folders = [Path(name) / f"case-{number}" for number in range(len(cases))]
        for case, folder in zip(cases, folders, strict=True):
            folder.mkdir()
            (folder / "recipe.yaml").write_text(json.dumps(case.recipe(Path(name))))
        merge_by_mergekit(folders, options.python)
        for case, folder in zip(cases, folders, strict=True):
            sm.merge(folder / "recipe.yaml", out=folder / "ours")
            found = apart(read(folder / "ours"), read(folder / "theirs"))
            far += not found <= NEAR and not case.differs
            print(f"{found:9.1e}  {case}  {case.differs}".rstrip(), flush=True)
    print(f"{far} cases are further apart than {NEAR:g} without a reason")
    return 1 if far else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
