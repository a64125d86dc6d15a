"""The small files of an output: config, tokenizer, index, model card, recipe and record.

None of them carries a time, host, user or absolute path: the same merge gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from streammerge.errors import InputChanged, InputMissing
from streammerge.storage.durable import write_file
from streammerge.storage.folder import CONFIG, INDEX
from streammerge.storage.record import RECIPE, RECORD, Record
from streammerge.storage.shard import ShardLayout
from streammerge.storage.smallfile import unreadable

CARD = "README.md"
ADAPTER_CONFIG = "adapter_config.json"


def copy_donated(
    folder: Path,
    given: Mapping[Path, Path],
    digests: Mapping[str, str],
    config: Mapping[str, Any],
    changed: Mapping[str, Any],
) -> None:
    """Tokenizer, licence and the like, relative name by place; the config as it was `changed`.

    `digests` is the sha256 of each of them when the merge began: another file or none is
    `InputChanged` or `InputMissing`.
    """
    for name, digest in digests.items():
        data = _read_unchanged(name, given.get(Path(name)), digest)
        if name == CONFIG and changed != config:
            data = _json(changed)
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        write_file(target, data)


def _read_unchanged(name: str, path: Path | None, digest: str) -> bytes:
    remedy = "leave the inputs alone while a merge runs; put it back, then run the command again"
    if path is None:
        raise InputMissing("was there when the merge began, and is gone", where=name, remedy=remedy)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(str(path), error) from error
    if hashlib.sha256(data).hexdigest() != digest:
        what = "the file changed after the merge began"
        raise InputChanged(what, where=str(path), remedy=remedy)
    return data


def write_index(folder: Path, layouts: Sequence[ShardLayout]) -> None:
    """The index of a sharded output; `total_size` is in bytes of tensors."""
    if len(layouts) == 1:
        return
    extents = {name: extent for layout in layouts for name, extent in layout.extents.items()}
    total = sum(extent.spec.nbytes for extent in extents.values())
    weight_map = {name: extent.path for name, extent in extents.items()}
    write_file(folder / INDEX, _json({"metadata": {"total_size": total}, "weight_map": weight_map}))


def write_adapter_config(folder: Path, config: Mapping[str, Any]) -> None:
    """What PEFT loads an adapter by."""
    write_file(folder / ADAPTER_CONFIG, _json(config))


def write_documents(folder: Path, *, card: str, recipe: str) -> None:
    """The model card and the recipe."""
    write_file(folder / CARD, card.encode())
    write_file(folder / RECIPE, recipe.encode())


def companion_digests(folder: Path, shards: Collection[str]) -> dict[str, str]:
    """sha256 of every file of an output but its shards and its record, by relative name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in names.items()
        if name not in shards and name != RECORD
    }


def write_record(folder: Path, record: Record) -> None:
    """The record of the merge, which comes last: it speaks of all other files."""
    write_file(folder / RECORD, record.as_json())


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
