"""How keys and values of a recipe are shown to people."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, TypeAlias

KeyPath: TypeAlias = tuple[str | int, ...]

_MOST_SHOWN = 60


def dotted(path: KeyPath) -> str:
    """`adapters[0].density` for `("adapters", 0, "density")`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".") or "the recipe"


def shown(value: Any, spelled: str) -> str:
    """A value as it was written, and what kind of value it was read as."""
    match value:
        case None:
            return "nothing"
        case bool():
            return f"{spelled} (true or false)"
        case int() | float():
            return f"{short(spelled)} (a number)"
        case str():
            return f"{quoted(value)} (text)"
        case list():
            return "a list"
    return "a mapping"


def quoted(text: str) -> str:
    """Text in quotes; what a terminal must not be sent is escaped."""
    return repr(short(text))


def short(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 3] + "..."


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that a mistyped word most likely stands for, if one is near."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return near[0] if near else None
