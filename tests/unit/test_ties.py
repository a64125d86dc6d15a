"""Which tensors of a model are one, by names, shapes and what its config says."""

from __future__ import annotations

from typing import Any

import pytest
from adapter_files import base_of

from streammerge.storage.heads import is_vocabulary
from streammerge.storage.ties import find_ties, hidden_tie, scales_its_head

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]


def ties(shapes: Shapes, config: Config) -> dict[str, str]:
    return find_ties(base_of(shapes), config)


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
    shapes = dict.fromkeys([EMBEDDING, *([HEAD] if stored else [])], (9, 4))
    assert ties(shapes, config) == ({HEAD: EMBEDDING} if tied else {})


def test_a_stored_head_of_another_shape_is_no_copy() -> None:
    assert ties({EMBEDDING: (9, 4), HEAD: (11, 4)}, {"tie_word_embeddings": True}) == {}


@pytest.mark.parametrize(
    ("tensor", "shape"), [("score.weight", (1, 4)), ("classifier.bias", (3,)), ("v_head.w", (1, 4))]
)
@pytest.mark.parametrize("said", [{}, {"tie_word_embeddings": True}])
def test_a_classifier_tells_a_model_without_a_head(
    tensor: str, shape: tuple[int, ...], said: Config
) -> None:
    """Where no class is named: a reward model keeps its `score`, and reads words with no head."""
    assert ties({EMBEDDING: (9, 4), tensor: shape}, said) == {}
    assert hidden_tie(base_of({"w.emb.weight": (9, 4), tensor: shape}), {"vocab_size": 9}) == []


# ------------------------------------------------------------------- heads whose bias is stored

BERT = "bert.embeddings.word_embeddings.weight"
BODY: Shapes = {BERT: (9, 4), "bert.embeddings.token_type_embeddings.weight": (2, 4)}


@pytest.mark.parametrize(
    ("head", "reads"),
    [
        (
            {"cls.predictions.bias": (9,), "cls.predictions.transform.dense.weight": (4, 4)},
            {
                "cls.predictions.decoder.weight": BERT,
                "cls.predictions.decoder.bias": "cls.predictions.bias",
            },
        ),
        (
            {"lm_head.bias": (9,), "lm_head.decoder.bias": (9,), "lm_head.dense.weight": (4, 4)},
            {"lm_head.decoder.weight": BERT},  # the config says nothing: the stored bias is its own
        ),
        ({"of_no_known_name.bias": (9,)}, {"of_no_known_name.weight": BERT}),
        ({"cls.seq_relationship.bias": (2,), "cls.seq_relationship.weight": (2, 4)}, {}),
        ({"bert.pooler.dense.bias": (9,)}, {}),  # of the body
        ({"other.3.bias": (9,)}, {}),  # of a layer
    ],
)
def test_a_head_is_where_its_bias_is(head: Shapes, reads: dict[str, str]) -> None:
    assert ties(BODY | head, {"architectures": ["BertForMaskedLM"]}) == reads


def test_a_square_embedding_tells_nothing_about_biases() -> None:
    assert ties({BERT: (4, 4), "head.bias": (4,)}, {"architectures": ["BertForMaskedLM"]}) == {}


# ------------------------------------------------------------------------ encoders and decoders


def test_encoder_and_decoder_read_the_embedding_beside_them() -> None:
    shapes = {"model.shared.weight": (9, 4), "final_logits_bias": (1, 9)}
    shapes |= {f"model.{one}.layers.0.fc1.weight": (4, 4) for one in ("encoder", "decoder")}
    stacks = dict.fromkeys(
        ["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"],
        "model.shared.weight",
    )
    bart = {"architectures": ["BartForConditionalGeneration"]}
    assert ties(shapes, bart) == {**stacks, "lm_head.weight": "model.shared.weight"}
    assert ties(shapes, {"architectures": ["BartForQuestionAnswering"]}) == stacks
    assert ties(shapes, {**bart, "tie_word_embeddings": False}) == {}


