"""Which tensors of a model are one: a head that shares its weight with the embedding.

transformers calls it `tie_word_embeddings` and keeps for each model class which tensor is read from
which (`_tied_weights_keys`). Files hold the shared one once, as a rule under the embedding's name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from streammerge.words import Extent

# An embedding's name -> the name of the head that reads it. By all of both names: a head under a
# wrong one would be left out when the output is loaded, and filled with random numbers.
_HEADS: Final = {
    "model.embed_tokens": "lm_head",
    "embed_tokens": "lm_head",
    "model.language_model.embed_tokens": "lm_head",
    "model.text_model.embed_tokens": "lm_head",
    "language_model.model.embed_tokens": "language_model.lm_head",  # LLaVA's, as it is stored
    "thinker.model.embed_tokens": "thinker.lm_head",
    "transformer.wte": "lm_head",
    "wte": "lm_head",
    "transformer.tokens_embed": "lm_head",
    "tokens_embed": "lm_head",
    "transformer.word_embeddings": "lm_head",
    "word_embeddings": "lm_head",
    "gpt_neox.embed_in": "embed_out",
    "bert.embeddings.word_embeddings": "cls.predictions.decoder",
    "roberta.embeddings.word_embeddings": "lm_head.decoder",
    "distilbert.embeddings.word_embeddings": "vocab_projector",
}
# Heads whose bias is another module's too, which is where the file holds it.
_BIASES: Final = {
    "cls.predictions.decoder": "cls.predictions",
    "lm_head.decoder": "lm_head",
}
_WITH_A_HEAD: Final = re.compile(
    "CausalLM|LMHead|DoubleHeads|ConditionalGeneration|MaskedLM|PreTraining|Text2Text|ToText"
)
# Classes whose head has another name than that of others with an embedding of this name.
_OTHERS: Final = re.compile("BertGeneration|Ultrabert")
_EMBEDDING: Final = re.compile("emb|shared|wte")


@dataclass(frozen=True, slots=True)
class Tie:
    """An embedding and the head that shares it; `reads` has each tensor of the head that does."""

    embedding: str
    head: str
    reads: Mapping[str, str]  # a tensor of the head -> the one that it is


def find_tie(tensors: Collection[str], config: Mapping[str, Any]) -> Tie | None:
    """The tie that a model's config asks for, or that its missing head implies; None without one.

    Where the config is silent, the file decides: transformers ties unless told otherwise.
    """
    found = next(_embeddings(tensors), None)
    if found is None or any(
        _OTHERS.search(str(name)) for name in config.get("architectures") or ()
    ):
        return None
    embedding, head = found
    stored = f"{head}.weight" in tensors
    if not _says(config, stored) or not (stored or _has_head(config)):
        return None
    reads = {f"{head}.weight": embedding}
    bias = f"{_BIASES.get(head, head)}.bias"
    if bias in tensors and f"{head}.bias" not in tensors:
        reads[f"{head}.bias"] = bias
    return Tie(embedding, f"{head}.weight", reads)


def hidden_tie(tensors: Mapping[str, Extent], config: Mapping[str, Any]) -> list[str]:
    """The embeddings of a model with a head that is nowhere, and would be under an unknown name.

    Seen by shape: of all tensors with a row for each word, none is a head.
    """
    if _text(config, "tie_word_embeddings") is False or not _has_head(config):
        return []
    words = _text(config, "vocab_size")
    shapes = ((name, tensors[name].spec.shape) for name in tensors)
    wide = [name for name, shape in shapes if len(shape) == 2 and shape[0] == words]
    return wide if all(_EMBEDDING.search(name) for name in wide) else []


def is_vocabulary(name: str) -> bool:
    """Whether the rows of a tensor are the words of the vocabulary: an embedding or a head."""
    module = name.removesuffix(".weight")
    return module in _HEADS or module in _HEADS.values()


def _embeddings(tensors: Collection[str]) -> Iterator[tuple[str, str]]:
    for embedding, head in _HEADS.items():
        if f"{embedding}.weight" in tensors:
            yield f"{embedding}.weight", head


def _text(config: Mapping[str, Any], key: str) -> Any:
    """A value of the config, or of that of the text model in it."""
    text = config.get("text_config")
    nested = text.get(key) if isinstance(text, Mapping) else None
    return config.get(key) if config.get(key) is not None else nested


def _says(config: Mapping[str, Any], stored: bool) -> bool:
    text = config.get("text_config")
    nested = text.get("tie_word_embeddings") if isinstance(text, Mapping) else None
    said = {config.get("tie_word_embeddings"), nested}
    return True in said or (False not in said and not stored)


def _has_head(config: Mapping[str, Any]) -> bool:
    """Whether the model has a head at all; one whose config does not say what it is may have."""
    return not config.get("architectures") or _is(config, _WITH_A_HEAD)


def _is(config: Mapping[str, Any], kind: re.Pattern[str]) -> bool:
    return any(kind.search(str(name)) for name in config.get("architectures") or ())
