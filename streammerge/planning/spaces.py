"""Which tensors are merged as low-rank updates, which cannot be, and whether that will do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from streammerge.errors import BadInput, ConfigError, Problems
from streammerge.planning.inputs import Inputs, Model
from streammerge.planning.pairs import Pairs
from streammerge.planning.parts import Assembly
from streammerge.recipe import Recipe
from streammerge.words import Addition, Dora, Factors, Replacement

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Split:
    """The tensors that are merged, by what the models do to them.

    Those that have low-rank updates alone; and by the reason why they have not, those that an
    adapter replaces and all others.
    """

    low_rank: Sequence[str]
    replaced: Mapping[str, Sequence[str]]
    dense: Mapping[str, Sequence[str]]


def split(inputs: Inputs) -> Split:
    """Sort the tensors that a model takes part in."""
    low_rank: list[str] = []
    replaced: dict[str, list[str]] = {}
    dense: dict[str, list[str]] = {}
    for name, extent in inputs.donor.tensors.items():
        part = [model for model in inputs.models if model.takes_part(name)]
        if not part or not extent.spec.numel or not extent.spec.dtype.mergeable:
            continue
        reasons = [why for model in part if (why := _why_dense(model, name))]
        if not reasons:
            low_rank.append(name)
        elif all(_replaces(model, name) or not _why_dense(model, name) for model in part):
            replaced.setdefault(reasons[0], []).append(name)
        else:
            dense.setdefault(reasons[0], []).append(name)
    return Split(low_rank, replaced, dense)


def _replaces(model: Model, tensor: str) -> bool:
    if model.adapter is None or not model.on_base:
        return False
    return isinstance(model.adapter.updates.get(tensor), Replacement)


def _why_dense(model: Model, tensor: str) -> str | None:
    """What a model does to a tensor, where that is no low-rank update of the base."""
    if model.adapter is None:
        return f"{model.name} is a full model"
    if not model.on_base:
        return f"{model.name} is an adapter of another model"
    match model.adapter.updates[tensor]:
        case Factors():
            return None
        case Addition():
            return f"{model.name} adds to a bias"
        case Dora():
            return f"{model.name} is a DoRA, which rescales what it adapts"
        case Replacement():
            return f"{model.name} saves it whole"


def check_core(recipe: Recipe, found: Split, problems: Problems) -> list[str]:
    """Whether the tensors suit a method on core matrices; returns notes for the plan."""
    others = {**found.replaced, **found.dense}
    if recipe.method.space == "cores":
        what = f"{recipe.method.name} merges low-rank updates, and some here are not"
        _refuse(what, others, "another method; task_arithmetic and ties take any update", problems)
    elif recipe.space == "core":
        return [f"core space: {_count(found.low_rank)}", *_in_full(others)]
    return []


def _in_full(others: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for reason, names in others.items():
        yield f"full space: {_some(names)}, as {reason}"


def check_adapter(
    recipe: Recipe, found: Split, assembly: Assembly, pairs: Pairs, problems: Problems
) -> None:
    """Whether the merge can be written as an adapter."""
    if recipe.base is None:
        problems.add(
            ConfigError(
                "an adapter as output needs a base to be an adapter of",
                found="no base_model",
                remedy="add `base_model: ...`",
            )
        )
        return
    what = "the merge is no adapter: some of its updates are not low-rank"
    _refuse(what, found.dense, "`kind: model`", problems)
    if not found.low_rank:
        problems.add(
            BadInput(
                "the merge is no adapter: there is no low-rank update in it",
                found=f"{sum(map(len, found.replaced.values()))} tensors that are saved whole",
                remedy="write `kind: model`",
            )
        )
        return
    whys: dict[str | None, str] = {}
    for name in found.low_rank:
        whys.setdefault(pairs.why_none(name, assembly.parts(name)), name)
    for why, name in whys.items():
        if why is not None:
            problems.add(
                ConfigError(
                    "the merge cannot be written as an adapter",
                    where=name,
                    found=why,
                    remedy="write `kind: model`, or choose another method",
                )
            )


def _refuse(
    what: str, others: Mapping[str, Sequence[str]], instead: str, problems: Problems
) -> None:
    for reason, names in others.items():
        problems.add(
            BadInput(
                what,
                found=f"{_some(names)}: {reason}",
                expected="LoRA adapters of the base and nothing else",
                remedy=f"leave that model out, or choose {instead}",
            )
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'' if len(names) == 1 else 's'}"
