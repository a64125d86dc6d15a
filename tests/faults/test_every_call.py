"""The file calls of a small merge fail once each, or are its last; see `seam`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

# Fault -> every so manieth call, and how many tries that is at least; with EVERY_CALL in the
# environment, as scripts/faults sets it, every one.
STEPS = {
    "kill": (1, 50),
    "kill after": (2, 17),
    "kill inside": (2, 15),
    "EIO": (2, 25),
    "EIO of inputs": (2, 10),
    "ENOSPC": (2, 20),
    "EDQUOT": (4, 8),
    "EACCES": (2, 8),
    "EROFS": (4, 10),
}


@pytest.mark.parametrize("fault", STEPS)
def test_a_fault_at_any_call_is_survived(fault: str, record_property: Any, tmp_path: Path) -> None:
    step, least = STEPS[fault]
    step, least = (1, step * (least - 1)) if os.environ.get("EVERY_CALL") else (step, least)
    command = [sys.executable, "-m", "tests.faults.seam", f"{fault}:{step}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name in ("tries", "survived", "equal"):
        record_property(name, found[name])
    assert not found["problems"], "\n".join([*found["problems"], done.stderr[-3000:]])
    assert found["tries"] == found["survived"] == found["equal"] >= least
