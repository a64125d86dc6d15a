"""Whether a merge can be written as an adapter, and how each of its tensors would be."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streammerge.errors import ConfigError, Problems
from streammerge.planning.inputs import Inputs
from streammerge.planning.pairs import Pairs
from streammerge.planning.parts import Assembly
from streammerge.planning.spaces import Split, count, some
from streammerge.recipe import Recipe
from streammerge.words import TensorSpec

# What models call the two matrices whose rows are tokens.
_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|embed_in|embed_out|wte|wpe|\w*embeddings?|lm_head)\.weight$"
)


@dataclass(frozen=True, slots=True)
class Fit:
    """The tensors of the adapter by how they are made; and those that it cannot hold."""

    paired: tuple[str, ...]  # from low-rank updates, exactly
    sketched: tuple[str, ...]  # the nearest of a rank to a dense update
    whole: tuple[str, ...]
    left_out: tuple[str, ...]

    def warnings(self) -> list[str]:
        if not self.left_out:
            return []
        names = some(self.left_out)
        return [f"left out of the adapter: {count(self.left_out)} that may have changed: {names}"]


class Fitting:
    """Sorts the tensors of one merge; what cannot be is a problem."""

    def __init__(
        self, recipe: Recipe, inputs: Inputs, assembly: Assembly, pairs: Pairs, problems: Problems
    ) -> None:
        self._recipe = recipe
        self._inputs = inputs
        self._assembly = assembly
        self._pairs = pairs
        self._problems = problems

    def fit(self, found: Split) -> Fit | None:
        """None when there are problems."""
        before = len(self._problems)
        if self._recipe.base is None:
            self._refuse("an adapter as output needs a base to be an adapter of", "no base_model")
            return None
        dense: dict[str, list[str]] = {reason: [*names] for reason, names in found.dense.items()}
        paired = []
        for name in found.low_rank:
            why = self._pairs.why_none(name, self._assembly.parts(name))
            if why is None:
                paired.append(name)
            else:
                dense.setdefault(why, []).append(name)
        made = self._dense(tuple(paired), found, dense)
        if not (made.paired or made.sketched):
            self._refuse("the merge is no adapter", "no matrix that is updated")
        return made if len(self._problems) == before else None

    def _dense(
        self, paired: tuple[str, ...], found: Split, dense: Mapping[str, Sequence[str]]
    ) -> Fit:
        """Matrices get a rank; of the others, what is asked for is saved whole."""
        sketched: list[str] = []
        kinds: dict[str, list[str]] = {"embeddings": [], "norms": [], "others": []}
        for reason, names in dense.items():
            matrices = [name for name in names if self._kind(name) == "matrices"]
            self._check_sketch(reason, matrices)
            sketched += matrices
            for name in names:
                if (kind := self._kind(name)) != "matrices":
                    kinds[kind].append(name)
        saved = self._recipe.saved
        asked = [name for kind in saved or () for name in kinds[kind]]
        rest = [name for names in kinds.values() for name in names if name not in asked]
        if rest and saved is None:
            self._refuse(
                "the merge changes tensors that no low-rank matrix can stand for",
                some(rest),
                "say under `output` which are saved whole, `save: [embeddings, norms]`, and that "
                "the rest is left out; or none, `save: []`",
            )
        replaced = [name for names in found.replaced.values() for name in names]
        return Fit(paired, tuple(sketched), (*replaced, *asked), tuple(rest))

    def _kind(self, name: str) -> str:
        spec = self._inputs.donor.tensors[name].spec
        if _EMBEDDING.search(name):
            return "embeddings"
        if _is_matrix(spec):
            return "matrices"
        return "norms" if len(spec.shape) == 1 and name.endswith("norm.weight") else "others"

    def _check_sketch(self, reason: str, names: Sequence[str]) -> None:
        """Whether dense updates of some matrices can be approximated."""
        if not names:
            return
        why = self._pairs.why_no_update(self._assembly.parts(names[0]))
        if why is not None:
            found = reason if reason == why else f"{reason}; {why}"
            self._refuse("the merge cannot be written as an adapter", f"{some(names)}: {found}")
        elif self._recipe.rank is None and self._recipe.missed_share is None:
            self._refuse(
                "an adapter of updates of full rank needs a rank",
                f"{some(names)}: {reason}",
                "say under `output` how much they get, such as `rank: 32`, or what they may miss, "
                "such as `error: 0.1`",
            )

    def _refuse(
        self, what: str, found: str, remedy: str = "write `kind: model`, or choose another method"
    ) -> None:
        self._problems.add(ConfigError(what, found=found, remedy=remedy))


def _is_matrix(spec: TensorSpec) -> bool:
    """Of a linear layer, or the kernel of a convolution."""
    return len(spec.shape) in (2, 4, 5) and min(spec.rows, spec.cols) > 1
