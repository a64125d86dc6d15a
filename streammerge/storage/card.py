"""The model card of an output: a README.md with the metadata that the Hugging Face hub reads.

Metadata: https://huggingface.co/docs/hub/model-cards. Nothing in it tells when, where or by whom
the merge was made: the same recipe gives the same bytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from streammerge.storage.references import is_hub_id
from streammerge.storage.smallfile import open_regular

_README_HEAD_BYTES = 64 << 10
_FRONT_MATTER = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
# A whole YAML parser is not let loose on a stranger's text: licences are plain identifiers.
_LICENSE = re.compile(r"^license:[ \t]*([\"']?)([\w.+-]+)\1[ \t]*(?:#.*)?\r?$", re.MULTILINE)

_BODY = """\
# {title}

A merge of {names}, made by streammerge {version} with the method {method}.

## How it was made

{fence}yaml
{recipe}
{fence}

{changed}## How to load it

{loading}
A model of another kind loads by the class for its task, such as `AutoModelForImageTextToText`.
"""

_LOADING = {
    "model": """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file is, or the id of this repository
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(folder)
```
""",
    "adapter": """\
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("...", dtype="auto")  # the base model named above
model = PeftModel.from_pretrained(base, ".")  # where this file is, or the id of this repository
```
""",
}
_LIBRARY = {"model": "transformers", "adapter": "peft"}


def model_card(
    *,
    base: str,
    models: Sequence[str],
    method: str,
    recipe_yaml: str,
    library_version: str,
    changed: Sequence[str],
    license: str | None,
    kind: Literal["model", "adapter"] = "model",
) -> str:
    """The README.md of an output.

    `base` and `models` are display names, `recipe_yaml` is the recipe with such names in place of
    paths: what is handed in appears as it is. `changed` is a line for each model, such as
    "math: 224 of 224 tensors applied"; `license` the base's, None when it is not known.
    """
    names = list(dict.fromkeys([base, *models]))
    body = _BODY.format(
        title=f"Merge into {_line(base)}",
        names=", ".join(map(_code, names)),
        version=library_version,
        method=_code(method),
        fence="`" * max(3, _longest_ticks(recipe_yaml) + 1),
        recipe=recipe_yaml.rstrip("\n"),
        changed="".join(f"- {_line(line)}\n" for line in changed) + "\n" if changed else "",
        loading=_LOADING[kind],
    )
    return f"---\n{_front_matter(names, license, _LIBRARY[kind])}---\n\n{body}"


def license_of(folder: Path) -> str | None:
    """The licence that the front matter of a model's README.md states, None when it states none."""
    readme = os.path.join(folder, "README.md")
    if not os.path.isfile(readme):
        return None
    with open_regular(readme) as (descriptor, _):
        head = os.pread(descriptor, _README_HEAD_BYTES, 0).decode("utf-8", "replace")
    front = _FRONT_MATTER.match(head)
    stated = _LICENSE.search(front[1]) if front else None
    return stated[2] if stated else None


def _front_matter(names: Sequence[str], license: str | None, library: str) -> str:
    # The hub refuses a card whose base_model could not be an id; such names stand in the text.
    bases = [name for name in names if is_hub_id(name)]
    front: dict[str, Any] = {"license": license} if license else {}
    if bases:
        front |= {"base_model": bases, "base_model_relation": "merge"}
    front |= {"library_name": library, "tags": ["merge", "streammerge"]}
    return str(yaml.safe_dump(front, sort_keys=False, allow_unicode=True))


def _line(text: str) -> str:
    return " ".join(text.split())


def _code(text: str) -> str:
    """A Markdown code span, whatever backticks the text holds."""
    ticks = "`" * (_longest_ticks(text) + 1)
    pad = " " if "`" in text else ""
    return f"{ticks}{pad}{_line(text)}{pad}{ticks}"


def _longest_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
