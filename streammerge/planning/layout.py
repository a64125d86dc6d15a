"""The shards of the output: the donor's own, or packed anew to a size."""

from __future__ import annotations

from collections.abc import Sequence

from streammerge.planning.outline import Outline
from streammerge.storage.folder import ModelFolder, shard_names
from streammerge.storage.shard import ShardLayout, lay_out
from streammerge.words import DType, TensorSpec


def output_spec(spec: TensorSpec, outline: Outline, out_dtype: DType | None) -> TensorSpec:
    """A tensor as it will be written: floating ones take the recipe's dtype."""
    rows = outline.rows.get(spec.name)
    shape = spec.shape if rows is None else (rows, *spec.shape[1:])
    dtype = out_dtype if out_dtype is not None and spec.dtype.mergeable else spec.dtype
    return TensorSpec(spec.name, shape, dtype)


def lay_out_shards(
    donor: ModelFolder, outline: Outline, out_dtype: DType | None, shard_bytes: int | None
) -> tuple[ShardLayout, ...]:
    """The donor's shards, tensors in its order; or filled up to `shard_bytes` each.

    What the donor does not store comes last.

    Where a shard keeps all dtypes, its data starts at the donor's offset modulo the page, so that
    file systems which can will share the blocks of untouched tensors.
    """
    groups = [
        [
            output_spec(extent.spec, outline, out_dtype)
            for name, extent in shard.tensors.items()
            if outline.keeps(name)
        ]
        for shard in donor.shards
    ]
    added = (donor.tensors[name].spec for name in outline.added)
    groups[-1] += [output_spec(spec, outline, out_dtype) for spec in added]
    starts: list[int | None] = [shard.data_start for shard in donor.shards]
    if shard_bytes is not None:
        groups = _pack([spec for group in groups for spec in group], shard_bytes)
        starts = [None] * len(groups)
    names = shard_names(len(groups))
    return tuple(lay_out(*one) for one in zip(names, groups, starts, strict=True))


def _pack(specs: Sequence[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    """Fill shards in order; a tensor larger than the size gets one of its own."""
    groups: list[list[TensorSpec]] = [[]]
    room = shard_bytes
    for spec in specs:
        if groups[-1] and spec.nbytes > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(spec)
        room -= spec.nbytes
    return groups
