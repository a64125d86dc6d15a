"""crc32c and how it combines; where the tensors of a shard go."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import deserialize

from streammerge.errors import StorageError
from streammerge.storage.checksum import checksum, combine
from streammerge.storage.header import read_header
from streammerge.storage.shard import PAGE, ShardFile, lay_out
from streammerge.words import DType, TensorSpec

SPECS = [
    TensorSpec("embed.weight", (7, 3), DType.BF16),
    TensorSpec("flag", (5,), DType.BOOL),
    TensorSpec("nothing", (0, 4), DType.F32),
    TensorSpec("scale", (), DType.F64),
    TensorSpec("名前.weight", (2, 2), DType.F32),
]


# -------------------------------------------------------------------------------------- checksums


@pytest.mark.parametrize(
    ("data", "expected"),
    [  # RFC 3720, appendix B.4, and the check value of the catalogue of CRCs
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_known_checksums(data: bytes, expected: int) -> None:
    assert checksum(data) == expected
    assert checksum(np.frombuffer(data, np.uint8)) == expected


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_checksums_of_two_runs_combine(first: bytes, second: bytes) -> None:
    whole = checksum(first + second)
    assert combine(checksum(first), checksum(second), len(second)) == whole
    assert checksum(second, checksum(first)) == whole


@given(st.lists(st.binary(max_size=60), max_size=8))
def test_checksums_of_many_runs_combine(runs: list[bytes]) -> None:
    total = checksum(b"")
    for run in runs:
        total = combine(total, checksum(run), len(run))
    assert total == checksum(b"".join(runs))


def test_checksums_of_long_runs_combine() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.bytes(100), rng.bytes((1 << 20) + 7)
    assert combine(checksum(first), checksum(second), len(second)) == checksum(first + second)


def test_the_length_of_the_second_run_may_be_huge() -> None:
    """Ten terabytes of zeros, by squaring: the same as in two halves."""
    half = 5 * 10**12
    zeros = combine(0xFFFFFFFF, 0, half)
    assert combine(zeros, 0, half) == combine(0xFFFFFFFF, 0, 2 * half) != zeros


# ----------------------------------------------------------------------------------------- layout


@given(st.none() | st.integers(0, 1 << 40))
def test_data_starts_where_the_source_does_modulo_a_page(data_start: int | None) -> None:
    layout = lay_out("model.safetensors", SPECS, data_start)
    start = len(layout.header)
    assert start % 8 == 0 if data_start is None else start % PAGE == data_start % PAGE
    assert layout.size_bytes == start + sum(spec.nbytes for spec in SPECS)
    end = start
    for spec in SPECS:  # in the order given, without holes
        assert layout.extents[spec.name].offset == end
        assert layout.extents[spec.name].path == "model.safetensors"
        end += spec.nbytes
    assert end == layout.size_bytes


def test_padding_is_no_longer_than_needed() -> None:
    bare = len(lay_out("m", SPECS).header)
    for data_start in (bare, bare + 8, PAGE + bare, 3):
        padded = len(lay_out("m", SPECS, data_start).header)
        assert bare - 8 < padded <= bare + PAGE


def test_the_header_is_the_format_s() -> None:
    header = lay_out("m", SPECS, 1234).header
    assert int.from_bytes(header[:8], "little") == len(header) - 8
    assert header[8:9] == b"{"
    document = json.loads(header[8:])
    assert document.pop("__metadata__") == {"format": "pt"}
    assert document["embed.weight"] == {"dtype": "BF16", "shape": [7, 3], "data_offsets": [0, 42]}
    assert document["nothing"] == {"dtype": "F32", "shape": [0, 4], "data_offsets": [47, 47]}
    assert document["scale"]["shape"] == []
    assert list(document) == [spec.name for spec in SPECS]


# ------------------------------------------------------------------------------------------- file


def write_shard(folder: Path, data_start: int | None) -> bytes:
    """A shard of random bytes, tensor by tensor from the last to the first."""
    layout = lay_out("model.safetensors", SPECS, data_start)
    shard = ShardFile(folder, layout)
    rng = np.random.default_rng(0)
    body = rng.bytes(sum(spec.nbytes for spec in SPECS))
    for spec in reversed(SPECS):
        extent = layout.extents[spec.name]
        start = extent.offset - len(layout.header)
        shard.write(extent.offset, np.frombuffer(body[start : start + spec.nbytes], np.uint8))
    shard.sync()
    shard.close()
    return body


@pytest.mark.parametrize("data_start", [None, 4095, 77])
def test_a_shard_is_read_by_the_library_and_by_us(tmp_path: Path, data_start: int | None) -> None:
    body = write_shard(tmp_path, data_start)
    raw = (tmp_path / "model.safetensors").read_bytes()
    found = dict(deserialize(raw))  # type: ignore[no-untyped-call]
    assert b"".join(bytes(found[spec.name]["data"]) for spec in SPECS) == body
    header = read_header(tmp_path / "model.safetensors")
    assert [extent.spec for extent in header.tensors.values()] == SPECS


def test_a_shard_is_as_open_as_the_umask_allows(tmp_path: Path) -> None:
    import os

    before = os.umask(0o027)
    try:
        write_shard(tmp_path, None)
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o640


def test_an_existing_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(StorageError, match="cannot be created") as caught:
        ShardFile(tmp_path, lay_out("model.safetensors", SPECS))
    assert caught.value.where == str(tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_text() == "mine"
