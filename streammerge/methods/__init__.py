"""The merge methods: one typed function each, listed here by name."""

from streammerge.methods.registry import load, method

NAMES = (
    "linear",
    "task_arithmetic",
    "ties",
    "slerp",
    "nuslerp",
    "multislerp",
    "karcher",
    "model_stock",
    "passthrough",
)

CATALOGUE = load(__name__, NAMES)

__all__ = ["CATALOGUE", "NAMES", "load", "method"]
