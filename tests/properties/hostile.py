"""Files as a hostile or a broken program writes them, of four kinds, and what must hold for each.

They are for the suite, which tries some, and for scripts/fuzz, which tries them for minutes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from streammerge.adapters.config import read_config
from streammerge.adapters.fields import EXTRAS, IGNORED
from streammerge.errors import Place, Problems
from streammerge.methods import CATALOGUE
from streammerge.recipe import parse_recipe
from streammerge.recipe.schema import RecipeShape
from tests.properties import test_header_fuzz, test_index_fuzz


@dataclass(frozen=True)
class Hostile:
    """A kind of file: what it may hold, and a check that may use a folder and fails by raising."""

    contents: st.SearchStrategy[bytes]
    check: Callable[[Path, bytes], None]


words = st.text("ab1e0.-+@:#!&*[]{}'\"%|> ~,=é\ud800\0\n", max_size=8)
numbers = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 2**63, 1e-9, 10**400])
values = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw: st.DrawFn, documents: st.SearchStrategy[Any]) -> bytes:
    """A document as JSON, which YAML takes too, with up to three places spoiled."""
    raw = bytearray(json.dumps(draw(documents)).encode("utf-8", "surrogatepass"))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(raw)))
        raw[at : at + draw(st.integers(0, 3))] = draw(
            st.sampled_from(
                [b"", b"{", b"[", b'"', b"- ", b"&a", b"*a", b"!!", b": ", b"\n", b"\t"]
            )
            | st.binary(max_size=2)
        )
    return bytes(raw)


# ------------------------------------------------------------------------------------- recipes

_KNOBS = ["weight", "density", "t", "lambda", "normalize", "gamma", "epsilon", "x"]
_ALWAYS = ("merge_method", "base_model")
knobs = st.dictionaries(st.sampled_from(_KNOBS), values | st.just(0.5), max_size=3)
references = st.sampled_from(["./a", "./b", "a@r+b@s", "org/name"]) | words | values
entries = st.fixed_dictionaries(
    {}, optional={"model": references, "path": references, "name": words, "parameters": knobs}
)
recipes = st.fixed_dictionaries(
    {"merge_method": st.sampled_from(sorted(CATALOGUE)) | values, "base_model": references},
    optional={
        **{name: values for name in RecipeShape.model_fields if name not in _ALWAYS},
        "models": st.lists(entries, max_size=3) | values,
        "adapters": st.lists(entries, max_size=3) | values,
        "parameters": knobs | values,
        "slices": values,
        "merge": values,
    },
)


def check_recipe(folder: Path, raw: bytes) -> None:
    """Read, or refused with a place and a remedy."""
    problems = Problems()
    text = raw.decode("utf-8", "replace")
    found = parse_recipe(text, "cfg.yaml", folder, CATALOGUE, problems)
    assert found is not None or len(problems) > 0
    for problem in problems:
        assert isinstance(problem.where, Place) and problem.remedy
        str(problem).encode("utf-8", "backslashreplace")


# ----------------------------------------------------------------------------- adapter configs

_FIELDS = [
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "bias", "use_rslora", "use_dora",
    "lora_bias", "fan_in_fan_out", "trainable_token_indices", "base_model_name_or_path",
    "peft_version", "init_r", "target_r", "init_lora_weights", "modules_to_save",
    "target_modules", "new", *(extra.field for extra in EXTRAS), *sorted(IGNORED),
]  # fmt: skip
configs = st.builds(
    lambda kind, fields: {"peft_type": kind, **fields},
    st.sampled_from(["LORA", "ADALORA", "LORA", "XLORA", None]) | values,
    st.dictionaries(st.sampled_from(_FIELDS), values | st.integers(1, 64), max_size=5),
)


def check_config(folder: Path, raw: bytes) -> None:
    """Read, with a scale that is a number, or refused with its file and a remedy."""
    path, problems = folder / "adapter_config.json", Problems()
    path.write_bytes(raw)
    config = read_config(path, problems)
    assert (config is None) == (len(problems) > 0)
    for problem in problems:
        assert str(path) in str(problem) and problem.remedy
        str(problem).encode("utf-8", "backslashreplace")
    if config is not None:
        assert math.isfinite(config.scale("model.q_proj"))


# ------------------------------------------------------------------------- headers and indices


def check_header(folder: Path, raw: bytes) -> None:
    """A sound table of tensors, or refused with its file and a remedy."""
    if header := test_header_fuzz.opened(folder / "x.safetensors", raw):
        test_header_fuzz.check_sound(header, raw)


def check_index(folder: Path, raw: bytes) -> None:
    """Followed, or refused with its place."""
    test_index_fuzz.opens(folder / "model", raw)


HOSTILE = {
    "header": Hostile(test_header_fuzz.mutated() | test_header_fuzz.rewritten(), check_header),
    "index": Hostile(damaged(test_index_fuzz.indices), check_index),
    "recipe": Hostile(damaged(recipes), check_recipe),
    "adapter": Hostile(damaged(configs), check_config),
}
