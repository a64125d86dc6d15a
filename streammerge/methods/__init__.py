"""The merge methods: one typed function each, listed here by name."""

from streammerge.methods.own import WithOwn
from streammerge.methods.registry import load, method

NAMES = (
    "linear",
    "task_arithmetic",
    "ties",
    "magnitude_prune",
    "dare_linear",
    "dare_ties",
    "della_linear",
    "della",
    "breadcrumbs",
    "breadcrumbs_ties",
    "slerp",
    "nuslerp",
    "multislerp",
    "karcher",
    "model_stock",
    "sce",
    "nearswap",
    "arcee_fusion",
    "ram",
    "ramplus_tl",
    "passthrough",
    "tsv",
    "iso_c",
)

CATALOGUE = load(__name__, NAMES)

__all__ = ["CATALOGUE", "NAMES", "WithOwn", "load", "method"]
