"""Whole merges of drawn models and adapters, through the engine, against the dense formulas."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import streammerge as sm
from streammerge import grid
from tests.contracts.small_inputs import Entry, Shape, SmallInputs, decode, read_back
from tests.oracles import dense
from tests.oracles.dense import Answer, check, rounded

FAST = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,  # the same examples everywhere: a merge is not the place for a lottery
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@pytest.fixture(scope="module", autouse=True)
def no_waiting() -> Iterator[None]:
    """Nothing here is about durability."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, lambda descriptor: None)
        yield


@dataclass(frozen=True, slots=True)
class Drawn:
    """How one model of an example is made."""

    kind: str  # adapter, model, or an adapter on a model
    rank: int
    scale: float
    dtype: str
    on: tuple[bool, ...]  # which tensors it changes
    transposed: bool


@dataclass(frozen=True, slots=True)
class Case:
    """One example, but for the method's parameters."""

    shapes: Mapping[str, Shape]
    dtype: str
    out_dtype: str | None
    models: Sequence[Drawn]
    tile_elements: int
    threads: int
    io: Any
    seed: int


SMALL, LONG = st.integers(1, 24), st.integers(100, 700)
MATRICES = st.one_of(
    st.tuples(SMALL, SMALL),
    st.tuples(st.just(1), SMALL),
    st.tuples(SMALL, st.just(1)),
    st.tuples(st.integers(1, 4), LONG),  # rows that are longer than a tile
    st.tuples(LONG, st.integers(1, 3)),
)
OTHERS = st.one_of(
    st.just(()),
    st.tuples(LONG),
    st.tuples(SMALL),
    st.sampled_from([(0,), (0, 3), (3, 0), (4, 3, 2), (2, 3, 4, 5)]),
)
MODELS = st.builds(
    Drawn,
    kind=st.sampled_from(["adapter", "adapter", "model", "on a model"]),
    rank=st.integers(1, 9),
    scale=st.sampled_from([0.25, 1.0, 2.0, -0.5]),
    dtype=st.sampled_from(["F32", "BF16", "F16"]),
    on=st.tuples(*[st.booleans()] * 5),
    transposed=st.booleans(),
)
WEIGHTS = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 0.5, 0.25]),
    st.floats(-2, 2).map(lambda w: round(w, 3)),
)
DENSITIES = st.one_of(
    st.sampled_from([1.0, 1e-9, 0.5]), st.floats(0, 1, exclude_min=True).map(lambda d: max(d, 1e-6))
)


@st.composite
def cases(draw: st.DrawFn, most_models: int = 4) -> Case:
    matrices = draw(st.lists(MATRICES, min_size=1, max_size=3))
    others = draw(st.lists(OTHERS, max_size=2))
    shapes: dict[str, Shape] = {f"layers.{i}.w{i}.weight": s for i, s in enumerate(matrices)}
    shapes |= {f"layers.{i}.experts.{i}": s for i, s in enumerate(others)}
    return Case(
        shapes=shapes,
        dtype=draw(st.sampled_from(list(DTYPES.values()))),
        out_dtype=draw(st.none() | st.sampled_from(list(DTYPES))),
        models=draw(st.lists(MODELS, min_size=1, max_size=most_models)),
        tile_elements=draw(st.sampled_from([64, 100, 256, 512])),
        threads=draw(st.integers(1, 3)),
        io=draw(st.sampled_from(["mmap", "read"])),
        seed=draw(st.integers(0, 1 << 20)),
    )


def write(case: Case, folder: Path) -> SmallInputs:
    """The files of an example."""
    inputs = SmallInputs(folder, case.shapes, case.dtype, seed=case.seed)
    for model in case.models:
        names = [name for name, on in zip(case.shapes, model.on, strict=False) if on]
        matrices = [name for name in names if ".experts." not in name] or [next(iter(case.shapes))]
        if model.kind == "model":
            inputs.add_model(names)
            continue
        own = None
        if model.kind == "on a model":
            own = inputs.add_model(names)
            inputs.entries.remove(own)
        oblong = all(case.shapes[name][0] != case.shapes[name][1] for name in matrices)
        inputs.add_adapter(
            matrices,
            model.rank,
            scale=model.scale,
            dtype=model.dtype,
            on=own,
            transposed=model.transposed and oblong,
        )
    return inputs


