"""Each case of the registry through PEFT, a merge, and the answers of the merged model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml
from adapter_case import Case, load_any, train
from adapter_cases import CASES, LARGER, MODELS
from exact_merge import read_tensors
from peft_models import Shelf

import streammerge as sm
from streammerge.errors import StreammergeError

if TYPE_CHECKING:
    from torch import Tensor

MERGED = [case for case in CASES if case.refused is None]
REFUSED = [case for case in CASES if case.refused is not None]
# Of the largest answer. Two float32 models that compute the same in another order differ by 2e-6.
TIGHT = 1e-5


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("cases"))


def answers(model: Any) -> Tensor:
    """Logits for fixed inputs: all of its tokens, an image, or a sound."""
    import torch

    words = getattr(model.config.get_text_config(), "vocab_size", 0)
    ids = torch.arange(words - words % 2).reshape(2, -1)
    decoded = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    ramp = torch.linspace(-1, 1, 3 * 64 * 64)
    given = {
        "input_ids": {"input_ids": ids},
        "input_features": {"input_features": ramp[: 2 * 8 * 40].reshape(2, 8, 40)},
        "pixel_values": {"pixel_values": ramp.reshape(1, 3, 64, 64)},
        "input_values": {"input_values": (torch.arange(600.0)[None] ** 2).cos()},
    }
    with torch.inference_mode():
        out: Tensor = model(**given[model.main_input_name], **decoded).logits
    return out


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a share of the largest answer."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def merge(folder: Path, base: Path, adapter: Path, **recipe: str) -> Path:
    recipe = {"base_model": str(base), "merge_method": "task_arithmetic", **recipe}
    folder.mkdir(exist_ok=True)
    entries = [{"path": str(adapter)}]
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "adapters": entries}))
    sm.merge(folder / "recipe.yaml", out=folder / "merged", memory="8GiB")
    return folder / "merged"


@pytest.mark.parametrize("case", MERGED, ids=lambda case: case.label)
def test_the_merged_model_answers_like_the_unmerged_one(
    shelf: Shelf, tmp_path: Path, case: Case
) -> None:
    """Unmerged, because PEFT merges an embedding's delta into a head that shares its weight."""
    base = shelf.get(case.model, MODELS[case.model])
    theirs = answers(train(case, base, tmp_path / "adapter"))
    merged = load_any(merge(tmp_path, base, tmp_path / "adapter"))
    assert distance(answers(merged), theirs) < TIGHT
    before = answers(load_any(base))
    if before.shape == theirs.shape:
        assert distance(before, theirs) > 1000 * TIGHT, "the adapter does nothing"
    if case.tied is not None:
        assert is_tied(merged) == case.tied
        added = set(read_tensors(tmp_path / "merged")) - set(read_tensors(base))
        assert all(name.endswith(may_be_added(case, base)) for name in added), added


# Tensors that are replaced, tied or longer than the base's, where the base is stored in 16 bits.
IN_16_BITS = [
    "modules_to_save on Llama",
    "bias: all on Qwen2",
    "trainable tokens on Llama",
    "LoRA on tied weights on tied Llama (the embedding)",
    "LoRA on tied weights on T5 (the encoder's and the decoder's)",
    "modules_to_save of tied weights on GPT-2 (the head)",
    "trainable tokens of tied weights on tied Llama",
    "a larger vocabulary on tied Llama (trainable tokens)",
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("label", IN_16_BITS)
def test_a_base_in_16_bits_is_read_exactly_and_written_with_one_rounding(
    shelf: Shelf, tmp_path: Path, label: str, dtype: str
) -> None:
    """Written in float32 it answers like the unmerged model; else it is that, rounded."""
    import torch

    (case,) = [one for one in MERGED if one.label == label]
    wide = shelf.get(case.model, MODELS[case.model])
    base = shelf.get(f"{case.model} in {dtype}", lambda folder: recast(wide, folder, dtype))
    theirs = answers(train(case, base, tmp_path / "adapter"))
    exact = merge(tmp_path / "wide", base, tmp_path / "adapter", out_dtype="float32")
    assert distance(answers(load_any(exact)), theirs) < TIGHT
    rounded = read_tensors(merge(tmp_path / "narrow", base, tmp_path / "adapter"))
    before = read_tensors(base)
    for name, tensor in read_tensors(exact).items():
        narrow = torch.from_numpy(tensor.values()).to(getattr(torch, dtype))
        assert np.array_equal(rounded[name].values(), narrow.double().numpy()), name
        assert rounded[name].dtype == next(iter(before.values())).dtype


def recast(model: Path, folder: Path, dtype: str) -> Path:
    """A saved model in another dtype."""
    import torch

    load_any(model).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.label)
