"""Full models whose head is, or is not, their embedding, merged with each other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from exact_merge import read_tensors
from numpy.typing import NDArray
from safetensors.numpy import save_file

import streammerge as sm
from streammerge.planning import Plan

Array = NDArray[np.float32]
EMBEDDING, HEAD, Q = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.q_proj.weight"


def numbers(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model(folder: Path, seed: int, *, tied: bool | None, head: str) -> dict[str, Array]:
    """A model whose head is `missing`, a `copy` of its embedding, or its `own`; its tensors, with
    the head that it means."""
    tensors = {EMBEDDING: numbers(seed, 9, 4), Q: numbers(seed + 1, 4, 4)}
    meant = numbers(seed + 2, 9, 4) if head == "own" else tensors[EMBEDDING].copy()
    stored = tensors if head == "missing" else {**tensors, HEAD: meant}
    folder.mkdir()
    save_file(stored, folder / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "text_config": {"model_type": "llama"}}
    said = {} if tied is None else {"tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps({**config, **said}))
    return {**tensors, HEAD: meant}


def merge(folder: Path) -> Plan:
    """`base + 0.25 (tuned - base)`, into `merged`."""
    models = [{"model": str(folder / "tuned"), "parameters": {"weight": 0.25}}]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(folder / "base")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "models": models}))
    plan = sm.plan(folder / "recipe.yaml", memory="8GiB")
    sm.merge(folder / "recipe.yaml", out=folder / "merged", memory="8GiB")
    return plan


TIED = [(True, "missing"), (True, "copy"), (None, "missing")]
UNTIED = [(False, "own"), (None, "own"), (True, "own")]  # transformers ties no unequal weights


@pytest.mark.parametrize("base", TIED)
@pytest.mark.parametrize("tuned", TIED)
def test_tied_models_stay_tied(
    tmp_path: Path, base: tuple[bool | None, str], tuned: tuple[bool | None, str]
) -> None:
    """With a stored head or without: the output has none."""
    a = model(tmp_path / "base", 1, tied=base[0], head=base[1])
    b = model(tmp_path / "tuned", 4, tied=tuned[0], head=tuned[1])
    merge(tmp_path)
    merged = read_tensors(tmp_path / "merged")
    assert set(merged) == {EMBEDDING, Q}
    expected = 0.75 * a[EMBEDDING] + 0.25 * b[EMBEDDING]
    assert np.abs(merged[EMBEDDING].values() - expected).max() < 1e-6
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config == json.loads((tmp_path / "base" / "config.json").read_text())


@pytest.mark.parametrize(
    ("base", "tuned"),
    [*((a, b) for a in TIED for b in UNTIED), *((b, a) for a in TIED for b in UNTIED)],
)
def test_a_tie_ends_where_a_model_has_none(
    tmp_path: Path, base: tuple[bool | None, str], tuned: tuple[bool | None, str]
) -> None:
    """A head that is missing is read from its embedding, on either side."""
    a = model(tmp_path / "base", 1, tied=base[0], head=base[1])
    b = model(tmp_path / "tuned", 4, tied=tuned[0], head=tuned[1])
    plan = merge(tmp_path)
    merged = read_tensors(tmp_path / "merged")
    assert set(merged) == {EMBEDDING, Q, HEAD}
    for name in (EMBEDDING, HEAD):
        expected = 0.75 * a[name] + 0.25 * b[name]
        assert np.abs(merged[name].values() - expected).max() < 1e-6
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    if base[0] or base[1] == "missing":
        assert config["tie_word_embeddings"] is False
        assert config["text_config"]["tie_word_embeddings"] is False
        assert any("are no longer one" in note for note in plan.notes)
    assert not config.get("tie_word_embeddings")


def test_the_counts_are_of_what_is_written(tmp_path: Path) -> None:
    model(tmp_path / "base", 1, tied=True, head="missing")
    model(tmp_path / "tuned", 4, tied=True, head="missing")
    merge(tmp_path)
    plan = sm.plan(tmp_path / "recipe.yaml", memory="8GiB")
    assert plan.demand.merged_tensors == 2
    report = sm.merge(tmp_path / "recipe.yaml", out=tmp_path / "again", memory="8GiB")
    assert [(one.applied, one.total) for one in report.changes] == [(2, 2)]


def test_a_model_without_a_head_gets_none(tmp_path: Path) -> None:
    for name, seed in (("base", 1), ("tuned", 4)):
        model(tmp_path / name, seed, tied=True, head="missing")
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(
            json.dumps({**config, "architectures": ["LlamaModel"]})
        )
    merge(tmp_path)
    assert set(read_tensors(tmp_path / "merged")) == {EMBEDDING, Q}


# -------------------------------------------------------------------------------------- adapters


def adapter(folder: Path, tensors: dict[str, Array], **config: object) -> Path:
    folder.mkdir()
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    saved = {f"base_model.model.model.embed_tokens.{key}": one for key, one in tensors.items()}
    save_file(saved, folder / "adapter_model.safetensors")
    return folder


def tokens(folder: Path, seed: int, rows: list[int]) -> Path:
    delta = {"token_adapter.trainable_tokens_delta": numbers(seed, len(rows), 4)}
    return adapter(folder, delta, trainable_token_indices=rows)


def merge_adapters(folder: Path, *adapters: Path) -> dict[str, NDArray[np.float64]]:
    entries = [{"path": str(path), "weight": 0.5} for path in adapters]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(folder / "base")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "adapters": entries}))
    sm.merge(folder / "recipe.yaml", out=folder / "merged", memory="8GiB")
    return {name: stored.values() for name, stored in read_tensors(folder / "merged").items()}


def test_trained_tokens_are_the_heads_too(tmp_path: Path) -> None:
    """Both adapters leave the two equal, so they stay one."""
    base = model(tmp_path / "base", 1, tied=True, head="missing")[EMBEDDING].astype(np.float64)
    merged = merge_adapters(
        tmp_path, tokens(tmp_path / "a", 10, [2, 7]), tokens(tmp_path / "b", 11, [7])
    )
    expected = base.copy()
    expected[[2, 7]] += 0.5 * (numbers(10, 2, 4) - base[[2, 7]])
    expected[[7]] += 0.5 * (numbers(11, 1, 4) - base[[7]])
    assert set(merged) == {EMBEDDING, Q}
    assert np.abs(merged[EMBEDDING] - expected).max() < 1e-6


def test_what_one_adapter_unties_the_other_changes_on_both_sides(tmp_path: Path) -> None:
    """A LoRA on the embedding, which is not the head's, and trained tokens, which are."""
    base = model(tmp_path / "base", 1, tied=True, head="missing")[EMBEDDING].astype(np.float64)
    a, b = numbers(12, 2, 9), numbers(13, 4, 2)
    lora = adapter(tmp_path / "lora", {"lora_embedding_A": a, "lora_embedding_B": b})
    merged = merge_adapters(tmp_path, lora, tokens(tmp_path / "tokens", 10, [2, 7]))
    head = base.copy()
    head[[2, 7]] += 0.5 * (numbers(10, 2, 4) - base[[2, 7]])
    embedding = head + 0.5 * 2 * (b.astype(np.float64) @ a).T
    assert np.abs(merged[HEAD] - head).max() < 1e-6
    assert np.abs(merged[EMBEDDING] - embedding).max() < 1e-6
