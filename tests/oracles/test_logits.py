"""A merged folder answers like the unmerged PEFT model: the oracle that users would trust.

Adapters stay unmerged on PEFT's side: its own merge would put a delta on a tied embedding into the
head as well, and rounds once per adapter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from exact_merge import read_tensors, updates_by_peft
from peft_models import VOCABULARY, Shelf, load, make_gpt2, make_llama, make_qwen2, merged_by_peft

import streammerge as sm

if TYPE_CHECKING:
    from torch import Tensor

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONV1D = ["c_attn", "c_proj", "c_fc"]
MAKERS = {"llama": make_llama, "qwen2": make_qwen2, "gpt2": make_gpt2}
MODULES = {"llama": LINEARS, "qwen2": LINEARS, "gpt2": CONV1D}
TIED = ("qwen2", "gpt2")
MEMORY = "8GiB"

# Of the largest logit. Two float32 models of a few layers that compute the same in another order
# differ by 2e-6; a missing module shows at a tenth and more.
TIGHT = 1e-5
VISIBLE = 1000 * TIGHT


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("logits"))


def model_of(shelf: Shelf, kind: str, dtype: str = "float32") -> Path:
    return shelf.get(f"{kind}-{dtype}", MAKERS[kind], dtype)


def adapter_of(shelf: Shelf, kind: str, dtype: str = "float32") -> Path:
    """An adapter on every linear layer."""
    model, modules = model_of(shelf, kind, dtype), MODULES[kind]
    return shelf.adapter(f"{kind}-{dtype}-all", model, 1, dtype=dtype, target_modules=modules)


def merge(folder: Path, method: str, base: Path, *adapters: Path, **weights: Any) -> Path:
    """Merge adapters into a base, with a list per parameter: `weight=[0.5, 1]`."""
    entries = [
        {"path": str(path), **{key: values[i] for key, values in weights.items()}}
        for i, path in enumerate(adapters)
    ]
    recipe = {"base_model": str(base), "merge_method": method, "adapters": entries}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    sm.merge(folder / "recipe.yaml", out=folder / "merged", memory=MEMORY)
    return folder / "merged"


def logits(model: Any) -> Tensor:
    """`[sequences, tokens, vocabulary]`, for two fixed sequences."""
    import torch

    tokens = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        out: Tensor = model.eval()(input_ids=tokens).logits
    return out


def unmerged(model: Path, *adapters: Path) -> Any:
    """The base with adapters beside its weights; the first is active. Named `0`, `1`, ..."""
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(load(model), adapters[0], adapter_name="0")
    for number, path in enumerate(adapters[1:], start=1):
        adapted.load_adapter(path, adapter_name=str(number))
    return adapted


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a share of the largest logit."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@contextmanager
def without_delta(model: Any, base: Any, name: str) -> Iterator[None]:
    """The model with one weight set back to the base's."""
    weight = model.get_parameter(name)
    kept, weight.data = weight.data, base.get_parameter(name).data
    yield
    weight.data = kept


# -------------------------------------------------------------------------------- one adapter


@pytest.mark.parametrize("kind", MAKERS)
def test_a_merged_model_answers_like_the_unmerged_one(
    shelf: Shelf, tmp_path: Path, kind: str
) -> None:
    model, adapter = model_of(shelf, kind), adapter_of(shelf, kind)
    merged = load(merge(tmp_path, "task_arithmetic", model, adapter))
    theirs = logits(unmerged(model, adapter))
    assert distance(logits(merged), theirs) < TIGHT


@pytest.mark.parametrize("kind", MAKERS)
def test_a_single_missing_module_would_show(shelf: Shelf, tmp_path: Path, kind: str) -> None:
    """Else the test above would say little: one module out of all, each in turn."""
    model, adapter = model_of(shelf, kind), adapter_of(shelf, kind)
    merged, base = load(merge(tmp_path, "task_arithmetic", model, adapter)), load(model)
    theirs = logits(unmerged(model, adapter))
    for name in updates_by_peft(model, adapter):
        with without_delta(merged, base, name):
            assert distance(logits(merged), theirs) > VISIBLE, name
    assert distance(logits(merged), theirs) < TIGHT


