"""Every kind of LoRA, ours and PEFT's, within the bound of a float32 merge of the exact result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from adapter_case import load_any
from exact_merge import STEP, Answer, Stored, assert_close, read_tensors
from kind_cases import CASES, MODELS, Case, answers, merged_by_peft, train
from peft_models import VOCABULARY, Shelf

import streammerge as sm
from streammerge import grid
from streammerge.errors import StreammergeError
from streammerge.statistics import select


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("kinds"))


def model_of(shelf: Shelf, kind: str, dtype: str = "float32") -> Path:
    return shelf.get(f"{kind}-{dtype}", MODELS[kind], dtype)


def adapter_of(shelf: Shelf, label: str) -> tuple[Path, Path]:
    """The model and the adapter of a case."""
    case = CASES[label]
    model = model_of(shelf, case.model, case.dtype)
    return model, shelf.get(label, lambda folder: train(case, model, folder))


def merge(
    folder: Path,
    base: Path,
    *adapters: Path,
    method: str = "task_arithmetic",
    parameters: Any = None,
    assume_residual_base: bool = False,
    **options: Any,
) -> dict[str, Stored]:
    residual = {"assume_residual_base": True} if assume_residual_base else {}
    entries = [{"path": str(path), **residual} for path in adapters]
    recipe = {"base_model": str(base), "merge_method": method, "adapters": entries}
    recipe |= {"parameters": parameters} if parameters else {}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "out_dtype": "float32"}))
    sm.merge(folder / "recipe.yaml", out=folder / "merged", memory="8GiB", **options)
    return read_tensors(folder / "merged")


@pytest.mark.parametrize("label", CASES)
def test_ours_and_pefts_are_what_the_formula_says(shelf: Shelf, tmp_path: Path, label: str) -> None:
    model, adapter = adapter_of(shelf, label)
    base, expected = read_tensors(model), answers(CASES[label], model, adapter)
    ours = merge(tmp_path, model, adapter)
    theirs = merged_by_peft(model, adapter, tmp_path / "peft")
    for name, answer in expected.items():
        assert_close(name, ours[name], answer)
        assert_close(f"PEFT's {name}", theirs[name], answer)
        moved = np.abs(answer.exact - base[name].values())
        assert moved.max() > 1e-3, f"{name} hardly changed"
    for name in set(base) - set(expected):
        if base[name].dtype == "I64":
            assert ours[name] == base[name], "a buffer"
        else:
            assert np.array_equal(ours[name].values(), base[name].values()), name


# A deltas method and a weights method that coefficients tell apart, and one that reads once more.
METHODS = {"task_arithmetic": 2, "linear": 2, "ties": 3}


@pytest.mark.parametrize("method", METHODS)
def test_norms_over_all_rows_take_one_more_read_and_any_number_of_threads(
    shelf: Shelf, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two DoRAs of Conv1Ds and one of an embedding: none of their tiles has a whole column."""
    monkeypatch.setattr(grid, "TILE_ELEMENTS", 200)
    monkeypatch.setattr(select, "_SAMPLE_FROM", 1000)
    adapters = [adapter_of(shelf, label)[1] for label in ("dora-transposed", "dora-patterns")]
    base = model_of(shelf, "gpt2")
    ways: list[dict[str, Any]] = [{"threads": 1, "io": "mmap"}, {"threads": 3, "io": "read"}]
    outputs = []
    for number, way in enumerate(ways):
        options = {"method": method, "parameters": {"density": 0.6}, **way}
        outputs.append(merge(tmp_path / str(number), base, *adapters, **options))
    assert outputs[0] == outputs[1]
    plan = sm.plan(tmp_path / "0" / "recipe.yaml")
    assert max(plan.demand.reads) == METHODS[method]


def test_the_mean_of_doras_is_the_mean_of_their_weights(shelf: Shelf, tmp_path: Path) -> None:
    labels = ("dora-transposed", "dora-patterns")
    model, _ = adapter_of(shelf, labels[0])
    found = [answers(CASES[label], model, adapter_of(shelf, label)[1]) for label in labels]
    merged = merge(tmp_path, model, *(adapter_of(shelf, one)[1] for one in labels), method="linear")
    both = set(found[0]) & set(found[1])
    assert any("c_attn" in name for name in both)
    for name in both:
        one, other = found[0][name], found[1][name]
        slack = (one.slack + other.slack) / 2 + 4 * STEP * (abs(one.exact) + abs(other.exact))
        assert_close(name, merged[name], Answer((one.exact + other.exact) / 2, slack))


