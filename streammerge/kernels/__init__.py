"""The few hot loops. Importing this imports neither numba nor torch; the first call does."""

from streammerge.kernels.cache import FOLDER
from streammerge.kernels.casts import narrow, widen
from streammerge.kernels.loading import load, will_compile
from streammerge.kernels.product import multiply
from streammerge.kernels.prune import Cut, trim
from streammerge.kernels.vote import elect

__all__ = ["FOLDER", "Cut", "elect", "load", "multiply", "narrow", "trim", "widen", "will_compile"]
