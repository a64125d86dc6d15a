"""Out-of-core streaming merges of language models and LoRA adapters.

import streammerge as sm
sm.merge("cfg.yaml", out="merged", memory="2GiB")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["Plan", "Report", "StreammergeError", "__version__", "merge", "plan"]

if TYPE_CHECKING:
    from streammerge.engine import merge, plan
    from streammerge.errors import StreammergeError
    from streammerge.planning import Plan
    from streammerge.report import Report

_HOMES = {
    "Plan": "streammerge.planning",
    "Report": "streammerge.report",
    "StreammergeError": "streammerge.errors",
    "merge": "streammerge.engine",
    "plan": "streammerge.engine",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `streammerge --help` must not wait for numpy."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
