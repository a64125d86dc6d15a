"""Whether two stored tensors are the same, read block by block: the one thing that headers hide.

PEFT saves the base's embedding beside an adapter on it. Taken for trained, it would count as a
model that changes the tensor; only its bytes tell that it does not.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from streammerge.arrays import Rows
from streammerge.errors import BadInput
from streammerge.kernels.casts import narrow, widen
from streammerge.storage.smallfile import open_regular, pread
from streammerge.words import DType, Extent, Factors, Matrix, Replacement, Update

BLOCK_ELEMENTS: Final = 1 << 18


def same_values(copy: Extent, original: Extent) -> bool:
    """Whether a float tensor is another one of its shape, bit by bit, in the copy's dtype.

    A model that was loaded in another dtype for training leaves the original's values, rounded to
    that. Stops at the first block that differs. Raises BadInput for a file that ends early,
    StorageError for one that cannot be read.
    """
    with open_regular(copy.path) as (first, _), open_regular(original.path) as (second, _):
        for start in range(0, copy.spec.numel, BLOCK_ELEMENTS):
            size = min(BLOCK_ELEMENTS, copy.spec.numel - start)
            held, own = _read(first, copy, start, size), _read(second, original, start, size)
            if held != _cast(own, original.spec.dtype, copy.spec.dtype):
                return False
    return True


def same_update(one: Update | None, other: Update | None) -> bool:
    """Whether two updates do the same, as far as that shows in what they store.

    What is not known to be the same counts as different: two tensors that could have been one are
    then written twice, which costs space and changes nothing.
    """
    match one, other:
        case None, None:
            return True
        case Factors(), Factors():
            sides = (one.left, other.left), (one.right, other.right)
            plain = one.values is None and other.values is None  # AdaLoRA ties no weights
            return plain and one.scale == other.scale and all(same_matrix(*pair) for pair in sides)
        case Replacement(), Replacement():
            alike = one.rows == other.rows and one.extent.spec.shape == other.extent.spec.shape
            return (
                alike
                and same_values(one.extent, other.extent)
                and same_update(one.then, other.then)
            )
    return False


def same_matrix(one: Matrix, other: Matrix) -> bool:
    """Whether two matrices are equal bit by bit, whichever way each is stored."""
    if (one.rows, one.cols) != (other.rows, other.cols):
        return False
    if one.transposed == other.transposed:
        return same_values(one.extent, other.extent)
    if one.extent.spec.dtype != other.extent.spec.dtype:
        return False
    upright, turned = (other, one) if one.transposed else (one, other)
    return _is_transpose(upright.extent, turned.extent)


def _is_transpose(one: Extent, other: Extent) -> bool:
    """`one` `[rows, cols]`, `other` `[cols, rows]`: bands of rows against bands of columns."""
    rows, cols = one.spec.shape
    step = max(1, BLOCK_ELEMENTS // cols)
    width = one.spec.dtype.itemsize
    with open_regular(one.path) as (first, _), open_regular(other.path) as (second, _):
        for top in range(0, rows, step):
            count = min(step, rows - top)
            band = np.frombuffer(_read(first, one, top * cols, count * cols), np.uint8)
            columns = (_read(second, other, col * rows + top, count) for col in range(cols))
            turned = np.frombuffer(b"".join(columns), np.uint8).reshape(cols, count, width)
            if not np.array_equal(band.reshape(count, cols, width), turned.transpose(1, 0, 2)):
                return False
    return True


def _read(descriptor: int, extent: Extent, start: int, size: int) -> bytes:
    width = extent.spec.dtype.itemsize
    data = pread(descriptor, size * width, extent.offset + start * width)
    if len(data) < size * width:
        raise BadInput(
            "the file ends before its last tensor does",
            where=extent.path,
            remedy="the file was cut short; fetch it again",
        )
    return data


def _cast(data: bytes, dtype: DType, wanted: DType) -> bytes:
    if dtype is wanted:
        return data
    rows: Rows = np.empty((1, len(data) // dtype.itemsize), np.float32)
    widen(np.frombuffer(data, np.uint8), dtype, rows)
    out = np.empty(rows.size * wanted.itemsize, np.uint8)
    narrow(rows, wanted, out)
    return out.tobytes()
