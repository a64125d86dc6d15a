"""Which tensors of a model are one: a head that shares its weight with the embedding.

transformers calls it `tie_word_embeddings` and keeps for each model class which tensor is read from
which (`_tied_weights_keys`). Files hold the shared one once, as a rule under the embedding's name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

# The last parts of an embedding's name -> the head that reads it, by all its name.
_HEADS: Final = {
    "language_model.model.embed_tokens": "language_model.lm_head",  # LLaVA's, as it is stored
    "thinker.model.embed_tokens": "thinker.lm_head",
    "embed_tokens": "lm_head",
    "wte": "lm_head",
    "tokens_embed": "lm_head",
    "transformer.word_embeddings": "lm_head",
    "gpt_neox.embed_in": "embed_out",
    "roberta.embeddings.word_embeddings": "lm_head.decoder",
    "distilbert.embeddings.word_embeddings": "vocab_projector",
    "embeddings.word_embeddings": "cls.predictions.decoder",
}
# Heads whose bias is another module's too, which is where the file holds it.
_BIASES: Final = {
    "cls.predictions.decoder": "cls.predictions",
    "lm_head.decoder": "lm_head",
}
_WITH_A_HEAD: Final = re.compile("CausalLM|LMHead|DoubleHeads|ConditionalGeneration|MaskedLM|PreTr")


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
    if found is None:
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


def is_vocabulary(name: str) -> bool:
    """Whether the rows of a tensor are the words of the vocabulary: an embedding or a head."""
    module = name.removesuffix(".weight")
    return module in _HEADS.values() or any(_ends(module, tail) for tail in _HEADS)


def _embeddings(tensors: Collection[str]) -> Iterator[tuple[str, str]]:
    weights = [name for name in tensors if name.endswith(".weight")]
    likely = [name for name in weights if "embed" in name or "wte" in name]
    for tail, head in _HEADS.items():
        named = [name for name in likely if _ends(name.removesuffix(".weight"), tail)]
        if len(named) == 1:
            yield named[0], head


def _ends(module: str, tail: str) -> bool:
    return module == tail or module.endswith(f".{tail}")


def _says(config: Mapping[str, Any], stored: bool) -> bool:
    text = config.get("text_config")
    nested = text.get("tie_word_embeddings") if isinstance(text, Mapping) else None
    said = {config.get("tie_word_embeddings"), nested}
    return True in said or (False not in said and not stored)


def _has_head(config: Mapping[str, Any]) -> bool:
    """Whether the model has a head at all; one whose config does not say what it is may have."""
    names = config.get("architectures")
    return not names or any(_WITH_A_HEAD.search(str(name)) for name in names)
