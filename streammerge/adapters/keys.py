"""The names of an adapter's tensors: which belong together, and which are no LoRA.

PEFT writes `base_model.model.<module>.lora_A.weight` and `.lora_B.weight`. Other writers leave the
adapter's name in (`.lora_A.default.weight`) or a wrapper of torch.compile (`_orig_mod.`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from streammerge.adapters.faults import MERGE_FIRST, Fault, Findings
from streammerge.adapters.pairs import Pair, pair_up
from streammerge.words import Extent

# `<module>.lora_A.weight`, or with the adapter's name: `<module>.lora_A.default.weight`.
_PART: Final = re.compile(
    r"(?P<module>.+?)\.lora_(?P<what>A|B|E|diag|embedding_A|embedding_B|magnitude_vector)"
    r"(?P<name>(\.[^.]+)??)(?P<end>(\.(weight|bias))?)"
)
# What and end of a key -> the part of the module's pair that it is. PEFT stores a magnitude without
# `.weight`, as its first versions named it; a raw checkpoint has it as the module's parameter.
_PARTS: Final = {
    ("A", ".weight"): "A",
    ("B", ".weight"): "B",
    ("B", ".bias"): "bias",
    ("A", ""): "svd_A",
    ("B", ""): "svd_B",
    ("E", ""): "E",
    ("diag", ""): "diag",
    ("embedding_A", ""): "embedding_A",
    ("embedding_B", ""): "embedding_B",
    ("magnitude_vector", ""): "magnitude",
    ("magnitude_vector", ".weight"): "magnitude",
}
_PEFT_PREFIX: Final = "base_model.model."
_COMPILED: Final = "_orig_mod."

# VeLoRA's projection and MonteCLoRA's sampler: they acted in training and add nothing to a weight.
_TRAINING_STATE: Final = re.compile(r"\.lora_(velora_|monteclora_sampler)")

_PAIRS_ONLY: Final = "pairs of lora_A and lora_B, and what PEFT saves beside them"

# Searched in this order; the last one takes everything.
_OTHER_TENSORS: Final = tuple(
    (re.compile(pattern), Fault(f"{what}, which cannot be merged yet", _PAIRS_ONLY, remedy))
    for pattern, what, remedy in (
        (r"\.base_layer\..*lora_[AB]", "LoRA on several parameters of one module", MERGE_FIRST),
        (r"", "tensors of no known kind", MERGE_FIRST),
    )
)

# torch's MultiheadAttention keeps the three input projections in one parameter, under no module.
_MULTIHEAD: Final = re.compile(r"(?P<module>.+)\.base_layer\.out_proj\..+")
_TWICE: Final = Fault(
    "LoRA on torch's MultiheadAttention, of which the file does not tell the meaning",
    "LoRA on layers whose update counts once: PEFT up to 0.21.2 adds that of `out_proj` twice, in "
    "training as in a merge",
    "merge it with the release of PEFT that trained it (merge_and_unload), save that and list it "
    "under `models`",
)

_SEVERAL_NAMES: Final = Fault(
    "tensors under more than one adapter name in one file",
    "the tensors of one adapter, under one name or none",
    "save each adapter into a folder of its own with PEFT",
)


@dataclass(frozen=True, slots=True)
class Contents:
    """What the tensors of an adapter are: its pairs, in file order, and all others.

    `saved` are those without factors, by their clean names; `name` is the adapter's, where the keys
    carry it.
    """

    pairs: tuple[Pair, ...]
    saved: Mapping[str, Extent]
    name: str | None = None
    training_state: int = 0


def sort_tensors(tensors: Mapping[str, Extent], findings: Findings) -> Contents:
    """Pair the factors of an adapter; those that make no pair go to `findings`."""
    parts: dict[str, dict[str, Extent]] = {}  # module -> part of its pair -> tensor
    names: dict[str, str] = {}  # adapter name in the keys -> the first key that has it
    saved: dict[str, Extent] = {}
    training_state = 0
    multihead: set[str] = set()
    for key, extent in tensors.items():
        found = _PART.fullmatch(key)
        part = _PARTS.get((found["what"], found["end"])) if found else None
        if found and part and ".base_layer." not in key:
            names.setdefault(found["name"], key)
            parts.setdefault(found["module"], {})[part] = extent
        elif _TRAINING_STATE.search(key):
            training_state += 1
        elif attention := _MULTIHEAD.fullmatch(key):
            findings.add(_TWICE, key)
            multihead.add(attention["module"])
        elif ".lora_" not in key:
            saved[key] = extent
        else:
            findings.add(next(fault for like, fault in _OTHER_TENSORS if like.search(key)), key)
    for module in multihead:
        parts.pop(module, None)  # of the input projections, which are refused with the other
    if len(names) > 1:
        for key in names.values():
            findings.add(_SEVERAL_NAMES, key)
        return Contents((), {}, None, training_state)
    pairs = tuple(pair_up(unwrapped(list(parts)), parts, findings))
    plain = dict(zip(unwrapped(list(saved)), saved.values(), strict=True))
    name = next(iter(names), "").removeprefix(".") or None
    return Contents(pairs, plain, name, training_state)


def unwrapped(modules: Sequence[str]) -> list[str]:
    """Module names without what PEFT and torch.compile put around them, where all have it."""
    if all(_COMPILED in module for module in modules):
        plain = [module.replace(_COMPILED, "") for module in modules]
        modules = plain if len(set(plain)) == len(plain) else modules
    if all(module.startswith(_PEFT_PREFIX) for module in modules):
        return [module.removeprefix(_PEFT_PREFIX) for module in modules]
    return list(modules)
