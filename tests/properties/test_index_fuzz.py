"""Index files as strangers write them: a folder is opened or refused, and never crashes."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.errors import StreammergeError
from streammerge.storage.folder import open_model
from tests.makers import write_model

TENSORS = {f"t{i}": ("F32", (2,), struct.pack("<2f", i, i)) for i in range(4)}
INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]

names = st.sampled_from([*TENSORS, "other", ""]) | st.text(max_size=8)
files = (
    st.sampled_from([*SHARDS, "../x.safetensors", "/etc/passwd", "a\0.safetensors", INDEX])
    | st.text(max_size=12)
    | st.none()
    | st.integers()
)
maps = st.dictionaries(names, files, max_size=6)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
indices = st.fixed_dictionaries(
    {}, optional={"weight_map": maps | anything, "metadata": anything, "x": anything}
)


def opens(folder: Path, data: bytes) -> bool:
    """Whether a folder with that index can be opened; what cannot is refused, with its place."""
    write_model(folder, TENSORS, 2, {"model_type": "llama"})
    (folder / INDEX).write_bytes(data)
    try:
        open_model(folder)
    except StreammergeError as error:
        assert error.exit_code in (65, 66)
        assert str(folder) in str(error)
        return False
    return True


@settings(max_examples=150, deadline=None)
@given(indices)
def test_any_index_is_followed_or_refused(index: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        opens(Path(folder), json.dumps(index).encode("utf-8", "surrogatepass"))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 400), st.binary(min_size=1, max_size=4))
def test_a_sound_index_with_bytes_changed(place: int, junk: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), TENSORS, 2)
        data = bytearray((Path(folder) / INDEX).read_bytes())
        data[place % len(data) : place % len(data) + len(junk)] = junk
        opens(Path(folder), bytes(data))


def test_the_sound_index_is_followed(tmp_path: Path) -> None:
    write_model(tmp_path / "made", TENSORS, 2)
    assert opens(tmp_path / "again", (tmp_path / "made" / INDEX).read_bytes())
