"""Factors cut to the least rank that misses no more of an update than was asked.

Ranks are numbers of a header, which is written first. So the factors are written at the most that
they may have, apart from the output, their columns in the order of strength; when all are there,
the last columns that may be missed are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from streammerge.arrays import PerModel
from streammerge.planning.adapter_output import Factored
from streammerge.planning.spaces import count, some
from streammerge.report import Missed, Written
from streammerge.sinks.cut import column_squares, cut, row_squares
from streammerge.storage.bytesource import Files, Stamp
from streammerge.storage.header import read_header
from streammerge.storage.rundir import RunDirectory
from streammerge.words import Extent


def trim(written: Written, state: RunDirectory) -> Written:
    """Write the output's shard from the one that was written apart from it.

    Needs no more memory than some blocks of rows. Stopped half-way, it is done again.
    """
    adapter, (layout,) = written.adapter, written.layouts
    assert adapter is not None and adapter.missed_share is not None  # else nothing is to be cut
    header = read_header(state.shards / layout.name)
    stamp = Stamp(header.size_bytes, header.mtime_ns, header.inode)
    missed = {}
    with Files({header.path: stamp}, "read") as files:
        for one in adapter.factored:
            if (whole := written.missed.get(one.tensor)) is not None:
                squares = _strengths(files, one, header.tensors)
                missed[one.tensor] = least_rank(whole, squares, adapter.missed_share)
        trimmed = adapter.of_ranks({tensor: left.rank for tensor, left in missed.items()})
        target = trimmed.layout()
        state.drop(state.output / target.name)  # as a run left it that was stopped here
        sums = cut(files, header.tensors, state.output, target)
    return Written((target,), sums, trimmed, dict(sorted(missed.items())))


def _strengths(files: Files, one: Factored, stored: Mapping[str, Extent]) -> PerModel:
    """Squared norms of what each column of B adds with its row of A, strongest first.

    Their sum over some is the squared norm of all of them, as columns or rows are orthogonal.
    """
    return row_squares(files, stored[one.a.name]) * column_squares(files, stored[one.b.name])


def least_rank(whole: Missed, strengths: PerModel, share: float) -> Missed:
    """What is missed at the least rank that misses no more than a share of the squared norm.

    `whole` is what all columns miss: the answer where that is too much. At least one is left.
    """
    tails = np.append(np.cumsum(strengths[::-1])[::-1][1:], 0.0)  # [r]: beyond rank r + 1
    left = whole.missed**2 + tails
    enough = np.flatnonzero(left <= share * whole.update**2)
    rank = int(enough[0]) + 1 if len(enough) else len(strengths)
    return Missed(rank, whole.update, math.sqrt(left[rank - 1]))


def unmet(written: Written) -> list[str]:
    """A line on the updates of which more is missed than was asked, if there are any."""
    share = (written.adapter and written.adapter.missed_share) or 0.0
    most = math.sqrt(share) * (1 + 1e-9)  # a root and a square have been taken of it
    names = [name for name, one in written.missed.items() if one.relative > most]
    if not names:
        return []
    return [f"{count(names)} miss more than {most:.3g} at the most rank allowed: {some(names)}"]
