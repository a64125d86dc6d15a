"""Files of weights that end in zeros, as an interrupted copy of the right size does."""

from __future__ import annotations

import os
from collections.abc import Iterator

from streammerge.planning.inputs import Inputs
from streammerge.storage.header import Header
from streammerge.storage.smallfile import open_regular, pread

# A copy is torn at pages or blocks; the last tensor of a sound file may well be a row of zeros.
_LEAST_BYTES = 4096
_LOOKED_AT_BYTES = 64 << 10


def zero_tails(inputs: Inputs) -> Iterator[str]:
    """A warning for each file of weights whose last page holds nothing but zeros."""
    for header in inputs.headers():
        zeros = _zeros_at_end(header)
        if zeros >= _LEAST_BYTES:
            more = "or more " if zeros == min(_LOOKED_AT_BYTES, header.data_bytes) else ""
            yield (
                f"{header.path} ends in {zeros} bytes {more}of zeros, as a copy that was "
                "interrupted does: compare it with where it came from"
            )


def _zeros_at_end(header: Header) -> int:
    """How many of the last bytes of the tensors are zeros, as far as they are looked at."""
    length = min(_LOOKED_AT_BYTES, header.data_bytes)
    with open_regular(os.fspath(header.path)) as (descriptor, _):
        tail = pread(descriptor, length, header.size_bytes - length)
    return len(tail) - len(tail.rstrip(b"\0"))
