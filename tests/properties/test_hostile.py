"""Some of what scripts/fuzz tries, each time the suite runs; and scripts/fuzz itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.properties.hostile import HOSTILE

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", HOSTILE)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_hostile_files_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    raw = data.draw(HOSTILE[kind].contents)
    HOSTILE[kind].check(tmp_path_factory.mktemp("any"), raw)


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/fuzz.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)


def test_the_script_counts_what_it_tries() -> None:
    done = fuzz("--seconds", "2", "--json", "adapter")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert found["kind"] == "adapter" and found["cases"] > 10 and not found["failed"]


def test_the_script_shows_what_fails() -> None:
    done = fuzz("--seconds", "20", "--json", "--hypothesis", "self-test")
    assert done.returncode == 1
    (found,) = json.loads(done.stdout)
    assert found["failed"] and "b'!!'" in done.stderr
