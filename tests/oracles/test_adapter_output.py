"""Adapters merged into one adapter: PEFT loads it and it answers as the merged model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml
from peft_models import Shelf, load, make_gpt2, make_llama
from test_logits import CONV1D, LINEARS, MEMORY, TIGHT, logits

import streammerge as sm
from streammerge.commands.recompute import Lead, recompute
from streammerge.commands.verify import verify
from streammerge.errors import BadInput, ConfigError, Refused
from streammerge.storage.record import read_record
from tests.oracles import low_rank
from tests.oracles.dense import Exact

if TYPE_CHECKING:
    from torch import Tensor


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("adapters"))


def llama(shelf: Shelf) -> tuple[Path, list[Path]]:
    """A base, and adapters of different ranks on different modules; one with DoRA."""
    base = shelf.get("llama", make_llama)
    one = shelf.adapter("one", base, 1, r=4, target_modules=LINEARS)
    patterns = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 5}}
    two = shelf.adapter("two", base, 2, r=2, target_modules=["q_proj", "down_proj"], **patterns)
    return base, [one, two]


def merge(
    folder: Path, method: str, base: Path, adapters: list[Path], name: str, **keys: Any
) -> sm.Report:
    recipe = {
        "base_model": str(base),
        "merge_method": method,
        "adapters": [
            {"path": str(path), "weight": weight}
            for path, weight in zip(adapters, (0.7, 0.4), strict=True)
        ],
        **keys,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return sm.merge(path, out=folder / name, memory=MEMORY)


def beside(base: Path, adapter: Path) -> Tensor:
    """Logits of the base with an adapter beside its weights."""
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(load(base), adapter))


def updates(adapter: Path) -> dict[str, Exact]:
    """Module -> the update that PEFT makes of the factors in the file, in float64."""
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key
    from safetensors.numpy import load_file

    config = LoraConfig.from_pretrained(str(adapter))
    held = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for key, a in held.items():
        if ".lora_A." not in key:
            continue
        module = key.removeprefix("base_model.model.").partition(".lora_")[0]
        alpha, rank = (
            patterns.get(get_pattern_key(patterns, module), default)
            for patterns, default in (
                (config.alpha_pattern, config.lora_alpha),
                (config.rank_pattern, config.r),
            )
        )
        b = held[key.replace(".lora_A.", ".lora_B.")]
        found[module] = alpha / rank * b.astype(np.float64) @ a.astype(np.float64)
    return found


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference, of the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("task_arithmetic", {}),
        ("linear", {}),
        ("model_stock", {}),
        ("ties", {"space": "core"}),
        ("dare_ties", {"space": "core", "parameters": {"density": 0.5}}),
        ("tsv", {}),
        ("iso_c", {}),
        ("task_arithmetic", {"isotropize": True, "space": "core"}),
    ],
)
def test_an_adapter_answers_as_the_merged_model(
    shelf: Shelf, tmp_path: Path, method: str, keys: dict[str, Any]
) -> None:
    base, adapters = llama(shelf)
    merge(tmp_path, method, base, adapters, "model", **keys)
    merge(tmp_path, method, base, adapters, "adapter", output={"kind": "adapter"}, **keys)
    expected = logits(load(tmp_path / "model"))
    assert distance(beside(base, tmp_path / "adapter"), expected) < TIGHT
    assert distance(logits(load(base)), expected) > 100 * TIGHT
    ranks = {one.rank for one in read_record(tmp_path / "adapter").approximations.values()}
    assert ranks <= {4, 6, 7}  # of one adapter, and of both


def test_a_transposed_layer_is_turned_for_peft(shelf: Shelf, tmp_path: Path) -> None:
    base = shelf.get("gpt2", make_gpt2, tied=False)
    adapters = [
        shelf.adapter(f"gpt2-{seed}", base, seed, r=3, target_modules=CONV1D) for seed in (1, 2)
    ]
    for method, space in (("task_arithmetic", "full"), ("ties", "core")):
        output = {"kind": "adapter"}
        merge(tmp_path, method, base, adapters, f"{method}-a", space=space, output=output)
        merge(tmp_path, method, base, adapters, f"{method}-m", space=space)
        expected = logits(load(tmp_path / f"{method}-m"))
        assert distance(beside(base, tmp_path / f"{method}-a"), expected) < TIGHT


def test_a_lower_rank_misses_what_it_says(shelf: Shelf, tmp_path: Path) -> None:
    """Each tensor's factors, as PEFT reads them, are as far from the sum as the record says."""
    import torch
    from safetensors.torch import load_file

    base, adapters = llama(shelf)
    report = merge(
        tmp_path, "task_arithmetic", base, adapters, "low", output={"kind": "adapter", "rank": 2}
    )
    exact = merge(tmp_path, "task_arithmetic", base, adapters, "all", output={"kind": "adapter"})
    assert not exact.missed
    low, whole = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("low", "all"))
    record = read_record(tmp_path / "low")
    assert len(record.approximations) == len(report.missed) == 14
    for tensor, one in record.approximations.items():
        module = f"base_model.model.{tensor.removesuffix('.weight')}"
        update, factors = (
            held[f"{module}.lora_B.weight"].double() @ held[f"{module}.lora_A.weight"].double()
            for held in (whole, low)
        )
        missed = float(torch.linalg.norm(update - factors) / torch.linalg.norm(update))
        assert one.rank == 2
        assert missed == pytest.approx(one.missed / one.update, rel=1e-3, abs=1e-6)