# ----------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("model", "config", "says"),
    [
        ("convnext", {"target_modules": ["dwconv"], "r": 8}, "a convolution with groups"),
        (
            "llama",
            {"target_modules": ["q_proj"], "lora_bias": True},
            "layers of the base that have",
        ),
    ],
)
def test_what_peft_cannot_merge_either_is_refused_with_the_reason(
    shelf: Shelf, tmp_path: Path, model: str, config: dict[str, Any], says: str
) -> None:
    base = model_of(shelf, model)
    adapter = train(Case(model, config), base, tmp_path / "adapter")
    with pytest.raises(StreammergeError, match=says) as caught:
        merge(tmp_path, base, adapter)
    assert caught.value.exit_code == 65
    assert str(caught.value).count("remedy:") == 1, "one reason"
    with pytest.raises((NotImplementedError, RuntimeError)):
        merged_by_peft(base, adapter, tmp_path / "peft")


def train_larger(shelf: Shelf, folder: Path, **options: Any) -> Any:
    """A DoRA on a model that was given four more tokens; returns PEFT's unmerged model."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = load_any(model_of(shelf, "llama"))
    model.resize_token_embeddings(VOCABULARY + 4)
    model = get_peft_model(model, LoraConfig(use_dora=True, **options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(str(folder))
    return model.eval()


def test_lengths_of_longer_columns_are_refused(shelf: Shelf, tmp_path: Path) -> None:
    """The base has only a part of the columns that the lengths belong to."""
    train_larger(shelf, tmp_path / "adapter", target_modules=["embed_tokens", "lm_head"])
    with pytest.raises(StreammergeError, match="DoRA on an embedding of a larger vocabulary"):
        merge(tmp_path, model_of(shelf, "llama"), tmp_path / "adapter")


def test_rows_that_the_base_lacks_have_their_lengths(shelf: Shelf, tmp_path: Path) -> None:
    import torch

    told = {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]}
    theirs = train_larger(shelf, tmp_path / "adapter", **told)
    merge(tmp_path, model_of(shelf, "llama"), tmp_path / "adapter")
    tokens = torch.arange(VOCABULARY + 3).reshape(2, -1)
    with torch.inference_mode():
        expected = theirs(input_ids=tokens).logits
        ours = load_any(tmp_path / "merged")(input_ids=tokens).logits
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()


# ----------------------------------------------------------------- bases that training changed


def train_residual(shelf: Shelf, init: str, folder: Path) -> tuple[Path, Path, Path]:
    """An adapter that changed its base when training started: it, that base, and what came of it.

    Beside it lies what PEFT makes of it: the same update of the base as it was, of twice the rank.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=init, r=4)
    model = get_peft_model(load_any(model_of(shelf, "llama")), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(folder / "initial"))
    model.peft_config["default"].init_lora_weights = init
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = parameter + 0.1 * torch.randn_like(parameter)
    converted = str(folder / "converted")
    initial = str(folder / "initial")
    model.save_pretrained(converted, path_initial_model_for_weight_conversion=initial)
    model.peft_config["default"].init_lora_weights = init
    model.save_pretrained(str(folder / "adapter"))
    model.unload().save_pretrained(folder / "residual")
    return folder / "adapter", folder / "residual", folder / "converted"


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_residual_base_is_merged_at_the_recipes_word(
    shelf: Shelf, tmp_path: Path, init: str
) -> None:
    adapter, residual, converted = train_residual(shelf, init, tmp_path)
    with pytest.raises(StreammergeError, match="assume_residual_base: true"):
        merge(tmp_path / "refused", residual, adapter)
    ours = merge(tmp_path / "ours", residual, adapter, assume_residual_base=True)
    case = Case("llama", {})
    expected = answers(case, residual, adapter)
    for name, answer in expected.items():
        assert_close(name, ours[name], answer)
    # Converted, it is plain LoRA on the base as it was, and comes to the same model.
    original = model_of(shelf, "llama")
    plain = merge(tmp_path / "plain", original, converted)
    for name, answer in answers(case, original, converted).items():
        assert_close(name, plain[name], answer)
        assert np.abs(plain[name].values() - ours[name].values()).max() < 1e-5


def test_kasa_is_merged_into_its_truncated_base(shelf: Shelf, tmp_path: Path) -> None:
    """A diagonal stands between its factors, and the base is one that lacks the least part."""
    import torch
    from peft import KasaConfig, LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(target_modules=["q_proj"], kasa_config=KasaConfig(), r=4, lora_alpha=6)
    model = get_peft_model(load_any(model_of(shelf, "llama")), config)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = parameter + 0.1 * torch.randn_like(parameter)
    adapter, residual = tmp_path / "adapter", tmp_path / "residual"
    model.save_pretrained(str(adapter))
    model.unload().save_pretrained(residual)
    with pytest.raises(StreammergeError, match=r"(?s)KaSA.*assume_residual_base: true"):
        merge(tmp_path / "refused", residual, adapter)
    ours = merge(tmp_path / "ours", residual, adapter, assume_residual_base=True)
    expected = answers(Case("llama", {}), residual, adapter)
    assert len(expected) == 2
    for name, answer in expected.items():
        assert_close(name, ours[name], answer)
