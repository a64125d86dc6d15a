"""What is measured: recipes over the benchmark's inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import bench_inputs
from bench_inputs import LLAMA_1B, Config

from streammerge.methods import CATALOGUE

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
    """One recipe. `reads` are the folders whose weights it must read, `base` what it writes."""

    name: str
    recipe: Path
    base: Path
    reads: tuple[Path, ...]
    options: tuple[str, ...] = ()

    @property
    def only_base(self) -> bool:
        """Whether the copy of the base alone is the limit: adapters are small."""
        return not any("tuned" in folder.name for folder in self.reads)


def inputs(root: Path, config: Config = LLAMA_1B, *, tuned: bool = True) -> Path:
    """The 2.5 GB model, three adapters, eight of rank 256, three fine-tunes; 13 GB, made once."""
    folder = root / "llama"
    if not (folder / "base").exists():
        bench_inputs.make_llama(folder / "base", config)
    for seed in range(3):
        if not (folder / f"lora-{seed}").exists():
            bench_inputs.make_adapter(folder / f"lora-{seed}", config, seed=seed)
    for seed in range(8):
        if not (folder / f"large-{seed}").exists():
            bench_inputs.make_adapter(folder / f"large-{seed}", config, rank=256, seed=40 + seed)
    few = folder / "lora-qv"
    if not few.exists():
        bench_inputs.make_adapter(few, config, seed=9, targets=("q_proj", "v_proj"))
    for seed in range(3 if tuned else 0):
        if not (folder / f"tuned-{seed}").exists():
            bench_inputs.make_finetune(folder / "base", folder / f"tuned-{seed}", 20 + seed)
    return folder


def works(folder: Path) -> Iterator[Work]:
    """Every method on three adapters and on full models, and the few special ones."""
    base = folder / "base"
    loras = [folder / f"lora-{seed}" for seed in range(3)]
    tuned = [folder / f"tuned-{seed}" for seed in range(3)]
    for method, spec in CATALOGUE.items():
        most = spec.models[1] or 3
        for kind, models in (("adapters", loras), ("models", tuned)):
            chosen = models[:most]
            text = recipe_text(method, chosen, adapters=kind == "adapters")
            path = folder / f"{kind}-{method}.yaml"
            path.write_text(text)
            yield Work(f"{len(chosen)} {kind}, {method}", path, base, (base, *chosen))
    path = folder / "few.yaml"
    path.write_text(recipe_text("linear", [folder / "lora-qv"], adapters=True))
    yield Work("adapter on q and v, linear", path, base, (base, folder / "lora-qv"))
    path = folder / "all.yaml"
    path.write_text(recipe_text("linear", loras[:1], adapters=True))
    yield Work("adapter on all, linear", path, base, (base, loras[0]))
    yield from _spilling(folder)


def _spilling(folder: Path) -> Iterator[Work]:
    """Both sides of what `--spill auto` decides."""
    base = folder / "base"
    large = [folder / f"large-{seed}" for seed in range(8)]
    small = [folder / f"lora-{seed}" for seed in range(3)]
    for name, models in (("8 adapters of rank 256", large), ("3 adapters of rank 16", small)):
        path = folder / f"spill-{len(models)}.yaml"
        path.write_text(recipe_text("ties", models, adapters=True))
        for mode in ("auto", "always", "never"):
            options = ("--spill", mode)
            yield Work(f"{name} with --spill {mode}, ties", path, base, (base, *models), options)


def recipe_text(method: str, models: list[Path], *, adapters: bool) -> str:
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
