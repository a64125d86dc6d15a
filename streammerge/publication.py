"""Around the main loop: whether the output may be written, and what goes beside its shards."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from streammerge import __version__, events, grid
from streammerge.errors import BadInput, OutputRefused, StreammergeError
from streammerge.manner import Manner
from streammerge.planning import Plan
from streammerge.planning.differences import Differences, differences
from streammerge.planning.fingerprint import Identity, minor
from streammerge.recipe import to_yaml
from streammerge.report import Change, Changes, Missed, Written, describe_missed
from streammerge.scratch import Scratch
from streammerge.sinks.companions import (
    companion_digests,
    copy_donated,
    write_adapter_config,
    write_documents,
    write_index,
    write_record,
)
from streammerge.storage.bytesource import Files
from streammerge.storage.card import license_of, model_card
from streammerge.storage.donated import donated
from streammerge.storage.folder import output_config
from streammerge.storage.header import read_header
from streammerge.storage.record import (
    RECIPE,
    ApproximationRecord,
    ChangeRecord,
    Record,
    ShardRecord,
    find_record,
    read_record,
)
from streammerge.storage.references import display_name
from streammerge.storage.room import check_room
from streammerge.storage.rundir import check_output, state_folder
from streammerge.storage.shard import ShardLayout
from streammerge.storage.smallfile import read_small
from streammerge.words import Extent

# A tile of the narrowest type that is merged, and what the journal has to say of it.
_LEAST_PIECE_BYTES = 2 * grid.TILE_ELEMENTS
_LINE_BYTES = 400
# Card, recipe, record, index, lock and its owner.
_OWN_FILES, _OWN_FILE_BYTES = 6, 64 << 10


def refuse_overlap(plan: Plan, out: Path) -> None:
    """The output must not be, contain or lie in a folder that is read."""
    target = os.path.realpath(out)
    for header in plan.inputs.headers():
        folder = os.path.realpath(os.path.dirname(header.path))
        if target == folder or folder.startswith(target + os.sep):
            relation = "is" if target == folder else "contains"
        elif target.startswith(folder + os.sep):
            relation = "lies in"
        else:
            continue
        raise OutputRefused(
            f"the output {relation} an input folder",
            where=str(out),
            found=folder,
            remedy="choose an --out outside of the inputs",
        )


def check_room_for(plan: Plan, out: Path) -> None:
    """Raise `OutputRefused` unless the output fits where it is built, which is where it stays."""
    others = donated(plan.inputs.donor.path, plan.outline.tokenizer).values()
    companions = [path.stat().st_size for path in others]
    pieces = sum(-(-layout.size_bytes // _LEAST_PIECE_BYTES) for layout in plan.layouts)
    journal = _LINE_BYTES * (pieces + plan.demand.merged_tensors + plan.demand.copied_tensors)
    own = [_OWN_FILE_BYTES] * _OWN_FILES
    shards = [layout.size_bytes for layout in plan.layouts]
    cut = shards if plan.trims else []  # for a while both are there
    check_room(state_folder(out), [*shards, *cut, *companions, journal, *own])


def there_already(out: Path, identity: Identity, manner: Manner) -> bool:
    """Whether the folder holds this very merge, finished, so that nothing need be done.

    Raises `OutputRefused` where it cannot take the output: there is something of another merge,
    unless it is to be replaced, or something of others.
    """
    differ = finished(out, identity)
    if differ is None or differ.merge or (differ.elsewhere and manner.strict_bytes):
        others = (*differ.merge, *differ.elsewhere) if differ else ()
        check_output(out, force=manner.force, differences=others)
        return False
    if manner.force:
        return False
    for line in differ.elsewhere:
        manner.emit(
            events.Warned(f"the output was made elsewhere; its last bits may differ: {line}")
        )
    return True


def finished(out: Path, identity: Identity) -> Differences | None:
    """How the finished output in the folder differs from this merge, None where there is none.

    It is finished when every file that its record names is there, the shards with their size and
    their header.
    """
    record = find_record(out)
    if record is None or not all((out / name).is_file() for name in record.files):
        return None
    if not all(_is_whole(out / name, shard) for name, shard in record.shards.items()):
        return None
    return differences(recorded_identity(out, record), identity)


def _is_whole(path: Path, recorded: ShardRecord) -> bool:
    try:
        header = read_header(path)
    except StreammergeError:
        return False
    return (header.size_bytes, header.digest) == (recorded.bytes, recorded.header_sha256)


def recorded_changes(out: Path) -> tuple[Change, ...]:
    """What each model changed, as the record of a finished output says."""
    changes = read_record(out).changes
    return tuple(Change(one.model, one.applied, one.total, one.relative) for one in changes)


def recorded_misses(out: Path) -> dict[str, Missed]:
    """What the factors of an adapter miss, as the record of a finished output says."""
    found = read_record(out).approximations
    return {name: Missed(one.rank, one.update, one.missed) for name, one in found.items()}


def recorded_identity(out: Path, record: Record) -> Identity:
    """What a finished output was made of, by its own word."""
    return Identity(
        recipe=read_small(out / RECIPE).decode("utf-8", "replace"),
        inputs=dict(record.inputs),
        layout={n: one.planned_sha256 or one.header_sha256 for n, one in record.shards.items()},
        grid=record.grid,
        environment=dict(record.environment),
        version=minor(record.streammerge),
    )


def compare_buffers(plan: Plan) -> None:
    """Integer and boolean tensors are copied from the donor, so all models must agree on them."""
    donor = plan.inputs.donor
    buffers = [n for n in donor.tensors if not donor.tensors[n].spec.dtype.mergeable]
    folders = {str(model.folder.path): model.folder for model in plan.inputs.models}
    for folder in folders.values():
        for name in buffers:
            if folder is not donor and name in folder.tensors:
                _compare(plan.files, donor.tensors[name], folder.tensors[name])


def _compare(files: Files, ours: Extent, theirs: Extent) -> None:
    scratches = Scratch(), Scratch()
    for tile in grid.tiles(ours.spec):
        with (
            files.tile(ours, tile, scratches[0]) as a,
            files.tile(theirs, tile, scratches[1]) as b,
        ):
            if not np.array_equal(a, b):
                raise BadInput(
                    f"the buffer {ours.spec.name} differs from the one in {ours.path}",
                    where=theirs.path,
                    found=f"other values in rows {tile.start} to {tile.stop - 1}",
                    remedy="buffers are copied, not merged: merge models that agree on them",
                )


def built_files(folder: Path) -> list[str]:
    """The names of what is to be published."""
    return sorted(os.listdir(folder))


def write_companions(
    plan: Plan, folder: Path, identity: Identity, written: Written, changes: Changes
) -> None:
    """All of the output but its shards: config, tokenizer, index, card, recipe, and the record."""
    inputs, recipe, changed = plan.inputs, plan.recipe, changes.result()
    donor = inputs.donor
    if written.adapter:
        write_adapter_config(folder, written.adapter.config(display_name(donor.path)))
    else:
        config = output_config(
            donor.config,
            dtype=recipe.out_dtype,
            untied=plan.outline.untied,
            vocabulary=plan.outline.vocabulary,
        )
        given, digests = donated(donor.path, plan.outline.tokenizer), identity.inputs["donated"]
        copy_donated(folder, given, digests, donor.config, config)
        write_index(folder, written.layouts)
    recipe_yaml = to_yaml(recipe, portable=True)
    folders = [m.adapter.folder.path if m.adapter else m.folder.path for m in inputs.models]
    card = model_card(
        base=display_name(donor.path),
        models=[display_name(path) for path in folders],
        method=recipe.method.name,
        recipe_yaml=recipe_yaml,
        library_version=__version__,
        changed=[*map(str, changed), *describe_missed(written.missed)],
        kind=recipe.kind,
        license=license_of(donor.path),
    )
    write_documents(folder, card=card, recipe=recipe_yaml)
    write_record(folder, _record(plan, folder, identity, written, changes))


def _record(
    plan: Plan, folder: Path, identity: Identity, written: Written, changes: Changes
) -> Record:
    """What was merged, by what, and checksums of what came of it."""
    crcs = written.sums.shards()
    shards = {
        layout.name: _shard(layout, identity.layout[layout.name], crcs[layout.name])
        for layout in written.layouts
    }
    return Record(
        streammerge=__version__,
        kind=plan.recipe.kind,
        fingerprint=identity.fingerprint,
        method=plan.recipe.method.name,
        grid=identity.grid,
        environment=identity.environment,
        inputs=identity.inputs,
        changes=tuple(_change(change) for change in changes.result()),
        approximations={name: _approximation(one) for name, one in written.missed.items()},
        files=companion_digests(folder, shards),
        shards=shards,
        tensors=dict(sorted(written.sums.tensors.items())),
    )


def _shard(layout: ShardLayout, planned: str, crc32c: int | None) -> ShardRecord:
    digest = hashlib.sha256(layout.header).hexdigest()
    return ShardRecord(layout.size_bytes, digest, crc32c, None if planned == digest else planned)


def _approximation(one: Missed) -> ApproximationRecord:
    return ApproximationRecord(one.rank, _digits(one.update), _digits(one.missed))


def _change(change: Change) -> ChangeRecord:
    relative = None if change.relative is None else _digits(change.relative)
    return ChangeRecord(change.name, change.applied, change.total, relative)


def _digits(norm: float) -> float:
    """Six of them: norms are for people, and summed with reassociation."""
    return float(f"{norm:.6g}")
