"""Statistics of whole tensors, as folds over tiles; and what needs no read."""

from streammerge.statistics.column_norms import ColumnNorms, ColumnSquares
from streammerge.statistics.given import ElementCount, ModelCount, Random, TotalWeight
from streammerge.statistics.gram import Gram
from streammerge.statistics.kth_magnitude import KthMagnitude
from streammerge.statistics.kth_value import KthValue
from streammerge.statistics.rescaling import Rescaling
from streammerge.statistics.sums import Sums

__all__ = [
    "ColumnNorms",
    "ColumnSquares",
    "ElementCount",
    "Gram",
    "KthMagnitude",
    "KthValue",
    "ModelCount",
    "Random",
    "Rescaling",
    "Sums",
    "TotalWeight",
]
