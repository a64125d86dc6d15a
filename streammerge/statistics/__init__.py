"""Statistics of whole tensors, as folds over tiles."""

from streammerge.statistics.kth_magnitude import KthMagnitude

__all__ = ["KthMagnitude"]
