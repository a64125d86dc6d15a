"""Suites to inherit live in modules without a `test_` prefix; their asserts explain themselves too."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite(
    *(
        f"tests.contracts.{name}_contract"
        for name in ("adapter", "merged", "method", "sink", "source", "statistic")
    )
)
