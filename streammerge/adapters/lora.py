"""One LoRA on one weight: whether it fits, which way it lies, and what it does.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021: `W + s * B @ A`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from streammerge.adapters.config import LoraConfig
from streammerge.adapters.faults import Fault, Findings
from streammerge.adapters.pairs import Pair
from streammerge.words import Dora, Extent, Factors, Matrix, TensorSpec

# Model types whose linear layers are Conv1D, which stores its weight as [in, out].
CONV1D_MODELS: Final = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})

_UNEQUAL_RANKS: Final = Fault(
    "factors whose ranks differ",
    "lora_A.weight [r, in] and lora_B.weight [out, r] of the same rank r",
    "the file mixes two adapters or was cut: save it again",
)
_OTHER_RANK: Final = Fault(
    "factors whose rank is not the one that adapter_config.json gives",
    "the rank of `r`, or of the first key of `rank_pattern` that matches the module",
    "put the adapter_config.json that was saved with these factors beside them",
)
_OTHER_SHAPE: Final = Fault(
    "updates of another shape than the tensor of the base",
    "lora_B @ lora_A of the shape of the base's tensor, or of its transpose (Conv1D)",
    "check that the adapter belongs to this base; where only the rows of an embedding or head "
    "differ, the adapter was trained with another vocabulary",
)
_OTHER_LENGTH: Final = Fault(
    "tensors beside the factors whose length is not that of the layer",
    "a magnitude for each output feature, a singular value for each rank",
    "check that the adapter belongs to this base",
)
_GROUPED: Final = Fault(
    "LoRA on a convolution with groups, which PEFT does not merge either",
    "convolutions with one group: B @ A mixes all inputs, the base's kernel does not",
    "leave the grouped convolutions out of target_modules, or serve the adapter with PEFT",
)
_MIXED: Final = "put the adapter_config.json that was saved with these tensors beside them"
_DORA: Final = Fault(
    "modules whose magnitude vector (DoRA) is unlike the config's `use_dora`",
    "lora_magnitude_vector of each module with use_dora: true, and of none without",
    _MIXED,
)
_BIAS: Final = Fault(
    "modules whose bias of lora_B is unlike the config's `lora_bias`",
    "lora_B.bias of each module with lora_bias: true, and of none without",
    _MIXED,
)
_ADALORA: Final = Fault(
    "modules whose singular values (lora_E) are unlike the config's `peft_type`",
    'lora_A, lora_B and lora_E of each module with "ADALORA", lora_A.weight with "LORA"',
    _MIXED,
)
_KASA: Final = Fault(
    "modules whose diagonal (lora_diag) is unlike the config's `kasa_config`",
    "lora_diag of each module with a kasa_config, and of none without",
    _MIXED,
)
_NO_FLOATS: Final = Fault(
    "factors that are no floating-point numbers",
    "F64, F32, F16 or BF16",
    "save the adapter in one of these types",
)
_CODES: Final = Fault(
    "tensors of the base that hold integer or 8-bit codes, not weights",
    "F64, F32, F16 or BF16",
    "merge into the unquantised base; the adapter is the same",
)


def low_rank(
    a: Extent, b: Extent, scale: float, *, transposed: bool = False, values: Extent | None = None
) -> Factors:
    """`scale * B @ diag(values) @ A` as an update of the stored tensor; A `[r, in]`, B `[out, r]`.

    `transposed` says that the base stores this weight as `[in, out]`.
    """
    left, right = (a, b) if transposed else (b, a)
    return Factors(scale, Matrix(left, transposed), Matrix(right, transposed), values)


def update_of(pair: Pair, scale: float, *, transposed: bool) -> Factors | Dora:
    """What a pair does to its weight."""
    factors = low_rank(pair.a, pair.b, scale, transposed=transposed, values=pair.values)
    if pair.magnitude is None:
        return factors
    return Dora(factors, pair.magnitude, "columns" if transposed else "rows")


def fits(pair: Pair, target: Extent, config: LoraConfig, findings: Findings) -> bool:
    """Whether a pair can be added to its target; what is wrong goes to `findings`."""
    groups = _groups(pair, target.spec)
    if groups > 1:  # its B has fewer columns than A has rows, and that is no mistake of its own
        findings.add(_GROUPED, f"{pair.module}: {groups} groups, base {list(target.spec.shape)}")
        return False
    mistakes = [*_unlike_config(pair, config), *_unlike_target(pair, target), *_no_numbers(pair)]
    for fault, line in mistakes:
        findings.add(fault, f"{pair.module}: {line}")
    return not mistakes


def _unlike_config(pair: Pair, config: LoraConfig) -> Iterator[tuple[Fault, str]]:
    """Ranks, and what stands beside the factors: a config and a file of two adapters differ."""
    for fault, said, held in (
        (_DORA, config.use_dora, pair.magnitude is not None),
        (_BIAS, config.lora_bias and not pair.embedding, pair.bias is not None),
        (_ADALORA, config.adalora is not None, pair.svd),
        (_KASA, config.kasa, pair.values is not None and not pair.svd),
    ):
        if said != held:
            yield fault, f"{_yes(held)} in the file, {_yes(said)} in the config"
    a, b = pair.a.spec, pair.b.spec
    expected = config.rank(pair.module)
    if pair.rank != b.shape[1]:
        yield _UNEQUAL_RANKS, f"lora_A {list(a.shape)}, lora_B {list(b.shape)}"
    elif pair.rank != expected:
        yield _OTHER_RANK, f"rank {pair.rank} in the file, {expected} in the config"
    for extent, length in ((pair.values, pair.rank), (pair.magnitude, pair.outputs)):
        if extent is not None and extent.spec.numel != length:
            yield _OTHER_LENGTH, f"{extent.spec.name} {list(extent.spec.shape)}, not {length}"


def _unlike_target(pair: Pair, target: Extent) -> Iterator[tuple[Fault, str]]:
    weight, update = target.spec, pair.update_shape
    if not weight.dtype.mergeable:
        yield _CODES, f"{weight.dtype.label} {list(weight.shape)}"
    if not matches(pair, weight):
        yield _OTHER_SHAPE, f"update {list(update)}, base {list(weight.shape)}"


def _groups(pair: Pair, weight: TensorSpec) -> int:
    """How often the base's kernel goes into the inputs of the factors."""
    if not pair.kernel or weight.shape[2:] != pair.kernel or not weight.numel:
        return 1
    groups, rest = divmod(pair.update_shape[1], weight.shape[1])
    return 1 if rest else groups


