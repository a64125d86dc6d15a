"""Loading the CPU's kernels before a merge, and knowing beforehand whether that takes long."""

from __future__ import annotations

import importlib
import signal
from pathlib import Path

from streammerge.kernels.cache import FOLDER

_MODULES = ("cpu", "cpu_stack")


def will_compile() -> bool:
    """Whether loading the kernels will take some seconds, since none are kept for this version."""
    if FOLDER is None:
        return True
    return any(_is_older(name, FOLDER) for name in _MODULES)


def _is_older(module: str, folder: Path) -> bool:
    """Whether a module's newest compiled kernel is older than its source, or not there."""
    source = Path(__file__).with_name(f"{module}.py").stat().st_mtime
    kept = [path.stat().st_mtime for path in folder.glob(f"*/{module}.*.nbi")]
    return not kept or max(kept) < source


def load() -> None:
    """Compile the kernels, or load them.

    Signals wait meanwhile: LLVM calls back into Python, and an exception that a handler raises in
    such a call is lost, with the process after it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        for name in _MODULES:
            importlib.import_module(f"streammerge.kernels.{name}")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