def test_a_decoder_within_a_model_has_a_config_of_its_own() -> None:
    """The outer config says false, and that is about outer tensors."""
    shapes: Shapes = {"decoder.transformer.wte.weight": (9, 4), "encoder.norm.weight": (4,)}
    config = {"architectures": ["VisionEncoderDecoderModel"], "tie_word_embeddings": False}
    reads = {"decoder.lm_head.weight": "decoder.transformer.wte.weight"}
    assert ties(shapes, {**config, "decoder": {}}) == reads
    assert ties(shapes, {**config, "decoder": {"tie_word_embeddings": False}}) == {}


def test_t5_shares_its_weights_whatever_its_config_says_about_a_scale() -> None:
    t5 = {"model_type": "t5", "architectures": ["T5EncoderModel"], "tie_word_embeddings": False}
    shapes: Shapes = {"shared.weight": (9, 4), "encoder.block.0.layer.0.q.weight": (4, 4)}
    assert scales_its_head(t5)
    assert not scales_its_head({"model_type": "bart"})
    assert scales_its_head({"model_type": "musicgen", "text_encoder": {"model_type": "t5"}})
    assert ties(shapes, t5) == {"encoder.embed_tokens.weight": "shared.weight"}


# ------------------------------------------------------------------------------- unknown names

NEW: Config = {"architectures": ["NewForCausalLM"], "vocab_size": 9}


@pytest.mark.parametrize(
    ("config", "more", "hidden"),
    [
        (NEW, (), True),
        ({**NEW, "tie_word_embeddings": False}, (), False),
        (NEW, ("decoder.emb.weight",), True),
        (NEW, ("unembed.weight", "vocabulary.weight"), False),
        ({**NEW, "architectures": ["NewModel"]}, (), False),
        ({**NEW, "vocab_size": 8}, (), False),
        ({**NEW, "vocab_size": None, "text_config": {"vocab_size": 9}}, (), True),
    ],
)
def test_a_head_of_unknown_name_is_seen_by_its_absence(
    config: Config, more: tuple[str, ...], hidden: bool
) -> None:
    shapes = dict.fromkeys(("new.emb.weight", *more), (9, 4)) | {"new.layer.weight": (4, 4)}
    found = hidden_tie(base_of(shapes), config)
    assert found == (["new.emb.weight", *more] if hidden else [])


def test_a_known_tie_does_not_hide_an_unknown_head() -> None:
    """An encoder reads the embedding, and so does a head of which nobody knows the name."""
    shapes: Shapes = {"new.shared.weight": (9, 4), "new.encoder.0.q.weight": (4, 4)}
    stack = {"new.encoder.embed_tokens.weight": "new.shared.weight"}
    assert ties(shapes, NEW) == stack
    with_stack = base_of(shapes | dict.fromkeys(stack, (9, 4)))
    assert hidden_tie(with_stack, NEW) == ["new.shared.weight", *stack]
    assert hidden_tie(base_of(shapes | {"embed_out.weight": (9, 4)}), NEW) == []
    inner = {**NEW, "architectures": ["EncoderDecoderModel"], "tie_word_embeddings": False}
    assert hidden_tie(base_of(shapes), inner) == []
    assert hidden_tie(base_of(shapes), {**inner, "decoder": {"vocab_size": 9}}) != []


def test_what_has_a_row_for_each_word() -> None:
    words = [EMBEDDING, HEAD, BERT, "cls.predictions.decoder.weight", "encoder.embed_tokens.weight"]
    words += ["language_model.model.embed_tokens.weight", "language_model.lm_head.weight"]
    for name in words:
        assert is_vocabulary(name), name
    for name in (
        "model.embed_positions.weight",
        "vision.model.embed_tokens.weight",
        *list(BODY)[1:],
    ):
        assert not is_vocabulary(name), name
