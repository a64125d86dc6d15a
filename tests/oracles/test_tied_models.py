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
from streammerge.errors import StreammergeError
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


# ------------------------------------------------------- an encoder, a decoder, and a head of T5

SHARED, STACKS = "shared.weight", ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def t5(
    folder: Path, seed: int, *, head: str, scaled: bool, copies: bool = False
) -> dict[str, Array]:
    """A T5 whose head is its `own`, as in T5 1.1, or `missing`; its tensors as they are meant.

    `scaled` is what `tie_word_embeddings` says, and `copies` whether the file repeats the shared
    embedding, as some on the hub do.
    """
    tensors = {SHARED: numbers(seed, 9, 4)}
    for number, stack in enumerate(("encoder", "decoder"), start=1):
        tensors[f"{stack}.block.0.layer.0.SelfAttention.q.weight"] = numbers(seed + number, 4, 4)
    own = {HEAD: numbers(seed + 3, 9, 4)} if head == "own" else {}
    repeated = {name: tensors[SHARED].copy() for name in STACKS if copies}
    folder.mkdir()
    save_file({**tensors, **own, **repeated}, folder / "model.safetensors")
    config = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": scaled}))
    return tensors | {HEAD: own.get(HEAD, tensors[SHARED])}


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize(("head", "scaled"), [("own", False), ("missing", True)])
def test_t5s_of_a_kind_stay_what_they_are(
    tmp_path: Path, head: str, scaled: bool, copies: bool
) -> None:
    """What each shares goes unsaid and is left out; a head of its own is no change."""
    a = t5(tmp_path / "base", 1, head=head, scaled=scaled, copies=copies)
    b = t5(tmp_path / "tuned", 11, head=head, scaled=scaled)
    plan = merge(tmp_path)
    merged = read_tensors(tmp_path / "merged")
    assert set(merged) == set(a) - ({HEAD} if head == "missing" else set())
    for name, stored in merged.items():
        assert np.abs(stored.values() - (0.75 * a[name] + 0.25 * b[name])).max() < 1e-6
    assert not any("no longer one" in note for note in plan.notes)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is scaled


def test_a_t5_with_a_head_of_its_own_parts_one_that_shares_it(tmp_path: Path) -> None:
    """The head is written, the stacks are not, and the scale stays that of the base."""
    a = t5(tmp_path / "base", 1, head="missing", scaled=True)
    b = t5(tmp_path / "tuned", 11, head="own", scaled=False)
    plan = merge(tmp_path)
    merged = read_tensors(tmp_path / "merged")
    assert set(merged) == set(a)
    assert np.abs(merged[HEAD].values() - (0.75 * a[HEAD] + 0.25 * b[HEAD])).max() < 1e-6
    (note,) = [note for note in plan.notes if "no longer one" in note]
    assert "`tie_word_embeddings` stays as it is" in note
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True


# --------------------------------------------------------------- a head that nobody has heard of

WORDS, UNWORDS = "new.emb.weight", "unemb.weight"


def unheard_of(folder: Path) -> dict[str, Array]:
    """A tied model of an unknown class: its head is in no file, and in no table of names."""
    tensors = {WORDS: numbers(1, 9, 4), "new.q.weight": numbers(2, 4, 4)}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {"architectures": ["NewForCausalLM"], "vocab_size": 9, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def lora(folder: Path, seed: int, module: str, outputs: int) -> tuple[Path, NDArray[np.float64]]:
    """An adapter on one module of 4 inputs, and its update."""
    a, b = numbers(seed, 2, 4), numbers(seed + 1, outputs, 2)
    folder.mkdir()
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    key = f"base_model.model.{module}.lora_"
    save_file({f"{key}A.weight": a, f"{key}B.weight": b}, folder / "adapter_model.safetensors")
    return folder, 2 * b.astype(np.float64) @ a


def test_an_adapter_on_a_head_says_what_it_is_called(tmp_path: Path) -> None:
    """The other adapter does not touch it, and both are on one model."""
    base = unheard_of(tmp_path / "base")
    on_q, of_q = lora(tmp_path / "q", 20, "new.q", 4)
    on_head, of_head = lora(tmp_path / "head", 30, "unemb", 9)
    merged = merge_adapters(tmp_path, on_q, on_head)
    assert set(merged) == {*base, UNWORDS}
    assert np.array_equal(merged[WORDS], base[WORDS])
    assert np.abs(merged[UNWORDS] - (base[WORDS] + 0.5 * of_head)).max() < 1e-6
    assert np.abs(merged["new.q.weight"] - (base["new.q.weight"] + 0.5 * of_q)).max() < 1e-6
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize(("module", "outputs"), [("unemb", 8), ("new.z", 4)])
def test_other_unknown_names_are_no_heads(tmp_path: Path, module: str, outputs: int) -> None:
    unheard_of(tmp_path / "base")
    adapter, _ = lora(tmp_path / "adapter", 30, module, outputs)
    with pytest.raises(StreammergeError, match="name no tensor of the base"):
        merge_adapters(tmp_path, adapter)
