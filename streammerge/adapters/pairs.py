"""The tensors that an adapter holds for one module, put together: two factors and what goes along.

kind           factors                                  update of the stored weight
linear         A [r, in], B [out, r]                    s B A, [out, in], or its transpose
convolution    A [r, in, k...], B [out, r, 1...]        s B A, [out, in, k...]
embedding      A [r, vocabulary], B [features, r]       s (B A)', [vocabulary, features]
AdaLoRA        A [r, in], B [out, r], E [r, 1]          s B diag(E) A
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from streammerge.adapters.faults import Fault, Findings
from streammerge.words import Extent, TensorSpec

_LONELY: Final = Fault(
    "a factor without its other half",
    "lora_A.weight and lora_B.weight of each module, and for AdaLoRA lora_A, lora_B and lora_E",
    "the adapter was saved incompletely: save it again",
)
_NO_MATRIX: Final = Fault(
    "factors that are no matrices, as sharded training leaves them",
    "matrices [r, in] and [out, r], or those of a convolution, [r, in, k...] and [out, r, 1...]",
    "gather the shards (DeepSpeed ZeRO-3, FSDP) before save_pretrained, and save it again",
)

_STRAY: Final = Fault(
    "tensors of one module that do not go together",
    "a bias, a magnitude or a diagonal beside lora_A.weight and lora_B.weight; a magnitude beside "
    "lora_embedding_A and _B; lora_E beside lora_A and lora_B without `.weight`",
    "the file mixes two adapters: save each into a folder of its own with PEFT",
)


@dataclass(frozen=True, slots=True)
class _Form:
    """Which parts make a pair: the factors and what else must be there, and what may be."""

    a: str
    b: str
    needs: frozenset[str] = frozenset()
    takes: frozenset[str] = frozenset()


_FORMS: Final = (
    _Form("A", "B", takes=frozenset({"bias", "magnitude", "diag"})),
    _Form("embedding_A", "embedding_B", takes=frozenset({"magnitude"})),
    _Form("svd_A", "svd_B", needs=frozenset({"E"})),
)
_MOST_DIMENSIONS: Final = 5  # of a factor: 3-d convolutions


@dataclass(frozen=True, slots=True)
class Pair:
    """What an adapter holds for one module: A `[r, in]`, B `[out, r]`, kernels laid out flat."""

    module: str
    a: Extent
    b: Extent
    kernel: tuple[int, ...] = ()  # of a convolution
    embedding: bool = False
    svd: bool = False  # AdaLoRA
    values: Extent | None = None  # [r], between the factors: lora_E of AdaLoRA, lora_diag of KaSA
    magnitude: Extent | None = None  # [out], the lengths of DoRA
    bias: Extent | None = None  # [out], of lora_B

    @property
    def rank(self) -> int:
        return self.a.spec.shape[0]

    @property
    def outputs(self) -> int:
        """Output features: what DoRA has lengths and lora_bias has numbers for."""
        return self.b.spec.shape[0]

    @property
    def update_shape(self) -> tuple[int, ...]:
        """The shape of `B @ A`, `(out, in, *kernel)`; of an embedding, as it is stored."""
        inputs = self.a.spec.shape[1] // math.prod(self.kernel)
        if self.embedding:
            return inputs, self.outputs
        return self.outputs, inputs, *self.kernel

    @property
    def has_orientation(self) -> bool:
        """Whether a base may store the weight as `[in, out]`: convolutions and embeddings don't."""
        return not (self.kernel or self.embedding)


def pair_up(
    modules: Sequence[str], parts: Mapping[str, Mapping[str, Extent]], findings: Findings
) -> Iterator[Pair]:
    """The pairs of an adapter; what makes none goes to `findings`.

    `parts` holds tensors by module, then by part; `modules` are the same modules' clean names.
    """
    for module, held in zip(modules, parts.values(), strict=True):
        form = next((form for form in _FORMS if form.a in held or form.b in held), None)
        first = next(iter(held.values())).spec
        if form is None or not {form.a, form.b, *form.needs} <= set(held):
            findings.add(_LONELY, first.name)
        elif set(held) - {form.a, form.b} - form.needs - form.takes:
            findings.add(_STRAY, first.name)
        elif odd := _odd(held[form.a].spec, held[form.b].spec):
            findings.add(_NO_MATRIX, f"{odd.name} {list(odd.shape)}")
        else:
            yield _pair(module, held, form)


def _pair(module: str, held: Mapping[str, Extent], form: _Form) -> Pair:
    a, b = held[form.a], held[form.b]
    return Pair(
        module,
        _flat(a),
        _flat(b),
        kernel=a.spec.shape[2:],
        embedding=form.a == "embedding_A",
        svd=form.a == "svd_A",
        values=held.get("E") or held.get("diag"),
        magnitude=held.get("magnitude"),
        bias=held.get("bias"),
    )


def _odd(a: TensorSpec, b: TensorSpec) -> TensorSpec | None:
    """The one that is no factor: the kernel of A is any, that of B has one element."""
    if not 2 <= len(a.shape) <= _MOST_DIMENSIONS:
        return a
    return b if len(b.shape) != len(a.shape) or any(n != 1 for n in b.shape[2:]) else None


def _flat(factor: Extent) -> Extent:
    """Seen as a matrix: rows as they are, everything else in a row."""
    spec = factor.spec
    shape = spec.shape[0], math.prod(spec.shape[1:])
    return replace(factor, spec=replace(spec, shape=shape))
