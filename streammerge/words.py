"""The words of the project: what a tensor, a tile, a source, a statistic and a method are.

Everything here is a plain frozen value or a protocol. Nothing here reads a file or imports numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from keyword import iskeyword
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from streammerge.arrays import Deltas, Factor, PerModel, Rows
    from streammerge.memory import Scratch


class DType(Enum):
    """An element type of the safetensors format: its name in the header, bytes, and kind."""

    BOOL = ("BOOL", 1, "bool")
    U8 = ("U8", 1, "int")
    I8 = ("I8", 1, "int")
    F8_E4M3 = ("F8_E4M3", 1, "float8")
    F8_E5M2 = ("F8_E5M2", 1, "float8")
    U16 = ("U16", 2, "int")
    I16 = ("I16", 2, "int")
    F16 = ("F16", 2, "float")
    BF16 = ("BF16", 2, "float")
    U32 = ("U32", 4, "int")
    I32 = ("I32", 4, "int")
    F32 = ("F32", 4, "float")
    U64 = ("U64", 8, "int")
    I64 = ("I64", 8, "int")
    F64 = ("F64", 8, "float")

    def __init__(self, label: str, itemsize: int, kind: str) -> None:
        self.label = label
        self.itemsize = itemsize
        self.kind = kind

    @property
    def mergeable(self) -> bool:
        """Whether arithmetic on its elements means anything: F16, BF16, F32 and F64."""
        return self.kind == "float"


# What users write for `dtype` and `out_dtype`, and what Hugging Face configs call it.
FLOAT_NAMES: Mapping[str, DType] = {
    "float16": DType.F16,
    "bfloat16": DType.BF16,
    "float32": DType.F32,
    "float64": DType.F64,
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's name, shape and dtype, and how it is seen as `[rows, cols]`.

    Two-dimensional and convolution tensors have `shape[0]` rows, stacks of experts
    `[E, out, in]` have `E * out`, one-dimensional tensors and scalars are one row.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType

    @property
    def rows(self) -> int:
        if len(self.shape) < 2:
            return 1
        if len(self.shape) == 3 and ".experts." in self.name:
            return self.shape[0] * self.shape[1]
        return self.shape[0]

    @property
    def cols(self) -> int:
        return self.numel // self.rows if self.numel else 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Tile(NamedTuple):
    """A run of whole rows `[start, stop)` of a tensor; with steps, a thinned sample of it."""

    start: int
    stop: int
    row_step: int = 1
    col_step: int = 1

    def shape(self, spec: TensorSpec) -> tuple[int, int]:
        """`(rows, cols)` of the tile of a tensor."""
        rows = len(range(self.start, self.stop, self.row_step))
        return rows, len(range(0, spec.cols, self.col_step))


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a tensor's bytes lie: `spec.nbytes` of them from `offset` of the file `path`."""

    path: str
    offset: int
    spec: TensorSpec


class Source(Protocol):
    """Anything that hands out the rows of one model's tensor, as float32.

    `read` gives the model's own rows. `delta` gives its difference from the base, exactly: a LoRA
    delta is formed from its factors, never as (base + delta) - base. Both write into `out`, a
    buffer `[rows, cols]` that the caller owns and reuses.
    """

    @property
    def spec(self) -> TensorSpec: ...

    @property
    def needs_base(self) -> bool:
        """Whether `delta` wants the base's rows."""
        ...

    @property
    def own_statistics(self) -> tuple[OwnStatistic, ...]:
        """What it must be given before it can hand out rows; mostly nothing."""
        ...

    @property
    def resident_bytes(self) -> int:
        """What is held in memory from the first read until `release`."""
        ...

    def read(self, tile: Tile, out: Rows, scratch: Scratch) -> None: ...

    def delta(self, tile: Tile, base_rows: Rows | None, out: Rows, scratch: Scratch) -> None: ...

    def terms(self) -> Terms:
        """The model as the rows of another source plus low-rank products, where it is one."""
        ...

    def read_bytes(self, tile: Tile) -> int:
        """How many bytes of files one `delta` of the tile reads, the base's rows not counted."""
        ...

    @property
    def once_bytes(self) -> int:
        """How many bytes of files the first read takes besides, held until `release`."""
        ...

    def scratch_bytes(self, tile: Tile) -> int:
        """Working memory that one `read` or `delta` of the tile takes from the scratch."""
        ...

    def release(self) -> None: ...


