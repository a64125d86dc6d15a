"""adapter_config.json, read strictly: the fields that decide what a LoRA adds to its base."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from streammerge.adapters.fields import IGNORED, asked_extras, is_off, refused_fields, refused_type
from streammerge.errors import BadInput, Problems, StreammergeError
from streammerge.storage.smallfile import parse_json, read_small, show

_Value = TypeVar("_Value")

# EVA writes a rank for every module, some 100 KB for a large model; a file far beyond that is
# something else under this name.
MOST_BYTES: Final = 16 << 20
_SAVE_AGAIN: Final = "save the adapter again with PEFT, or correct the field by hand"


@dataclass(frozen=True, slots=True)
class Patterns:
    """Values of single modules: the first pattern that matches, in the order of the file."""

    entries: tuple[tuple[re.Pattern[str], float], ...] = ()

    @classmethod
    def of(cls, values: Mapping[str, float]) -> Patterns:
        """From a config's dictionary of patterns.

        Raises re.error when a pattern is no regular expression.
        """
        return cls(tuple((re.compile(rf"(.*\.)?({key})$"), one) for key, one in values.items()))

    def lookup(self, module: str, default: float) -> float:
        """The value that applies to a module, `default` where no pattern matches."""
        return next((value for key, value in self.entries if key.match(module)), default)


@dataclass(frozen=True, slots=True)
class AdaLora:
    """What AdaLoRA adds: the rank it started with, and those that training left its modules.

    Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR
    2023 (arXiv 2303.10512).
    """

    init_r: int = 12
    ranks: Mapping[str, int] = field(default_factory=dict)  # by module; the others have init_r


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What decides the numbers of a LoRA adapter; the defaults are those of PEFT.

    `alpha` over the rank (or its square root, for rank-stabilised LoRA) scales the product of the
    factors. `fan_in_fan_out` is what the last wrapped layer said and only a last resort.
    """

    r: int = 8
    alpha: float = 8
    use_rslora: bool = False
    rank_pattern: Patterns = Patterns()
    alpha_pattern: Patterns = Patterns()
    fan_in_fan_out: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    kasa: bool = False
    adalora: AdaLora | None = None
    bias: str = "none"
    trainable_token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()  # modules that were trained in full, by ends of names
    base_model_name_or_path: str | None = None
    peft_version: str | None = None
    residual: tuple[str, ...] = ()  # fields by which training changed its base when it started
    ignored: tuple[str, ...] = ()  # fields that are set and steered the training only

    def rank(self, module: str) -> int:
        """The rank that the config gives a module, named as the adapter names it."""
        if self.adalora:
            return self.adalora.ranks.get(module, self.adalora.init_r)
        return int(self.rank_pattern.lookup(module, self.r))

    def token_indices(self, module: str) -> tuple[int, ...] | None:
        """The rows of a module that were trained by themselves; None where it has none.

        PEFT's config names modules by the ends of their names; a mere list, kept here under an
        empty name, means the embedding.
        """
        listed = self.trainable_token_indices.items()
        return next((rows for name, rows in listed if module.endswith(name)), None)

    def scale(self, module: str) -> float:
        """The factor s of `s * B @ A`: alpha / r, or alpha / sqrt(r) with `use_rslora`.

        Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023.
        AdaLoRA knows neither that nor patterns, and keeps its first rank: alpha / (init_r + 1e-5).
        """
        if self.adalora:
            alpha = self.alpha if self.alpha > 0 else self.rank(module)
            return alpha / (self.adalora.init_r + 1e-5)
        rank = self.rank(module)
        divisor = math.sqrt(rank) if self.use_rslora else rank
        return self.alpha_pattern.lookup(module, self.alpha) / divisor


def read_config(
    path: Path, problems: Problems, *, assume_residual_base: bool = False
) -> LoraConfig | None:
    """Read an adapter's config; what is wrong with it goes to `problems`, and None comes back.

    `assume_residual_base` is the user's word that the base is the one which an initialisation
    such as PiSSA's left behind.
    """
    before = len(problems)
    try:
        raw = parse_json(read_small(str(path), MOST_BYTES), str(path), "the adapter's config")
    except StreammergeError as problem:
        problems.add(problem)
        return None
    other_kind = refused_type(raw.get("peft_type"), str(path))
    if other_kind is not None:
        problems.add(other_kind)
        return None
    for refused in refused_fields(raw, str(path), assume_residual_base=assume_residual_base):
        problems.add(refused)
    config = _Fields(raw, str(path), problems).config()
    return config if len(problems) == before else None


