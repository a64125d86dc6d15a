"""Whether two folders' tokenizers name the same tokens by the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streammerge.storage.donated import contents, vocabulary_files
from streammerge.storage.smallfile import parse_json, read_small

_TABLE = "tokenizer.json"


def tokens_apart(ours: Path, theirs: Path) -> str | None:
    """How the tokens of the second folder differ from those of the first; None where they do not.

    Files that are alike tell it at once. Otherwise the tables of `tokenizer.json` are compared,
    whose other parts (truncation, padding) differ from fine-tune to fine-tune.
    """
    a, b = vocabulary_files(ours), vocabulary_files(theirs)
    if not b or contents(a) == contents(b):
        return None
    if not a:
        return "it holds a tokenizer, and the first model none"
    if _TABLE not in a or _TABLE not in b:
        return f"another {', '.join(sorted({*a} | {*b}))}"
    mine, other = _table(a[_TABLE]), _table(b[_TABLE])
    if mine is None or other is None:
        return f"another {_TABLE}"
    moved = [token for token, number in other.items() if mine.get(token) != number]
    moved += [token for token in mine if token not in other]
    if not moved:
        return None
    return f"{len(moved)} tokens differ, such as {moved[0]!r}"


def _table(path: Path) -> dict[str, int] | None:
    """Token -> its number; None where the file has another form."""
    document = parse_json(read_small(path), str(path))
    model: Any = document.get("model")
    added: Any = document.get("added_tokens")
    vocabulary: Any = model.get("vocab") if isinstance(model, dict) else None
    try:
        if isinstance(vocabulary, list):  # of pairs: token, score
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        return {**vocabulary, **{one["content"]: one["id"] for one in added}}
    except (KeyError, TypeError, ValueError):
        return None