@dataclass(frozen=True, slots=True)
class OwnStatistic:
    """A statistic that a source must be given before it can hand out rows.

    The fold is of `rows`, the only model of the stack that it measures. It holds `state_bytes`, and
    a part of it `part_bytes`. Its value goes to `take`, and is kept there.
    """

    rows: Source
    start: Callable[[], Fold]
    take: Callable[[StatisticValue], None]
    state_bytes: int
    part_bytes: int


# ------------------------------------------------------------------------------------- updates


@dataclass(frozen=True, slots=True)
class Matrix:
    """A stored two-dimensional factor, possibly to be used transposed."""

    extent: Extent
    transposed: bool = False

    @property
    def rows(self) -> int:
        return self.extent.spec.shape[1 if self.transposed else 0]

    @property
    def cols(self) -> int:
        return self.extent.spec.shape[0 if self.transposed else 1]


@dataclass(frozen=True, slots=True)
class Factors:
    """A low-rank update `scale * left @ diag(values) @ right` of a tensor seen as `[rows, cols]`.

    `left` is `[rows, rank]`, `right` is `[rank, cols]`, `values` is `[rank]`, ones where there are
    none. For a LoRA on an ordinary linear layer left and right are B and A as stored; on a
    transposed weight (GPT-2's Conv1D, an embedding) A and B transposed.
    """

    scale: float
    left: Matrix
    right: Matrix
    values: Extent | None = None

    @property
    def rank(self) -> int:
        return self.left.cols

    def turned(self) -> Factors:
        """The same update of the transposed tensor."""
        left, right = (
            replace(one, transposed=not one.transposed) for one in (self.right, self.left)
        )
        return replace(self, left=left, right=right)


@dataclass(frozen=True, slots=True)
class Addition:
    """`scale` times a stored tensor of the same shape, added: lora_B's bias on the layer's."""

    scale: float
    extent: Extent

    rank: ClassVar[int] = 0


@dataclass(frozen=True, slots=True)
class Dora:
    """`m / norm(W + factors) * (W + factors)`: DoRA, where lengths are learned by themselves.

    Norms are those of the rows, or of the columns where the base stores the weight as `[in, out]`.
    `magnitude` m holds as many lengths. Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation",
    ICML 2024 (arXiv 2402.09353).
    """

    factors: Factors
    magnitude: Extent
    norms_of: Literal["rows", "columns"]

    @property
    def rank(self) -> int:
        return self.factors.rank

    @property
    def scale(self) -> float:
        return self.factors.scale


@dataclass(frozen=True, slots=True)
class Replacement:
    """A stored tensor in place of the base's; or of some rows of it, in the order of `rows`.

    `then` is what the same adapter does to the tensor after that.
    """

    extent: Extent
    rows: tuple[int, ...] | None = None
    then: Update | None = None

    @property
    def rank(self) -> int:
        return self.then.rank if self.then else 0


# What an adapter does to one tensor. Planning chooses the source that does it.
Update = Factors | Addition | Dora | Replacement


@dataclass(frozen=True, slots=True)
class Terms:
    """A model's tensor as `rows + sum of factors`: exactly what `rows` hands out, and products."""

    rows: Source
    factors: tuple[Factors, ...] = ()


# ------------------------------------------------------------------------------------- methods

# What a method is handed of a model: its difference from the base, its own weights, or, where
# the recipe may do without a base, differences if it names one and weights if not. "cores" are
# differences, too, but whole: as small matrices in a common basis, so they must be low-rank.
Space = Literal["deltas", "weights", "either", "cores"]


KnobValue = float | bool | str


@dataclass(frozen=True, slots=True)
class Knob:
    """A parameter of a merge method, with its default and bounds, as the recipe may set it.

    `default` None means that the recipe must give it. `above` and `below` are exclusive,
    `at_least` and `up_to` inclusive. `about` is one line of help. `whole` and `choices` follow
    from the parameter's type, `int` or `Literal[...]`; `switch` says for which of the choices
    false and true stand, if they may be given too.
    """

    default: KnobValue | None = None
    about: str = ""
    above: float | None = None
    below: float | None = None
    at_least: float | None = None
    up_to: float | None = None
    switch: tuple[str, str] | None = None
    whole: bool = False
    choices: tuple[str, ...] = ()

    def bounds(self) -> str:
        """The bounds in words, empty when there are none."""
        words = (
            ("above", self.above),
            ("at least", self.at_least),
            ("below", self.below),
            ("up to", self.up_to),
        )
        return " and ".join(f"{word} {bound:g}" for word, bound in words if bound is not None)

    def allows(self, value: float) -> bool:
        """Whether a finite value lies within the bounds."""
        return (
            (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.up_to is None or value <= self.up_to)
        )