def test_what_cannot_be_merged_is_refused_by_name(shelf: Shelf, tmp_path: Path, case: Case) -> None:
    base = shelf.get(case.model, MODELS[case.model])
    train(case, base, tmp_path / "adapter")
    with pytest.raises(StreammergeError) as caught:
        merge(tmp_path, base, tmp_path / "adapter")
    assert str(case.refused) in str(caught.value)
    assert "remedy:" in str(caught.value)
    assert not (tmp_path / "merged").exists()


RESIZED = [case for case in LARGER if not case.refused or "resize" in case.refused]


@pytest.mark.parametrize("case", RESIZED, ids=lambda case: case.label)
def test_a_base_of_the_new_size_takes_what_was_saved_of_a_resized_one(
    shelf: Shelf, tmp_path: Path, case: Case
) -> None:
    """The way out of a refusal: its new rows are others, and the adapter replaces all of them."""
    base = shelf.get(case.model, MODELS[case.model])
    theirs = answers(train(case, base, tmp_path / "adapter"))
    resized = load_any(base)
    assert case.change is not None
    case.change(resized)
    resized.get_input_embeddings().weight.data[-4:].normal_()
    resized.save_pretrained(tmp_path / "resized")
    merged = load_any(merge(tmp_path, tmp_path / "resized", tmp_path / "adapter"))
    assert distance(answers(merged), theirs) < TIGHT
    assert distance(answers(load_any(tmp_path / "resized")), theirs) > 1000 * TIGHT


def test_a_classifier_needs_a_base_that_has_one(shelf: Shelf, tmp_path: Path) -> None:
    """Most reward models are trained on a language model, whose file has no `score`."""
    import torch
    from transformers import AutoModelForSequenceClassification

    base = shelf.get("Llama", MODELS["Llama"])
    for number, name in enumerate(("trained", "loaded")):
        torch.manual_seed(number)  # each with a score of its own
        kind = AutoModelForSequenceClassification
        kind.from_pretrained(base, num_labels=3, pad_token_id=0).save_pretrained(tmp_path / name)
    lora = Case("a reward model", "Llama", {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"})
    theirs = answers(train(lora, tmp_path / "trained", tmp_path / "adapter"))
    with pytest.raises(StreammergeError) as caught:
        merge(tmp_path / "refused", base, tmp_path / "adapter")
    assert "tensors of a classifier" in str(caught.value)
    assert "score.weight" in str(caught.value)
    assert "AutoModelForSequenceClassification" in str(caught.value)
    merged = load_any(merge(tmp_path, tmp_path / "loaded", tmp_path / "adapter"))
    assert distance(answers(merged), theirs) < TIGHT
    assert distance(answers(load_any(tmp_path / "loaded")), theirs) > 1000 * TIGHT


def is_tied(model: Any) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return bool(head.weight.data_ptr() == embedding.weight.data_ptr())


def may_be_added(case: Case, base: Path) -> tuple[str, ...]:
    """What a file may hold that the base's lacks: nothing while it is tied, else what was."""
    heads = (*load_any(base).all_tied_weights_keys, "embed_out.weight")  # GPT-NeoX's in its file
    return () if case.tied else heads
