"""Statistics of whole tensors, as folds over tiles."""

from streammerge.statistics.gram import Gram
from streammerge.statistics.kth_magnitude import KthMagnitude

__all__ = ["Gram", "KthMagnitude"]
