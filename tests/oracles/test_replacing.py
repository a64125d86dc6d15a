"""What an adapter holds itself goes through every method as a full model's tensor would.

No formula is needed for that: the same method merges full models in which the tensor was replaced,
and the two results must be equal bit by bit, random masks and thresholds included.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from exact_merge import Stored, read_tensors
from numpy.typing import NDArray
from safetensors.numpy import save_file

import streammerge as sm
from streammerge.commands.verify import verify
from streammerge.errors import Refused, StreammergeError
from streammerge.methods import CATALOGUE

Array = NDArray[np.float32]
EMBEDDING, HEAD, Q = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.q_proj.weight"
ROWS, COLS = 97, 48
TRAINED = ([5, 3, 90], [3, 60])  # rows of the embedding, one list for each adapter
CONFIG = {"tie_word_embeddings": False, "vocab_size": ROWS, "architectures": ["LlamaForCausalLM"]}


# Methods in core space merge factors and refuse everything else.
METHODS = [name for name, method in CATALOGUE.items() if method.space != "cores"]


def numbers(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


BASE = {EMBEDDING: numbers(1, ROWS, COLS), HEAD: numbers(2, ROWS, COLS), Q: numbers(3, COLS, COLS)}
NEW_HEADS = [BASE[HEAD] + numbers(seed, ROWS, COLS) / 3 for seed in (4, 5)]
NEW_ROWS = [numbers(seed, len(rows), COLS) for seed, rows in zip((6, 7), TRAINED, strict=True)]


def model(folder: Path, tensors: dict[str, Array], **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def adapter(folder: Path, tensors: dict[str, Array], **config: Any) -> Path:
    """A LoRA of rank 2 on one layer, and tensors held in full."""
    folder.mkdir()
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    module = f"base_model.model.{Q.removesuffix('.weight')}"
    factors = {f"{module}.lora_A.weight": numbers(8, 2, COLS)}
    factors[f"{module}.lora_B.weight"] = numbers(9, COLS, 2)
    saved = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(factors | saved, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`; adapters `0` and `1` with a head and trained tokens; the same as full models."""
    root = tmp_path_factory.mktemp("replacing")
    model(root / "base", BASE)
    for i, (head, rows, trained) in enumerate(zip(NEW_HEADS, NEW_ROWS, TRAINED, strict=True)):
        delta = f"{EMBEDDING.removesuffix('.weight')}.token_adapter.trainable_tokens_delta"
        told = {"trainable_token_indices": trained}
        adapter(root / f"adapter-{i}", {HEAD: head, delta: rows}, **told)
        embedding = BASE[EMBEDDING].copy()
        embedding[trained] = rows
        model(root / f"model-{i}", {**BASE, EMBEDDING: embedding, HEAD: head})
    return root


def merge(out: Path, recipe: dict[str, Any]) -> dict[str, Stored]:
    out.mkdir()
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    sm.merge(out / "recipe.yaml", out=out / "merged", memory="8GiB")
    return read_tensors(out / "merged")


def values(stored: Stored) -> NDArray[np.float64]:
    return stored.values()


WEIGHTS, DENSITIES = (0.7, 0.6), (0.5, 0.8)
OF_EACH = {"weight": WEIGHTS, "density": DENSITIES}


def recipe_of(name: str, base: Path, models: list[str]) -> dict[str, Any]:
    """The method with whatever it needs; weights and densities where it takes them."""
    method = CATALOGUE[name]
    most = method.models[1] or len(models)
    entries = [
        {
            "model": text,
            "parameters": {k: OF_EACH[k][i] for k in method.per_model if k in OF_EACH},
        }
        for i, text in enumerate(models[:most])
    ]
    shared = {k: 0.3 for k, knob in method.shared.items() if knob.default is None}
    return {
        "merge_method": name,
        "base_model": str(base),
        "models": entries,
        "parameters": shared,
        "seed": 5,
    }


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_them_as_a_full_models_tensors(
    folder: Path, tmp_path: Path, method: str
) -> None:
    base = folder / "base"
    adapted = [f"{base}+{folder / f'adapter-{i}'}" for i in range(2)]
    full = [str(folder / f"model-{i}") for i in range(2)]
    ours = merge(tmp_path / "adapters", recipe_of(method, base, adapted))
    theirs = merge(tmp_path / "models", recipe_of(method, base, full))
    for name in (HEAD, EMBEDDING):
        assert ours[name].data == theirs[name].data, name
        assert ours[name].data != BASE[name].tobytes(), f"{name} did not change"
    assert ours[Q].data != BASE[Q].tobytes()