def test_a_sum_is_cut_to_what_matters(shelf: Shelf, tmp_path: Path) -> None:
    """Of factors, which are exact: the rank is that of the dense sum's singular values."""
    base, adapters = llama(shelf)
    output = {"kind": "adapter", "error": 0.3}
    merge(tmp_path, "task_arithmetic", base, adapters, "out", output=output)
    record, found = read_record(tmp_path / "out"), updates(tmp_path / "out")
    one, two = (updates(adapter) for adapter in adapters)
    for module, update in found.items():
        total = 0.7 * one.get(module, 0.0) + 0.4 * two.get(module, 0.0)
        values = np.linalg.svd(total, compute_uv=False) ** 2
        tails = values.sum() - values.cumsum()
        rank = int(np.flatnonzero(tails <= 0.09 * values.sum())[0]) + 1
        told = record.approximations[f"{module}.weight"]
        assert told.rank == rank
        np.testing.assert_allclose(update, low_rank.nearest(total, rank), atol=1e-6)
        floor = 1e-6 * told.update
        assert told.missed == pytest.approx(max(tails[rank - 1], 0.0) ** 0.5, rel=1e-3, abs=floor)


def test_compressed_first_is_the_dense_formula(shelf: Shelf, tmp_path: Path) -> None:
    """Of each module that both adapt, from their factors as they are stored."""
    base, adapters = llama(shelf)
    output = {"kind": "adapter", "rank": 3}
    keys = {"space": "compressed", "output": output}
    merge(tmp_path, "task_arithmetic", base, adapters, "out", **keys)
    notes = sm.plan(tmp_path / "out.yaml", memory=MEMORY).notes
    assert "compressed space: 14 tensors" in notes
    found = updates(tmp_path / "out")
    one, two = (updates(adapter) for adapter in adapters)
    both = sorted(one.keys() & two.keys())
    assert len(both) == 4
    for module in both:
        deltas = [one[module], two[module]]
        expected = low_rank.compressed(deltas, 3, lambda cores: 0.7 * cores[0] + 0.4 * cores[1])
        np.testing.assert_allclose(found[module], expected, atol=1e-5 * np.abs(expected).max())


def test_a_module_that_one_adapter_saves_whole(shelf: Shelf, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    base, (one, _) = llama(shelf)
    kinds = {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}
    saved = shelf.adapter("saved", base, 7, r=2, **kinds)
    weights = load_file(saved / "adapter_model.safetensors")
    head = next(value for key, value in weights.items() if "lm_head" in key)
    head += 0.1 * torch.randn(head.shape, generator=torch.Generator().manual_seed(4))
    save_file(weights, saved / "adapter_model.safetensors")
    merge(tmp_path, "task_arithmetic", base, [one, saved], "model")
    merge(tmp_path, "task_arithmetic", base, [one, saved], "adapter", output={"kind": "adapter"})
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["lm_head"]
    expected = logits(load(tmp_path / "model"))
    assert distance(beside(base, tmp_path / "adapter"), expected) < TIGHT


def test_an_adapter_is_verified_and_derived_again(shelf: Shelf, tmp_path: Path) -> None:
    base, adapters = llama(shelf)
    keys = {"space": "core", "output": {"kind": "adapter", "rank": 4}, "out_dtype": "bfloat16"}
    merge(tmp_path, "ties", base, adapters, "out", **keys)
    found = verify(tmp_path / "out", read_data=True)
    assert recompute(found, 7, Lead(tmp_path / "out.yaml", MEMORY)).derived == 7
    again = merge(tmp_path, "ties", base, adapters, "out", **keys)
    assert again.already_done
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "streammerge.json",
        "streammerge.yaml",
    }


@pytest.mark.parametrize(
    ("method", "keys", "words"),
    [
        ("ties", {"output": {"kind": "adapter"}}, "needs a rank"),
        (
            "linear",
            {"parameters": {"normalize": False}, "output": {"kind": "adapter"}},
            "sum to 1.1, which scales the base",
        ),
    ],
)
def test_a_merge_that_is_no_adapter(
    shelf: Shelf, tmp_path: Path, method: str, keys: dict[str, Any], words: str
) -> None:
    base, adapters = llama(shelf)
    with pytest.raises((ConfigError, Refused), match=words):
        merge(tmp_path, method, base, adapters, "out", **keys)
    assert not (tmp_path / "out").exists()


def test_dense_updates_are_refused_with_the_reason(shelf: Shelf, tmp_path: Path) -> None:
    base, (one, _) = llama(shelf)
    dora = shelf.adapter("dora", base, 3, r=2, target_modules=["v_proj"], use_dora=True)
    with pytest.raises(BadInput) as caught:
        merge(tmp_path, "tsv", base, [one, dora], "out")
    said = str(caught.value)
    assert "v_proj.weight: dora is a DoRA, which rescales what it adapts" in said


def test_core_space_says_which_tensors_are_not_in_it(shelf: Shelf, tmp_path: Path) -> None:
    base, (one, _) = llama(shelf)
    dora = shelf.adapter("dora", base, 3, r=2, target_modules=["v_proj"], use_dora=True)
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump(
            {
                "base_model": str(base),
                "merge_method": "ties",
                "adapters": [{"path": str(one)}, {"path": str(dora)}],
                "space": "core",
            }
        )
    )
    notes = sm.plan(tmp_path / "r.yaml", memory=MEMORY).notes
    assert "core space: 12 tensors" in notes
    assert any("full space" in note and "dora is a DoRA" in note for note in notes)