Formula = Callable[[SmallInputs, str], Answer]


def hold(
    case: Case,
    method: str,
    per_model: Sequence[Mapping[str, Any]],
    shared: Mapping[str, Any],
    formula: Formula,
) -> None:
    """Merge an example and compare every tensor with the formula."""
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "TILE_ELEMENTS", case.tile_elements)
        folder = Path(place)
        inputs = write(case, folder)
        dtype = DTYPES[case.out_dtype] if case.out_dtype else case.dtype
        answers = {name: formula(inputs, name) for name in case.shapes}
        for answer in answers.values():  # what is too large for the type is refused
            assume(np.isfinite(rounded(np.abs(answer.value) + answer.slack, dtype)).all())
        recipe = inputs.recipe(method, per_model, shared, case.out_dtype)
        sm.merge(recipe, out=folder / "out", memory="4GiB", threads=case.threads, io=case.io)
        merged = read_back(folder / "out")
        assert merged.keys() == case.shapes.keys()
        for name, tensor in merged.items():
            assert tensor[:2] == (dtype, case.shapes[name])
            check(name, decode(tensor), dtype, answers[name])


def vectors(of: Callable[[Entry, str], Any], inputs: SmallInputs, name: str) -> list[Any]:
    return [of(entry, name) for entry in inputs.entries]


def four(values: st.SearchStrategy[float]) -> st.SearchStrategy[list[float]]:
    return st.lists(values, min_size=4, max_size=4)


@FAST
@given(cases(), four(WEIGHTS), st.booleans())
def test_linear(case: Case, drawn: list[float], normalize: bool) -> None:
    weights = drawn[: len(case.models)]
    assume(not normalize or abs(sum(weights)) > 1e-6)
    hold(
        case,
        "linear",
        [{"weight": weight} for weight in weights],
        {"normalize": normalize},
        lambda inputs, name: dense.linear(
            vectors(inputs.model, inputs, name), weights, normalize=normalize
        ),
    )


@FAST
@given(cases(), four(WEIGHTS), WEIGHTS, st.booleans())
def test_task_arithmetic(case: Case, drawn: list[float], lambda_: float, normalize: bool) -> None:
    weights = drawn[: len(case.models)]
    assume(not normalize or abs(sum(weights)) > 1e-6)
    hold(
        case,
        "task_arithmetic",
        [{"weight": weight} for weight in weights],
        {"lambda": lambda_, "normalize": normalize},
        lambda inputs, name: dense.task_arithmetic(
            inputs.origin(name),
            vectors(inputs.delta, inputs, name),
            weights,
            lambda_=lambda_,
            normalize=normalize,
        ),
    )


@FAST
@given(cases(), four(WEIGHTS), four(DENSITIES), WEIGHTS, st.booleans())
def test_ties(
    case: Case, drawn: list[float], densities: list[float], lambda_: float, normalize: bool
) -> None:
    def formula(inputs: SmallInputs, name: str) -> Answer:
        models = [i for i, one in enumerate(inputs.entries) if inputs.touches(one, name)]
        return dense.ties(
            inputs.origin(name),
            [inputs.task_vector(inputs.entries[i], name) for i in models],
            [drawn[i] for i in models],
            [densities[i] for i in models],
            lambda_=lambda_,
            normalize=normalize,
        )

    pairs = zip(drawn, densities, case.models, strict=False)
    per_model = [{"weight": weight, "density": density} for weight, density, _ in pairs]
    hold(case, "ties", per_model, {"lambda": lambda_, "normalize": normalize}, formula)


@FAST
@given(cases(most_models=1), WEIGHTS)
def test_passthrough(case: Case, scale: float) -> None:
    hold(
        case,
        "passthrough",
        [{"scale": scale}],
        {},
        lambda inputs, name: dense.passthrough(inputs.model(inputs.entries[0], name), scale),
    )
