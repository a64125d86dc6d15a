"""What a method may ask for that no read is needed for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

from streammerge import grid
from streammerge.declarations import Buffers, Declared, Knobs
from streammerge.noise import Draws, key_of
from streammerge.words import StatisticValue, TensorSpec


@dataclass(frozen=True, slots=True)
class Given:
    """Declares a value that follows from the tensor's shape, the knobs and who takes part."""

    find: Callable[[TensorSpec, Knobs], StatisticValue]
    knob: str | None = None  # the per-model knob that it looks at

    def check(self, declared: Declared) -> None:
        if self.knob is not None and self.knob not in declared.per_model:
            raise TypeError(f"{self.knob!r} is no per-model knob that is declared before")

    def waits_for(self) -> Sequence[str]:
        return ()

    def measured(self, knobs: Knobs) -> Sequence[int]:
        return ()

    def reads_base(self, knobs: Knobs) -> bool:
        return False

    def reads(self, knobs: Knobs) -> int:
        return 0

    def state_bytes(self, spec: TensorSpec, knobs: Knobs) -> tuple[int, int]:
        return 0, 0

    def part_bytes(self, spec: TensorSpec, knobs: Knobs) -> int:
        return 0

    def buffers(self, knobs: Knobs) -> Buffers:
        return Buffers()

    def by_products(self, knobs: Knobs) -> bool:
        return True

    def start(
        self,
        spec: TensorSpec,
        knobs: Knobs,
        values: Mapping[str, StatisticValue],
        state_bytes: int,
    ) -> StatisticValue:
        return self.find(spec, knobs)


@dataclass(frozen=True, slots=True)
class Same:
    """A value that is the same for every tile."""

    value: Any

    def at(self, tile_index: int) -> Any:
        return self.value


@dataclass(frozen=True, slots=True)
class _Drawn:
    keys: tuple[int, ...]
    tile_elements: int

    def at(self, tile_index: int) -> Draws:
        return Draws(self.keys, tile_index * self.tile_elements)


def _draws(spec: TensorSpec, knobs: Knobs) -> StatisticValue:
    keys = tuple(key_of(knobs.seed, spec.name, model) for model in knobs.touching)
    return _Drawn(keys, grid.tile_rows(spec) * spec.cols)


def _models(spec: TensorSpec, knobs: Knobs) -> StatisticValue:
    return Same(knobs.models)


def _elements(spec: TensorSpec, knobs: Knobs) -> StatisticValue:
    return Same(spec.numel)


def _total_weight(spec: TensorSpec, knobs: Knobs) -> StatisticValue:
    return Same(float(knobs.of_all["weight"].sum()))


Random: TypeAlias = Annotated[Draws, Given(_draws)]
ModelCount: TypeAlias = Annotated[int, Given(_models)]  # those that leave the tensor alone included
ElementCount: TypeAlias = Annotated[int, Given(_elements)]  # of the tensor
TotalWeight: TypeAlias = Annotated[float, Given(_total_weight, knob="weight")]  # theirs included
