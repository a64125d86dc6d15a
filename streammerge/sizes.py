"""Sizes in bytes, as people write and read them: `2GiB`, `512MiB`, `2GB`, `1.5GiB`, `1048576`."""

from __future__ import annotations

import re
from fractions import Fraction

from streammerge.errors import ConfigError

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SIZE = re.compile(r"([0-9]{1,30}(?:\.[0-9]{1,30})?) ?([a-z]*)")
# File offsets are signed 64-bit numbers.
_MOST_BYTES = 2**63 - 1


def parse_size(text: str, where: str | None = None) -> int:
    """Bytes of a size such as `2GiB` (2^31), `2GB` (2 * 10^9), `1.5GiB` or `1048576`.

    Units count in any case of letters; a fraction of a byte is cut off. `where` it was given, such
    as an option, stands before the error.

    Raises ConfigError when the text is no size, less than one byte, or more than a file can hold.
    """
    match = _SIZE.fullmatch(text.strip().lower())
    if match and match[2] in _UNITS:
        size = int(Fraction(match[1]) * _UNITS[match[2]])
        if 1 <= size <= _MOST_BYTES:
            return size
    raise ConfigError(
        "this is not a size",
        where=where,
        found=repr(text),
        expected="a number of bytes, or a number with KiB, MiB, GiB, TiB, KB, MB, GB or TB",
        remedy="for example 2GiB or 512MiB",
    )


def format_size(n: int) -> str:
    """A number of bytes for people, in binary units: `17 B`, `384 MiB`, `2.5 GiB`."""
    value = float(n)
    for unit in ("B", "KiB", "MiB", "GiB"):
        # 1023.96 would be printed as 1024.0, so it belongs to the next unit.
        if round(value, 1) < 1024:
            return _trimmed(value, unit)
        value /= 1024
    return _trimmed(value, "TiB")


def _trimmed(value: float, unit: str) -> str:
    return f"{value:.1f}".removesuffix(".0") + f" {unit}"
