"""The names of tied weights, held to those of every class of transformers."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from streammerge.storage.ties import find_tie

# GPT-NeoX's head has its old name in files: transformers renames it when it loads them.
RENAMED = {"GPTNeoXForCausalLM": {"embed_out.weight": "gpt_neox.embed_in.weight"}}
_CLASS = re.compile(r"^class (\w+)|^    _tied_weights_keys = (\{[^}]*\})", re.MULTILINE)


def classes() -> Iterator[tuple[str, dict[str, str]]]:
    """Class name and its `_tied_weights_keys`, from the source; patterns are left out."""
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    for path in sorted(Path(spec.origin).parent.glob("models/*/modeling_*.py")):
        name = ""
        for found in _CLASS.finditer(path.read_text()):
            name = found[1] or name
            tied = ast.literal_eval(found[2]) if found[2] and "rf" not in found[2] else {}
            if tied and not any(mark in key for key in tied for mark in "*(?["):
                yield name, tied


def test_a_head_is_untied_under_its_own_name_or_not_at_all() -> None:
    """Under a wrong one transformers would leave it out and fill the right one at random."""
    known = 0
    for name, tied in classes():
        config = {"architectures": [name], "tie_word_embeddings": True}
        tie = find_tie({*tied.values(), "layers.0.weight"}, config)
        if tie is not None:
            assert dict(tie.reads) == RENAMED.get(name, tied), name
            known += 1
    assert known > 200, "hardly any class was found: does the pattern still fit the source?"
