"""Which tensors are merged as low-rank updates, which cannot be, and whether that will do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streammerge.errors import BadInput, Problems
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


def check_core(
    recipe: Recipe, found: Split, assembly: Assembly, pairs: Pairs, problems: Problems
) -> list[str]:
    """Whether the tensors suit a method on core matrices; returns notes for the plan."""
    others = {**found.replaced, **found.dense}
    if recipe.method.space == "cores":
        what = f"{recipe.method.name} merges low-rank updates, and some here are not"
        _refuse(what, others, problems)
        return []
    if recipe.space == "full" or not found.low_rank:
        return []
    first = found.low_rank[0]
    if why := pairs.why_none(first, assembly.parts(first)):
        return [f"full space: all tensors, as {why}"]
    in_full = [f"full space: {some(names)}, as {reason}" for reason, names in others.items()]
    return [f"{recipe.space} space: {count(found.low_rank)}", *in_full]


def _refuse(what: str, others: Mapping[str, Sequence[str]], problems: Problems) -> None:
    for reason, names in others.items():
        problems.add(
            BadInput(
                what,
                found=f"{some(names)}: {reason}",
                expected="LoRA adapters of the base and nothing else",
                remedy="leave that model out, or choose another method: task_arithmetic and ties "
                "take any update",
            )
        )


def some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def count(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'' if len(names) == 1 else 's'}"
