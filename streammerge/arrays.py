"""The array types, as method signatures and kernels name them. Importing this imports numpy.

On a CUDA device tensors of torch stand for them, with the same shapes and types; see `device`.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import numpy as np
from numpy.typing import NDArray

Rows: TypeAlias = NDArray[np.float32]  # [rows, cols]; on a device, a torch tensor like it
RawBytes: TypeAlias = NDArray[np.uint8]  # [bytes], as they lie in the file

# What a method's first argument is; the annotation tells which. All are [models, rows, cols].
Deltas: TypeAlias = Annotated[NDArray[np.float32], "deltas"]  # each model minus the base
Weights: TypeAlias = Annotated[NDArray[np.float32], "weights"]  # the models themselves
Vectors: TypeAlias = Annotated[NDArray[np.float32], "either"]  # deltas where there is a base

# A keyword argument of this type is handed the base's rows, not to be changed.
Base: TypeAlias = Annotated[NDArray[np.float32], "base"]  # [rows, cols]
# A method on low-rank updates is handed them in a common orthonormal basis; see sources/core.py.
Core: TypeAlias = NDArray[np.float64]  # [left basis, right basis], of one update
Cores: TypeAlias = Annotated[NDArray[np.float64], "cores"]  # [models, left basis, right basis]

PerModel: TypeAlias = NDArray[np.float64]  # [models], in the order of the recipe
InnerProducts: TypeAlias = NDArray[np.float64]  # [..., models, models]
Factor: TypeAlias = float | NDArray[np.float64]  # of one model: a number, [rows, 1] or [1, cols]
