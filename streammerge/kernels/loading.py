"""Loading the CPU's kernels before a merge, and knowing beforehand whether that takes long."""

from __future__ import annotations

from pathlib import Path

from streammerge.kernels.cache import FOLDER


def will_compile() -> bool:
    """Whether loading the kernels will take some seconds, since none are kept for this version."""
    if FOLDER is None:
        return True
    source = Path(__file__).with_name("cpu.py").stat().st_mtime
    kept = [path.stat().st_mtime for path in FOLDER.glob("*/cpu.*.nbi")]
    return not kept or max(kept) < source


def load() -> None:
    """Compile the kernels, or load them."""
    import streammerge.kernels.cpu  # noqa: F401
