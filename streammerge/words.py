"""The words of the project: what a tensor, a tile, a source, a fold and a merged tensor are.

Everything here is a plain frozen value or a protocol. Nothing here reads a file or imports numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from streammerge.arrays import Deltas, PerModel, Rows
    from streammerge.scratch import Scratch


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

    @property
    def thinned(self) -> bool:
        return self.row_step > 1 or self.col_step > 1

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


# -------------------------------------------------------------------------------------- merging


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
    def measured(self) -> TensorSpec:
        """The tensor whose tiles are measured: the same, unless the merge is a factor of it."""
        ...

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
