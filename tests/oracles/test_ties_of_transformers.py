"""Which tensors are one, held to every class of transformers."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from streammerge.storage.ties import find_ties
from streammerge.words import DType, Extent, TensorSpec

# Files have older names, which transformers changes when it loads them.
RENAMED = {
    "GPTNeoXForCausalLM": {"embed_out.weight": "gpt_neox.embed_in.weight"},
    "DeepseekV4ForCausalLM": {"head.weight": "model.embed_tokens.weight"},
    "HyperCLOVAXVisionV2ForConditionalGeneration": {
        "model.language_model.lm_head.weight": "model.language_model.embed_tokens.weight"
    },
    "UltrabertForMaskedLM": {"cls.weight": "ultrabert.embed_tokens.weight"},
    "UltraVBertForMaskedLM": {"head.decoder.weight": "model.text_model.embed_tokens.weight"},
    "IBertForMaskedLM": {
        "lm_head.decoder.weight": "ibert.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
}
# What the source of a class does not tell: that its head's bias is stored. Made below, or like
# those that are.
WITH_A_BIAS = re.compile(
    "Electra|ConvBert|Flaubert|XLM|XLNet|Funnel|Git|CTRL|Vilt|BridgeTower|Lxmert|Esm|Gte|DistilBert"
    "|ModernBert|ModernVBert"
)
# Ties of their own kind: of codebooks, boxes and patches, and of language models that an adapter on
# the embedding is refused on, since no head is found (`hidden_tie`).
OTHERS = re.compile(
    "Bark|Blt|Csm|Detr|DFine|Dino|DocLayout|Flava|Luke|NeoMME|Sam|T5Gemma2|Udop|GraniteSpeech5ForCTC"
    "|FSMTModel|OpenAIGPTDoubleHeads|Pix2StructTextModel|ProphetNetDecoderWrapper|Talker"
)
_CLASS = re.compile(r"^class (\w+)|^    _tied_weights_keys = (\{[^}]*\})", re.MULTILINE)


def classes() -> Iterator[tuple[str, dict[str, str]]]:
    """Class name and its `_tied_weights_keys`, from the source; patterns are left out."""
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    for path in sorted(Path(spec.origin).parent.glob("models/*/modeling_*.py")):
        name = ""
        for found in _CLASS.finditer(path.read_text()):
            name = found[1] or name
            tied = ast.literal_eval(found[2]) if found[2] and "rf" not in found[2] else {}
            if tied and not any(mark in key for key in tied for mark in "*(?["):
                yield name, tied


def ties_of(shapes: Mapping[str, tuple[int, ...]], **config: Any) -> dict[str, str]:
    """What our rule says of a file with these tensors."""
    tensors = {
        name: Extent("model.safetensors", 0, TensorSpec(name, tuple(shape), DType.BF16))
        for name, shape in shapes.items()
    }
    return find_ties(tensors, {"tie_word_embeddings": True, **config})


def stored(tied: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """What is read, and a layer beside each module that reads it."""
    read: dict[str, tuple[int, ...]] = {
        of: (9,) if of.endswith("bias") else (9, 4) for of in tied.values()
    }
    parents = {name.rpartition(".")[0].rpartition(".")[0] for name in tied}
    return read | {f"{parent}.dense.0.weight".lstrip("."): (4, 4) for parent in parents}


def test_a_head_is_untied_under_its_own_name_or_not_at_all() -> None:
    """Under a wrong one transformers would leave it out and fill the right one at random."""
    known = 0
    for name, tied in classes():
        expected = RENAMED.get(name, tied)
        ours = ties_of(stored(expected or tied), architectures=[name])
        if not OTHERS.search(name) and (ours or not WITH_A_BIAS.search(name)):
            assert ours == expected, name
            known += 1
    assert known > 340, "hardly any class was found: does the pattern still fit the source?"


MADE = (
    "AlbertForMaskedLM",
    "BartForConditionalGeneration",
    "BertForPreTraining",
    "BertGenerationDecoder",
    "BlipForConditionalGeneration",
    "CTRLLMHeadModel",
    "ConvBertForMaskedLM",
    "DistilBertForMaskedLM",
    "ElectraForMaskedLM",
    "FSMTForConditionalGeneration",
    "FunnelForMaskedLM",
    "GPTJForCausalLM",
    "GitForCausalLM",
    "LEDForConditionalGeneration",
    "MarianMTModel",
    "ModernBertForMaskedLM",
    "ProphetNetForConditionalGeneration",
    "RobertaForMaskedLM",
    "SeamlessM4TModel",
    "T5EncoderModel",
    "T5ForConditionalGeneration",
    "T5ForTokenClassification",
    "ViltForMaskedLM",
    "WhisperForConditionalGeneration",
    "XLMWithLMHeadModel",
    "XLNetLMHeadModel",
)


@pytest.mark.parametrize("name", MADE)
def test_the_tensors_of_a_model_tell_the_same(name: str) -> None:
    """Of a model that takes no memory, all its parts included: what it ties, and what is left."""
    import torch
    import transformers

    kind = getattr(transformers, name)
    config = kind.config_class()
    config.tie_word_embeddings = True
    with torch.device("meta"):
        model = kind(config)
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    assert tied
    shapes = {n: tuple(one.shape) for n, one in model.state_dict().items() if n not in tied}
    assert ties_of(shapes, architectures=[name], model_type=config.model_type) == tied
