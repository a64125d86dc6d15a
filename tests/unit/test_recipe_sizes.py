"""Sizes as people write and read them."""

from __future__ import annotations

import pytest

from streammerge.errors import ConfigError
from streammerge.sizes import format_size, parse_size


@pytest.mark.parametrize(
    "text, size",
    [
        ("2GiB", 2 << 30),
        ("512MiB", 512 << 20),
        ("2GB", 2 * 10**9),
        ("1.5GiB", 3 << 29),
        ("0.1KB", 100),
        ("1048576", 1 << 20),
        (" 7 b ", 7),
        ("3 tib", 3 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "2G", "-1", "0", "0.5", "GiB", "1e9", "2GiB!", "nan", "9999999TiB", "1" * 99, "١"]
)
def test_nonsense(text: str) -> None:
    with pytest.raises(ConfigError, match="size") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value) and "2GiB" in str(caught.value)


@pytest.mark.parametrize(
    "size, text",
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (384 << 20, "384 MiB"),
        (5 << 29, "2.5 GiB"),
        ((1 << 30) - 1, "1 GiB"),
        (5000 << 40, "5000 TiB"),
    ],
)
def test_format(size: int, text: str) -> None:
    assert format_size(size) == text
