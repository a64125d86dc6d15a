"""One LoRA on one weight: its scale, its orientation, and whether it fits.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021: `W + s * B @ A`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from streammerge.adapters.config import LoraConfig
from streammerge.adapters.faults import Fault, Findings
from streammerge.adapters.keys import Pair
from streammerge.words import Extent, Factors, Matrix

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


def low_rank(a: Extent, b: Extent, scale: float, *, transposed: bool = False) -> Factors:
    """`scale * B @ A` as an update of the stored tensor, A being `[r, in]` and B `[out, r]`.

    `transposed` says that the base stores this weight as `[in, out]`.
    """
    left, right = (a, b) if transposed else (b, a)
    return Factors(scale, Matrix(left, transposed), Matrix(right, transposed))


def fits(pair: Pair, target: Extent, config: LoraConfig, findings: Findings) -> bool:
    """Whether a pair can be added to its target; what is wrong goes to `findings`."""
    a, b, weight = pair.a.spec, pair.b.spec, target.spec
    expected, update = config.rank(pair.module), pair.update_shape
    mistakes: dict[Fault, str] = {}
    if pair.rank != b.shape[1]:
        mistakes[_UNEQUAL_RANKS] = f"lora_A {list(a.shape)}, lora_B {list(b.shape)}"
    elif pair.rank != expected:
        mistakes[_OTHER_RANK] = f"rank {pair.rank} in the file, {expected} in the config"
    if weight.shape not in (update, update[::-1]):
        mistakes[_OTHER_SHAPE] = f"update {list(update)}, base {list(weight.shape)}"
    if not (a.dtype.mergeable and b.dtype.mergeable):
        mistakes[_NO_FLOATS] = f"lora_A {a.dtype.label}, lora_B {b.dtype.label}"
    if not weight.dtype.mergeable:
        mistakes[_CODES] = f"{weight.dtype.label} {list(weight.shape)}"
    for fault, line in mistakes.items():
        findings.add(fault, f"{pair.module}: {line}")
    return not mistakes


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
            if pair.update_shape[0] != pair.update_shape[1]:
                transposed = target.spec.shape != pair.update_shape
                self._kinds.setdefault(_kind(pair), set()).add(transposed)
        self._conv1d = base_config.get("model_type") in CONV1D_MODELS
        self._flag = config.fan_in_fan_out

    def transposed(self, pair: Pair, target: Extent) -> bool:
        """Whether `target` is stored as the transpose of `pair`'s product."""
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
