"""Which tensors of a model are one: a head, or an encoder, that reads the embedding's weight.

transformers calls it `tie_word_embeddings` and keeps for each model class which tensor is read from
which (`_tied_weights_keys`). Files hold the shared one once, as a rule under the embedding's name.
What the config says decides, and which tensors the file holds; names only say what the others are
called (`heads.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from streammerge.storage.heads import heads_of, is_embedding, is_of_a_task, part_of, stacks_of
from streammerge.words import Extent

_WITH_A_HEAD: Final = re.compile(
    "CausalLM|CausalImage|LMHead|DoubleHeads|ConditionalGeneration|MaskedLM|PreTraining|Text2Text"
    "|To(Text|Speech)|EncoderDecoderModel|BertGenerationDecoder|MarianMT|Blip2Model|SeamlessM4T.*Model"
    "|BlipForQuestion|VisualBertForRegion|ShieldGemma|Rag(Model|Sequence|Token)|BlockDiffusion"
)
# Classes whose tensors are tied in a way of their own: not by the rules here.
_OTHERS: Final = re.compile("Luke|Flava|T5Gemma2|NeoMME|Bark|Blt|Csm")
# Heads that add a bias themselves to what a layer without one gives.
_ONE_BIAS: Final = re.compile("Esm|Lxmert|BridgeTower")
# Heads whose decoder is all that they have beside its bias.
_BARE: Final = re.compile("BertGeneration")
_NUMBER: Final = re.compile(r"\.\d+\.")  # of a layer
# Models in which `tie_word_embeddings` says that the head's input is scaled by d_model ** -0.5.
_SCALED: Final = frozenset(
    ["t5", "mt5", "umt5", "longt5", "pop2piano", "switch_transformers", "udop"]
)


def find_ties(tensors: Mapping[str, Extent], config: Mapping[str, Any]) -> dict[str, str]:
    """The tensors that are others, by the config's word or for want of their own -> those others.

    Where the config is silent, the file decides: transformers ties unless told otherwise. A tensor
    may be stored and be here nevertheless: only its bytes tell whether it is a copy.
    """
    architectures = _architectures(config)
    if _any(_OTHERS, architectures):
        return {}
    weights = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    embeddings = list(filter(is_embedding, weights))
    reads = {stack: one for one in embeddings for stack in stacks_of(one, tensors)}
    found = {}
    if _has_head(tensors, architectures):
        own = [one for one in embeddings if one not in reads]
        reads |= {head: one for one in own for head in heads_of(one, architectures)}
        found = _heads_with_a_bias(tensors, embeddings, architectures)
    found |= {f"{name}.weight": f"{of}.weight" for name, of in reads.items()}
    said = {name: of for name, of in found.items() if _is_tied(config, name, name in tensors)}
    return {name: of for name, of in said.items() if _may_be(tensors, name, of)}


def hidden_tie(tensors: Mapping[str, Extent], config: Mapping[str, Any]) -> list[str]:
    """The embeddings of a model with a head that is nowhere, and would be under an unknown name.

    Seen by shape: of all tensors with a row for each word, those that are tied to others among
    them, none is a head. Where a decoder has a config of its own, that is the one which tells.
    """
    decoder = config.get("decoder")
    told = decoder if isinstance(decoder, Mapping) else config
    untied = _value(told, "tie_word_embeddings") is False
    if untied or not _has_head(tensors, _architectures(config)):
        return []
    words = _value(told, "vocab_size")
    shapes = ((name, tensors[name].spec.shape) for name in tensors)
    wide = [name for name, shape in shapes if len(shape) == 2 and shape[0] == words]
    return wide if all(map(is_embedding, wide)) else []


def scales_its_head(config: Mapping[str, Any]) -> bool:
    """Whether `tie_word_embeddings` of a model's config is about a factor, as in T5.

    Such a model shares its weights in any case, unless its file holds them with other values.
    """
    return any(part.get("model_type") in _SCALED for part in _parts(config))


def _heads_with_a_bias(
    tensors: Mapping[str, Extent], embeddings: Sequence[str], architectures: Sequence[str]
) -> dict[str, str]:
    """What heads read whose bias is stored, so that no table need say what they are called.

    `cls.predictions.bias` is that of `cls.predictions.decoder`, if `cls.predictions` has layers,
    and mostly the decoder has it, too.
    """
    reads: dict[str, str] = {}
    for bias in tensors:
        if not bias.endswith(".bias") or _NUMBER.search(bias):
            continue
        head = bias.removesuffix(".bias")
        embedding = _embedding_of(head, tensors[bias].spec.shape, tensors, embeddings)
        if embedding is None:
            continue
        module = _decoder(head, tensors, architectures)
        reads[f"{module}.weight"] = embedding
        if module != head and not _any(_ONE_BIAS, architectures):
            reads[f"{module}.bias"] = bias
    return reads


def _decoder(head: str, tensors: Iterable[str], architectures: Sequence[str]) -> str:
    """The module of a head that has the weight: the last one, if the head has layers."""
    start = len(head) + 1
    inner = any(name.startswith(f"{head}.") and "." in name[start:] for name in tensors)
    return f"{head}.decoder" if inner or _any(_BARE, architectures) else head


def _embedding_of(
    head: str, words: tuple[int, ...], tensors: Mapping[str, Extent], embeddings: Sequence[str]
) -> str | None:
    """The embedding of the largest vocabulary outside of which a head stands, if it has its rows.

    A square one is left alone: biases of any other layer would fit it as well.
    """
    part = part_of(head)
    body = [one for one in embeddings if part_of(one) == part and _top(one) != _top(head)]
    shapes = {f"{one}.weight": tensors[f"{one}.weight"].spec.shape for one in body}
    flat = [name for name, shape in shapes.items() if len(shape) == 2]
    largest = max(flat, key=lambda name: shapes[name][0], default=None)
    if largest is None or shapes[largest][:1] != words or shapes[largest][1:] == words:
        return None
    return largest


def _top(module: str) -> str:
    """The first part of a name, within the model that it belongs to."""
    return module.removeprefix(part_of(module)).partition(".")[0]


def _has_head(tensors: Iterable[str], architectures: Sequence[str]) -> bool:
    """Whether the model is one of language; where its config names no class, its tensors tell."""
    if architectures:
        return _any(_WITH_A_HEAD, architectures)
    return not any(map(is_of_a_task, tensors))


def _may_be(tensors: Mapping[str, Extent], name: str, of: str) -> bool:
    """Whether a tensor, where it is stored, has the shape of the one that it would be."""
    return name not in tensors or tensors[name].spec.shape == tensors[of].spec.shape


def _is_tied(config: Mapping[str, Any], name: str, stored: bool) -> bool:
    said = {part.get("tie_word_embeddings") for part in _deciding(config, name)}
    return scales_its_head(config) or True in said or (False not in said and not stored)


def _deciding(config: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """The configs that say whether a tensor is tied: a decoder's own, else the model's."""
    own = config.get(part_of(name).rpartition(".")[0].rpartition(".")[2])
    if isinstance(own, Mapping):
        return [own]
    return [part for part in (config, config.get("text_config")) if isinstance(part, Mapping)]


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    yield from (part for part in config.values() if isinstance(part, Mapping))


def _value(config: Mapping[str, Any], key: str) -> Any:
    """A value of the config, or of that of the text model in it."""
    values = (part.get(key) for part in _deciding(config, ""))
    return next((value for value in values if value is not None), None)


def _architectures(config: Mapping[str, Any]) -> list[str]:
    return [str(name) for name in config.get("architectures") or ()]


def _any(like: re.Pattern[str], names: Iterable[str]) -> bool:
    return any(map(like.search, names))
