"""What a merge method declares with its signature: knobs, statistics, what it takes and returns.

As in `words.py`, all are plain frozen values or protocols, without an import of numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from keyword import iskeyword
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from streammerge.words import Fold, StatisticValue, TensorSpec

if TYPE_CHECKING:
    from streammerge.arrays import Factor, PerModel

# What a method is handed of a model: its difference from the base, its own weights, or, where
# the recipe may do without a base, differences if it names one and weights if not. "cores" are
# differences, too, but whole: as small matrices in a common basis, so they must be low-rank.
Space = Literal["deltas", "weights", "either", "cores"]


KnobValue = float | bool | str


@dataclass(frozen=True, slots=True)
class Knob:
    """A parameter of a merge method, with its default and bounds, as the recipe may set it.

    `default` None means that the recipe must give it. `above` and `below` are exclusive,
    `at_least` and `up_to` inclusive; `nothing_at` is a value beyond them that a gradient or filter
    may reach: there the model's task vector is zero. `about` is one line of help. `whole` and
    `choices` follow from the parameter's type, `int` or `Literal[...]`; `switch` says for which of
    the choices false and true stand, if they may be given too.
    """

    default: KnobValue | None = None
    about: str = ""
    above: float | None = None
    below: float | None = None
    at_least: float | None = None
    up_to: float | None = None
    nothing_at: float | None = None
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
    on_torch: bool = False  # whether its function is one of torch tensors
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


@dataclass(frozen=True, slots=True)
class Declared:
    """The names that a method has declared so far, which a statistic of it may refer to."""

    per_model: frozenset[str]
    shared: frozenset[str]
    statistics: frozenset[str]


class Buffers(NamedTuple):
    """How many float32 buffers of a tile a statistic takes besides the rows of the models.

    Where it is `stacked`, it looks at those of all models at once, else at one after the other.
    """

    kept: int = 0  # of the scratch, which a thread keeps
    passing: int = 0
    stacked: bool = True


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

    def buffers(self, knobs: Knobs) -> Buffers:
        """What it takes to measure a tile."""
        ...

    def by_products(self, knobs: Knobs) -> bool:
        """Whether the inner products of the deltas are all that it looks at."""
        ...
