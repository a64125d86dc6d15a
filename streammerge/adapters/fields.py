"""The fields of adapter_config.json that ask for more than plain LoRA, and the ones that do not.

The tables follow PEFT 0.21.2 (`peft.LoraConfig`, `peft.PeftType`). A field that changes what the
adapter computes is refused by name, never half applied; a field that only steered the training
is ignored; a field that nothing here knows is ignored only where it is switched off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from streammerge.adapters.faults import MERGE_FIRST
from streammerge.errors import BadInput
from streammerge.storage.smallfile import show

_NOT_ONE_WEIGHT: Final = (
    "leave it out: no merged weight computes the same; serve it with PEFT beside the merged model"
)


@dataclass(frozen=True, slots=True)
class Extra:
    """A field that asks for more than plain LoRA, unless it is off or has a `plain` value."""

    field: str
    what: str
    why: str
    remedy: str = MERGE_FIRST
    plain: tuple[object, ...] = ()
    residual: bool = False  # it changed the base when training started, and asks for nothing else


_CONVERT: Final = (
    "convert it to plain LoRA in PEFT: save_pretrained(..., "
    "path_initial_model_for_weight_conversion=...); or merge it there into the changed base"
)
_RESIDUAL: Final = (
    "if the base of this merge is that changed base, say so beside the adapter in the recipe: "
    "assume_residual_base: true"
)

EXTRAS: Final = (
    Extra(
        "target_parameters",
        "LoRA on stacked parameters such as experts",
        "the factors of all experts are interleaved in one tensor; not supported yet",
    ),
    Extra(
        "layer_replication",
        "layer replication",
        "the adapter belongs to a model with more layers than the base stores",
    ),
    Extra(
        "use_qalora",
        "QA-LoRA",
        "its inputs are pooled in groups, so its factors do not have the shape of the weight",
        "leave it out: it belongs to its quantised base; train a plain LoRA to merge it",
    ),
    Extra(
        "alora_invocation_tokens",
        "activated LoRA (aLoRA)",
        "it acts only on the tokens after its invocation tokens",
        _NOT_ONE_WEIGHT,
    ),
    Extra(
        "arrow_config",
        "Arrow routing",
        "it chooses among adapters token by token",
        _NOT_ONE_WEIGHT,
    ),
    Extra(
        "use_bdlora",
        "block-diagonal LoRA (BD-LoRA)",
        "its factors are stored as packed blocks, not as the matrices of a product",
    ),
    Extra(
        "kasa_config",
        "KaSA",
        "it cuts the smallest singular values off the base when training starts",
        f"{_RESIDUAL}; if not, {MERGE_FIRST}",
        residual=True,
    ),
    Extra(
        "megatron_config",
        "LoRA on Megatron's parallel layers",
        "its tensors follow Megatron's layout, not that of the base",
        "convert model and adapter to the Hugging Face layout first",
    ),
    Extra(
        "init_lora_weights",
        "this initialisation",
        "PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ change the base when training starts, so the "
        "adapter is the difference from that changed base and not from this one; only true, "
        "false, gaussian, eva, orthogonal and mica leave the base as it is",
        f"{_RESIDUAL}; if not, {_CONVERT}",
        plain=(True, "gaussian", "eva", "orthogonal", "mica"),
        residual=True,
    ),
)

# Steered the training, or say what the file's tensors say too. The configs of an initialisation
# stand here because `init_lora_weights` decides: PEFT leaves them when it converts to plain LoRA.
# VeLoRA changes only the backward pass; MonteCLoRA samples in training and merges as plain LoRA.
IGNORED: Final = frozenset(
    [
        "task_type",
        "auto_mapping",
        "revision",
        "inference_mode",
        "runtime_config",
        "target_modules",
        "exclude_modules",
        "lora_dropout",
        "layers_to_transform",
        "layers_pattern",
        "ensure_weight_tying",
        "megatron_core",
        "qalora_group_size",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "velora_config",
        "monteclora_config",
    ]
)

USED: Final = frozenset(
    [
        "peft_type",
        "peft_version",
        "base_model_name_or_path",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "fan_in_fan_out",
        "use_dora",
        "lora_bias",
        "bias",
        "trainable_token_indices",
        "modules_to_save",
    ]
)

# The kinds that are merged, with the fields that only they have. Of AdaLoRA's, `init_r` decides its
# scale, and of trained tokens `token_indices` their rows; the others steered the training.
KINDS: Final[Mapping[str, frozenset[str]]] = {
    "LORA": frozenset(),
    "ADALORA": frozenset(
        [
            "init_r",
            "target_r",
            "tinit",
            "tfinal",
            "deltaT",
            "beta1",
            "beta2",
            "orth_reg_weight",
            "total_step",
        ]
    ),
    "TRAINABLE_TOKENS": frozenset(["token_indices", "init_weights"]),
}
_KINDS_IN_WORDS: Final = " or ".join(f'"{kind}"' for kind in KINDS)

# Adapters that change no weight: there is nothing to merge.
NO_WEIGHTS: Final = {
    "PROMPT_TUNING": "prompt tuning",
    "MULTITASK_PROMPT_TUNING": "multitask prompt tuning",
    "P_TUNING": "P-tuning",
    "PREFIX_TUNING": "prefix tuning",
    "ADAPTION_PROMPT": "LLaMA-Adapter prompts",
    "CPT": "context-aware prompt tuning",
    "CARTRIDGE": "cartridges",
    "XLORA": "X-LoRA, which mixes adapters token by token",
    "POLY": "Poly, which mixes adapters task by task",
}

# Adapters that change weights in another way than LoRA does; others keep the name PEFT gives them.
OTHER_WEIGHTS: Final = {
    "IA3": "IA3",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
    "OFT": "OFT",
    "BOFT": "BOFT",
    "HRA": "HRA",
    "VERA": "VeRA",
    "PVERA": "PVeRA",
    "VBLORA": "VB-LoRA",
    "RANDLORA": "RandLoRA",
    "FOURIERFT": "FourierFT",
    "WAVEFT": "WaveFT",
    "DELORA": "DeLoRA",
    "GRALORA": "GraLoRA",
    "TINYLORA": "TinyLoRA",
    "UNILORA": "Uni-LoRA",
    "HIRA": "HiRA",
    "SHIRA": "SHiRA",
    "MISS": "MiSS",
    "BONE": "Bone",
    "C3A": "C3A",
    "ROAD": "RoAd",
    "LN_TUNING": "trained layer norms",
}


def is_off(value: object) -> bool:
    """Whether a field says nothing: null, false, or empty."""
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def asked_extras(raw: Mapping[str, Any]) -> Iterator[Extra]:
    """The extras that a config asks for."""
    for extra in EXTRAS:
        value = raw.get(extra.field)
        said = value.lower() if isinstance(value, str) else value
        if not is_off(value) and said not in extra.plain:
            yield extra


def refused_fields(
    raw: Mapping[str, Any], where: str, *, assume_residual_base: bool = False
) -> Iterator[BadInput]:
    """What the config of a LoRA asks for that is not merged, each field by its name.

    With `assume_residual_base`, initialisations that changed the base are taken: the base of the
    merge is said to be the changed one.
    """
    for extra in asked_extras(raw):
        if not (extra.residual and assume_residual_base):
            yield BadInput(
                f"{extra.what} cannot be merged: {extra.why}",
                where=where,
                found=f"{extra.field}: {show(raw[extra.field])}",
                remedy=extra.remedy,
            )
    known = USED | IGNORED | {extra.field for extra in EXTRAS} | KINDS[raw["peft_type"]]
    for field, value in raw.items():
        if field not in known and not is_off(value):
            yield BadInput(
                f"the field {show(field)} is not known, so what it changes cannot be honoured",
                where=where,
                found=f"{field}: {show(value)}",
                expected="a field of PEFT 0.21.2's LoraConfig, or a value that switches it off",
                remedy=f"if it changed only the training, remove it from the file; if not, "
                f"{MERGE_FIRST}",
            )


def refused_type(peft_type: object, where: str) -> BadInput | None:
    """The refusal of every kind of adapter that is not merged, by the name people know it by."""
    if isinstance(peft_type, str) and peft_type in KINDS:
        return None
    if not isinstance(peft_type, str):
        return BadInput(
            "`peft_type` does not say what kind of adapter this is",
            where=where,
            found="nothing" if peft_type is None else show(peft_type),
            expected=_KINDS_IN_WORDS,
            remedy="save the adapter again with PEFT, which writes it",
        )
    in_words = NO_WEIGHTS.get(peft_type) or OTHER_WEIGHTS.get(peft_type, show(peft_type))
    return BadInput(
        f"only LoRA adapters and trained tokens are merged; this one is {in_words}",
        where=where,
        found=f"peft_type: {show(peft_type)}",
        expected=_KINDS_IN_WORDS,
        remedy=_NOT_ONE_WEIGHT if peft_type in NO_WEIGHTS else f"if PEFT can, {MERGE_FIRST}",
    )
