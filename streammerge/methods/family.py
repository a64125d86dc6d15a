"""What the family of TIES shares: prune each task vector, vote or add up, add to the base.

Each method names its own defaults; the parameters that are the same in all of them stand here.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from streammerge.arrays import Deltas, PerModel, Rows
from streammerge.kernels import Cut, add_up, elect, trim
from streammerge.kernels.vote import Divisor, Vote
from streammerge.statistics.kth_magnitude import largest
from streammerge.words import Knob

Rescale: TypeAlias = Literal["none", "l1", "density"]
Divide: TypeAlias = Literal["normalize", "weights", "count", "none"]
Equal: TypeAlias = Literal["first", "all"]

Weight: TypeAlias = Annotated[PerModel, Knob(1.0, "factor of this model's task vector")]
Density: TypeAlias = Annotated[PerModel, Knob(1.0, "share of elements to keep", above=0, up_to=1)]
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
