"""Values that are not finite, and which input they come from."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from streammerge.arrays import PerModel
from streammerge.errors import BadInput
from streammerge.kernels.casts import not_finite
from streammerge.planning.inputs import Inputs
from streammerge.scheduler import Merge
from streammerge.scratch import Scratch
from streammerge.sources.dense import Dense
from streammerge.storage.bytesource import Files
from streammerge.words import Extent

_REMEDY = "fetch or train that model again, leave it out, or keep such values with --nan keep"


class Spoils:
    """Finds whose values spoil a tile of a merge."""

    def __init__(self, inputs: Inputs, files: Files) -> None:
        self._inputs = inputs
        self._files = files

    def refuse_model(self, item: Merge, norms: PerModel) -> None:
        """By its norm, which tells whose the values are where the result could not."""
        if not np.isfinite(norms[0]):
            return  # no base to compare with, or one that spoils the result itself
        for model, squared in zip(item.job.models, norms[1:], strict=False):  # none in a mere cast
            if not np.isfinite(squared):
                what = f"{self._inputs.models[model].name} has values that are NaN or infinite"
                raise BadInput(what, where=_rows_of(item), remedy=_REMEDY)

    def refuse_rows(self, item: Merge, count: int, scratch: Scratch) -> None:
        """The result has values that are not finite: look for them in the full models."""
        rows = scratch.rows("looked through", item.tile.shape(item.job.target.spec))
        for extent in self._stored(item.job.target.spec.name):
            Dense(self._files, extent).read(item.tile, rows, scratch)
            if held := not_finite(rows):
                raise BadInput(
                    f"{_rows_of(item)}: {held} values are NaN or infinite",
                    where=extent.path,
                    remedy=_REMEDY,
                )
        adapters = ", ".join(model.name for model in self._inputs.models if model.adapter)
        raise BadInput(
            f"the merge has {count} values that are NaN or infinite",
            where=_rows_of(item),
            found="none in the full models"
            + (f"; adapters: {', '.join(adapters)}" * bool(adapters)),
            remedy="try the merge without one model after the other, or --nan keep",
        )

    def _stored(self, tensor: str) -> Iterator[Extent]:
        """The tensor in every full model, each file once."""
        base = [self._inputs.base] if self._inputs.base else []
        folders = {f.path: f for f in [*base, *(model.folder for model in self._inputs.models)]}
        for folder in folders.values():
            if tensor in folder.tensors:
                yield folder.tensors[tensor]


def refuse_overflow(item: Merge, count: int) -> None:
    """A cast that makes a finite value infinite is an error, whatever is done with NaN."""
    raise BadInput(
        f"the merge has {count} values that are too large for {item.job.target.spec.dtype.label}",
        where=_rows_of(item),
        remedy="choose out_dtype: bfloat16 or float32",
    )


def _rows_of(item: Merge) -> str:
    return f"{item.job.target.spec.name}, rows {item.tile.start} to {item.tile.stop - 1}"
