"""Whether tokenizers are the same, and `tokenizer_source: union` where they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import streammerge as sm
from streammerge.errors import ConfigError
from streammerge.storage.tokens import tokens_apart
from tests.makers import Tensor, write_model

TABLE: dict[str, Any] = {
    "truncation": None,
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}},
    "added_tokens": [{"id": 2, "content": "<s>", "special": True}],
}


def changed(**changes: Any) -> dict[str, Any]:
    return {**TABLE, **changes}


def holding(folder: Path, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (TABLE, None),
        (changed(truncation={"max_length": 8}), None),
        (changed(model={"vocab": [["a", -1.0], ["b", -2.0]]}), None),  # Unigram: place is number
        (changed(model={"vocab": {"a": 1, "b": 0}}), "2 tokens differ, such as 'a'"),
        (changed(model={"vocab": {"a": 0}}), "1 tokens differ, such as 'b'"),
        (changed(added_tokens=[{"id": 2, "content": "<t>"}]), "2 tokens differ, such as '<t>'"),
        (changed(model={"vocab": 3}), "another tokenizer.json"),
        (changed(model={"vocab": ["a", "b"]}), "another tokenizer.json"),
        (changed(model=None), "another tokenizer.json"),
        (changed(added_tokens=[{"id": 2}]), "another tokenizer.json"),
        (changed(added_tokens=[3]), "another tokenizer.json"),
        (changed(added_tokens=None), "another tokenizer.json"),
    ],
)
def test_tables_are_compared_token_by_token(
    tmp_path: Path, theirs: dict[str, Any], words: str | None
) -> None:
    ours = holding(tmp_path / "a", tokenizer__json=TABLE)
    assert tokens_apart(ours, holding(tmp_path / "b", tokenizer__json=theirs)) == words


def test_other_files_must_be_alike(tmp_path: Path) -> None:
    ours, none = holding(tmp_path / "a", vocab__txt="x\ny\n"), holding(tmp_path / "none")
    assert tokens_apart(ours, holding(tmp_path / "b", vocab__txt="x\ny\n")) is None
    assert tokens_apart(ours, holding(tmp_path / "c", vocab__txt="x\nz\n")) == "another vocab.txt"
    assert tokens_apart(ours, none) is None
    assert tokens_apart(none, ours) == "it holds a tokenizer, and the first model none"


def merged(folder: Path, *tables: Any, source: str = "union") -> Path:
    for index, table in enumerate(tables):
        values = np.full(4, index, np.float32).tobytes()
        stored: dict[str, Tensor] = {"embed_tokens.weight": ("F32", (4, 1), values)}
        place = write_model(folder / f"m{index}", stored, config={})
        holding(place, tokenizer__json=table)
    models = [{"model": f"./m{index}"} for index in range(len(tables))]
    recipe = {"merge_method": "linear", "models": models, "tokenizer_source": source}
    (folder / "cfg.yaml").write_text(yaml.safe_dump(recipe))
    sm.merge(folder / "cfg.yaml", out=folder / "out", memory="8GiB")
    return folder / "out"


def test_the_union_of_equal_tokenizers_is_the_donors(tmp_path: Path) -> None:
    out = merged(tmp_path, TABLE, changed(truncation={"max_length": 8}))
    assert json.loads((out / "tokenizer.json").read_text()) == TABLE


def test_the_union_of_others_is_refused(tmp_path: Path) -> None:
    other = changed(added_tokens=[{"id": 2, "content": "<t>"}])
    with pytest.raises(ConfigError) as caught:
        merged(tmp_path, TABLE, other)
    assert f"{tmp_path / 'm1'}: 2 tokens differ, such as '<t>'" in str(caught.value)
    assert "tokenizer_source: base" in str(caught.value)
    assert merged(tmp_path, TABLE, other, source="base").is_dir()
