"""Statistics of whole tensors, as folds over tiles."""

from streammerge.statistics.column_norms import ColumnNorms, ColumnSquares
from streammerge.statistics.gram import Gram
from streammerge.statistics.kth_magnitude import KthMagnitude

__all__ = ["ColumnNorms", "ColumnSquares", "Gram", "KthMagnitude"]
