"""Which module reads which embedding: the names that transformers 5.23 gives the two.

A head that is its embedding lies in no file, so only its class knows what it is called. The names
here are those of files, which older releases gave; `tests/oracles/test_ties_of_transformers.py`
holds them to every class of transformers. A head with a bias needs no row: its bias is stored.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Final

# An embedding -> its head. By all of both names: a head under a wrong one would be left out when
# the output is loaded, and filled with random numbers.
_HEADS: Final = {
    "model.embed_tokens": "lm_head",
    "embed_tokens": "lm_head",
    "model.language_model.embed_tokens": "lm_head",
    "model.text_model.embed_tokens": "lm_head",
    "model.embed_tokens.embed_tokens": "lm_head",
    "model.decoder.embed_tokens": "lm_head",
    "decoder.embed_tokens": "lm_head",
    "model.shared": "lm_head",
    "shared": "lm_head",
    "led.shared": "lm_head",
    "model.language_model.shared": "lm_head",
    "prophetnet.word_embeddings": "lm_head",
    "transformer.wte": "lm_head",
    "wte": "lm_head",
    "transformer.tokens_embed": "lm_head",
    "tokens_embed": "lm_head",
    "transformer.word_embeddings": "lm_head",
    "word_embeddings": "lm_head",
    "backbone.embeddings": "lm_head",
    "rwkv.embeddings": "head",
    "gpt_neox.embed_in": "embed_out",
    "gpt_neox_japanese.embed_in": "embed_out",
    "biogpt.embed_tokens": "output_projection",
    "tok_embeddings": "output",
    "speecht5.decoder.prenet.embed_tokens": "text_decoder_postnet.lm_head",
    "ultrabert.embed_tokens": "cls",
}
# Classes whose embedding has a name from above, and its readers others.
_OF_CLASSES: Final = tuple(
    (re.compile(classes), embedding, readers)
    for classes, embedding, *readers in (
        ("Whisper|Moonshine|Canary|CohereAsr", "model.decoder.embed_tokens", "proj_out"),
        ("TrOCR", "model.decoder.embed_tokens", "output_projection"),
        (
            "FSMT",
            "model.decoder.embed_tokens",
            "model.encoder.embed_tokens",
            "model.decoder.output_projection",
        ),
        ("T5GemmaFor", "model.decoder.embed_tokens", "lm_head.out_proj"),
        ("Pop2Piano", "shared"),  # its head has a weight of its own
        ("DeepseekV4", "model.embed_tokens", "head"),
        ("HyperCLOVAX", "model.language_model.embed_tokens", "model.language_model.lm_head"),
        (
            "ShieldGemma2ForImage",
            "model.model.language_model.model.embed_tokens",
            "model.lm_head",
        ),
        ("UltraVBert", "model.text_model.embed_tokens", "head.decoder"),
    )
)
# Models within a model; the names above stand behind these.
_PARTS: Final = (
    "language_model.",
    "text_model.",
    "thinker.",
    "decoder.",
    "text_decoder.",
    "t2u_model.",
    "rag.generator.",
    "generator.",
)
# Encoders and decoders that each have an embedding of their own, and read the one beside them.
_STACKS: Final = ("encoder", "decoder", "text_encoder", "text_decoder")
_OF_STACKS: Final = {"shared": "embed_tokens", "word_embeddings": "word_embeddings"}
_EMBEDDING: Final = re.compile(r"emb|shared|wte|\.w$")
# Heads of classifiers, reward models and the like: a model with one reads words and writes none.
_TASKS: Final = re.compile(
    r"(score|classifier|classification_head|qa_outputs|v_head|reward_head)\."
)
_NO_WORDS: Final = re.compile(r"pos(ition|_emb)|type|segment|patch|wpe|embed_out|unemb")
# The others that have a row for each word: what encoder and decoder read, and around heads with a
# bias, which need no row above.
_WORDS: Final = re.compile(
    r"(^|\.)((en|de)coder\.embed_tokens|embeddings\.(word|tok)_embeddings|vocab_projector"
    r"|(cls\.predictions|predictions|lm_head|mlm_score)\.decoder|generator_lm_head|lm_loss)$"
)


def is_embedding(module: str) -> bool:
    """Whether a module is called like an embedding, not of places or kinds, and not like a head."""
    return _EMBEDDING.search(module) is not None and not _NO_WORDS.search(module)


def is_of_a_task(name: str) -> bool:
    """Whether a tensor belongs to the head of another task than writing words."""
    return _TASKS.match(name) is not None


def heads_of(embedding: str, architectures: Iterable[str]) -> list[str]:
    """The modules that read an embedding where a model ties the two; none for an unknown name."""
    part = part_of(embedding)
    name, classes = embedding.removeprefix(part), list(architectures)
    for like, own, readers in _OF_CLASSES:
        if name == own and any(map(like.search, classes)):
            return [part + reader for reader in readers]
    known = name in _HEADS and (not part or "." in name)  # a bare name is that of a whole model
    return [part + _HEADS[name]] if known else []


def stacks_of(embedding: str, names: Collection[str]) -> Iterator[str]:
    """The embeddings of encoder and decoder that read one which stands beside them.

    `names` are those of all stored tensors.
    """
    parent, dot, leaf = embedding.rpartition(".")
    for stack in _STACKS if leaf in _OF_STACKS else ():
        module = f"{parent}{dot}{stack}"
        if any(name.startswith(f"{module}.") for name in names):
            yield f"{module}.{_OF_STACKS[leaf]}"


def is_vocabulary(name: str) -> bool:
    """Whether the rows of a tensor are the words of the vocabulary: an embedding or a head."""
    module = name.removesuffix(".weight")
    plain = module.removeprefix(part_of(module))
    known = {*_HEADS, *_HEADS.values(), *(one for *_, own in _OF_CLASSES for one in own)}
    return plain in known or _WORDS.search(module) is not None


def part_of(module: str) -> str:
    """The model within a model that a module belongs to; empty where it is the model's own."""
    inner = () if module in _HEADS else _PARTS
    return next((part for part in inner if module.startswith(part)), "")