# Those that add what a model changes, when it is the only one and nothing of it is pruned.
WHOLE = [name for name, method in CATALOGUE.items() if method.alone]


@pytest.mark.parametrize("method", ["task_arithmetic", "linear", "passthrough", *WHOLE])
def test_what_one_model_decides_alone_keeps_its_bytes(
    folder: Path, tmp_path: Path, method: str
) -> None:
    """By difference, a third of the elements would be off in the last bit."""
    models = [{"model": f"{folder / 'base'}+{folder / 'adapter-0'}"}]
    base = {} if method == "passthrough" else {"base_model": str(folder / "base")}
    whole = {"gamma": 0.0} if "gamma" in CATALOGUE[method].per_model else {}
    recipe = {"merge_method": method, "models": models, "parameters": whole, **base}
    merged = merge(tmp_path / "out", recipe)
    expected = BASE[EMBEDDING].copy()
    expected[TRAINED[0]] = NEW_ROWS[0]
    assert merged[HEAD].data == NEW_HEADS[0].tobytes()
    assert merged[EMBEDDING].data == expected.tobytes()


@pytest.mark.parametrize("method", WHOLE)
@pytest.mark.parametrize("normalize", [True, False])
def test_alone_it_is_added_as_the_method_would(
    folder: Path, tmp_path: Path, method: str, normalize: bool
) -> None:
    """Beside a model that changes nothing, and at a density just under 1, nothing is lost but the
    smallest element."""
    spec, base = CATALOGUE[method], folder / "base"
    shared = {"lambda": 0.7, "normalize": normalize}
    found = []
    for density in (1.0, 1 - 1e-9):
        own = {"weight": 0.6, "density": density, "gamma": 0.0, "epsilon": 0.0}
        parameters = {key: value for key, value in own.items() if key in spec.per_model}
        model = {"model": str(folder / "model-0"), "parameters": parameters}
        recipe = {"merge_method": method, "base_model": str(base), "parameters": shared}
        found.append(merge(tmp_path / f"{density}", {**recipe, "models": [model], "seed": 1}))
    for name in (HEAD, EMBEDDING):
        changed = np.abs(values(found[0][name]) - BASE[name])
        assert (np.abs(values(found[0][name]) - values(found[1][name])) > 1e-6).sum() <= 1
        assert changed.max() > 0.1


def test_rounded_once_in_another_dtype(folder: Path, tmp_path: Path) -> None:
    recipe = {"merge_method": "task_arithmetic", "base_model": str(folder / "base")}
    models = [{"model": f"{folder / 'base'}+{folder / 'adapter-0'}"}]
    merged = merge(tmp_path / "out", {**recipe, "models": models, "out_dtype": "float16"})
    assert merged[HEAD].data == NEW_HEADS[0].astype(np.float16).tobytes()


