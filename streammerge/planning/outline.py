"""Which tensors the output has, and what goes with them, where these are not the donor's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Outline:
    """The output's tensors against those that the donor stores, and what its config must say."""

    added: tuple[str, ...] = ()  # a head that is no longer the embedding, and was not stored
    left_out: frozenset[str] = frozenset()  # a head that still is, and was stored nevertheless
    untied: bool = False
    rows: Mapping[str, int] = field(default_factory=dict)  # of tensors with a larger vocabulary
    vocabulary: int | None = None  # its size, where it is not the donor's
    tokenizer: Path | None = None  # the folder that holds the tokenizer, where the donor's does not
    notes: tuple[str, ...] = ()

    def keeps(self, name: str) -> bool:
        """Whether a tensor that the donor stores is one of the output's."""
        return name not in self.left_out
