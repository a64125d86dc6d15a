"""Which tensor of the base each tensor of an adapter means, where the names differ a little.

An adapter that was trained on the body of a model, under an older transformers, or on the text
half of a vision-language model carries names whose leading parts differ from the base's. One
change of leading parts, the same for all names, is tried, and taken only if every name then is
that of exactly one tensor: half an adapter is worse than none.
"""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Final

from streammerge.adapters.faults import NAMES_SHOWN, Fault, Findings
from streammerge.storage.smallfile import show


@dataclass(frozen=True, slots=True)
class Move:
    """A change of leading parts: the first prefix that fits is replaced, other names stay.

    `inner` are parts of names that are replaced wherever they stand, one after the other.
    """

    about: str
    prefixes: tuple[tuple[str, str], ...]
    inner: tuple[tuple[str, str], ...] = ()

    def apply(self, name: str) -> str:
        """The name after the move."""
        for old, new in self.inner:
            name = name.replace(old, new)
        for old, new in self.prefixes:
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name


# The head stands beside the body, so a prefix that the body gains or loses is not the head's.
_HEAD: Final = ("lm_head", "lm_head")
AS_THEY_ARE: Final = Move("as they are", ())
# transformers 5 calls the layers of vision models as it calls those of language models. Files keep
# the names that these models had before.
_VISION_ATTENTION: Final = (
    (".attention.q_proj", ".attention.attention.query"),
    (".attention.k_proj", ".attention.attention.key"),
    (".attention.v_proj", ".attention.attention.value"),
    (".attention.o_proj", ".attention.output.dense"),
)
MOVES: Final = (
    # transformers 4.52 drew the parts of vision-language models together under `model.`, for the
    # LLaVA family and for Qwen2-VL in different ways; files on disk mostly keep the older names.
    Move(
        "moved as transformers 4.52 did for the LLaVA family",
        (
            ("language_model.lm_head", "lm_head"),
            ("language_model.model.", "model.language_model."),
            ("", "model."),
        ),
    ),
    Move(
        "moved back to what the LLaVA family was before transformers 4.52",
        (
            ("lm_head", "language_model.lm_head"),
            ("model.language_model.", "language_model.model."),
            ("model.", ""),
        ),
    ),
    Move(
        "moved as transformers 4.52 did for Qwen2-VL",
        (("visual.", "model.visual."), ("model.", "model.language_model.")),
    ),
    Move(
        "moved back to what Qwen2-VL was before transformers 4.52",
        (("model.visual.", "visual."), ("model.language_model.", "model.")),
    ),
    # Qwen's omni models are stored whole, and trained without the half that speaks.
    Move(
        "moved as transformers 5 did for the thinker of Qwen's omni models",
        (
            ("thinker.model.", "model.language_model."),
            ("thinker.lm_head", "lm_head"),
            ("thinker.", "model."),
        ),
    ),
    Move(
        "moved back into the thinker of Qwen's omni models",
        (
            ("model.language_model.", "thinker.model."),
            ("lm_head", "thinker.lm_head"),
            ("model.visual.", "thinker.visual."),
            ("model.audio_tower.", "thinker.audio_tower."),
            ("", "thinker."),
        ),
    ),
    Move("with attention named as DINOv2's was before transformers 5", (), _VISION_ATTENTION),
    Move(
        "with layers named as ViT's were before transformers 5",
        (),
        (
            *_VISION_ATTENTION,
            (".mlp.fc1", ".intermediate.dense"),
            (".mlp.fc2", ".output.dense"),
            (".layers.", ".encoder.layer."),
        ),
    ),
    Move(
        "with blocks named as Swin's were before transformers 5",
        (),
        (
            (".attention.q_proj", ".attention.self.query"),
            (".attention.k_proj", ".attention.self.key"),
            (".attention.v_proj", ".attention.self.value"),
            (".attention.o_proj", ".attention.output.dense"),
            (".mlp.fc1", ".intermediate.dense"),
            (".mlp.fc2", ".output.dense"),
        ),
    ),
    # Nemotron-H's files call the body `backbone`, as Mamba's do.
    Move("with the body named `backbone`", (("model.", "backbone."),)),
    # GPT-NeoX's head lies in the file under its first name.
    Move("with the head named `embed_out`", (("lm_head", "embed_out"),)),
    Move("with the head named `lm_head`", (("embed_out", "lm_head"),)),
)

_AMBIGUOUS: Final = Fault(
    "names that fit two sets of tensors of the base",
    "names that fit one set of tensors",
    "rename the adapter's tensors so that they equal the base's",
)


def find_tensors(
    names: Sequence[str], base: Mapping[str, object], findings: Findings, named_base: str | None
) -> tuple[Mapping[str, str], Move]:
    """The base tensor of each name, and how it was found.

    Names of no tensor are missing from the mapping and go to `findings`, with the nearest ones.
    `named_base` is the base that the adapter's config names, for the remedy.
    """
    exact = _reach(AS_THEY_ARE, names, base)
    if len(exact) == len(names):
        return exact, AS_THEY_ARE
    tried = [(_reach(move, names, base), move) for move in moves(names, base)]
    moved = [one for one in tried if len(set(one[0].values())) == len(one[0])]  # none named twice
    complete = [one for one in moved if len(one[0]) == len(names)]
    for name in names:
        if len({found[name] for found, _ in complete}) > 1:
            for found, move in complete:
                findings.add(_AMBIGUOUS, f"{name} -> {found[name]} ({move.about})")
            break
    if complete:
        return complete[0]
    best = max([(exact, AS_THEY_ARE), *moved], key=lambda one: len(one[0]))
    _report_missing(names, best, base, findings, named_base)
    return best


def moves(names: Iterable[str], base: Iterable[str]) -> Iterator[Move]:
    """A leading part less, a leading part of the base's more, and what transformers moved."""
    for part in _leading_parts(names):
        yield Move(f"without `{part}`", ((part, ""),))
    for part in _leading_parts(base):
        yield Move(f"with `{part}` in front", (_HEAD, ("", part)))
    yield from MOVES


def _leading_parts(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.partition(".")[0] + "." for name in names if "." in name))


def _reach(move: Move, names: Sequence[str], base: Mapping[str, object]) -> dict[str, str]:
    renamed = ((name, move.apply(name)) for name in names)
    return {name: tensor for name, tensor in renamed if tensor in base}


def _report_missing(
    names: Sequence[str],
    best: tuple[Mapping[str, str], Move],
    base: Mapping[str, object],
    findings: Findings,
    named_base: str | None,
) -> None:
    found, move = best
    missing = [name for name in names if name not in found]
    trained_on = f"; it was trained on {show(named_base)}" if named_base else ""
    fault = Fault(
        f"names in the adapter that name no tensor of the base, out of {len(names)}",
        "names of tensors of the base, but for one prefix that all of them have or lack",
        f"check that the adapter belongs to this base{trained_on}",
    )
    for place, name in enumerate(missing):
        near = nearest(move.apply(name), base) if place < NAMES_SHOWN else []
        findings.add(fault, f"{name} (nearest: {', '.join(near) or 'none'})")


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """The names most like `name`: most equal parts at both ends first, then most alike as text."""
    parts = name.split(".")

    def equal_ends(candidate: str) -> int:
        other = candidate.split(".")
        return _equal(parts, other) + _equal(parts[::-1], other[::-1])

    # Comparing as text costs 0.1 ms a name, and a model of experts has 60,000 of them.
    close = heapq.nlargest(50, candidates, key=equal_ends)
    return difflib.get_close_matches(name, close, n=count, cutoff=0.0)


def _equal(one: Sequence[str], other: Sequence[str]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
