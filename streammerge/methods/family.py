"""What the family of TIES shares: prune each task vector, vote or add up, add to the base.

Each method names its own defaults; the parameters that are the same in all of them stand here.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from streammerge.arrays import Deltas, PerModel, Rows
from streammerge.declarations import Knob, Knobs
from streammerge.kernels import Cut, add_up, elect, trim
from streammerge.kernels.vote import Divisor, Vote
from streammerge.statistics.kth_magnitude import largest

Rescale: TypeAlias = Literal["none", "l1", "density"]
Divide: TypeAlias = Literal["normalize", "weights", "count", "none"]
Equal: TypeAlias = Literal["first", "all"]

Weight: TypeAlias = Annotated[PerModel, Knob(1.0, "factor of this model's task vector")]
Density: TypeAlias = Annotated[
    PerModel, Knob(1.0, "share of elements to keep", above=0, up_to=1, nothing_at=0)
]
Lambda: TypeAlias = Annotated[float, Knob(1.0, "factor of the merged task vector")]
Unscaled: TypeAlias = Annotated[
    Rescale,
    Knob("none", "scale what is kept to the old L1 norm, or by 1/density", switch=("none", "l1")),
]
ToOldNorm: TypeAlias = Annotated[
    Rescale,
    Knob("l1", "scale what is kept to the old L1 norm, or by 1/density", switch=("none", "l1")),
]
OverAgreeing: TypeAlias = Annotated[bool, Knob(True, "divide by the weights that agree")]
NotDivided: TypeAlias = Annotated[bool, Knob(False, "divide by the weights (that agree)")]
Voting: TypeAlias = Annotated[
    Vote, Knob("weighted", "the sign of sum w d, of sum d (the paper), or of most w d")
]
Dividing: TypeAlias = Annotated[
    Divide, Knob("normalize", "what agrees is divided by: as `normalize` says, or by its own name")
]

Equals: TypeAlias = Annotated[
    Equal, Knob("first", "of equal magnitudes at the threshold, keep the first or all")
]


# What divides by less than this is divided by 1, and a negative weight may lose a vote of its own.
_LEAST_WEIGHT = 1e-8


def trimmed(deltas: Deltas, cut: Cut) -> Deltas:
    """What magnitude pruning leaves of each model, in place."""
    return trim(deltas, cut)


def kept_share(numel: int, density: float) -> float:
    """The share that magnitude pruning keeps."""
    return largest(numel, density) / numel


def voted(
    deltas: Deltas, weight: PerModel, vote: Vote, divide: Divide, normalize: bool, lambda_: float
) -> Rows:
    """The mean, or sum, of what agrees with the elected sign."""
    divisor: Divisor = ("weights" if normalize else "none") if divide == "normalize" else divide
    return elect(deltas, weight, vote=vote, divide=divisor, scale=lambda_)


def summed(deltas: Deltas, weight: PerModel, total: float, normalize: bool, lambda_: float) -> Rows:
    """The sum, or the mean by the weights of all models of the recipe."""
    return add_up(deltas, weight, lambda_ / total if normalize else lambda_)


def alone_in_vote(knobs: Knobs) -> float | None:
    """The factor of a delta that nobody else votes on, where nothing of it is pruned."""
    weight, shared = float(knobs.per_model["weight"][0]), knobs.shared
    if _is_pruned(knobs) or weight < _LEAST_WEIGHT:
        return None
    divide = shared["divide"]
    by_weights = divide == "weights" or (divide == "normalize" and shared["normalize"])
    return float(shared["lambda"]) * (1.0 if by_weights else weight)


def alone_in_sum(knobs: Knobs) -> float | None:
    """The factor of a delta that is the only one, where nothing of it is pruned."""
    if _is_pruned(knobs):
        return None
    weight = float(knobs.per_model["weight"][0])
    total = float(knobs.of_all["weight"].sum()) if knobs.shared["normalize"] else 1.0
    return float(knobs.shared["lambda"]) * (weight / total)


def _is_pruned(knobs: Knobs) -> bool:
    own = knobs.per_model
    return bool(own["density"][0] < 1 or ("gamma" in own and own["gamma"][0] > 0))
