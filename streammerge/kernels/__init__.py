"""The few hot loops. Importing this imports neither numba nor torch; the first call does."""

from streammerge.kernels.cache import FOLDER
from streammerge.kernels.casts import narrow, widen
from streammerge.kernels.drop import drop, drop_by_rank
from streammerge.kernels.loading import load, will_compile
from streammerge.kernels.product import multiply
from streammerge.kernels.prune import Cut, drop_largest, trim
from streammerge.kernels.vote import elect
from streammerge.kernels.weighted import add_up, scaled

__all__ = [
    "FOLDER",
    "Cut",
    "add_up",
    "drop",
    "drop_by_rank",
    "drop_largest",
    "elect",
    "load",
    "multiply",
    "narrow",
    "scaled",
    "trim",
    "widen",
    "will_compile",
]
