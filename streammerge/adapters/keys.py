"""The names of an adapter's tensors: which belong together, and which are more than plain LoRA.

PEFT writes `base_model.model.<module>.lora_A.weight` and `.lora_B.weight`. Other writers leave the
adapter's name in (`.lora_A.default.weight`) or a wrapper of torch.compile (`_orig_mod.`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from streammerge.adapters.faults import MERGE_FIRST, Fault, Findings
from streammerge.words import Extent

_FACTOR: Final = re.compile(r"(?P<module>.+?)\.lora_(?P<which>[AB])(\.(?P<name>[^.]+))?\.weight")
_PEFT_PREFIX: Final = "base_model.model."
_COMPILED: Final = "_orig_mod."

# VeLoRA's projection and MonteCLoRA's sampler: they acted in training and add nothing to a weight.
_TRAINING_STATE: Final = re.compile(r"\.lora_(velora_|monteclora_sampler)")

_PAIRS_ONLY: Final = "pairs of lora_A.weight and lora_B.weight"

# PEFT does this for every adapter on an embedding or a head ("auto", the default).
_WITHOUT_COPY: Final = (
    "save it again with save_pretrained(..., save_embedding_layers=False), which leaves out what "
    "is a copy of the base's weight"
)

# Searched in this order; the last one takes everything.
_OTHER_TENSORS: Final = tuple(
    (re.compile(pattern), Fault(f"{what}, which cannot be merged yet", _PAIRS_ONLY, remedy))
    for pattern, what, remedy in (
        (r"\.base_layer\..*lora_[AB]", "LoRA on several parameters of one module", MERGE_FIRST),
        (r"\.lora_embedding_[AB]", "LoRA on an embedding", MERGE_FIRST),
        (r"\.lora_magnitude_vector", "magnitude vectors of DoRA", MERGE_FIRST),
        (r"\.lora_[AB]\.(.*\.)?bias$", "biases of LoRA factors (lora_bias)", MERGE_FIRST),
        (r"\.lora_diag", "singular values of KaSA", MERGE_FIRST),
        (r"\.lora_(E|ranknum)", "singular values of AdaLoRA", MERGE_FIRST),
        (r"\.(token_adapter\.|trainable_tokens_)", "trainable tokens", MERGE_FIRST),
        (r"\.base_layer\.weight$", "weights of the base beside the adapter", _WITHOUT_COPY),
        (r"^(?!.*lora_).*\.(weight|bias)$", "modules or biases trained in full", MERGE_FIRST),
        (r"", "tensors of no known kind", MERGE_FIRST),
    )
)

_LONELY: Final = Fault(
    "a factor without its other half",
    "lora_A.weight and lora_B.weight of each module",
    "the adapter was saved incompletely: save it again",
)
_SEVERAL_NAMES: Final = Fault(
    "tensors under more than one adapter name in one file",
    "the tensors of one adapter, under one name or none",
    "save each adapter into a folder of its own with PEFT",
)
_FLAT: Final = "matrices, [r, in] and [out, r]"
_CONVOLUTION: Final = Fault("LoRA on a convolution, which cannot be merged yet", _FLAT)
_BY_DIMENSIONS: Final = {
    3: Fault("LoRA on a 1-d convolution or on stacked experts, which cannot be merged yet", _FLAT),
    4: _CONVOLUTION,
    5: _CONVOLUTION,
}
_NO_MATRIX: Final = Fault(
    "factors that are no matrices, as sharded training leaves them",
    _FLAT,
    "gather the shards (DeepSpeed ZeRO-3, FSDP) before save_pretrained, and save it again",
)


@dataclass(frozen=True, slots=True)
class Pair:
    """The two factors that an adapter holds for one module: A `[r, in]` and B `[out, r]`."""

    module: str
    a: Extent
    b: Extent

    @property
    def rank(self) -> int:
        return self.a.spec.shape[0]

    @property
    def update_shape(self) -> tuple[int, int]:
        """The shape of `B @ A`, `(out, in)`."""
        return self.b.spec.shape[0], self.a.spec.shape[1]


@dataclass(frozen=True, slots=True)
class Contents:
    """What the tensors of an adapter are: its pairs, in file order, and what was left out."""

    pairs: tuple[Pair, ...]
    training_state: int = 0


def sort_tensors(tensors: Mapping[str, Extent], findings: Findings) -> Contents:
    """Pair the factors of an adapter; everything that is no such pair goes to `findings`."""
    halves: dict[str, dict[str, Extent]] = {}  # module -> "A" or "B" -> factor
    names: dict[str | None, str] = {}  # adapter name in the keys -> the first key that has it
    training_state = 0
    for key, extent in tensors.items():
        factor = _FACTOR.fullmatch(key)
        if factor and ".base_layer." not in key:
            names.setdefault(factor["name"], key)
            halves.setdefault(factor["module"], {})[factor["which"]] = extent
        elif _TRAINING_STATE.search(key):
            training_state += 1
        else:
            findings.add(next(fault for like, fault in _OTHER_TENSORS if like.search(key)), key)
    if len(names) > 1:
        for key in names.values():
            findings.add(_SEVERAL_NAMES, key)
        return Contents((), training_state)
    return Contents(tuple(_pairs(halves, findings)), training_state)


def _pairs(halves: Mapping[str, Mapping[str, Extent]], findings: Findings) -> Iterator[Pair]:
    for module, (raw, half) in zip(unwrapped(list(halves)), halves.items(), strict=True):
        if len(half) < 2:
            findings.add(_LONELY, f"{raw}.lora_{next(iter(half))}.weight")
            continue
        odd = next((one.spec for one in half.values() if len(one.spec.shape) != 2), None)
        if odd:
            fault = _BY_DIMENSIONS.get(len(odd.shape), _NO_MATRIX)
            findings.add(fault, f"{odd.name} {list(odd.shape)}")
        else:
            yield Pair(module, half["A"], half["B"])


def unwrapped(modules: Sequence[str]) -> list[str]:
    """Module names without what PEFT and torch.compile put around them, where all have it."""
    if all(_COMPILED in module for module in modules):
        plain = [module.replace(_COMPILED, "") for module in modules]
        modules = plain if len(set(plain)) == len(plain) else modules
    if all(module.startswith(_PEFT_PREFIX) for module in modules):
        return [module.removeprefix(_PEFT_PREFIX) for module in modules]
    return list(modules)
