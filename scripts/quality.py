"""How well merges do the tasks of their adapters: a small problem that is trained in a minute.

A Llama of two layers learns to copy sequences, whatever mark stands before them. Each of four
adapters of it learns to do something else to them after a mark of its own, and to copy after any
other. Every method then merges the four, in full and in core space, and the merged model is asked
for all four tasks on sequences that nobody has seen. Where a method has a `lambda`, it is chosen by
the mean accuracy on other sequences.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import streammerge as sm
from streammerge.methods import CATALOGUE

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LENGTH, SYMBOLS = 6, 16
SEPARATOR = SYMBOLS  # what stands before the answer
FIRST_MARK = SYMBOLS + 1
HIDDEN, RANK = 128, 8
BATCH = 64
LAMBDAS = (0.5, 1.0, 1.5, 2.0)
MEMORY = "8GiB"

Task = Callable[["Tensor"], "Tensor"]
# `[batch, LENGTH]` symbols to the answer of the same shape.
TASKS: Mapping[str, Task] = {
    "shift": lambda x: (x + 3) % SYMBOLS,
    "complement": lambda x: SYMBOLS - 1 - x,
    "reverse": lambda x: x.flip(1),
    "rotate": lambda x: x.roll(1, 1),
}
# Knobs other than the defaults; densities that thin out more than the default, which is nothing.
PER_MODEL: Mapping[str, Mapping[str, float]] = {
    name: {"density": 0.5}
    for name in (
        *("ties", "magnitude_prune", "dare_linear", "dare_ties", "della_linear", "della"),
        *("breadcrumbs", "breadcrumbs_ties"),
    )
}


# ------------------------------------------------------------------------------------- the problem


def sequences(task: Task, marks: Sequence[int], count: int, seed: int) -> Tensor:
    """`[count, 2 * LENGTH + 2]`: one of the marks, symbols, separator, answer."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    symbols = torch.randint(SYMBOLS, (count, LENGTH), generator=draw)
    chosen = torch.tensor(marks)[torch.randint(len(marks), (count, 1), generator=draw)]
    separators = torch.full((count, 1), SEPARATOR)
    return torch.cat([chosen, symbols, separators, task(symbols)], 1)


MARKS = range(FIRST_MARK, FIRST_MARK + len(TASKS))


def copies(marks: Sequence[int], count: int, seed: int) -> Tensor:
    return sequences(lambda symbols: symbols, marks, count, seed)


def train(
    model: torch.nn.Module, batch: Callable[[int], Tensor], steps: int, rate: float = 3e-3
) -> None:
    """On a fresh batch in every step; only the answers count."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step in range(steps):
        tokens = batch(step)
        labels = tokens.clone()
        labels[:, : LENGTH + 2] = -100
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def lessons(task: Task, mark: int) -> Callable[[int], Tensor]:
    """Batches of which one half is the task, the other copies after other marks."""
    import torch

    others = [one for one in MARKS if one != mark]

    def batch(step: int) -> Tensor:
        seed = 1000 * mark + step
        half = sequences(task, [mark], BATCH // 2, seed)
        return torch.cat([half, copies(others, BATCH // 2, seed)])

    return batch


def accuracy(model: torch.nn.Module, task: Task, mark: int, seed: int) -> float:
    """The share of symbols of the answers that are right, given those before."""
    import torch

    tokens = sequences(task, [mark], 512, seed)
    with torch.inference_mode():
        guessed = model(input_ids=tokens).logits[:, LENGTH + 1 : -1].argmax(-1)
    return float((guessed == tokens[:, LENGTH + 2 :]).float().mean())


def accuracies(model: torch.nn.Module, seed: int) -> list[float]:
    """Of each task."""
    model.eval()
    tasks = enumerate(TASKS.values())
    return [accuracy(model, task, FIRST_MARK + i, seed) for i, task in tasks]


CHOOSING, HELD_OUT = 10**8, 10**8 + 1  # seeds that no training step has


def make_models(folder: Path, steps: int) -> None:
    """`base`, and one adapter of it for each task."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=FIRST_MARK + len(TASKS),
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    base = LlamaForCausalLM(config)
    train(base, lambda step: copies(MARKS, BATCH, step), 3 * steps // 2)
    base.save_pretrained(folder / "base")
    for number, (name, task) in enumerate(TASKS.items()):
        torch.manual_seed(number)
        linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=linears)
        adapted = get_peft_model(load(folder / "base"), settings)
        train(adapted, lessons(task, MARKS[number]), steps, 1e-3)
        adapted.save_pretrained(str(folder / name))