def test_the_report_counts_them(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(
        "task_arithmetic", folder / "base", [f"{folder / 'base'}+{folder / 'adapter-0'}"]
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    report = sm.merge(tmp_path / "recipe.yaml", out=tmp_path / "merged", memory="8GiB")
    assert [(change.applied, change.total) for change in report.changes] == [(3, 3)]


# ---------------------------------------------------------------------- adapters of another model


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_another_model_is_that_model_with_it(
    folder: Path, tmp_path: Path, method: str
) -> None:
    """`other+adapter-0` in a merge on the base: replaced tensors are the adapter's, not other's;
    factors are added to other's weights, and what differs from the base's is all of that."""
    base = folder / "base"
    tensors = {name: values(one) for name, one in read_tensors(folder / "model-1").items()}
    tensors[Q] = tensors[Q] + numbers(12, COLS, COLS) / 5
    other = model(tmp_path / "other", {n: one.astype(np.float32) for n, one in tensors.items()})
    tensors[EMBEDDING][TRAINED[0]] = NEW_ROWS[0]
    tensors[Q] += 2 * numbers(9, COLS, 2).astype(np.float64) @ numbers(8, 2, COLS)  # alpha / r
    applied = {n: one.astype(np.float32) for n, one in tensors.items()} | {HEAD: NEW_HEADS[0]}
    same = model(tmp_path / "same", applied)
    adapted = [f"{other}+{folder / 'adapter-0'}", str(folder / "model-0")]
    ours = merge(tmp_path / "adapters", recipe_of(method, base, adapted))
    full = [str(same), str(folder / "model-0")]
    theirs = merge(tmp_path / "models", recipe_of(method, base, full))
    for name in (HEAD, EMBEDDING):
        assert ours[name].data == theirs[name].data, name
    # In the last bits the two are formed in another order, which may turn a threshold or a vote.
    off = np.abs(values(ours[Q]) - values(theirs[Q])) > 1e-5
    assert off.mean() < 0.005
    if method != "model_stock":  # which takes the base where one of the models does not change it
        assert np.abs(values(ours[Q]) - BASE[Q]).max() > 0.1


# ------------------------------------------------------------------------------ larger vocabulary

MORE = 4


def grown(seed: int, name: str) -> Array:
    """The base's tensor with more rows, those that it has moved a little."""
    own = BASE[name] + numbers(seed, ROWS, COLS) / 10
    return np.concatenate([own, numbers(seed + 1, MORE, COLS)])


def growing(folder: Path, seed: int, **files: str) -> Path:
    path = adapter(folder, {EMBEDDING: grown(seed, EMBEDDING), HEAD: grown(seed + 50, HEAD)})
    for name, text in files.items():
        (path / f"{name}.json").write_text(text)
    return path


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_linear", "slerp"])
def test_rows_that_the_base_lacks_are_the_weighted_mean(
    folder: Path, tmp_path: Path, method: str
) -> None:
    base = folder / "base"
    paths = [growing(tmp_path / f"new-{i}", seed) for i, seed in enumerate((10, 20))]
    recipe = recipe_of(method, base, [f"{base}+{path}" for path in paths])
    merged = merge(tmp_path / "out", recipe)
    weights = [entry["parameters"].get("weight", 1.0) for entry in recipe["models"]]
    for name, offset in ((EMBEDDING, 0), (HEAD, 50)):
        new = [grown(seed + offset, name) for seed in (10, 20)][: len(weights)]
        mean = np.average([one[ROWS:].astype(np.float64) for one in new], axis=0, weights=weights)
        assert merged[name].shape == (ROWS + MORE, COLS)
        assert np.abs(values(merged[name])[ROWS:] - mean).max() < 1e-6
        # The rows that it has are merged as if there were no others.
        full = [
            model(tmp_path / f"{name}-{i}", {**BASE, name: one[:ROWS]}) for i, one in enumerate(new)
        ]
        known = merge(tmp_path / f"{name}-known", recipe_of(method, base, list(map(str, full))))
        assert merged[name].data[: ROWS * COLS * 4] == known[name].data
    config = json.loads((tmp_path / "out" / "merged" / "config.json").read_text())
    assert config["vocab_size"] == ROWS + MORE


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_new_rows_are_tiles_of_their_own(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Whatever the tiles: 97 known rows and 4 new ones, ten at a time, three at a time, at once."""
    base = folder / "base"
    paths = [growing(tmp_path / f"new-{i}", seed) for i, seed in enumerate((10, 20))]
    recipe = recipe_of(method, base, [f"{base}+{path}" for path in paths])
    found = []
    for rows in (ROWS + MORE, 10, 3):
        monkeypatch.setattr("streammerge.grid.TILE_ELEMENTS", rows * COLS)
        found.append(merge(tmp_path / f"out-{rows}", recipe))
    for name in (EMBEDDING, HEAD):
        assert len({merged[name].data for merged in found}) == 1
    verify(tmp_path / "out-3" / "merged", read_data=True)


def test_one_models_larger_vocabulary_keeps_its_bytes(folder: Path, tmp_path: Path) -> None:
    base, path = folder / "base", growing(tmp_path / "new", 10)
    others = [f"{base}+{path}", f"{base}+{adapter(tmp_path / 'other', {})}"]
    recipe = recipe_of("task_arithmetic", base, others)
    recipe["models"][0]["parameters"] = {"weight": 1.0}
    merged = merge(tmp_path / "out", recipe)
    assert merged[HEAD].data == grown(60, HEAD).tobytes()


def refusal(out: Path, base: Path, *adapters: Path, **recipe: Any) -> StreammergeError:
    told = recipe_of("linear", base, [f"{base}+{path}" for path in adapters]) | recipe
    with pytest.raises(StreammergeError) as caught:
        merge(out, told)
    assert not (out / "merged").exists()
    return caught.value


def test_vocabularies_of_two_sizes_are_refused(folder: Path, tmp_path: Path) -> None:
    other = adapter(
        tmp_path / "other",
        {n: np.concatenate([BASE[n], numbers(0, 9, COLS)]) for n in (EMBEDDING, HEAD)},
    )
    error = refusal(tmp_path / "out", folder / "base", growing(tmp_path / "new", 10), other)
    assert "differ in size" in str(error)
    assert f"{HEAD} has {ROWS + 9} rows" in str(error)


def test_weights_that_sum_to_zero_have_no_mean(folder: Path, tmp_path: Path) -> None:
    base = folder / "base"
    paths = [growing(tmp_path / f"new-{i}", seed) for i, seed in enumerate((10, 20))]
    recipe = recipe_of("task_arithmetic", base, [f"{base}+{path}" for path in paths])
    for entry, weight in zip(recipe["models"], (1.0, -1.0), strict=True):
        entry["parameters"] = {"weight": weight}
    error = refusal(tmp_path / "out", base, *paths, **recipe)
    assert isinstance(error, Refused)
    assert error.exit_code == 78
    assert "sum to zero" in str(error)


# ---------------------------------------------------------------------------------------- tokenizer


def tokenizer_of(out: Path) -> str:
    return (out / "merged" / "tokenizer.json").read_text()


def test_the_tokenizer_comes_from_whom_the_vocabulary_does(folder: Path, tmp_path: Path) -> None:
    base = model(tmp_path / "base", BASE)
    (base / "tokenizer.json").write_text('"old"')
    (base / "generation_config.json").write_text("{}")
    new = growing(tmp_path / "new", 10, tokenizer='"new"', special_tokens_map="{}")
    plain = adapter(tmp_path / "plain", {})
    (plain / "tokenizer.json").write_text('"of no account"')
    recipe = recipe_of("linear", base, [f"{base}+{new}", f"{base}+{plain}"])
    merge(tmp_path / "out", recipe)
    assert tokenizer_of(tmp_path / "out") == '"new"'
    files = {path.name for path in (tmp_path / "out" / "merged").iterdir()}
    assert {"special_tokens_map.json", "generation_config.json"} <= files
    assert "adapter_config.json" not in files
    merge(tmp_path / "named", {**recipe, "tokenizer_source": "plain"})
    assert tokenizer_of(tmp_path / "named") == '"of no account"'
    merge(tmp_path / "kept", {**recipe, "tokenizer_source": "base"})
    assert tokenizer_of(tmp_path / "kept") == '"old"'


def test_two_tokenizers_are_refused_until_one_is_named(folder: Path, tmp_path: Path) -> None:
    base = folder / "base"
    paths = [growing(tmp_path / f"new-{i}", 10 * i, tokenizer=f'"{i}"') for i in (1, 2)]
    error = refusal(tmp_path / "out", base, *paths)
    assert error.exit_code == 78
    assert "tokenizer_source: new-1" in str(error)
    recipe = recipe_of("linear", base, [f"{base}+{path}" for path in paths])
    merge(tmp_path / "named", {**recipe, "tokenizer_source": "new-2"})
    assert tokenizer_of(tmp_path / "named") == '"2"'
    error = refusal(tmp_path / "wrong", base, *paths, tokenizer_source="new-3")
    assert "expected: one of base, new-1, new-2" in str(error)


def test_two_equal_tokenizers_are_one(folder: Path, tmp_path: Path) -> None:
    base = folder / "base"
    paths = [growing(tmp_path / f"new-{i}", 10 * i, tokenizer='"same"') for i in (1, 2)]
    merge(tmp_path / "out", recipe_of("linear", base, [f"{base}+{path}" for path in paths]))
    assert tokenizer_of(tmp_path / "out") == '"same"'
