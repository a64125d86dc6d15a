"""crc32c of bytes, and the crc32c of two runs of bytes laid end to end.

The polynomial is Castagnoli's (RFC 3720, appendix B.4). Combining follows from crc being linear
over GF(2): appending n zero bytes to the first run is a 32 x 32 matrix, made by squaring.
"""

from __future__ import annotations

from functools import cache

from crc32c import crc32c

from streammerge.arrays import RawBytes

_POLYNOMIAL = 0x82F63B78  # reflected

_Matrix = tuple[int, ...]  # 32 columns, each the image of one bit


def checksum(data: bytes | RawBytes, start: int = 0) -> int:
    """crc32c of the bytes, going on from the checksum of what came before."""
    view = data if isinstance(data, bytes) else data.data
    return int(crc32c(view, start))  # the GIL is released for large data


def _times(matrix: _Matrix, vector: int) -> int:
    result = 0
    for column in matrix:
        if vector & 1:
            result ^= column
        vector >>= 1
    return result


@cache
def _zeros(power: int) -> _Matrix:
    """The effect of 2 ** power zero bits."""
    if power == 0:
        return (_POLYNOMIAL, *(1 << bit for bit in range(31)))
    half = _zeros(power - 1)
    return tuple(_times(half, column) for column in half)


def combine(first: int, second: int, second_bytes: int) -> int:
    """crc32c of two runs end to end, from the crc32c of each and the length of the second."""
    bits, power = second_bytes * 8, 0
    while bits:
        if bits & 1:
            first = _times(_zeros(power), first)
        bits >>= 1
        power += 1
    return first ^ second
