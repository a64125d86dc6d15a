"""base + s * left @ right from our factors equals what PEFT merges, within rounding."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from peft_models import Shelf, make_gpt2, make_llama, make_qwen2, merged_by_peft

from streammerge.adapters import ResolvedAdapter, open_adapter, resolve_adapter
from streammerge.adapters.fields import EXTRAS, IGNORED, USED, is_off
from streammerge.errors import BadInput, StreammergeError
from streammerge.storage.header import read_header
from streammerge.words import DType, Extent, Factors, Matrix

Exact = NDArray[np.float64]

LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2_LINEARS = ["c_attn", "c_proj", "c_fc"]
MODELS = {"llama": make_llama, "qwen2": make_qwen2, "gpt2": make_gpt2}

# label: model, its dtype, the adapter's dtype, how many tensors it touches, LoraConfig
CASES: dict[str, tuple[str, str, str, int, dict[str, Any]]] = {
    "plain": ("llama", "float32", "float32", 14, {"target_modules": LLAMA_LINEARS}),
    "bfloat16": ("llama", "bfloat16", "bfloat16", 14, {"target_modules": LLAMA_LINEARS}),
    "float16-on-bfloat16": ("llama", "bfloat16", "float16", 14, {"target_modules": LLAMA_LINEARS}),
    "head": ("llama", "float32", "float32", 3, {"target_modules": ["q_proj", "lm_head"]}),
    "rslora": (
        "llama",
        "float32",
        "float32",
        4,
        {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "r": 5, "lora_alpha": 3},
    ),
    "patterns": (
        "llama",
        "float32",
        "float32",
        14,
        {
            "target_modules": LLAMA_LINEARS,
            "r": 4,
            "lora_alpha": 6,
            # Both match layers.1's q_proj: the first in the file decides, which PEFT sorts.
            "rank_pattern": {"layers.1.self_attn.q_proj": 3, "q_proj": 2, "^model.*down_proj": 7},
            "alpha_pattern": {r"layers\.0\..*": 5, "k_proj": 1},
        },
    ),
    "rslora-patterns": (
        "qwen2",
        "float32",
        "float32",
        4,
        {
            "target_modules": ["q_proj", "up_proj"],
            "use_rslora": True,
            "rank_pattern": {"up_proj": 3},
            "alpha_pattern": {"up_proj": 11},
        },
    ),
    "layers": (
        "qwen2",
        "bfloat16",
        "float32",
        1,
        {"target_modules": ["v_proj"], "layers_to_transform": [1], "lora_dropout": 0.1},
    ),
    "orthogonal": (
        "llama",
        "float32",
        "float32",
        2,
        {"target_modules": ["o_proj"], "init_lora_weights": "orthogonal"},
    ),
    "mica": (
        "llama",
        "float32",
        "float32",
        2,
        {"target_modules": ["o_proj"], "init_lora_weights": "mica"},
    ),
    "gpt2": (
        "gpt2",
        "float32",
        "float32",
        8,
        {"target_modules": GPT2_LINEARS, "fan_in_fan_out": True},
    ),
    # Only square weights: nothing but the model's type says that they are transposed.
    "gpt2-square": ("gpt2", "bfloat16", "float32", 2, {"target_modules": ["attn.c_proj"]}),
    "gpt2-head": (
        "gpt2-untied",
        "float32",
        "float32",
        3,
        {"target_modules": ["attn.c_proj", "lm_head"]},
    ),
    "named": (
        "llama",
        "float32",
        "float32",
        2,
        {"target_modules": ["q_proj"], "name": "mathematics"},
    ),
}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("peft"))


def model_of(shelf: Shelf, kind: str, dtype: str) -> Path:
    name, _, untied = kind.partition("-")
    options = {"tied": False} if untied else {}
    return shelf.get(f"{kind}-{dtype}", MODELS[name], dtype, **options)


def resolve(model: Path, adapter: Path) -> tuple[ResolvedAdapter, Mapping[str, Extent]]:
    base = read_header(model / "model.safetensors").tensors
    config = json.loads((model / "config.json").read_text())
    return resolve_adapter(open_adapter(adapter, "it"), base, config), base


def values(extent: Extent) -> Exact:
    """A stored tensor, exactly."""
    raw = {DType.F32: "<f4", DType.F16: "<f2", DType.BF16: "<u2"}[extent.spec.dtype]
    data = np.fromfile(extent.path, raw, extent.spec.numel, offset=extent.offset)
    if extent.spec.dtype is DType.BF16:
        data = (data.astype(np.uint32) << 16).view(np.float32)
    return data.reshape(extent.spec.shape).astype(np.float64)


def matrix(factor: Matrix) -> Exact:
    stored = values(factor.extent)
    used = stored.T if factor.transposed else stored
    assert used.shape == (factor.rows, factor.cols)
    return used


def merged(base: Exact, factors: Factors) -> tuple[Exact, Exact]:
    """The merged weight in float64, and how far a float32 merge may be from it."""
    left, right = matrix(factors.left), matrix(factors.right)
    exact = base + factors.scale * (left @ right)
    magnitude = np.abs(base) + abs(factors.scale) * (np.abs(left) @ np.abs(right))
    return exact, 2.0**-24 * (np.abs(exact) + (factors.rank + 2) * magnitude)


def assert_merges_like_peft(model: Path, adapter: Path) -> ResolvedAdapter:
    resolved, base = resolve(model, adapter)
    expected = merged_by_peft(model, adapter)
    for name, update in resolved.updates.items():
        assert isinstance(update, Factors)
        exact, bound = merged(values(base[name]), update)
        assert (np.abs(expected[name] - exact) <= bound).all(), name
        assert np.abs(expected[name] - values(base[name])).max() > 1e-3, f"{name} did not change"
    for name in set(base) - set(resolved.updates):
        assert np.array_equal(expected[name], values(base[name])), f"PEFT changed {name}"
    return resolved


@pytest.mark.parametrize("label", CASES)
def test_factors_merge_like_peft(shelf: Shelf, label: str) -> None:
    kind, dtype, adapter_dtype, touched, options = CASES[label]
    model = model_of(shelf, kind, dtype)
    adapter = shelf.adapter(label, model, seed=7, dtype=adapter_dtype, **options)
    resolved = assert_merges_like_peft(model, adapter)
    assert len(resolved.updates) == touched
    assert {factor.extent.spec.dtype for factor in left_factors(resolved)} == {
        {"float32": DType.F32, "bfloat16": DType.BF16, "float16": DType.F16}[adapter_dtype]
    }


def left_factors(resolved: ResolvedAdapter) -> list[Matrix]:
    return [update.left for update in resolved.updates.values() if isinstance(update, Factors)]


def test_the_saved_fan_in_fan_out_is_not_believed(shelf: Shelf) -> None:
    """GPT-2's head is wrapped last, and PEFT saves its false for an adapter of Conv1Ds."""
    model = model_of(shelf, "gpt2-untied", "float32")
    options = CASES["gpt2-head"][-1]
    adapter = shelf.adapter("gpt2-head", model, seed=7, **options)
    resolved, _ = resolve(model, adapter)
    assert not resolved.folder.config.fan_in_fan_out
    updates = resolved.updates.items()
    sides = {name: one.left.transposed for name, one in updates if isinstance(one, Factors)}
    assert sides == {name: name != "lm_head.weight" for name in sides}


