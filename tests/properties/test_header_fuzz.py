"""Whatever the bytes, the header parser gives a sound `Header` or a `StreammergeError`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streammerge.errors import BadInput
from streammerge.storage.header import Header, read_header
from tests.makers import Tensor, frame, header_of, write_safetensors

ITEMSIZES = {"U8": 1, "BF16": 2, "F32": 4, "I64": 8}
TENSORS: dict[str, Tensor] = {
    "a": ("F32", (2, 2), bytes(16)),
    "b": ("BF16", (3,), bytes(6)),
    "c": ("U8", (0,), b""),
}
VALID = frame(header_of(TENSORS, {"format": "pt"}), bytes(22))
MANY = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 30) | st.integers() | st.floats() | st.text()
    | st.sampled_from(["F32", "U8", "dtype", "shape", "data_offsets", "__metadata__"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@st.composite
def tensor_sets(draw: st.DrawFn) -> dict[str, Tensor]:
    names = draw(st.lists(st.from_regex(r"\A[\w./ é]{1,20}\Z"), unique=True, max_size=6))
    tensors: dict[str, Tensor] = {}
    for name in names:
        label = draw(st.sampled_from(sorted(ITEMSIZES)))
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
        count = ITEMSIZES[label]
        for size in shape:
            count *= size
        tensors[name] = (label, shape, draw(st.binary(min_size=count, max_size=count)))
    return tensors


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid file with a few bytes changed, put in or taken out."""
    raw = bytearray(VALID)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(raw)))
        until = min(len(raw), at + draw(st.integers(0, 3)))
        piece = draw(st.binary(max_size=3) | st.sampled_from([b"0", b"{", b'"', b",", b"-", b"\\"]))
        raw[at:until] = piece
    return bytes(raw)


@st.composite
def rewritten(draw: st.DrawFn) -> bytes:
    """A valid file with values anywhere in its header replaced by other JSON."""
    document: Any = header_of(TENSORS, {"format": "pt"})
    for _ in range(draw(st.integers(1, 2))):
        node = document
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(node[key], dict | list) and draw(st.booleans()):
                node = node[key]
                continue
            node[key] = draw(json_values)
            break
    return frame(document, bytes(draw(st.sampled_from([22, 22, 22, 21, 30]))))


def opened(path: Path, raw: bytes) -> Header | None:
    path.write_bytes(raw)
    try:
        return read_header(path)
    except BadInput as error:
        assert str(path) in str(error)
        assert error.remedy
        str(error).encode()  # can be printed
        return None


def check_sound(header: Header, raw: bytes) -> None:
    """The tensors lie in the file, end to end, from the header to the end."""
    cursor = header.data_start
    for name, extent in header.tensors.items():
        assert name == extent.spec.name
        assert extent.offset == cursor
        cursor += extent.spec.nbytes
    assert cursor == len(raw) == header.size_bytes


@MANY
@given(
    tensors=tensor_sets(), metadata=st.none() | st.dictionaries(st.text(), st.text(), max_size=2)
)
def test_what_is_written_is_read(
    tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None
) -> None:
    path = write_safetensors(tmp_path / "x", tensors, metadata)
    header, raw = read_header(path), path.read_bytes()
    check_sound(header, raw)
    assert header.metadata == (metadata or {})
    assert set(header.tensors) == set(tensors)
    for name, (label, shape, data) in tensors.items():
        extent = header.tensors[name]
        assert (extent.spec.dtype.label, extent.spec.shape) == (label, shape)
        assert raw[extent.offset : extent.offset + len(data)] == data


@MANY
@given(
    raw=st.binary(max_size=200) | st.binary(max_size=100).map(lambda data: frame(b"{" + data, b""))
)
def test_random_bytes(tmp_path: Path, raw: bytes) -> None:
    if header := opened(tmp_path / "x", raw):
        check_sound(header, raw)


@MANY
@given(raw=mutated())
def test_a_valid_file_with_bytes_changed(tmp_path: Path, raw: bytes) -> None:
    if header := opened(tmp_path / "x", raw):
        check_sound(header, raw)


@MANY
@given(raw=rewritten())
def test_what_we_take_the_safetensors_library_takes_too(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "x"
    if header := opened(path, raw):
        check_sound(header, raw)
        with safetensors.safe_open(path, "numpy") as theirs:
            assert set(theirs.keys()) == set(header.tensors)


@pytest.mark.parametrize("cut", range(len(VALID)))
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, cut: int) -> None:
    assert opened(tmp_path / "x", VALID[:cut]) is None


def test_the_file_that_is_mutated_is_sound(tmp_path: Path) -> None:
    header = opened(tmp_path / "x", VALID)
    assert header is not None
    check_sound(header, VALID)
    assert json.loads(VALID[8 : header.data_start])["__metadata__"] == {"format": "pt"}