@dataclass(frozen=True, slots=True)
class Coefficients:
    """What a method returns that is a weighted sum: the factor of each model, and of the base.

    On deltas, the result is `base * b + sum of models[i] * delta_i`, b being the base's rows; on
    weights, it is `sum of models[i] * x_i`. All models of the recipe have one, in its order. A
    factor is a number, or float64 `[rows, 1]` or `[1, cols]` where it differs within the tensor.
    """

    models: Sequence[Factor]
    base: Factor = 1.0


@dataclass(frozen=True)
class MethodSpec:
    """A registered merge method: its function and what the function's signature declares."""

    name: str
    function: Callable[..., Any]
    space: Space
    returns: Literal["rows", "coefficients", "core"]
    per_model: Mapping[str, Knob]
    shared: Mapping[str, Knob]
    statistics: Mapping[str, Statistic]
    models: tuple[int, int | None] = (1, None)  # fewest and most, None: any number
    # Buffers of a tile's rows that the function allocates; None: one for each model, and one.
    temporaries: int | None = None
    nanoseconds: float = 0.0  # of an element of a model, beyond what methods cost in the mean
    reference: str = ""
    digest: str = ""  # sha256 of its file, where it is the user's own
    wants_base: bool = False  # whether it is handed the base's rows, as `base`
    # Says what is wrong with the per-model knobs that its parameters name, taken together.
    check: Callable[..., str | None] | None = None
    # Of a model that touches a tensor alone: the factor by which its whole delta is added, or None.
    alone: Callable[[Knobs], float | None] | None = None

    @property
    def needs_base(self) -> bool:
        return self.space in ("deltas", "cores")

    def on_deltas(self, *, has_base: bool) -> bool:
        """Whether it is handed differences from the base."""
        return self.needs_base or (self.space == "either" and has_base)

    @property
    def about(self) -> str:
        """The docstring of the function."""
        return (self.function.__doc__ or "").strip()


@dataclass(frozen=True)
class Knobs:
    """The knob values that apply to one tensor, and whom the stack of its deltas holds.

    An adapter that leaves a tensor alone takes part with zeros: its knobs and its place among the
    models count, and the stack leaves it out.
    """

    of_all: Mapping[str, PerModel]  # of every model of the recipe
    shared: Mapping[str, KnobValue]
    models: int  # of the recipe
    touching: tuple[int, ...]  # positions in the recipe of those in the stack
    seed: int = 0

    @property
    def per_model(self) -> dict[str, PerModel]:
        """Of the models in the stack."""
        chosen = list(self.touching)
        return {name: values[chosen] for name, values in self.of_all.items()}

    def arguments(self, *, of_all: bool) -> dict[str, Any]:
        """As keyword arguments; a knob called like a keyword gets an underscore: `lambda_`."""
        knobs = {**(self.of_all if of_all else self.per_model), **self.shared}
        return {n + "_" if iskeyword(n) else n: value for n, value in knobs.items()}


class DeltaStack(Protocol):
    """One tile of the models that touch a tensor, made when asked for; buffers are reused.

    Where no base is subtracted, a model's rows stand for its delta.
    """

    index: int  # of the tile in the grid

    def one(self, model: int) -> Rows:
        """The delta of one model, not to be changed; the next call may overwrite it."""
        ...

    def all(self) -> Deltas:
        """`[models, rows, cols]`, made anew, to be changed at will."""
        ...

    def base(self) -> Rows:
        """The base's rows, not to be changed."""
        ...

    def gram(self) -> NDArray[np.float64]:
        """`[models, models]`: inner products of the deltas over the tile."""
        ...


@dataclass(frozen=True, slots=True)
class Declared:
    """The names that a method has declared so far, which a statistic of it may refer to."""

    per_model: frozenset[str]
    shared: frozenset[str]
    statistics: frozenset[str]