# ---------------------------------------------------------------------------------------- fields


_COUNT = "a positive whole number below 2^31"
_MOST = 2**31  # of a rank: no tensor has so many rows, and a float holds it


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < _MOST


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_flags(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_flag, value))


def _is_name(value: object) -> bool:
    return value is None or isinstance(value, str)


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_bias(value: object) -> bool:
    return value in ("none", "all", "lora_only")


def _are_rows(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(row, int) and row >= 0 for row in value)


def _are_tokens(value: object) -> bool:
    lists = value.values() if isinstance(value, dict) else [value]
    return value is None or all(map(_are_rows, lists))


def _all(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


class _Fields:
    """Takes typed fields from the raw config; those of a wrong type become problems."""

    def __init__(self, raw: Mapping[str, Any], where: str, problems: Problems) -> None:
        self._raw = raw
        self._where = where
        self._problems = problems

    def config(self) -> LoraConfig:
        number = "a number, finite and of sensible size"
        kind = self._raw["peft_type"]
        adalora = self._adalora() if kind == "ADALORA" else None
        tokens = "token_indices" if kind == "TRAINABLE_TOKENS" else "trainable_token_indices"
        return LoraConfig(
            r=self._take("r", 8, _is_count, _COUNT),
            alpha=self._take("lora_alpha", 8.0, _is_number, number),
            use_rslora=self._take("use_rslora", False, _is_flag, "true or false"),
            rank_pattern=Patterns()
            if adalora
            else self._patterns("rank_pattern", _is_count, _COUNT),
            alpha_pattern=self._patterns("alpha_pattern", _is_number, number),
            fan_in_fan_out=self._take("fan_in_fan_out", False, _is_flag, "true or false"),
            use_dora=self._take("use_dora", False, _is_flag, "true or false"),
            lora_bias=self._take("lora_bias", False, _is_flag, "true or false"),
            kasa=not is_off(self._raw.get("kasa_config")),
            adalora=adalora,
            bias=self._take("bias", "none", _is_bias, "none, all or lora_only"),
            trainable_token_indices=self._tokens(tokens),
            modules_to_save=tuple(
                self._take("modules_to_save", [], _are_names, "a list of names") or ()
            ),
            base_model_name_or_path=self._take("base_model_name_or_path", None, _is_name, "a name"),
            peft_version=self._take("peft_version", None, _is_name, "a version"),
            residual=tuple(extra.field for extra in asked_extras(self._raw) if extra.residual),
            ignored=tuple(
                key for key in self._raw if key in IGNORED and not is_off(self._raw[key])
            ),
        )

    def _adalora(self) -> AdaLora:
        """Its `rank_pattern` says of each singular value whether it stays, by the key of lora_E."""
        kept: dict[str, list[bool]] = self._take(
            "rank_pattern",
            {},
            _all(_is_flags),
            "names of lora_E, each with a list of true or false",
        )
        return AdaLora(
            init_r=self._take("init_r", 12, _is_count, _COUNT),
            ranks={key.partition(".lora_E")[0]: sum(flags) for key, flags in kept.items()},
        )

    def _take(
        self, key: str, default: _Value, fits: Callable[[object], bool], expected: str
    ) -> _Value:
        value: _Value = self._raw.get(key, default)
        if value is None and not default:  # null says the same as a default that says nothing
            return default
        if fits(value):
            return value
        self._refuse(key, show(value), expected)
        return default

    def _patterns(self, key: str, fits: Callable[[object], bool], expected: str) -> Patterns:
        empty: dict[str, float] = {}
        values = self._take(key, empty, _all(fits), f"module patterns, each with {expected}")
        try:
            return Patterns.of(values)
        except re.error as error:
            self._refuse(key, f"{error.pattern!r}: {error}", "regular expressions on module names")
            return Patterns()

    def _tokens(self, key: str) -> dict[str, tuple[int, ...]]:
        expected = "row numbers from 0 on, or a list of them for each module"
        none: dict[str, list[int]] | list[int] | None = None
        value = self._take(key, none, _are_tokens, expected)
        named = value if isinstance(value, dict) else {"": value or []}
        return {name: tuple(rows) for name, rows in named.items() if rows}

    def _refuse(self, key: str, found: str, expected: str) -> None:
        self._problems.add(
            BadInput(
                f"the field `{key}` cannot be used",
                where=self._where,
                found=found,
                expected=expected,
                remedy=_SAVE_AGAIN,
            )
        )