def load(base: Path, other: Path | None = None) -> Any:
    """A model; or another that came of it, itself or an adapter."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    if other and (other / "adapter_config.json").exists():
        return PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), other)
    return LlamaForCausalLM.from_pretrained(other or base)


# --------------------------------------------------------------------------------------- the table


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: accuracies of each task, and what was chosen."""

    name: str
    space: str
    chosen: float | None
    tasks: Sequence[float]

    @property
    def mean(self) -> float:
        return sum(self.tasks) / len(self.tasks)

    def cells(self) -> list[str]:
        chosen = "" if self.chosen is None else f"{self.chosen:g}"
        shares = [f"{100 * share:.1f}" for share in (*self.tasks, self.mean)]
        return [self.name, self.space, chosen, *shares]


TITLES = ["method", "space", "lambda", *TASKS, "mean"]


def alone(folder: Path) -> Iterator[Row]:
    """The base, and each adapter by itself."""
    yield Row("base", "", None, accuracies(load(folder / "base"), HELD_OUT))
    for name in TASKS:
        adapted = load(folder / "base", folder / name)
        yield Row(f"adapter {name}", "", None, accuracies(adapted, HELD_OUT))


def methods(adapters: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every method that merges so many adapters, with what else the recipe says."""
    for name, spec in CATALOGUE.items():
        fewest, most = spec.models
        if most is not None and most < adapters:
            continue
        required = [knob for knob in spec.shared.values() if knob.default is None]
        if required or fewest > adapters:
            continue
        if spec.space == "cores":
            yield name, {}
            continue
        yield name, {"space": "full"}
        if core_differs(name):
            yield name, {"space": "core"}
    yield "task_arithmetic", {"space": "core", "isotropize": True}


def ranked(rank: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Some methods as adapters of a rank: the nearest to the merge in core space; merged in it."""
    for name in ("task_arithmetic", "ties", "tsv"):
        for space in ("core", "compressed"):
            yield name, {"space": space, "output": {"kind": "adapter", "rank": rank}}


def label(name: str, keys: Mapping[str, Any]) -> str:
    rank = keys.get("output", {}).get("rank")
    more = ", isotropized" if keys.get("isotropize") else f", rank {rank}" if rank else ""
    return name + more


def core_differs(name: str) -> bool:
    """Whether core space gives something else than full space: where rows are looked at."""
    return CATALOGUE[name].returns == "rows" and not CATALOGUE[name].wants_base


def merged_row(folder: Path, name: str, keys: Mapping[str, Any]) -> Row:
    """Merge with each `lambda` that there is to choose from, and measure the one chosen."""
    scale = "lambda" in CATALOGUE[name].shared
    tried = {}
    for number in LAMBDAS if scale else (None,):
        out = merge(folder, name, keys, number)
        tried[number] = sum(accuracies(load(folder / "base", out), CHOOSING))
    chosen = max(tried, key=lambda one: tried[one])
    out = merge(folder, name, keys, chosen)
    found = accuracies(load(folder / "base", out), HELD_OUT)
    return Row(label(name, keys), keys.get("space", "core"), chosen, found)


def merge(folder: Path, name: str, keys: Mapping[str, Any], scale: float | None) -> Path:
    """The merged folder."""
    recipe = {
        "base_model": "base",
        "merge_method": name,
        "adapters": [{"path": task, **PER_MODEL.get(name, {})} for task in TASKS],
        "parameters": {} if scale is None else {"lambda": scale},
        **keys,
    }
    called = "-".join([label(name, keys), keys.get("space", ""), str(scale)])
    path = folder / f"{called}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    sm.merge(path, out=folder / "merged" / called, memory=MEMORY)
    return folder / "merged" / called


def markdown(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def table(folder: Path, steps: int) -> list[list[str]]:
    """The cells of all rows, each said when it is there."""
    started = time.monotonic()
    make_models(folder, steps)
    print(f"trained in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    found = [TITLES]
    wanted = chain(methods(len(TASKS)), ranked(RANK))
    made = (merged_row(folder, *one) for one in wanted)
    for row in chain(alone(folder), made):
        found.append(row.cells())
        print("  ".join(found[-1]), file=sys.stderr, flush=True)
    return found


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=500, help="of each adapter (%(default)s)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there, too")
    parser.add_argument("--demo", action="store_true", help="the demo's model and adapters instead")
    options = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)  # the same numbers on any number of cores; no slower at this size
    started = time.monotonic()
    if options.demo:
        import quality_demo

        titles, *cells = quality_demo.table()
    else:
        with tempfile.TemporaryDirectory() as name:
            titles, *cells = table(Path(name), options.steps)
    text = markdown(titles, cells)
    print(text)
    if options.markdown:
        options.markdown.write_text(text)
    print(f"{time.monotonic() - started:.0f} s in all", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