class Statistic(Protocol):
    """What a method needs to know of a whole tensor before it can merge a tile of it."""

    def check(self, declared: Declared) -> None:
        """Raise TypeError when the declaration names what the method does not declare before."""
        ...

    def waits_for(self) -> Sequence[str]:
        """The names of parameters whose values it needs; those of statistics must come first."""
        ...

    def start(
        self,
        spec: TensorSpec,
        knobs: Knobs,
        values: Mapping[str, StatisticValue],
        state_bytes: int,
    ) -> Fold | StatisticValue:
        """The first fold, or the value itself where no read is needed.

        `values` holds those that it waits for. A fold and all that follow it hold at most
        `state_bytes` of state, or the least they need.
        """
        ...

    def measured(self, knobs: Knobs) -> Sequence[int]:
        """The places in the stack of the models that it reads."""
        ...

    def reads_base(self, knobs: Knobs) -> bool:
        """Whether it looks at the base's rows, too."""
        ...

    def reads(self, knobs: Knobs) -> int:
        """How many reads of the whole tensor it takes, samples not counted, as planned."""
        ...

    def state_bytes(self, spec: TensorSpec, knobs: Knobs) -> tuple[int, int]:
        """The state that it cannot do without, and the most that it could make use of."""
        ...

    def part_bytes(self, spec: TensorSpec, knobs: Knobs) -> int:
        """The most that one measured part holds."""
        ...

    def buffers(self, knobs: Knobs) -> tuple[int, int]:
        """How many float32 buffers of a tile it takes to measure, the stack not counted.

        Of the scratch, which a thread keeps, and in passing.
        """
        ...

    def by_products(self, knobs: Knobs) -> bool:
        """Whether the inner products of the deltas are all that it looks at."""
        ...


@runtime_checkable
class StatisticValue(Protocol):
    """A finished statistic."""

    def at(self, tile_index: int) -> Any:
        """What the method is handed for one tile of the grid."""
        ...


class Merged(Protocol):
    """The merge of one tensor: measured wave by wave, then computed tile by tile."""

    @property
    def spec(self) -> TensorSpec: ...

    @property
    def resident_bytes(self) -> int:
        """What is held in memory from the first tile until `release`, statistics not counted."""
        ...

    def start(
        self, state_bytes: int, values: Mapping[str, StatisticValue]
    ) -> dict[str, Fold | StatisticValue]:
        """The statistics that the method wants, by the name of its parameter.

        Those without a value that wait for none but the `values` found so far.
        """
        ...

    def state_bytes(self) -> tuple[int, int]:
        """The state that the statistics cannot do without, and the most they could make use of."""
        ...

    def measure(
        self, folds: Mapping[str, Fold], tile: Tile, index: int, scratch: Scratch
    ) -> dict[str, Any]:
        """Each fold's part of a tile."""
        ...

    def merge(
        self, tile: Tile, index: int, values: Mapping[str, StatisticValue], scratch: Scratch
    ) -> tuple[Rows, PerModel]:
        """The merged rows, in a buffer of the scratch, and the tile's squared norms.

        Norms are of the base's rows, then of each model's update; NaN where there is no base.
        """
        ...

    def waves(self) -> Sequence[Sequence[str]]:
        """The statistics that share each read before the merge, when no estimate fails."""
        ...

    def merge_bytes(self, tile: Tile) -> int:
        """Bytes of files that merging the tile reads."""
        ...

    def measure_bytes(self, tile: Tile, names: Sequence[str]) -> int:
        """Bytes of files that measuring the tile for some statistics reads."""
        ...

    def part_bytes(self) -> int:
        """The most that the measured parts of one tile hold."""
        ...

    @property
    def once_bytes(self) -> int:
        """Bytes of files that are read once for the tensor and held until `release`."""
        ...

    def scratch_bytes(self, tile: Tile) -> int:
        """Working memory of measuring or merging the tile, whichever takes more."""
        ...

    def release(self) -> None: ...


class Fold(Protocol):
    """The running state of a statistic: measure tiles anywhere, absorb in grid order."""

    def wants(self, grid: Sequence[Tile]) -> Sequence[Tile]:
        """Which tiles to measure: the whole grid, or a sample."""
        ...

    def measure(self, stack: DeltaStack, scratch: Scratch) -> Any:
        """A tile's part. Pure: the same rows give the same part, and the state is only read."""
        ...

    def absorb(self, tile_index: int, part: Any) -> None: ...

    def finish(self) -> Fold | StatisticValue:
        """The value, or the next fold, which wants another read."""
        ...