@pytest.mark.parametrize("variant", ["velora", "monteclora"])
def test_variants_that_change_training_only_merge_as_plain_lora(shelf: Shelf, variant: str) -> None:
    from peft.tuners.lora.config import MontecloraConfig, VeloraConfig

    config = {"velora": VeloraConfig(num_groups=4), "monteclora": MontecloraConfig(buffer_size=2)}
    model = model_of(shelf, "llama", "float32")
    options = {f"{variant}_config": config[variant], "target_modules": ["q_proj"]}
    resolved = assert_merges_like_peft(model, shelf.adapter(variant, model, seed=3, **options))
    assert len(resolved.updates) == 2
    assert "train" in resolved.notes[0]
    assert "acted in training only" in "\n".join(resolved.notes)


def test_an_adapter_that_was_converted_to_plain_lora_is_taken(shelf: Shelf) -> None:
    """PEFT leaves the config of the initialisation in place when it converts."""
    model = model_of(shelf, "llama", "float32")
    adapter = shelf.adapter("converted", model, seed=5, target_modules=["q_proj"])
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text()) | {"corda_config": {"corda_method": "kpm"}}
    path.write_text(json.dumps(config))
    assert_merges_like_peft(model, adapter)


REFUSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "pissa": ("llama", "PiSSA", {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}),
    "olora": ("llama", "OLoRA", {"target_modules": ["q_proj"], "init_lora_weights": "olora"}),
    "replicated": (
        "llama",
        "layer replication",
        {"target_modules": ["q_proj"], "layer_replication": [(0, 2), (0, 2)]},
    ),
    "activated": (
        "llama",
        "aLoRA",
        {
            "target_modules": ["q_proj"],
            "alora_invocation_tokens": [1, 2],
            "task_type": "CAUSAL_LM",
        },
    ),
}


@pytest.mark.parametrize("label", REFUSED)
def test_what_is_more_than_plain_lora_is_refused_by_name(shelf: Shelf, label: str) -> None:
    kind, name, options = REFUSED[label]
    adapter = shelf.adapter(f"no-{label}", model_of(shelf, kind, "float32"), seed=1, **options)
    with pytest.raises(StreammergeError) as caught:
        open_adapter(adapter, "it")
    assert name in str(caught.value)
    assert caught.value.exit_code == 65


def test_every_field_of_peft_is_known_and_off_by_default() -> None:
    from dataclasses import MISSING, fields

    from peft import LoraConfig

    known = USED | IGNORED | {extra.field for extra in EXTRAS}
    assert {field.name for field in fields(LoraConfig)} == known
    plain = {extra.field: extra.plain for extra in EXTRAS}
    for field in fields(LoraConfig):
        default = field.default if field.default is not MISSING else None
        assert field.name not in plain or is_off(default) or default in plain[field.name]


def test_a_copy_of_the_base_is_no_update(shelf: Shelf) -> None:
    """PEFT saves the head's own weight beside an adapter on it, unless told not to."""
    model = model_of(shelf, "llama", "float32")
    adapter = shelf.adapter("copy", model, seed=1, target_modules=["lm_head"], copy_base=True)
    resolved, _ = resolve(model, adapter)
    assert [type(update) for update in resolved.updates.values()] == [Factors]
    assert resolved.notes == ("1 of its tensors are copies of the base's and change nothing",)


def test_another_kind_of_adapter_is_refused_by_name(shelf: Shelf, tmp_path: Path) -> None:
    from peft import IA3Config, get_peft_model
    from peft_models import load

    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    get_peft_model(load(model_of(shelf, "llama", "float32")), config).save_pretrained(str(tmp_path))
    with pytest.raises(BadInput, match="this one is IA3"):
        open_adapter(tmp_path, "it")
