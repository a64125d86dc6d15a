"""What sets a fine-tune apart from its base, as an adapter: a merge of one model into factors."""

from __future__ import annotations

import os

from streammerge.errors import ConfigError, Problems
from streammerge.methods import CATALOGUE
from streammerge.recipe import Recipe, extraction


def recipe_of(
    tuned: str,
    *,
    base: str,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    embeddings: bool = False,
    norms: bool = False,
    out_dtype: str | None = None,
    seed: int | None = None,
) -> Recipe:
    """The recipe whose merge is the adapter; `embeddings` and `norms` are saved whole, or left out.

    Each matrix gets the rank, or the least one that keeps a share `energy` of the difference's
    squared norm and misses no more than `error` of its norm; `rank` is then the most.

    Raises StreammergeError.
    """
    if os.path.realpath(tuned) == os.path.realpath(base):
        raise ConfigError(
            "the fine-tune is its own base",
            found=f"{tuned} as both",
            remedy="name the model that was trained, and with --base the one that it came from",
        )
    problems = Problems()
    asked = {"embeddings": embeddings, "norms": norms}
    recipe = extraction(
        tuned=tuned,
        base=base,
        ranks={"rank": rank, "energy": energy, "error": error},
        saved=[kind for kind, wanted in asked.items() if wanted],
        methods=CATALOGUE,
        problems=problems,
        out_dtype=out_dtype,
        seed=seed,
    )
    problems.raise_any()
    assert recipe is not None  # else there was a problem
    return recipe