@pytest.mark.parametrize("kind", MAKERS)
def test_a_merged_model_generates_like_the_unmerged_one(
    shelf: Shelf, tmp_path: Path, kind: str
) -> None:
    import torch

    model, adapter = model_of(shelf, kind), adapter_of(shelf, kind)
    merged = load(merge(tmp_path, "task_arithmetic", model, adapter))
    prompt = torch.tensor([[5, 17, 60, 2]])
    greedy = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}
    ours, theirs, untouched = (
        one.eval().generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **greedy)
        for one in (merged, unmerged(model, adapter), load(model))
    )
    assert ours.shape == (1, 16)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, untouched)


@pytest.mark.parametrize("kind", TIED)
def test_a_tied_head_stays_tied(shelf: Shelf, tmp_path: Path, kind: str) -> None:
    model, adapter = model_of(shelf, kind), adapter_of(shelf, kind)
    folder = merge(tmp_path, "task_arithmetic", model, adapter)
    assert "lm_head.weight" not in read_tensors(folder)
    assert list(read_tensors(folder)) == list(read_tensors(model))
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    merged: Any = load(folder)
    head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
    assert head.weight.data_ptr() == embedding.weight.data_ptr()


# ---------------------------------------------------------------------------- several adapters


@pytest.mark.parametrize("kind", MAKERS)
def test_a_sum_of_adapters_answers_like_the_concatenated_one(
    shelf: Shelf, tmp_path: Path, kind: str
) -> None:
    """PEFT's `cat` stacks the factors: of its ways to combine adapters the only exact one."""
    model, modules, weights = model_of(shelf, kind), MODULES[kind], [0.7, -0.4, 1.0]
    options: list[dict[str, Any]] = [
        {"target_modules": modules, "lora_alpha": 12},
        {"target_modules": modules[:2], "r": 3, "lora_alpha": 9},
        {"target_modules": modules[1:], "r": 5, "rank_pattern": {modules[1]: 2}},
    ]
    adapters = [
        shelf.adapter(f"{kind}-{seed}", model, seed, **one) for seed, one in enumerate(options)
    ]
    names = [str(number) for number in range(len(adapters))]
    combined = unmerged(model, *adapters)
    combined.add_weighted_adapter(names, weights, "sum", combination_type="cat")
    combined.set_adapter("sum")
    theirs = logits(combined)

    merged = load(merge(tmp_path, "task_arithmetic", model, *adapters, weight=weights))

    assert distance(logits(merged), theirs) < TIGHT
    others = [path for path in adapters if path != adapters[1]]
    (tmp_path / "fewer").mkdir()
    fewer = merge(tmp_path / "fewer", "task_arithmetic", model, *others, weight=[0.7, 1.0])
    assert distance(logits(load(fewer)), theirs) > VISIBLE


# ------------------------------------------------------------------------------------ bfloat16


@pytest.mark.parametrize("kind", MAKERS)
def test_a_bfloat16_merge_costs_no_more_than_rounding_its_weights(
    shelf: Shelf, tmp_path: Path, kind: str
) -> None:
    """What rounding must cost is measured: PEFT's float32 merge, its weights rounded once."""
    import torch

    model, adapter = model_of(shelf, kind, "bfloat16"), adapter_of(shelf, kind, "bfloat16")
    theirs = logits(unmerged(model, adapter))
    rounded, exact = load(model), merged_by_peft(model, adapter)
    for name, parameter in rounded.named_parameters():
        parameter.data = torch.from_numpy(exact[name]).bfloat16().float()
    must = distance(logits(rounded), theirs)

    merged, base = load(merge(tmp_path, "task_arithmetic", model, adapter)), load(model)

    assert TIGHT < distance(logits(merged), theirs) < 1.5 * must
    missing = []
    for name in updates_by_peft(model, adapter):
        with without_delta(merged, base, name):
            missing.append(distance(logits(merged), theirs))
    assert min(missing) > 1.5 * must
