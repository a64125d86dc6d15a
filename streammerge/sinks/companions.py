"""The small files of an output: config, tokenizer, index, model card, recipe and record.

None of them carries a time, host, user or absolute path: the same merge gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streammerge.errors import StorageError
from streammerge.storage.folder import CONFIG, INDEX, donor_files, output_config
from streammerge.storage.rundir import RECORD, write_file
from streammerge.storage.shard import ShardLayout
from streammerge.words import DType

RECIPE = "streammerge.yaml"
CARD = "README.md"


def copy_donor_files(
    folder: Path, donor: Path, config: Mapping[str, Any], dtype: DType | None
) -> None:
    """Tokenizer, licence and the like from the donor; its config with the output's dtype."""
    for relative in donor_files(donor):
        try:
            data = (donor / relative).read_bytes()
        except OSError as error:
            what = f"cannot be read: {error.strerror}"
            raise StorageError(what, where=str(donor / relative)) from error
        if relative == Path(CONFIG):
            changed = output_config(config, dtype=dtype)
            if changed != config:
                data = _json(changed)
        target = folder / relative
        target.parent.mkdir(exist_ok=True)
        write_file(target, data)


def write_index(folder: Path, layouts: Sequence[ShardLayout]) -> None:
    """The index of a sharded output; `total_size` is in bytes of tensors."""
    if len(layouts) == 1:
        return
    extents = {name: extent for layout in layouts for name, extent in layout.extents.items()}
    total = sum(extent.spec.nbytes for extent in extents.values())
    weight_map = {name: extent.path for name, extent in extents.items()}
    write_file(folder / INDEX, _json({"metadata": {"total_size": total}, "weight_map": weight_map}))


def write_documents(folder: Path, *, card: str, recipe: str, record: Mapping[str, Any]) -> None:
    """The model card, the recipe, and last the record of the merge."""
    write_file(folder / CARD, card.encode())
    write_file(folder / RECIPE, recipe.encode())
    write_file(folder / RECORD, _json(record))


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
