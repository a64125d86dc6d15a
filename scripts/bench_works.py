"""What is measured: recipes over the benchmark's inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import bench_inputs
from bench_inputs import LLAMA_1B, Config

from streammerge.methods import CATALOGUE

Tool = Literal["streammerge", "mergekit", "PEFT"]

# What the issue of speed is about; the others of the catalogue are measured apart.
HEADLINE = ("linear", "ties", "dare_ties")

# What a method needs beyond its defaults; the rest of the catalogue runs as it is.
KNOBS = {
    "ties": "density: 0.5",
    "magnitude_prune": "density: 0.5",
    "dare_linear": "density: 0.5",
    "dare_ties": "density: 0.5",
    "della": "density: 0.5",
    "della_linear": "density: 0.5",
    "breadcrumbs": "density: 0.9",
    "breadcrumbs_ties": "density: 0.9",
}
SHARED = {"slerp": "t: 0.5", "nearswap": "t: 0.001", "sce": "select_topk: 0.1"}


@dataclass(frozen=True, slots=True)
class Work:
    """One recipe: what is merged, onto what, and by whom. `full` says that the models are no
    adapters; then some methods leave the base unread."""

    name: str
    recipe: Path
    base: Path
    models: tuple[Path, ...]
    method: str
    options: tuple[str, ...] = ()
    full: bool = False
    tool: Tool = "streammerge"

    @property
    def reads(self) -> tuple[Path, ...]:
        """The folders whose weights it must read."""
        from_base = not self.full or CATALOGUE[self.method].on_deltas(has_base=True)
        return (self.base, *self.models) if from_base else self.models

    def under(self, *options: str) -> Work:
        """The same with options, which its name says."""
        return replace(self, name=" ".join((self.name, *options)), options=options)


def inputs(folder: Path, config: Config = LLAMA_1B, *, tuned: bool = True) -> Path:
    """A model, three adapters, eight of rank 256, three fine-tunes; at full size 13 GB."""
    base = folder / "base"
    once(base, partial(bench_inputs.make_llama, config=config))
    for seed in range(3):
        once(folder / f"lora-{seed}", partial(bench_inputs.make_adapter, config=config, seed=seed))
    for seed in range(8):
        large = partial(bench_inputs.make_adapter, config=config, rank=256, seed=40 + seed)
        once(folder / f"large-{seed}", large)
    few = partial(bench_inputs.make_adapter, config=config, seed=9, targets=("q_proj", "v_proj"))
    once(folder / "lora-qv", few)
    for seed in range(3 if tuned else 0):
        made = partial(bench_inputs.make_finetune, base, seed=20 + seed)
        once(folder / f"tuned-{seed}", made)
    return folder


def once(folder: Path, make: Callable[[Path], None]) -> None:
    """Make an input that is not there; one that a stop cut off never has the name."""
    if not folder.exists():
        partly = folder.with_name(f"{folder.name}.part")
        make(partly)
        partly.rename(folder)


def catalogue(folder: Path, kind: str) -> Iterator[Work]:
    """Every method on three `adapters`, or on three full `models`."""
    base = folder / "base"
    prefix = "lora" if kind == "adapters" else "tuned"
    for method, spec in CATALOGUE.items():
        if spec.space == "cores" and kind == "models":
            continue  # a full model is no low-rank update
        models = tuple(folder / f"{prefix}-{i}" for i in range(min(3, spec.models[1] or 3)))
        path = folder / f"{kind}-{method}.yaml"
        path.write_text(recipe_text(method, models, adapters=kind == "adapters"))
        name = f"{len(models)} {kind}, {method}"
        yield Work(name, path, base, models, method, full=kind == "models")


def headline(folder: Path) -> Iterator[Work]:
    """The methods that are compared with other tools, and adapters on few and on all tensors."""
    for kind in ("adapters", "models"):
        yield from (work for work in catalogue(folder, kind) if work.method in HEADLINE)
    for name, adapter in (("on q and v", "lora-qv"), ("on all", "lora-0")):
        yield adapted(folder, f"adapter {name}, linear", "linear", [folder / adapter])


def others(folder: Path, kind: str) -> Iterator[Work]:
    """The rest of the catalogue."""
    yield from (work for work in catalogue(folder, kind) if work.method not in HEADLINE)


def spilling(folder: Path) -> Iterator[Work]:
    """Both sides of what `--spill auto` decides."""
    large = [folder / f"large-{seed}" for seed in range(8)]
    small = [folder / f"lora-{seed}" for seed in range(3)]
    for what, models in (("8 adapters of rank 256", large), ("3 adapters of rank 16", small)):
        for mode in ("auto", "always", "never"):
            name = f"{what} with --spill {mode}, ties"
            yield adapted(folder, name, "ties", models, "--spill", mode)


def peers(folder: Path, method: str, kind: str) -> Iterator[Work]:
    """One of the catalogue, and the same by mergekit and, of adapters, by PEFT."""
    (work,) = (work for work in catalogue(folder, kind) if work.method == method)
    yield work
    recipe = mergekit_recipe(work)
    yield replace(work, name=f"{work.name}, mergekit", recipe=recipe, tool="mergekit")
    if not work.full:
        yield replace(work, name=f"{work.name}, PEFT", tool="PEFT")


def adapted(folder: Path, name: str, method: str, models: Sequence[Path], *options: str) -> Work:
    """A merge of adapters; its recipe is named like the method and the models."""
    path = folder / f"{method}-of-{len(models)}-{models[0].name}.yaml"
    path.write_text(recipe_text(method, models, adapters=True))
    return Work(name, path, folder / "base", tuple(models), method, options)


def mergekit_recipe(work: Work) -> Path:
    """The recipe for mergekit, which writes an adapter as `model: base+adapter`."""
    lines = [f"merge_method: {work.method}", "dtype: bfloat16"]
    lines += [] if work.method == "linear" else [f"base_model: {work.base}"]
    lines.append("models:")
    knobs = {"weight": 1.0} | ({} if work.method == "linear" else {"density": 0.5})
    given = ", ".join(f"{name}: {value}" for name, value in knobs.items())
    for model in work.models:
        name = str(model) if work.full else f"{work.base}+{model}"
        lines.append(f"  - {{model: {name}, parameters: {{{given}}}}}")
    path = work.recipe.with_name(f"mergekit-{work.recipe.name}")
    path.write_text("\n".join(lines) + "\n")
    return path


def recipe_text(method: str, models: Sequence[Path], *, adapters: bool) -> str:
    """A recipe beside its inputs."""
    knobs = KNOBS.get(method, "")
    lines = ["base_model: ./base", f"merge_method: {method}"]
    if method in SHARED:
        lines.append(f"parameters: {{{SHARED[method]}}}")
    lines.append("adapters:" if adapters else "models:")
    for model in models:
        if adapters:
            lines.append(f"  - {{path: ./{model.name}{', ' * bool(knobs)}{knobs}}}")
        else:
            lines.append(f"  - {{model: ./{model.name}, parameters: {{{knobs}}}}}")
    return "\n".join(lines) + "\n"