def matches(pair: Pair, weight: TensorSpec) -> bool:
    """Whether the update has the shape of the stored weight, or of its transpose."""
    shape = pair.update_shape
    if len(weight.shape) > 2 and weight.rows != weight.shape[0]:
        return False  # seen as a stack of experts, each with rows of its own
    if pair.svd and len(weight.shape) > 2:  # AdaLoRA stores a convolution's kernel flat
        return shape == (weight.shape[0], weight.numel // weight.shape[0])
    return weight.shape == shape or (pair.has_orientation and weight.shape == shape[::-1])


def _no_numbers(pair: Pair) -> Iterator[tuple[Fault, str]]:
    labels = ("lora_A", "lora_B", "values", "magnitude", "bias of lora_B")
    held = (pair.a, pair.b, pair.values, pair.magnitude, pair.bias)
    codes = [
        f"{label} {one.spec.dtype.label}"
        for label, one in zip(labels, held, strict=True)
        if one is not None and not one.spec.dtype.mergeable
    ]
    if codes:
        yield _NO_FLOATS, ", ".join(codes)


def _yes(there: bool) -> str:
    return "there" if there else "not there"


class Orientation:
    """Which weights the base stores as `[in, out]`.

    Shapes decide, where they can. A square weight follows the others of its kind in the adapter
    (the last part of the module's name), then the model's type, then any weight of the adapter.
    The saved `fan_in_fan_out` comes last: PEFT writes what the last wrapped layer said. The type
    comes before other kinds, because GPT-2's head is an ordinary layer beside its Conv1Ds.
    """

    def __init__(
        self,
        targets: Iterable[tuple[Pair, Extent]],
        base_config: Mapping[str, Any],
        config: LoraConfig,
    ) -> None:
        self._kinds: dict[str, set[bool]] = {}
        for pair, target in targets:
            if pair.has_orientation and pair.update_shape[0] != pair.update_shape[1]:
                transposed = target.spec.shape != pair.update_shape
                self._kinds.setdefault(_kind(pair), set()).add(transposed)
        self._conv1d = base_config.get("model_type") in CONV1D_MODELS
        self._flag = config.fan_in_fan_out

    def transposed(self, pair: Pair, target: Extent) -> bool:
        """Whether `target` is stored as the transpose of `pair`'s product."""
        if not pair.has_orientation or len(target.spec.shape) > 2:
            return pair.embedding
        if pair.update_shape[0] != pair.update_shape[1]:
            return target.spec.shape != pair.update_shape
        of_its_kind = self._kinds.get(_kind(pair), set())
        of_its_model = {True} if self._conv1d else set()
        of_any_kind = set().union(*self._kinds.values())
        for said in (of_its_kind, of_its_model, of_any_kind):
            if len(said) == 1:
                return True in said
        return self._flag


def _kind(pair: Pair) -> str:
    return pair.module.rpartition(".")[2]
