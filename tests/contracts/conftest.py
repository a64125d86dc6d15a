"""Asserts in the suites to inherit, whose modules have no `test_` prefix, explain themselves."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite(
    *(
        f"tests.contracts.{name}_contract"
        for name in ("adapter", "merged", "method", "sink", "source", "statistic")
    )
)
