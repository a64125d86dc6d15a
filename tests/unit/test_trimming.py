"""The least rank that misses no more than was asked, and shards cut to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammerge.report import Missed
from streammerge.sinks import cut as cutting
from streammerge.sinks.cut import column_squares, cut, row_squares
from streammerge.storage.header import read_header
from streammerge.storage.shard import lay_out
from streammerge.trimming import least_rank
from streammerge.words import DType, TensorSpec
from tests.contracts.small_inputs import encode
from tests.contracts.source_contract import open_files
from tests.makers import write_safetensors


@given(
    st.lists(st.floats(0, 10), min_size=1, max_size=9).map(lambda s: sorted(s, reverse=True)),
    st.floats(0, 3),
    st.floats(0.001, 0.999),
)
def test_the_least_rank_is_found(strengths: list[float], beyond: float, share: float) -> None:
    """By trying all; `beyond` is the squared norm of what no column holds."""
    total = sum(strengths) + beyond
    whole = Missed(len(strengths), total**0.5, beyond**0.5)
    left = least_rank(whole, np.array(strengths), share)
    rank = left.rank
    missed = [sum(strengths[r:]) + beyond for r in range(1, len(strengths) + 1)]
    assert left.missed**2 == pytest.approx(missed[rank - 1], rel=1e-9, abs=1e-12)
    assert left.update == whole.update
    slack = 1e-9 * total
    if rank < len(strengths):
        assert missed[rank - 1] <= share * total + slack
    assert all(one > share * total - slack for one in missed[: rank - 1])


def test_of_nothing_one_column_is_left() -> None:
    assert least_rank(Missed(4, 0.0, 0.0), np.zeros(4), 0.1) == Missed(1, 0.0, 0.0)


SHAPES = {
    "a": ((5, 7), (2, 7)),
    "b": ((9, 5), (9, 2)),
    "conv b": ((4, 5, 1, 1), (4, 3, 1, 1)),
    "norm": ((6,), (6,)),
    "empty": ((0, 3), (0, 3)),
}


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_shard_is_cut_to_other_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """A few rows at a time, and the checksums are those of the file."""
    from safetensors.torch import load_file

    monkeypatch.setattr(cutting, "_BLOCK_BYTES", 50)
    random = np.random.default_rng(3)
    values = {name: random.normal(size=before) for name, (before, _) in SHAPES.items()}
    given = {name: encode(value, dtype) for name, value in values.items()}
    source = read_header(write_safetensors(tmp_path / "wide.safetensors", given))
    specs = [TensorSpec(name, after, DType[dtype]) for name, (_, after) in SHAPES.items()]
    layout = lay_out("cut.safetensors", specs)
    files = open_files(Path(source.path))
    sums = cut(files, source.tensors, tmp_path, layout)
    wide, found = (load_file(tmp_path / f"{name}.safetensors") for name in ("wide", "cut"))
    for name, (_, after) in SHAPES.items():
        expected = wide[name][tuple(slice(n) for n in after)]
        assert found[name].equal(expected) and found[name].dtype == expected.dtype
    data = (tmp_path / "cut.safetensors").read_bytes()
    assert sums.shards() == {"cut.safetensors": cutting.checksum(np.frombuffer(data, np.uint8))}
    squares = wide["b"].double().numpy() ** 2
    np.testing.assert_allclose(column_squares(files, source.tensors["b"]), squares.sum(0))
    np.testing.assert_allclose(row_squares(files, source.tensors["b"]), squares.sum(1))
