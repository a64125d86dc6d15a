"""Which tensors the output has, where these are not the donor's."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outline:
    """The output's tensors against those that the donor stores, and what its config must say."""

    added: tuple[str, ...] = ()  # a head that is no longer the embedding, and was not stored
    left_out: frozenset[str] = frozenset()  # a head that still is, and was stored nevertheless
    untied: bool = False
    notes: tuple[str, ...] = ()

    def keeps(self, name: str) -> bool:
        """Whether a tensor that the donor stores is one of the output's."""
        return name not in self.left_out
