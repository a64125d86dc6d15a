"""Which tensors of a model are one, by names, shapes and what its config says."""

from __future__ import annotations

from typing import Any

import pytest
from adapter_files import base_of

from streammerge.storage.ties import find_tie, hidden_tie, is_vocabulary

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Config = dict[str, Any]


@pytest.mark.parametrize(
    ("config", "stored", "tied"),
    [
        ({"tie_word_embeddings": True}, True, True),
        ({"tie_word_embeddings": True}, False, True),
        ({"text_config": {"tie_word_embeddings": True}}, True, True),
        ({"tie_word_embeddings": False}, True, False),
        ({"tie_word_embeddings": False}, False, False),
        ({"text_config": {"tie_word_embeddings": False}}, True, False),
        ({}, True, False),  # stored although nothing is said: it has a weight of its own
        ({}, False, True),  # GPT-2's config says nothing, and its head is not stored
        ({"text_config": None}, False, True),
        ({"architectures": ["LlamaForCausalLM"]}, False, True),
        ({"architectures": ["LlamaModel"]}, False, False),
        ({"architectures": ["LlamaForSequenceClassification"]}, False, False),
    ],
)
def test_when_a_head_is_the_embedding(config: Config, stored: bool, tied: bool) -> None:
    tie = find_tie([EMBEDDING, *([HEAD] if stored else [])], config)
    assert (tie is not None) == tied
    assert tie is None or (tie.embedding, tie.head, dict(tie.reads)) == (
        EMBEDDING,
        HEAD,
        {HEAD: EMBEDDING},
    )


def test_a_bias_that_is_shared_too() -> None:
    tensors = ["bert.embeddings.word_embeddings.weight", "cls.predictions.bias"]
    tie = find_tie(tensors, {"architectures": ["BertForMaskedLM"]})
    assert tie is not None
    assert tie.reads == {
        "cls.predictions.decoder.weight": tensors[0],
        "cls.predictions.decoder.bias": tensors[1],
    }


T5: Config = {"architectures": ["T5ForConditionalGeneration"], "vocab_size": 9}


@pytest.mark.parametrize(
    ("config", "more", "hidden"),
    [
        (T5, (), True),
        ({**T5, "tie_word_embeddings": False}, (), False),
        (T5, ("encoder.embed_tokens.weight",), True),
        (T5, ("lm_head.weight",), False),
        ({**T5, "architectures": ["T5EncoderModel"]}, (), False),
        ({**T5, "vocab_size": 8}, (), False),
        ({**T5, "vocab_size": None, "text_config": {"vocab_size": 9}}, (), True),
    ],
)
def test_a_head_of_unknown_name_is_seen_by_its_absence(
    config: Config, more: tuple[str, ...], hidden: bool
) -> None:
    shapes = dict.fromkeys(("shared.weight", *more), (9, 4)) | {"encoder.layer.weight": (4, 4)}
    found = hidden_tie(base_of(shapes), config)
    assert found == (["shared.weight", *more] if hidden else [])


def test_what_has_a_row_for_each_word() -> None:
    assert is_vocabulary(EMBEDDING)
    assert is_vocabulary(HEAD)
    assert not is_vocabulary("model.embed_positions.weight")
    assert not is_vocabulary("vision.model.embed_tokens.weight")
