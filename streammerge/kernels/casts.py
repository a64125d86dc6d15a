"""Casts between stored bytes and float32 rows.

bfloat16, which numpy does not know, is carried as `uint16` bits. Narrowing rounds to nearest even.
"""

from __future__ import annotations

import numpy as np

from streammerge.arrays import RawBytes, Rows
from streammerge.kernels.faces import two_faced
from streammerge.scratch import Scratch
from streammerge.words import DType

# The numpy type that carries the stored bytes of each float type.
CARRIER: dict[DType, type[np.generic]] = {
    DType.BF16: np.uint16,
    DType.F16: np.float16,
    DType.F32: np.float32,
    DType.F64: np.float64,
}


@two_faced(by=2)
def widen(stored: RawBytes, dtype: DType, out: Rows) -> None:
    """Stored little-endian elements `[n * itemsize]` to float32 `[rows, cols]`, n = rows * cols."""
    elements = stored.view(CARRIER[dtype])
    flat = out.reshape(-1)
    if dtype is DType.BF16:
        from streammerge.kernels import cpu

        cpu.bfloat16_to_float32(elements, flat)
    elif dtype is DType.F64:
        with np.errstate(over="ignore"):  # beyond float32: infinite, found when it is written
            np.copyto(flat, elements, casting="same_kind")
    else:
        np.copyto(flat, elements)


@two_faced()
def narrow(rows: Rows, dtype: DType, out: RawBytes) -> int:
    """float32 `[rows, cols]` to stored elements; returns how many of those are not finite."""
    from streammerge.kernels import cpu

    flat = rows.reshape(-1)
    elements = out.view(CARRIER[dtype])
    if dtype is DType.BF16:
        return int(cpu.float32_to_bfloat16(flat, elements))
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is counted below
        np.copyto(elements, flat, casting="same_kind")
    if dtype is DType.F16:
        return int(np.count_nonzero(~np.isfinite(elements)))
    return int(cpu.count_not_finite(flat))


@two_faced()
def not_finite(rows: Rows) -> int:
    """How many elements are NaN or infinite."""
    from streammerge.kernels import cpu

    return int(cpu.count_not_finite(rows.reshape(-1)))


def not_finite_stored(stored: RawBytes, dtype: DType) -> int:
    """How many stored elements `[n * itemsize]` of a float type are NaN or infinite."""
    elements = stored.view(CARRIER[dtype])
    if dtype is DType.BF16:
        return int(np.count_nonzero(elements & 0x7F80 == 0x7F80))  # all bits of the exponent
    return int(np.count_nonzero(~np.isfinite(elements)))


def round_to(rows: Rows, dtype: DType, scratch: Scratch) -> None:
    """Rows as they will be stored, still as float32; an overflow is found when they are."""
    if dtype not in (DType.F32, DType.F64):
        stored = scratch.array("rounded", (rows.size * dtype.itemsize,), np.uint8)
        narrow(rows, dtype, stored)
        widen(stored, dtype, rows)
