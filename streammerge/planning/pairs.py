"""Merges of low-rank updates as pairs of factors: which can be, and how they are put together."""

from __future__ import annotations

from math import fsum

from streammerge.declarations import Knobs
from streammerge.planning.parts import Parts
from streammerge.recipe import Recipe
from streammerge.sources.combined import Combined
from streammerge.sources.core import low_rank
from streammerge.sources.in_core import (
    Combine,
    Compressed,
    InCore,
    Isotropized,
    Turned,
    Weighted,
)
from streammerge.sources.pairs import Mixed, Pair, Stacked
from streammerge.storage.bytesource import Files
from streammerge.words import DType

# Weights whose sum is within this of one leave the base as it is.
_WHOLE = 1e-9


class Pairs:
    """Makes the pair of one tensor at a time."""

    def __init__(self, recipe: Recipe, files: Files) -> None:
        self._method = recipe.method
        self._core = recipe.space != "full" or recipe.method.space == "cores"
        self._on_deltas = recipe.method.on_deltas(has_base=recipe.base is not None)
        self._isotropize = recipe.isotropize
        self._by_strength = recipe.missed_share is not None
        self._compress_to = recipe.rank if recipe.space == "compressed" else None
        self._files = files

    def in_core(self, tensor: str, parts: Parts) -> Pair | None:
        """The merge in core space; None where it must be in full space, or is the same there."""
        updates = low_rank(parts.base, parts.models) if self._core else None
        combine = self._combine(tensor, parts) if updates else None
        if updates is None or combine is None or isinstance(combine, str | Weighted):
            return None
        return Mixed(self._files, updates, combine)

    def of_rank(self, tensor: str, parts: Parts, rank: int, dtype: DType, *, turned: bool) -> Pair:
        """The merged update of a tensor, or of its transpose, as factors of so much rank.

        A weighted sum that fits in float32 stays as it is, factor beside factor, unless those that
        matter least are to be left out.
        """
        updates, combine = low_rank(parts.base, parts.models), self._combine(tensor, parts)
        if updates is None or isinstance(combine, str):
            raise TypeError(f"{tensor} has no update of low rank, which the plan should have said")
        updates = updates.turned() if turned else updates
        exact = rank == updates.rank and dtype is DType.F32 and not self._by_strength
        if isinstance(combine, Weighted) and exact:
            return Stacked(self._files, updates, combine.factors)
        combine = Turned(combine) if turned else combine
        return Mixed(self._files, updates, combine, rank=rank, dtype=dtype)

    def why_none(self, tensor: str, parts: Parts) -> str | None:
        """Why the merge of a tensor's low-rank updates is none itself; None where it is."""
        combine = self._combine(tensor, parts)
        return combine if isinstance(combine, str) else None

    def why_no_update(self, parts: Parts) -> str | None:
        """Why a merge is not the base and an update, of whatever rank; None where it is."""
        statistics = self._method.statistics.values()
        reads_base = any(one.reads_base(parts.knobs) for one in statistics)
        if self._on_deltas and not reads_base and not self._method.wants_base:
            return None
        return f"{self._method.name} merges the base's own values, too"

    def _combine(self, tensor: str, parts: Parts) -> Combine | str:
        """How the core matrices become one, or why they cannot."""
        found: Combine | str | None = self._weighted(parts)
        if found is None:
            why = self.why_no_update(parts) or self._why_dense(parts.knobs)
            found = why or InCore(self._files, self._method, parts.knobs, tensor)
        if isinstance(found, str):
            return found
        found = Isotropized(found) if self._isotropize else found
        if self._compress_to is None:
            return found
        return Compressed(found, self._compress_to, len(parts.models))

    def _weighted(self, parts: Parts) -> Weighted | str | None:
        """A weighted sum whose factors are known, where the method gives one."""
        if self._method.returns != "coefficients":
            return None
        combined = Combined(self._files, self._method, parts.knobs, parts.base, parts.models)
        factors = parts.known_factors(combined)
        if factors is None:
            return None
        total = fsum(factors)
        if not self._on_deltas and abs(total - 1) > _WHOLE:
            return f"its weights sum to {total:g}, which scales the base: task_arithmetic adds"
        return Weighted(factors)

    def _why_dense(self, knobs: Knobs) -> str | None:
        method, statistics = self._method, self._method.statistics.values()
        same = method.returns == "coefficients" and all(
            one.by_products(knobs) for one in statistics
        )
        if same or self._core:
            return None
        return f"{method.name} in full space gives updates of full rank: add `space: core`"
