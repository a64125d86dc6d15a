"""The strict header parser: what it reads, and what it refuses (docs: bad inputs 15 to 31)."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors

from streammerge.errors import BadInput, InputMissing, StorageError
from streammerge.storage.header import TensorTable, read_header
from streammerge.storage.smallfile import read_small
from streammerge.words import DType, Extent, TensorSpec
from tests.makers import frame, header_of, write_safetensors

TENSORS = {
    "model.w": ("F32", (2, 3), bytes(range(24))),
    "model.b": ("BF16", (4,), b"\x01" * 8),
    "steps": ("I64", (), b"\x07" + bytes(7)),
    "none": ("F16", (0, 5), b""),
}


def entry(dtype: Any = "U8", shape: Any = (2,), offsets: Any = (0, 2)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refused(path: Path, *words: str) -> None:
    """The file is refused as bad, and the message names it and says the words."""
    with pytest.raises(BadInput) as caught:
        read_header(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert caught.value.remedy
    for word in words:
        assert word in text, text


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


# -------------------------------------------------------------------------------- what it reads


def test_extents_point_at_the_bytes(file: Path) -> None:
    write_safetensors(file, TENSORS, {"format": "pt"})
    header = read_header(file)
    raw = file.read_bytes()
    assert list(header.tensors) == list(TENSORS)
    for name, (label, shape, data) in TENSORS.items():
        extent = header.tensors[name]
        assert extent.spec == TensorSpec(name, shape, DType[label])
        assert raw[extent.offset : extent.offset + extent.spec.nbytes] == data
        assert extent.path == str(file)
    assert header.metadata == {"format": "pt"}
    assert header.data_bytes == 40
    assert header.tensors.dtypes() == {DType.F32, DType.BF16, DType.I64, DType.F16}


def test_agrees_with_the_safetensors_library(file: Path) -> None:
    write_safetensors(file, TENSORS)
    header = read_header(str(file))
    with safetensors.safe_open(file, "numpy") as theirs:
        assert sorted(theirs.keys()) == sorted(header.tensors)
        for name, extent in header.tensors.items():
            view = theirs.get_slice(name)
            assert tuple(view.get_shape()) == extent.spec.shape
            assert view.get_dtype() == extent.spec.dtype.label


def test_the_stamp_is_the_files(file: Path) -> None:
    write_safetensors(file, TENSORS)
    header, stat = read_header(file), file.stat()
    assert (header.size_bytes, header.mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert (header.inode, header.device) == (stat.st_ino, stat.st_dev)
    assert header.header_bytes == header.data_start == stat.st_size - 40


def test_the_digest_covers_the_header_alone(file: Path, tmp_path: Path) -> None:
    one = read_header(write_safetensors(file, {"a": ("U8", (2,), b"ab")}))
    same = read_header(write_safetensors(tmp_path / "b", {"a": ("U8", (2,), b"xy")}))
    other = read_header(write_safetensors(tmp_path / "c", {"b": ("U8", (2,), b"ab")}))
    assert one.digest == same.digest != other.digest


def test_iterates_in_file_order_whatever_the_order_of_the_header(file: Path) -> None:
    header = header_of(TENSORS)
    file.write_bytes(frame(dict(reversed(header.items())), bytes(40)))
    assert list(read_header(file).tensors) == list(TENSORS)


def test_no_tensors_and_padding_are_legal(file: Path) -> None:
    file.write_bytes(frame(b"{}      ", b""))
    header = read_header(file)
    assert len(header.tensors) == 0
    assert dict(header.metadata) == {}


def test_a_header_of_640_bytes_is_not_taken_for_a_pickle(file: Path) -> None:
    file.write_bytes(frame(b"{}".ljust(640), b""))
    assert file.read_bytes()[:2] == b"\x80\x02"
    assert read_header(file).data_start == 648


@pytest.mark.parametrize("name", ["a/b", "../../etc/passwd", "/abs", "ünï 模型", "a" * 4096])
def test_names_that_are_never_paths_may_look_like_paths(file: Path, name: str) -> None:
    write_safetensors(file, {name: ("U8", (1,), b"x")})
    assert list(read_header(file).tensors) == [name]


def test_every_dtype_of_ours_is_one_of_the_library(file: Path) -> None:
    for dtype in DType:
        write_safetensors(file, {"a": (dtype.label, (1,), bytes(dtype.itemsize))})
        assert read_header(file).tensors["a"].spec.dtype is dtype
        with safetensors.safe_open(file, "numpy") as theirs:
            assert theirs.get_slice("a").get_dtype() == dtype.label


def test_a_link_to_a_file_is_followed(file: Path, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "blob", TENSORS)
    file.symlink_to("blob")
    assert read_header(file).path == str(file)
    assert read_header(file).inode == (tmp_path / "blob").stat().st_ino


def test_the_table_is_a_mapping(file: Path) -> None:
    table = read_header(write_safetensors(file, TENSORS)).tensors
    assert isinstance(table, TensorTable)
    assert "steps" in table
    assert "stop" not in table
    assert len(table) == len(list(table.items())) == 4
    assert isinstance(table["steps"], Extent)
    with pytest.raises(KeyError):
        table["stop"]


def test_sixty_thousand_tensors_in_a_second_or_so(file: Path) -> None:
    names = (f"model.layers.{i // 768}.mlp.experts.{i % 768}.w.weight" for i in range(60_000))
    write_safetensors(file, dict.fromkeys(names, ("BF16", (2, 2), b"12345678")))
    begin = time.process_time()
    header = read_header(file)
    assert len(header.tensors) == 60_000
    assert time.process_time() - begin < 3  # 1.1 s measured; room for a loaded machine


def test_needs_neither_numpy_nor_torch() -> None:
    code = (
        "import sys, streammerge.storage.header, streammerge.storage.folder;"
        "print([m for m in ('numpy', 'torch', 'yaml', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------------------- what is not a file


def test_missing(file: Path) -> None:
    with pytest.raises(InputMissing, match="No such file"):
        read_header(file)


def test_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(InputMissing, match="a part of it is a file"):
        read_header(tmp_path / "a" / "b")


def test_dangling_link_names_its_target(file: Path) -> None:
    file.symlink_to("../../blobs/abc")
    with pytest.raises(InputMissing, match=r"link to \.\./\.\./blobs/abc"):
        read_header(file)


def test_link_loop(file: Path) -> None:
    file.symlink_to(file.name)
    with pytest.raises(InputMissing, match="lead back to themselves"):
        read_header(file)


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_impossible_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput, match="no possible file name") as caught:
        read_header(tmp_path / name)
    assert str(caught.value).isprintable() or "\n" in str(caught.value)
    str(caught.value).encode()


def test_folder(file: Path) -> None:
    file.mkdir()
    refused(file, "a folder", "regular file")


def test_fifo_does_not_block(file: Path) -> None:
    os.mkfifo(file)
    refused(file, "a FIFO")


def test_fifo_put_there_between_stat_and_open_does_not_block(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(file)
    regular = os.stat(__file__)
    monkeypatch.setattr(os, "stat", lambda _: regular)
    refused(file, "a FIFO")


def test_device_and_socket(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(Path("/dev/zero"), "a device")
    monkeypatch.chdir(tmp_path)  # a socket's path is at most 108 bytes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(file.name)
        refused(Path(file.name), "a socket")


@pytest.mark.parametrize(
    ("code", "kind"), [(5, StorageError), (13, InputMissing), (24, StorageError)]
)
def test_faults_of_opening(
    file: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[Exception]
) -> None:
    write_safetensors(file, TENSORS)

    def fail(*_: object) -> int:
        raise OSError(code, "made up")

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(kind) as caught:
        read_header(file)
    assert str(file) in str(caught.value)
    assert os.strerror(code) in str(caught.value)


def test_a_fault_of_reading_names_the_file_and_closes_it(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_safetensors(file, TENSORS)

    def fail(*_: object) -> bytes:
        raise OSError(5, "made up")

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(StorageError, match="Input/output error"):
        read_header(file)
    assert os.listdir("/proc/self/fd") == before


def test_short_reads_are_continued(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_safetensors(file, TENSORS)
    whole, pread = read_header(file), os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: pread(fd, min(n, 3), at))
    assert read_header(file) == whole


def test_a_file_that_shrinks_while_it_is_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_safetensors(file, TENSORS)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: pread(fd, min(n, 50 - at), at))
    refused(file, "shrank", "50 bytes")


def test_small_files_have_a_limit(file: Path) -> None:
    file.write_bytes(b"12345")
    assert read_small(file) == b"12345"
    with pytest.raises(BadInput, match="at most 4 bytes"):
        read_small(file, limit=4)


# ------------------------------------------------------------------------- what is another format


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"x")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", ("LFS", "git lfs pull")),
        (b"<!DOCTYPE html>\n<html><body>404</body></html>", ("web page",)),
        (b"  <html>Sign in</html>" * 9, ("web page",)),
        (b'<?xml version="1.0"?><Error>AccessDenied</Error>', ("web page",)),
        (pickle.dumps({"a": [1, 2, 3]}, protocol=2), ("pickle", "convert")),
        (pickle.dumps(list(range(99)), protocol=4), ("pickle", "can run code", "--allow-pickle")),
        (b"GGUF\x03\0\0\0" + bytes(32), ("GGUF",)),
        (gzip.compress(b"{}" * 30, mtime=0), ("gzip", "gunzip")),
    ],
)
def test_foreign_formats_are_named(file: Path, data: bytes, words: tuple[str, ...]) -> None:
    file.write_bytes(data)
    refused(file, "not a safetensors file", *words)


def test_a_renamed_zip_is_named(file: Path) -> None:
    zipped(file)
    refused(file, "pickle of PyTorch")


# ------------------------------------------------------------------------- what is wrongly framed


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ("is empty", "0 bytes")),
        (b"{", ("cut short", "1 bytes")),
        (b"1234567", ("cut short", "7 bytes")),
        (bytes(8), ("impossible header length", "0 bytes in a file of 8")),
        (bytes(4096), ("impossible header length",)),
        ((2).to_bytes(8, "little"), ("2 bytes in a file of 8",)),
        ((2**63).to_bytes(8, "little") + b"{}", ("9223372036854775808 bytes in",)),
        ((3).to_bytes(8, "little") + b"{}", ("3 bytes in a file of 10",)),
        (frame(b' {"a":1}', b""), ("does not begin with {", "b' '")),
        (frame(b"\xef\xbb\xbf{}", b""), ("does not begin with {",)),
        (frame(b"[]", b""), ("does not begin with {",)),
    ],
)
def test_bad_frames(file: Path, data: bytes, words: tuple[str, ...]) -> None:
    file.write_bytes(data)
    refused(file, *words)


def test_a_header_over_100_mb_is_not_read(file: Path) -> None:
    with file.open("wb") as out:
        out.write((100_000_001).to_bytes(8, "little") + b"{")
        out.truncate(200_000_000)
    refused(file, "100000001 bytes in", "1 to 100000000")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b'{"a\xff": 1}', ("not UTF-8", "byte 0xff at offset 3")),
        (b"{'a': 1}", ("not valid JSON", "line 1, column 2")),
        (b"{} {}", ("not valid JSON", "Extra data")),
        (b'{"a": ' + b"9" * 5000 + b"}", ("not valid JSON",)),
        (b'{"a": ' + b"[" * 200_000, ("absurdly deep",)),
        (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, ("absurdly deep",)),
        (b'{"\\ud800": 1}', ("not valid JSON", "surrogates")),
        (b'{"__metadata__": {"x": "\\uDFFF"}}', ("not valid JSON", "surrogates")),
        (b'{"abc": 1, "abc": 1}', ("a key twice", "'abc'")),
        (b'{"__metadata__": {}, "__metadata__": {}}', ("a key twice",)),
        (b'{"__metadata__": {"k": "1", "k": "2"}}', ("a key twice", "'k'")),
        (b'{"a": {"dtype": "U8", "dtype": "I8"}}', ("a key twice", "'dtype'")),
        (b'{"__metadata__": {"format": 1}}', ("__metadata__ is malformed", "strings")),
        (b'{"__metadata__": null}', ("__metadata__ is malformed", "None")),
        (b'{"__metadata__": []}', ("__metadata__ is malformed",)),
    ],
)
def test_bad_json(file: Path, raw: bytes, words: tuple[str, ...]) -> None:
    file.write_bytes(frame(raw, b""))
    refused(file, *words)


def test_a_surrogate_pair_is_a_character(file: Path) -> None:
    file.write_bytes(frame(b'{"\\ud83d\\ude00": ' + json.dumps(entry()).encode() + b"}", b"ab"))
    assert list(read_header(file).tensors) == ["\U0001f600"]


# --------------------------------------------------------------------------- what does not add up


@pytest.mark.parametrize(
    ("info", "words"),
    [
        (None, ("malformed entry", "None")),
        ([], ("malformed entry",)),
        ({"dtype": "U8", "shape": [2]}, ("malformed entry",)),
        (entry() | {"strides": [1]}, ("malformed entry", "strides")),
        (entry("F4"), ("unknown dtype", "'F4'", "BF16")),
        (entry("bf16"), ("unknown dtype",)),
        (entry(["U8"]), ("unknown dtype",)),
        (entry(7), ("unknown dtype",)),
        (entry(shape=2), ("malformed shape", "2")),
        (entry(shape={"0": 2}), ("malformed shape",)),
        (entry(shape=[2.0]), ("malformed shape", "2.0")),
        (entry(shape=[True, 2]), ("malformed shape", "True")),
        (entry(shape=[-2]), ("malformed shape", "-2")),
        (entry(shape=["2"]), ("malformed shape",)),
        (entry(shape=[2**63]), ("malformed shape",)),
        (entry(shape=[1] * 65), ("too many dimensions", "65")),
        (entry(shape=[2**40, 2**40]), ("shape overflows",)),
        (entry(shape=[2**40, 0, 2**40], offsets=[0, 0]), ("shape overflows",)),
        (entry(shape=[3]), ("disagree", "2 bytes, from 0 to 2", "3 bytes for U8 [3]")),
        (entry("BF16"), ("disagree", "4 bytes for BF16 [2]")),
        (entry(shape=[2**62]), ("disagree",)),
        (entry(shape=[]), ("disagree", "1 bytes for U8 []")),
        (entry(shape=[0]), ("disagree",)),
        (entry(offsets=None), ("malformed data_offsets", "None")),
        (entry(offsets=[0, 2, 2]), ("malformed data_offsets",)),
        (entry(offsets=[-2, 0]), ("malformed data_offsets", "-2")),
        (entry(offsets=[0.0, 2.0]), ("malformed data_offsets",)),
        (entry(offsets=[False, 2]), ("malformed data_offsets", "False")),
        (entry(offsets=[2, 0]), ("reversed data_offsets",)),
        (entry(offsets=[0, 2**64]), ("malformed data_offsets",)),
        (entry(offsets=[0, 2**63 - 1]), ("past the end of the file",)),
        (entry(shape=[3], offsets=[0, 3]), ("past the end", "1 too few", "at least 3")),
        (entry(shape=[1], offsets=[0, 1]), ("1 bytes at the end are no tensor's",)),
        (entry(shape=[1], offsets=[1, 2]), ("leaves a hole after the header", "byte 1", "byte 0")),
    ],
)
def test_bad_entries(file: Path, info: Any, words: tuple[str, ...]) -> None:
    file.write_bytes(frame({"some.weight": info}, b"ab"))
    refused(file, *words)


@pytest.mark.parametrize(
    ("offsets", "words"),
    [
        ([(0, 2), (3, 5)], ("'b' leaves a hole after tensor 'a'", "byte 3", "byte 2")),
        ([(0, 3), (2, 5)], ("'b' overlaps tensor 'a'", "byte 2", "byte 3")),
        ([(0, 5), (0, 5)], ("overlaps",)),
        ([(0, 5), (2, 2)], ("'b' overlaps",)),
        ([(0, 2), (2, 4)], ("1 bytes at the end", "tensor 'b'")),
    ],
)
def test_bad_cover(file: Path, offsets: list[tuple[int, int]], words: tuple[str, ...]) -> None:
    spans = zip("ab", offsets, strict=True)
    header = {
        name: entry(shape=[end - begin], offsets=[begin, end]) for name, (begin, end) in spans
    }
    file.write_bytes(frame(header, b"12345"))
    refused(file, *words)


def test_one_byte_short_and_one_too_many(file: Path) -> None:
    write_safetensors(file, TENSORS)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    refused(file, "tensor 'steps'", "1 too few")
    file.write_bytes(whole + b"\0")
    refused(file, "1 bytes at the end")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", ("empty name",)),
        ("a\0b", ("control character", "U+0000 at character 1")),
        ("a\n", ("control character", "U+000A")),
        ("\x1b[31mred", ("control character", "U+001B")),
        ("x\x9b", ("control character", "U+009B")),
        ("a" * 4097, ("too long", "4097 bytes")),
        ("ü" * 4096, ("too long", "8192 bytes")),
        ("a" * 65536, ("too long", "65536 bytes")),
    ],
)
def test_bad_names(file: Path, name: str, words: tuple[str, ...]) -> None:
    file.write_bytes(frame({name: entry()}, b"ab"))
    refused(file, *words)


@pytest.mark.parametrize("info", [{"dtype": "x" * 10**6}, [0] * 10**6, [[[[[[[[[[]]]]]]]]]]])
def test_messages_stay_short_whatever_the_file_holds(file: Path, info: Any) -> None:
    file.write_bytes(frame({"n" * 4000: info}, b""))
    with pytest.raises(BadInput) as caught:
        read_header(file)
    assert len(str(caught.value)) < 1000 + len(str(file))
